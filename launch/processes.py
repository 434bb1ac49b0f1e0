"""Run a launcher to its end: show what it prints, pass signals on, leave nothing behind.

The launcher gets a session of its own, so a Ctrl-C in the terminal reaches this process alone, which then stops the
ranks in order: terminate, wait, kill what is left. DeepSpeed's own way is not used: its runner dies of SIGTERM without
telling its children, and over pdsh it runs `pkill -f` for every DeepSpeed job of that interpreter on every host.
"""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

from triweave.launch.deepspeed_launcher import LaunchCommand

GRACE_S = 30.0
"""Seconds between asking ranks to end and killing them."""
LINGER_S = 5.0
"""Seconds that processes may live on after the launcher ended by itself."""
POLL_S = 0.1
"""Seconds without output after which an unfinished line (a progress display) is shown."""

LAUNCHER_NOISE = re.compile(rb"\[[^\]]*\] \[\w+\] \[(launch|(multinode_)?runner)\.py:\d+:")
USER_ERROR = re.compile(rb"(?:\S+: )?(triweave(?: \w+)?: .*)")
"""A rank's one-line error, behind the `HOST: ` that pdsh writes."""
INTERACTIVE = {"TTY_COMPATIBLE": "1", "TTY_INTERACTIVE": "1"}
"""Tell rich in the ranks that what reads their pipe ends at a terminal."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a launch ended.

    exit_code: 0, the code of the rank that failed, or 128 + the signal that ended it.
    stopped_by: the signal that this process was sent meanwhile, or None.
    cut_short: whether it was killed because `run_to_end` was told to end it.
    """

    exit_code: int
    stopped_by: signal.Signals | None = None
    cut_short: bool = False


class OutputFilter:
    """Pass lines on to `show`, without the launcher's own log lines and without repetitions of a user error.

    Every rank meets the same user error; it is shown once.
    """

    def __init__(self, show: Callable[[bytes], object]) -> None:
        self._show = show
        self._pending = b""
        self._errors: set[bytes] = set()

    def feed(self, data: bytes) -> None:
        """Take more output; complete lines are shown at once."""
        *lines, self._pending = (self._pending + data).split(b"\n")
        for line in lines:
            if not self._hidden(line):
                self._show(line + b"\n")

    def flush(self) -> None:
        """Show an unfinished line unless it may become one that is hidden."""
        if self._pending and not self._pending.startswith((b"[", b"triweave")):
            self._show(self._pending)
            self._pending = b""

    def close(self) -> None:
        """Show what is left."""
        if self._pending:
            self.feed(b"\n")

    def _hidden(self, line: bytes) -> bool:
        error = USER_ERROR.fullmatch(line.rstrip())
        if error is None:
            return LAUNCHER_NOISE.search(line) is not None
        repeated = error[1] in self._errors
        self._errors.add(error[1])
        return repeated


def run_to_end(
    command: LaunchCommand,
    *,
    log: IO[bytes],
    show: Callable[[bytes], object] | None = None,
    started: Callable[[int], object] | None = None,
    ended: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Start the launcher, wait for it and return how it ended.

    log: gets every byte the ranks print.
    show: gets what a person should see; standard error by default.
    started: gets the process group of the launch as soon as it runs.
    ended: asked several times a second; where it returns True the launch is killed.

    SIGINT and SIGTERM to this process end the ranks on all machines; when this returns, no process of the launch is
    left here. Signal handlers are put back.
    """
    environment = {**os.environ, **command.environment}
    # DeepSpeed compiles on first use and looks for ninja on PATH; it lies beside an interpreter that nobody activated
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    if "OMP_NUM_THREADS" in os.environ:
        environment["OMP_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"]
    if show is None:
        show = _to_standard_error
        if sys.stderr.isatty():
            environment |= INTERACTIVE | {"COLUMNS": str(os.get_terminal_size(sys.stderr.fileno()).columns)}
    received: list[signal.Signals] = []
    cut_short = False
    with (
        _noted_signals(received),
        subprocess.Popen(
            command.arguments,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as process,
    ):
        try:
            if started is not None:
                started(process.pid)
            cut_short = _pump(process, received, log, OutputFilter(show), ended)
            abandoned = not received and not cut_short and _outlived_by_ranks(process.pid)
        finally:
            _stop(process, command, grace_s=0.0 if cut_short else GRACE_S)
        # a launcher that is killed lets the DeepSpeed runner exit with 0 while ranks still work
        exit_code = 1 if abandoned and process.returncode == 0 else _shell_code(process.returncode)
        return Outcome(exit_code=exit_code, stopped_by=received[0] if received else None, cut_short=cut_short)


def group_members(group: int) -> list[int]:
    """Return the ids of the living processes of a process group (zombies are not living)."""
    members = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                state, _, process_group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
                if int(process_group) == group and state != "Z":
                    members.append(int(entry.name))
    return members


@contextlib.contextmanager
def _noted_signals(received: list[signal.Signals]) -> Iterator[None]:
    """Append SIGINT and SIGTERM to `received` instead of acting on them."""

    def note(number: int, _frame: FrameType | None) -> None:
        received.append(signal.Signals(number))

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _pump(
    process: subprocess.Popen[bytes],
    received: list[signal.Signals],
    log: IO[bytes],
    lines: OutputFilter,
    ended_by_watch: Callable[[], bool],
) -> bool:
    """Copy the output until the launcher has ended, a signal came, or the watch ends it; return whether it did."""
    assert process.stdout is not None
    cut_short = False
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while not received:
            if ended_by_watch():
                cut_short = True
                break
            ended = process.poll() is not None
            if not selector.select(POLL_S):
                lines.flush()
                if ended:
                    break
                continue
            data = os.read(process.stdout.fileno(), 1 << 16)
            if not data:
                break
            log.write(data)
            log.flush()
            lines.feed(data)
    lines.close()
    if not received and not cut_short:
        process.wait()
    return cut_short


def _outlived_by_ranks(group: int) -> bool:
    """Tell whether processes of the group still live some seconds after the launcher; workers need a moment to end."""
    return not _wait_for_group(group, LINGER_S)


def _wait_for_group(group: int, seconds: float) -> bool:
    """Wait until no process of the group lives; return whether that came true."""
    deadline = time.monotonic() + seconds
    while group_members(group):
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True


def _stop(process: subprocess.Popen[bytes], command: LaunchCommand, *, grace_s: float) -> None:
    """End what is left of the launch, here and on the other machines; grace_s: for ranks that can still end well."""
    group = process.pid
    if process.poll() is None and command.remote_hosts:
        _stop_remote(command)  # the local pdsh ends with them; SIGTERM would wake DeepSpeed's broad pkill
    else:
        _signal_group(group, signal.SIGTERM)
    _wait_for_group(group, grace_s)
    _signal_group(group, signal.SIGKILL)
    process.wait()
    _wait_for_group(group, LINGER_S)  # the kernel takes a moment to remove what was killed


def _stop_remote(command: LaunchCommand) -> None:
    """Terminate this job's launcher on each machine, found by the port that only it has; each ends its ranks."""
    port = command.arguments[command.arguments.index("--master_port") + 1]
    # from the start of the line: the shells and ssh clients that carry the same words must live on, they tell the end
    pattern = rf"^[^ ]*python[^ ]* -u -m deepspeed.launcher.launch .*--master_port={port} "
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        subprocess.run(
            ["pdsh", "-w", ",".join(command.remote_hosts), f"pkill -TERM -f '{pattern}'"],
            env={**os.environ, **command.environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=GRACE_S,
            check=False,
        )


def _signal_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def _shell_code(returncode: int) -> int:
    """Return an exit code as a shell would: signal n is 128 + n, also where sys.exit(-n) made it 256 - n."""
    if returncode < 0:
        return 128 - returncode
    return 128 + 256 - returncode if returncode > 256 - signal.NSIG else returncode


def _to_standard_error(data: bytes) -> None:
    sys.stderr.buffer.write(data)
    sys.stderr.buffer.flush()
