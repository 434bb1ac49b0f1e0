"""The process handling of `triweave launch`, with small shell programs in the launcher's place."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import time

import pytest

from triweave.launch import processes
from triweave.launch.deepspeed_launcher import LaunchCommand
from triweave.launch.processes import Outcome, OutputFilter, group_members, run_to_end


def run_shell(script: str) -> tuple[Outcome, str, str]:
    """Return the outcome, what was shown and what was logged."""
    shown: list[bytes] = []
    log = io.BytesIO()
    outcome = run_to_end(LaunchCommand(arguments=("bash", "-c", script), ranks=1), log=log, show=shown.append)
    return outcome, b"".join(shown).decode(), log.getvalue().decode()


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("exit 0", 0),
        ("exit 3", 3),
        ("kill -9 $$", 137),
        (f"{sys.executable} -c 'import sys; sys.exit(-9)'", 137),  # DeepSpeed's way to report a killed rank
    ],
)
def test_exit_codes_are_those_of_a_shell(script: str, code: int) -> None:
    assert run_shell(script)[0] == Outcome(exit_code=code)


def test_output_is_shown_and_logged() -> None:
    _, shown, logged = run_shell("echo one; echo two >&2; printf three")
    assert logged == "one\ntwo\nthree"
    assert shown.rstrip() == logged


def test_a_user_error_of_every_rank_is_shown_once_and_the_launchers_lines_not_at_all() -> None:
    error = "triweave train: model.layer: unknown key; did you mean model.layers?"
    lines = [error, "[2026-01-01 00:00:00,000] [ERROR] [launch.py:341:sigkill_handler] ['x'] exits", f"b: {error}"]
    outcome, shown, logged = run_shell("\n".join(f'echo "{line}"' for line in lines) + "\nexit 2")
    assert outcome.exit_code == 2
    assert shown == error + "\n"
    assert logged.splitlines() == lines


def test_an_unfinished_line_shows_unless_it_could_become_hidden() -> None:
    shown: list[bytes] = []
    lines = OutputFilter(shown.append)
    lines.feed(b"step 1")
    lines.flush()
    lines.feed(b" done\n[2026] [INFO] [runner")
    lines.flush()
    lines.feed(b".py:12:main] hidden\nlast")
    lines.close()
    assert b"".join(shown) == b"step 1 done\nlast\n"


def test_a_launcher_that_dies_before_its_ranks_is_a_failure() -> None:
    """DeepSpeed's runner exits with 0 when the process between it and the ranks is killed."""
    processes_before = processes.LINGER_S
    try:
        processes.LINGER_S = 0.3
        outcome, _, _ = run_shell("sleep 60 >/dev/null 2>&1 & exit 0")
    finally:
        processes.LINGER_S = processes_before
    assert outcome.exit_code == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_all_ranks(number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child of a child, deaf to the first signal, is gone when run_to_end returns; handlers are put back."""
    monkeypatch.setattr(processes, "GRACE_S", 0.5)
    groups: list[int] = []

    def stop() -> None:
        while not groups:
            groups.extend(int(line) for line in log.getvalue().decode().split())
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    log = io.BytesIO()
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    thread = threading.Thread(target=stop)
    thread.start()
    script = "(trap '' TERM INT; sleep 60 & wait; sleep 60) & echo $$; sleep 60"
    outcome = run_to_end(LaunchCommand(arguments=("bash", "-c", script), ranks=1), log=log, show=lambda _: None)
    thread.join()
    assert outcome.stopped_by == number
    assert group_members(groups[0]) == []
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
