"""Train: the spine of a run, the same program on every rank.

    deepspeed --num_accelerators 2 pretrain/train.py CONFIG [--resume] [key=value ...]
    triweave train CONFIG [--resume] [key=value ...]

Without a launcher this is a world of one. SIGTERM or SIGUSR1 ends the run with a checkpoint after the step it is in,
and with exit code 75: start it again with --resume.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from triweave.data_pipeline.errors import DataError
from triweave.data_pipeline.stream.loader import StepWindow
from triweave.kernels.errors import KernelError
from triweave.pretrain.checkpoints.checkpoint import CheckpointSaver
from triweave.pretrain.config import RunConfig, load_config, to_yaml
from triweave.pretrain.engine.world import (
    AGREED,
    ALONE,
    NOT_DETERMINISTIC,
    World,
    close_world,
    leave,
    open_world,
    world_is_open,
)
from triweave.pretrain.engine.zero import Engine
from triweave.pretrain.errors import PretrainError
from triweave.pretrain.health.heartbeat import Heartbeat, mark_phase
from triweave.pretrain.health.recovery import ends_noted, note_stop, recover
from triweave.pretrain.health.signals import REQUEUE, catch_stop_signals, fail_if_asked
from triweave.pretrain.ledger.consumed import ConsumedLedger
from triweave.pretrain.start import (
    build_engine,
    build_loader,
    check_run,
    find_checkpoint,
    go_on,
    open_heartbeat,
    open_ledger,
    open_telemetry,
)
from triweave.pretrain.telemetry import Telemetry

USER_ERRORS = (PretrainError, DataError, KernelError)


@dataclass(frozen=True, kw_only=True)
class Run:
    """What the steps of a run work with, in one rank. stop: filled by the signals that end the run."""

    config: RunConfig
    engine: Engine
    heartbeat: Heartbeat
    ledger: ConsumedLedger
    telemetry: Telemetry
    saver: CheckpointSaver
    stop: Sequence[signal.Signals]


def main(argv: Sequence[str] | None = None) -> int:
    """Train a config; return 0, 75 where it was stopped, or 2 after one line about what cannot be."""
    arguments = _parser().parse_intermixed_args(argv)
    try:
        finished = train(load_config(arguments.config, arguments.overrides), resume=arguments.resume)
    except USER_ERRORS as error:
        notes = getattr(error, "__notes__", ())
        shared = AGREED in notes or not (world_is_open() or ALONE in notes)
        if os.environ.get("RANK", "0") == "0" or not shared:
            print(f"triweave train: {error}", file=sys.stderr, flush=True)
        return 2
    except RuntimeError as error:
        if NOT_DETERMINISTIC not in str(error):
            raise
        operation = str(error).partition(",")[0]
        print(f"triweave train: {operation}; set train.deterministic=false", file=sys.stderr, flush=True)
        return 2
    finally:
        close_world()
    return 0 if finished else REQUEUE


def train(config: RunConfig, *, resume: bool = False) -> bool:
    """Run until `train.steps` steps are done, from the newest whole checkpoint where `resume` is set.

    Returns whether they are; not where a signal has stopped the run, of which a checkpoint is written then.
    """
    world = open_world(config.train.device, config.train.torch_threads, deterministic=config.train.deterministic)
    stop = catch_stop_signals()
    world.together(lambda: check_run(config, world, resume=resume))
    with world.together(lambda: open_heartbeat(config, world)) as heartbeat, ends_noted(config, world, heartbeat):
        finished = _train(config, world, heartbeat, stop, resume=resume)
    world.agree()  # a rank that ends before the others are done would have the launcher end those
    return finished


def _train(
    config: RunConfig, world: World, heartbeat: Heartbeat, stop: Sequence[signal.Signals], *, resume: bool
) -> bool:
    checkpoint = find_checkpoint(config, world) if resume else None
    if checkpoint and checkpoint.step >= config.train.steps:
        return True  # no attempt begins: the ledger, config.yaml and metrics stay as they are
    loader = world.together(lambda: build_loader(config, world, checkpoint))
    engine = world.together(lambda: build_engine(config, world, loader, checkpoint))
    if checkpoint:
        go_on(engine, config, checkpoint)
    with (
        open_ledger(config, world, checkpoint) as ledger,
        world.together(lambda: open_telemetry(config, engine)) as telemetry,
        CheckpointSaver(engine, config.checkpoint, config.run_dir) as saver,
    ):
        run = Run(
            config=config,
            engine=engine,
            heartbeat=heartbeat,
            ledger=ledger,
            telemetry=telemetry,
            saver=saver,
            stop=stop,
        )
        return run_steps(run, iter(loader), until=config.train.steps)


def run_steps(run: Run, stream: Iterator[StepWindow], *, until: int) -> bool:
    """Train on the windows of a stream until step `until` is done; return False where a signal has ended it before.

    What every step of a run does, in its order; collective.
    """
    config, engine, ledger, telemetry, saver = run.config, run.engine, run.ledger, run.telemetry, run.saver
    for window, data_wait_s in _windows(stream, engine, run.heartbeat, until=until):
        result = engine.train_window(window.micro_batches, data_wait_s=data_wait_s)
        ledger.write(result.step, window.micro_batches, skipped=result.verdict.reason)
        ledger.write_decision(result.decision)
        telemetry.step(result, window.load, saver.news())
        if result.verdict.action == "roll_back":
            saver.finish()
        put_back = recover(result, config, engine, ledger, telemetry)
        fail_if_asked(result.step, rank=engine.world.rank, attempt=ledger.attempt)
        stopping = engine.world.agree(saver.failure, stop=bool(run.stop))
        if stopping or put_back or config.checkpoint.due(result.step, config.train.steps):
            mark_phase("save")
            state = {
                "stream": window.state.to_json(),
                "attempt": ledger.attempt,
                "health": engine.judge.state(),
                "balance": engine.balance.state(),
                "loss_scale": engine.loss_scale.state(),
            }
            saver.save(state=state, config_yaml=to_yaml(config))
        if stopping and result.step < config.train.steps:
            saver.finish()
            note_stop(config, engine, telemetry, run.stop)
            return False
    return True


def _windows(
    stream: Iterator[StepWindow], engine: Engine, heartbeat: Heartbeat, *, until: int
) -> Iterator[tuple[StepWindow, float]]:
    """Yield the windows up to step `until` and the seconds each was waited for; what one rank cannot read ends all."""
    while engine.step < until:
        heartbeat.begin(engine.step)
        yield engine.world.together(partial(_timed_next, stream))


def _timed_next(stream: Iterator[StepWindow]) -> tuple[StepWindow, float]:
    started = time.perf_counter()
    with torch.random.fork_rng(devices=()):  # torch's DataLoader draws a seed for its workers from the global state
        window = next(stream)
    return window, time.perf_counter() - started


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="train.py", description="Train inside one rank.")
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument("--resume", action="store_true", help="continue from the newest whole checkpoint in run_dir")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted settings, such as train.steps=100")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # launchers add it; LOCAL_RANK says the same
    return parser


if __name__ == "__main__":
    leave(main())
