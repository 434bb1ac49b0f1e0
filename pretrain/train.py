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
from functools import partial

import torch

from triweave.data_pipeline.errors import DataError
from triweave.data_pipeline.stream.loader import StepLoader, StepWindow
from triweave.data_pipeline.stream.stalls import StallMeter
from triweave.data_pipeline.stream.state import StreamState
from triweave.kernels.errors import KernelError
from triweave.pretrain.batch import kernel_tables
from triweave.pretrain.checkpoints.checkpoint import Checkpoint, CheckpointSaver
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
from triweave.pretrain.health.signals import REQUEUE, catch_stop_signals, fail_if_asked, poison_if_asked
from triweave.pretrain.objectives.rows import objective_stages
from triweave.pretrain.start import build_model, check_run, find_checkpoint, open_heartbeat, open_ledger
from triweave.pretrain.telemetry import Telemetry

USER_ERRORS = (PretrainError, DataError, KernelError)


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
    loader = world.together(lambda: _build_loader(config, world, checkpoint))
    engine = world.together(lambda: _build_engine(config, world, loader, checkpoint))
    if checkpoint:
        checkpoint.load_into(engine)
        engine.judge.restore(checkpoint.state["health"])
        engine.balance.restore(checkpoint.state["balance"])
    with (
        open_ledger(config, world, checkpoint) as ledger,
        _open_telemetry(config, engine) as telemetry,
        CheckpointSaver(engine, config.checkpoint, config.run_dir) as saver,
    ):
        for window, data_wait_s in _windows(loader, engine, heartbeat, steps=config.train.steps):
            result = engine.train_window(window.micro_batches, data_wait_s=data_wait_s)
            ledger.write(result.step, window.micro_batches, skipped=result.verdict.reason)
            ledger.write_decision(result.decision)
            telemetry.step(result, window.load, saver.news())
            if result.verdict.action == "roll_back":
                saver.finish()
            put_back = recover(result, config, engine, ledger, telemetry)
            fail_if_asked(result.step, rank=world.rank, attempt=ledger.attempt)
            stopping = world.agree(saver.failure, stop=bool(stop))
            if stopping or put_back or config.checkpoint.due(result.step, config.train.steps):
                mark_phase("save")
                state = {
                    "stream": window.state.to_json(),
                    "attempt": ledger.attempt,
                    "health": engine.judge.state(),
                    "balance": engine.balance.state(),
                }
                saver.save(state=state, config_yaml=to_yaml(config))
            if stopping and result.step < config.train.steps:
                saver.finish()
                note_stop(config, engine, telemetry, stop)
                return False
    return True


def _build_loader(config: RunConfig, world: World, checkpoint: Checkpoint | None) -> StepLoader:
    return StepLoader(
        config.data,
        rank=world.rank,
        world_size=world.size,
        global_batch_rows=config.train.global_batch_rows,
        micro_batch_rows=config.train.micro_batch_rows,
        state=StreamState.from_json(checkpoint.state["stream"]) if checkpoint else None,
        post_pack=kernel_tables(config.model, world.device, config.train.dtype),
        stages=objective_stages(config.model, seed=config.data.seed),
    )


def _build_engine(config: RunConfig, world: World, loader: StepLoader, checkpoint: Checkpoint | None) -> Engine:
    model = build_model(config, world, loader, checkpoint)
    torch.manual_seed(config.seed + world.rank)
    engine = Engine(model, config, world, accumulation=loader.accumulation)
    poison_if_asked(engine)
    return engine


def _open_telemetry(config: RunConfig, engine: Engine) -> Telemetry:
    return Telemetry(
        config.run_dir,
        rank=engine.world.rank,
        first_step=engine.step + 1,
        total_steps=config.train.steps,
        every_steps=config.train.log_every_steps,
        stalls=StallMeter.of(config.data),
    )


def _windows(
    loader: StepLoader, engine: Engine, heartbeat: Heartbeat, *, steps: int
) -> Iterator[tuple[StepWindow, float]]:
    """Yield the windows up to step `steps` and the seconds each was waited for; what one rank cannot read ends all."""
    stream = iter(loader)
    while engine.step < steps:
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
