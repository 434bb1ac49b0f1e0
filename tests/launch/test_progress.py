"""The progress of long commands where stderr is a log: lines with rate and time left, no bar, nothing on stdout."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from triweave.launch import progress
from triweave.launch.progress import sample_progress, work_progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that the test moves."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_a_log_gets_a_line_every_half_minute(clock: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    with work_progress("building", "rows") as show:
        show(1000, 10_000)  # of an earlier run: no part of the rate
        for second in range(1, 71):
            clock.now += 1
            show(1000 + 50 * second, 10_000, "2 shards")
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == [
        "building: 2,500 of 10,000 rows (25%), 50 rows/s, 2 shards, about 2 min left",
        "building: 4,000 of 10,000 rows (40%), 50 rows/s, 2 shards, about 2 min left",
    ]


def test_what_is_not_counted_has_a_share(clock: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    with work_progress("verifying shards") as show:
        show(1, 1000)
        clock.now += 3600
        show(201, 1000)
    assert capsys.readouterr().err == "verifying shards: 20%, about 4 h 0 min left\n"


def test_short_work_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with sample_progress("counting tokens", 512) as advance:
        for _ in range(512):
            advance(1)
    assert capsys.readouterr() == ("", "")


def test_samples_are_counted_from_the_start(clock: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    with sample_progress("counting tokens", 1024) as advance:
        clock.now += 40
        advance(256)
    assert capsys.readouterr().err == "counting tokens: 256 of 1,024 samples (25%), 6 samples/s, about 2 min left\n"
