"""Signals that end a run in good order, and the hooks by which tests make a rank fail.

SIGTERM and SIGUSR1 (which Slurm sends with `--signal=USR1@120`) to any one rank end all of them after the step they are
in, with a checkpoint and the exit code REQUEUE. The environment variables are test hooks:

    TRIWEAVE_KILL_AT_STEP=N           every rank kills itself after logging step N
    TRIWEAVE_NAN_AT_STEP=N[,N...][:R] rank R (without it every rank) gets a loss that is NaN at these steps
    TRIWEAVE_HANG_AT_STEP=N:R         rank R stops itself (SIGSTOP) after logging step N, in the first attempt of a run
"""

from __future__ import annotations

import math
import os
import signal
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from triweave.pretrain.engine.zero import Engine

REQUEUE = 75
"""Exit code of a run that was asked to stop before its last step and has written a checkpoint: start it again with
--resume. EX_TEMPFAIL of sysexits.h."""
KILL_AT_STEP = "TRIWEAVE_KILL_AT_STEP"
NAN_AT_STEP = "TRIWEAVE_NAN_AT_STEP"
HANG_AT_STEP = "TRIWEAVE_HANG_AT_STEP"


def catch_stop_signals() -> list[signal.Signals]:
    """Return a list that SIGTERM and SIGUSR1 are appended to instead of ending the process."""
    caught: list[signal.Signals] = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda received, _: caught.append(signal.Signals(received)))
    return caught


def fail_if_asked(step: int, *, rank: int, attempt: int) -> None:
    """Kill or stop this process where a test has asked for it after this step."""
    if os.environ.get(KILL_AT_STEP) == str(step):
        os.kill(os.getpid(), signal.SIGKILL)
    if attempt == 1 and os.environ.get(HANG_AT_STEP) == f"{step}:{rank}":
        os.kill(os.getpid(), signal.SIGSTOP)


def poison_if_asked(engine: Engine) -> None:
    """Let the model return losses that are not finite where a test has asked for it."""
    asked, _, rank = os.environ.get(NAN_AT_STEP, "").partition(":")
    if not asked or (rank and int(rank) != engine.world.rank):
        return
    steps = {int(step) for step in asked.split(",")}

    def poison(_module: Any, _arguments: Any, found: Any) -> Any:
        if engine.step + 1 not in steps:
            return found
        heads = {name: value * math.nan for name, value in found.heads.items()}
        return found._replace(total=found.total * math.nan, heads=heads)

    engine.model.register_forward_hook(poison)
