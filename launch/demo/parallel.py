"""Several trainings side by side: one rank and one thread each, every one through a launcher process of its own."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from triweave.launch.errors import DemoError
from triweave.launch.metrics import newest_metrics
from triweave.launch.processes import GRACE_S

POLL_S = 1.0
LOG_NAME = "command.log"
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
_PR_SET_PDEATHSIG = 1  # prctl(2)

Update = Callable[[float, float | None, str], None]


def train_side_by_side(configs: Mapping[str, Path], *, steps: int, at_once: int, update: Update) -> None:
    """Train every run to its last step, `at_once` at a time, each from its newest checkpoint.

    configs: name -> config file, which names the run's folder.
    steps: last step of every run.

    Raises DemoError where one fails (the others are ended), KeyboardInterrupt where the user stops it.
    """
    from triweave.pretrain.checkpoints.checkpoint import newest_checkpoint
    from triweave.pretrain.config import load_config

    folders = {name: Path(load_config(path).run_dir) for name, path in configs.items()}
    waiting = [name for name in configs if newest_checkpoint(folders[name]) < steps]
    running: dict[str, subprocess.Popen[bytes]] = {}
    with _ended_together(running):
        while waiting or running:
            while waiting and len(running) < at_once:
                name = waiting.pop(0)
                running[name] = _start(configs[name], folders[name])
            time.sleep(POLL_S)
            _show(folders, running, steps=steps, update=update)
            for name in [name for name, process in running.items() if process.poll() is not None]:
                process = running.pop(name)
                if process.returncode != 0:
                    raise DemoError(_failure(name, process.returncode, folders[name]))


def _start(config: Path, run_dir: Path) -> subprocess.Popen[bytes]:
    """Start the launcher of one run."""
    run_dir.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "triweave.launch.cli", "launch", str(config), "--num-ranks", "1", "--resume"]
    with open(run_dir / LOG_NAME, "ab") as log:
        return subprocess.Popen(
            command,
            env={**os.environ, **ONE_THREAD},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C reaches the demo alone, which then ends them in order
            preexec_fn=_end_with_parent,
        )


def _end_with_parent() -> None:
    """Have the kernel send SIGTERM to this process when the demo is gone, also after `kill -9`; Linux only."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


@contextmanager
def _ended_together(running: dict[str, subprocess.Popen[bytes]]) -> Iterator[None]:
    """End what still runs on leaving; a launcher that is asked to ends its ranks first."""
    try:
        yield
    finally:
        for process in running.values():
            process.terminate()
        deadline = time.monotonic() + 2 * GRACE_S
        for process in running.values():
            try:
                process.wait(timeout=max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _show(
    folders: Mapping[str, Path], running: Mapping[str, subprocess.Popen[bytes]], *, steps: int, update: Update
) -> None:
    newest = {name: newest_metrics(folder) for name, folder in folders.items()}
    reached = {name: 0 if entry is None else int(entry["step"]) for name, entry in newest.items()}
    words = []
    for name in running:
        entry = newest[name]
        words.append(f"{name} is starting" if entry is None else f"{name} step {reached[name]}, {entry['loss']:.2f}")
    update(sum(reached.values()), steps * len(folders), "; ".join(words))


def _failure(name: str, code: int, run_dir: Path) -> str:
    lines = _lines(run_dir / LOG_NAME) or _lines(run_dir / "launch.log")
    last = lines[-1] if lines else "it printed nothing"
    return f"the training of {name} ended with exit code {code} ({last}); the same command continues it"


def _lines(path: Path) -> Sequence[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    except FileNotFoundError:
        return ()
