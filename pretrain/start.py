"""What stands before the first step of a run: its checks, the checkpoint it goes on from, its parts, its attempt."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import torch
import yaml

from triweave.data_pipeline.storage.location import shown
from triweave.data_pipeline.stream.loader import StepLoader
from triweave.data_pipeline.stream.stalls import StallMeter
from triweave.data_pipeline.stream.state import StreamState
from triweave.pretrain.batch import kernel_tables
from triweave.pretrain.checkpoints.checkpoint import (
    Checkpoint,
    checkpoint_root,
    list_checkpoints,
    newest_whole_checkpoint,
)
from triweave.pretrain.config import RunConfig, save_resolved, to_yaml
from triweave.pretrain.engine.config import check_device
from triweave.pretrain.engine.world import World
from triweave.pretrain.engine.zero import Engine
from triweave.pretrain.errors import PretrainError
from triweave.pretrain.health.heartbeat import Heartbeat
from triweave.pretrain.health.signals import poison_if_asked
from triweave.pretrain.ledger.consumed import ConsumedLedger, begin_attempt, decisions_behind, next_attempt
from triweave.pretrain.model.model import MultimodalTransformer
from triweave.pretrain.objectives.rows import objective_stages
from triweave.pretrain.open_models.initial import start_from
from triweave.pretrain.telemetry import Telemetry
from triweave.pretrain.wandb_board import WandbBoard, check_wandb


def check_run(config: RunConfig, world: World, *, resume: bool) -> None:
    """Raise PretrainError where the run cannot have so many ranks or their device, or would overwrite another one."""
    config.check_world(world.size)
    check_device(config, world.device)
    check_wandb(config.train.wandb_project)
    root, before = config.checkpoint.root(config.run_dir), checkpoint_root(config.run_dir)
    if before != root and list_checkpoints(config.run_dir):
        raise PretrainError(
            f"{config.run_dir} has its checkpoints in {shown(before)}, not in {shown(root)}; set checkpoint.location "
            "to where they are, move them, or choose another run_dir"
        )
    if not resume and list_checkpoints(config.run_dir, config.checkpoint.location):
        where = shown(root) if config.checkpoint.location else config.run_dir
        raise PretrainError(f"{where} already has checkpoints; add --resume, or choose another run_dir")


def open_heartbeat(config: RunConfig, world: World) -> Heartbeat:
    """Begin to tell the supervisor what this rank does. Raises PretrainError where run_dir cannot be written."""
    try:
        return Heartbeat(config.run_dir, rank=world.rank, ranks=world.size, stall_s=config.health.stall_s)
    except OSError as error:
        raise _cannot_write(world, error) from error


def find_checkpoint(config: RunConfig, world: World) -> Checkpoint | None:
    """Return the newest whole checkpoint of the run, None where there is none, and say what follows; collective."""
    tell = partial(_tell, world)
    checkpoint = newest_whole_checkpoint(config.run_dir, world, location=config.checkpoint.location, tell=tell)
    if checkpoint is None:
        tell(f"no checkpoint in {config.run_dir}, starting anew")
        return None
    next_row = StreamState.from_json(checkpoint.state["stream"]).next_row
    world.together(lambda: config.check_resume_row(next_row))
    where, done, asked = shown(checkpoint.folder), checkpoint.step, config.train.steps
    if done < asked:
        tell(f"resuming from {where}")
    else:
        tell(f"nothing to do: {where} has step {done}, and train.steps={asked}; set that above {done} to go on")
    return checkpoint


def build_model(
    config: RunConfig, world: World, loader: StepLoader, checkpoint: Checkpoint | None
) -> MultimodalTransformer:
    """Return the model with its first weights: drawn from the seed, then those of `init_from` unless it is resumed.

    Raises PretrainError where the folder is not the model of the config.
    """
    model = MultimodalTransformer(
        config.model, vocab_size=loader.tokenizer.vocab_size, media_features=loader.media_features, seed=config.seed
    )
    if config.init_from and checkpoint is None:
        anew = start_from(model, config.model, config.init_from)
        rest = f"; {len(anew)} parameters start anew, {anew[0]} the first" if anew else ""
        _tell(world, f"weights from {', '.join(config.init_from.values())}{rest}")
    return model


def build_loader(config: RunConfig, world: World, checkpoint: Checkpoint | None) -> StepLoader:
    """Return the loader of this rank's windows, from where the checkpoint goes on."""
    sharing = config.train.sequence_parallel  # ranks of the same rows
    return StepLoader(
        config.data,
        rank=world.rank // sharing,
        world_size=world.size // sharing,
        global_batch_rows=config.train.global_batch_rows,
        micro_batch_rows=config.train.micro_batch_rows,
        state=StreamState.from_json(checkpoint.state["stream"]) if checkpoint else None,
        post_pack=kernel_tables(config.model, world.device, config.train.dtype),
        stages=objective_stages(config.model, seed=config.data.seed),
    )


def build_engine(config: RunConfig, world: World, loader: StepLoader, checkpoint: Checkpoint | None) -> Engine:
    """Return the model of the config under DeepSpeed; collective."""
    model = build_model(config, world, loader, checkpoint)
    torch.manual_seed(config.seed + world.rank)
    engine = Engine(model, config, world, accumulation=loader.accumulation)
    poison_if_asked(engine)
    return engine


def go_on(engine: Engine, config: RunConfig, checkpoint: Checkpoint) -> None:
    """Put a checkpoint's weights, moments and counts into the engine; collective."""
    checkpoint.load_into(engine)
    state = checkpoint.state
    engine.judge.restore(state["health"])
    # decisions that losses lead to are rank 0's (`objectives.window.decide`), which has the record for certain
    known = decisions_behind(config.run_dir, state["attempt"], checkpoint.step) if engine.world.rank == 0 else []
    engine.balance.restore(state["balance"], known)
    engine.loss_scale.restore(state["loss_scale"])


def open_telemetry(config: RunConfig, engine: Engine) -> Telemetry:
    """Open this rank's part of what a run tells of its steps."""
    return Telemetry(
        config.run_dir,
        rank=engine.world.rank,
        first_step=engine.step + 1,
        total_steps=config.train.steps,
        every_steps=config.train.log_every_steps,
        stalls=StallMeter.of(config.data),
        exchange=engine.world.texts,
        wandb=_open_wandb(config, engine.world),
    )


def _open_wandb(config: RunConfig, world: World) -> WandbBoard | None:
    if world.rank or not config.train.wandb_project:
        return None
    return WandbBoard(config.train.wandb_project, config.run_dir, yaml.safe_load(to_yaml(config)))


def open_ledger(config: RunConfig, world: World, checkpoint: Checkpoint | None) -> ConsumedLedger:
    """Open the ledger of consumed samples; every rank writes to the attempt that rank 0 has numbered. Collective."""
    attempt = int(world.gather([next_attempt(config.run_dir)])[0, 0])

    def begin() -> ConsumedLedger:
        try:
            if world.rank == 0:
                parent = int(checkpoint.state["attempt"]) if checkpoint else None
                begin_attempt(config.run_dir, attempt, parent=parent, resumed_step=checkpoint.step if checkpoint else 0)
                save_resolved(config, Path(config.run_dir) / "config.yaml")
            leads = world.rank % config.train.sequence_parallel == 0  # its peers train on the same rows
            return ConsumedLedger(config.run_dir, attempt, world.rank, writes_rows=leads)
        except OSError as error:
            raise _cannot_write(world, error) from error

    return world.together(begin)


def _tell(world: World, message: str) -> None:
    if world.rank == 0:
        print(f"triweave train: {message}", file=sys.stderr, flush=True)


def _cannot_write(world: World, error: OSError) -> PretrainError:
    return PretrainError(f"cannot write to run_dir on rank {world.rank}: {error}; choose another one")
