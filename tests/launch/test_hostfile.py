from __future__ import annotations

import socket
from pathlib import Path

import pytest

from triweave.launch.errors import HostfileError
from triweave.launch.hostfile import Host, is_this_machine, parse_hostfile, take_ranks

TWO = (Host(name="a", slots=2), Host(name="b", slots=3))


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "hosts"
    path.write_text(text, encoding="utf-8")
    return path


def test_reads_machines_in_order_without_comments(tmp_path: Path) -> None:
    text = "# cluster\n\nworker-1 slots=8\n  worker-0\tslots=4  # the old one\n10.0.0.7 slots=1\n"
    assert parse_hostfile(write(tmp_path, text)) == (
        Host(name="worker-1", slots=8),
        Host(name="worker-0", slots=4),
        Host(name="10.0.0.7", slots=1),
    )


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("a slots=1\nb 4\n", 2, "slots=N"),
        ("a slots=two\n", 1, "slots=N"),
        ("a slots=1\n\na slots=2\n", 3, "twice"),
        ("a slots=0\n", 1, "at least 1"),
        ("-oProxyCommand=evil slots=1\n", 1, "host name"),
        ("a,b slots=1\n", 1, "host name"),
    ],
)
def test_names_the_line_that_is_wrong(tmp_path: Path, text: str, line: int, says: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(HostfileError) as raised:
        parse_hostfile(path)
    assert str(raised.value).startswith(f"{path}:{line}: ")
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_missing_or_empty_file_is_an_error(tmp_path: Path) -> None:
    """DeepSpeed itself would go on with this machine alone."""
    with pytest.raises(HostfileError, match="No such file"):
        parse_hostfile(tmp_path / "nowhere")
    with pytest.raises(HostfileError, match="names no machine"):
        parse_hostfile(write(tmp_path, "# nobody\n"))


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [(5, TWO), (2, TWO[:1]), (1, (Host(name="a", slots=1),)), (3, (TWO[0], Host(name="b", slots=1)))],
)
def test_ranks_fill_the_machines_in_order(ranks: int, expected: tuple[Host, ...]) -> None:
    assert take_ranks(TWO, ranks) == expected


def test_knows_its_own_names() -> None:
    assert is_this_machine("localhost")
    assert is_this_machine(socket.gethostname())
    assert not is_this_machine("worker-0.example")
