"""What the run does about a verdict of its judge: note it, and put the weights of an earlier checkpoint back."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from triweave.pretrain.checkpoints.checkpoint import Checkpoint, newest_whole_checkpoint
from triweave.pretrain.engine.world import World
from triweave.pretrain.errors import HealthError
from triweave.pretrain.health.events import Event, record_event
from triweave.pretrain.health.heartbeat import Heartbeat
from triweave.pretrain.ledger.consumed import ConsumedLedger
from triweave.pretrain.telemetry import Telemetry

if TYPE_CHECKING:
    from triweave.pretrain.config import RunConfig
    from triweave.pretrain.engine.zero import Engine, StepResult


def recover(
    result: StepResult, config: RunConfig, engine: Engine, ledger: ConsumedLedger, telemetry: Telemetry
) -> bool:
    """Act on the verdict of a step; return whether weights were put back, which wants a checkpoint at once. Collective.

    No save may be under way. Step numbers go on, for a number names the data of a window: what was trained on since
    that checkpoint is left out, and the learning rate is that of the step. Raises HealthError on all ranks where there
    is no checkpoint with other weights.
    """
    verdict, step = result.verdict, result.step
    if verdict.action == "update":
        return False
    if verdict.action == "skip":
        _note("skip", step, f"{verdict.reason}; its update is left out; {verdict.samples}", config, engine, telemetry)
        return False
    checkpoint = _earlier_checkpoint(result, config, engine, telemetry)
    checkpoint.load_into(engine)
    engine.balance.restore(checkpoint.state["balance"])  # what it has seen since then is of other weights
    engine.step = step
    engine.judge.rolled_back()
    ledger.roll_back(step, to=checkpoint.step)
    text = (
        f"{verdict.reason}, the last of {config.health.skips_in_a_row} bad steps in a row; the weights of step "
        f"{checkpoint.step} are back, the data of steps {checkpoint.step + 1} to {step} is left out; {verdict.samples}"
    )
    _note("roll_back", step, text, config, engine, telemetry, to=checkpoint.step)
    return True


@contextmanager
def ends_noted(config: RunConfig, world: World, heartbeat: Heartbeat) -> Iterator[None]:
    """Record the HealthError that ends the run within the block, and let it go on."""
    try:
        yield
    except HealthError as error:
        if world.rank == 0:
            record_event(config.run_dir, "stop", step=heartbeat.step + 1, text=str(error))
        raise


def note_stop(config: RunConfig, engine: Engine, telemetry: Telemetry, signals: Sequence[signal.Signals]) -> None:
    """Say that the run has been stopped by a signal, to this rank or another one."""
    names = ", ".join(number.name for number in signals) or "a signal to another rank"
    text = f"stopped by {names} after step {engine.step}; continue with --resume"
    telemetry.tell(text)
    if engine.world.rank == 0:
        record_event(config.run_dir, "preempted", step=engine.step, text=text)


def _earlier_checkpoint(result: StepResult, config: RunConfig, engine: Engine, telemetry: Telemetry) -> Checkpoint:
    """Return the newest whole checkpoint whose weights are not those that every step has been bad with."""
    first_bad = engine.judge.first_bad_step
    assert first_bad is not None
    checkpoint = newest_whole_checkpoint(
        config.run_dir,
        engine.world,
        location=config.checkpoint.location,
        before=first_bad - 1,
        tell=telemetry.tell,
    )
    if checkpoint is None:
        engine.world.agree(
            HealthError(
                f"{result.verdict.reason}, and no checkpoint is from before step {first_bad - 1} to roll back to; "
                f"{result.verdict.samples}; lower optimizer.lr, or set checkpoint.every_steps lower and "
                "checkpoint.keep higher and start again"
            )
        )
    assert checkpoint is not None
    return checkpoint


def _note(
    event: Event, step: int, text: str, config: RunConfig, engine: Engine, telemetry: Telemetry, **fields: int
) -> None:
    telemetry.tell(f"health: {text}")
    if engine.world.rank == 0:
        record_event(config.run_dir, event, step=step, text=text, **fields)
