"""Train: the spine of a run, the same program on every rank.

    deepspeed --num_accelerators 2 pretrain/train.py CONFIG [--resume] [key=value ...]
    triweave train CONFIG [--resume] [key=value ...]

Without a launcher this is a world of one. SIGTERM ends the run with a checkpoint after the step it is in. The
environment variable TRIWEAVE_KILL_AT_STEP=N is a test hook: every rank kills itself after logging step N.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from triweave.data_pipeline.errors import DataError
from triweave.data_pipeline.stream.loader import StepLoader, StepWindow
from triweave.data_pipeline.stream.stalls import StallMeter
from triweave.data_pipeline.stream.state import StreamState
from triweave.kernels.errors import KernelError
from triweave.pretrain.batch import kernel_tables
from triweave.pretrain.checkpoint import (
    Checkpoint,
    list_checkpoints,
    newest_whole_checkpoint,
    save_checkpoint,
)
from triweave.pretrain.config import RunConfig, load_config, save_resolved, to_yaml
from triweave.pretrain.consumed import ConsumedLedger, begin_attempt, next_attempt
from triweave.pretrain.errors import PretrainError
from triweave.pretrain.model import MultimodalTransformer
from triweave.pretrain.telemetry import Telemetry
from triweave.pretrain.world import AGREED, ALONE, World, close_world, leave, open_world, world_is_open
from triweave.pretrain.zero import Engine

USER_ERRORS = (PretrainError, DataError, KernelError)
KILL_AT_STEP = "TRIWEAVE_KILL_AT_STEP"


def main(argv: Sequence[str] | None = None) -> int:
    """Train a config; return 0, or 2 after one line about what the user asked for that cannot be."""
    arguments = _parser().parse_intermixed_args(argv)
    try:
        train(load_config(arguments.config, arguments.overrides), resume=arguments.resume)
    except USER_ERRORS as error:
        notes = getattr(error, "__notes__", ())
        shared = AGREED in notes or not (world_is_open() or ALONE in notes)
        if os.environ.get("RANK", "0") == "0" or not shared:
            print(f"triweave train: {error}", file=sys.stderr, flush=True)
        return 2
    finally:
        close_world()
    return 0


def train(config: RunConfig, *, resume: bool = False) -> None:
    """Run until `train.steps` optimizer steps are done, from the newest whole checkpoint where `resume` is set."""
    world = open_world(config.train.device, config.train.torch_threads)
    stop = _catch_sigterm()
    world.together(lambda: _check_run(config, world, resume=resume))
    checkpoint = _find_checkpoint(config, world) if resume else None
    loader = world.together(lambda: _build_loader(config, world, checkpoint))
    engine = world.together(lambda: _build_engine(config, world, loader))
    if checkpoint:
        checkpoint.load_into(engine)
    with _begin_attempt(config, world, checkpoint) as ledger, _open_telemetry(config, engine) as telemetry:
        for window, data_wait_s in _windows(loader, world, steps=config.train.steps - engine.step):
            result = engine.train_window(window.micro_batches, data_wait_s=data_wait_s)
            ledger.write(result.step, window.micro_batches)
            telemetry.step(result, window.load)
            _kill_if_asked(result.step)
            stopping = world.agree(stop=bool(stop))
            if stopping or config.checkpoint.due(result.step, config.train.steps):
                _save(config, engine, window.state, ledger.attempt)
            if stopping:
                telemetry.tell(f"stopped by SIGTERM after step {result.step}; continue with --resume")
                break


def _check_run(config: RunConfig, world: World, *, resume: bool) -> None:
    config.check_world(world.size)
    if not resume and list_checkpoints(config.run_dir):
        raise PretrainError(f"{config.run_dir} already has checkpoints; add --resume, or choose another run_dir")


def _find_checkpoint(config: RunConfig, world: World) -> Checkpoint | None:
    def tell(message: str) -> None:
        if world.rank == 0:
            print(f"triweave train: {message}", file=sys.stderr, flush=True)

    checkpoint = newest_whole_checkpoint(config.run_dir, world, tell=tell)
    if checkpoint:
        next_row = StreamState.from_json(checkpoint.state["stream"]).next_row
        world.together(lambda: config.check_resume_row(next_row))
    tell(f"resuming from {checkpoint.folder}" if checkpoint else f"no checkpoint in {config.run_dir}, starting anew")
    return checkpoint


def _build_loader(config: RunConfig, world: World, checkpoint: Checkpoint | None) -> StepLoader:
    return StepLoader(
        config.data,
        rank=world.rank,
        world_size=world.size,
        global_batch_rows=config.train.global_batch_rows,
        micro_batch_rows=config.train.micro_batch_rows,
        state=StreamState.from_json(checkpoint.state["stream"]) if checkpoint else None,
        post_pack=kernel_tables(config.model, world.device, config.train.dtype),
    )


def _build_engine(config: RunConfig, world: World, loader: StepLoader) -> Engine:
    model = MultimodalTransformer(
        config.model, vocab_size=loader.tokenizer.vocab_size, media_features=loader.media_features, seed=config.seed
    )
    torch.manual_seed(config.seed + world.rank)
    return Engine(model, config, world, accumulation=loader.accumulation)


def _begin_attempt(config: RunConfig, world: World, checkpoint: Checkpoint | None) -> ConsumedLedger:
    """Open the ledger of consumed samples; every rank writes to the attempt that rank 0 has numbered."""
    attempt = int(world.gather([next_attempt(config.run_dir)])[0, 0])

    def begin() -> ConsumedLedger:
        try:
            if world.rank == 0:
                parent = int(checkpoint.state["attempt"]) if checkpoint else None
                begin_attempt(config.run_dir, attempt, parent=parent, resumed_step=checkpoint.step if checkpoint else 0)
                save_resolved(config, Path(config.run_dir) / "config.yaml")
            return ConsumedLedger(config.run_dir, attempt, world.rank)
        except OSError as error:
            raise PretrainError(f"cannot write to run_dir on rank {world.rank}: {error}; choose another one") from error

    return world.together(begin)


def _open_telemetry(config: RunConfig, engine: Engine) -> Telemetry:
    return Telemetry(
        config.run_dir,
        rank=engine.world.rank,
        first_step=engine.step + 1,
        total_steps=config.train.steps,
        every_steps=config.train.log_every_steps,
        stalls=StallMeter.of(config.data),
    )


def _windows(loader: StepLoader, world: World, *, steps: int) -> Iterator[tuple[StepWindow, float]]:
    """Yield `steps` windows and the seconds each was waited for; what one rank cannot read ends all of them."""
    stream = iter(loader)
    for _ in range(steps):
        yield world.together(partial(_timed_next, stream))


def _timed_next(stream: Iterator[StepWindow]) -> tuple[StepWindow, float]:
    started = time.perf_counter()
    with torch.random.fork_rng(devices=()):  # torch's DataLoader draws a seed for its workers from the global state
        window = next(stream)
    return window, time.perf_counter() - started


def _save(config: RunConfig, engine: Engine, stream: StreamState, attempt: int) -> None:
    save_checkpoint(
        config.run_dir,
        engine,
        config.checkpoint,
        state={"stream": stream.to_json(), "attempt": attempt},
        config_yaml=to_yaml(config),
    )


def _catch_sigterm() -> list[int]:
    """Return a list that SIGTERM makes non-empty."""
    caught: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: caught.append(number))
    return caught


def _kill_if_asked(step: int) -> None:
    if os.environ.get(KILL_AT_STEP) == str(step):
        os.kill(os.getpid(), signal.SIGKILL)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="train.py", description="Train inside one rank.")
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument("--resume", action="store_true", help="continue from the newest whole checkpoint in run_dir")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted settings, such as train.steps=100")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # launchers add it; LOCAL_RANK says the same
    return parser


if __name__ == "__main__":
    leave(main())
