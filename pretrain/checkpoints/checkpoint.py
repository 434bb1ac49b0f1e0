"""Checkpoints: atomic, verified, and loadable by any world size and ZeRO stage.

    RUN/checkpoints/step-0000010/            or s3://bucket/prefix/step-0000010/
        rank-00000-000.safetensors ...       what each rank owned: named fp32 fragments of weights, moments, and RNG
        manifest.json                        parameters, files with sizes and checksums, config, the run's other state

A checkpoint becomes visible by one act, its manifest last, so that a kill at any moment leaves the previous one
untouched (`checkpoints/stores.py`). No pickle anywhere. Its place must be one that all ranks see. Functions that take a
`run_dir` take an s3:// location of checkpoints as well.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from triweave.data_pipeline.storage.location import is_remote, shown
from triweave.pretrain.checkpoints.config import FOLDER, CheckpointConfig
from triweave.pretrain.checkpoints.manifest import Checkpoint, read_checkpoint
from triweave.pretrain.checkpoints.saver import CheckpointSaver
from triweave.pretrain.checkpoints.stores import open_store
from triweave.pretrain.engine.world import World
from triweave.pretrain.errors import CheckpointError

if TYPE_CHECKING:
    from triweave.pretrain.engine.zero import Engine

__all__ = [
    "FOLDER",
    "Checkpoint",
    "CheckpointConfig",
    "CheckpointSaver",
    "checkpoint_root",
    "existing_checkpoints",
    "find_whole_checkpoint",
    "list_checkpoints",
    "newest_checkpoint",
    "newest_whole_checkpoint",
    "read_checkpoint",
    "save_checkpoint",
    "step_of",
]


def save_checkpoint(
    run_dir: str | Path, engine: Engine, config: CheckpointConfig, *, state: dict[str, Any], config_yaml: str
) -> Path:
    """Write one checkpoint of the engine's present step, wait for it, and return its folder; collective.

    A run that saves again and again keeps a `CheckpointSaver`. Raises CheckpointError on all ranks where one cannot
    write.
    """
    with CheckpointSaver(engine, config, run_dir) as saver:
        return saver.save(state=state, config_yaml=config_yaml)


def checkpoint_root(run_dir: str | Path, location: str | None = None) -> Path:
    """Return where a run's checkpoints lie.

    location: `checkpoint.location` of its config, '' for run_dir/checkpoints; None: what config.yaml in run_dir says.
    """
    if is_remote(run_dir):
        return Path(run_dir)
    if location is None:
        try:
            said = yaml.safe_load((Path(run_dir) / "config.yaml").read_text(encoding="utf-8"))
            location = str(said["checkpoint"].get("location", ""))
        except (OSError, yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
            location = ""
    return Path(location) if location else Path(run_dir) / FOLDER


def list_checkpoints(run_dir: str | Path, location: str | None = None) -> list[Path]:
    """Return the folders of complete checkpoints, oldest first; those being written are not among them.

    location: as of `checkpoint_root`. Raises StorageError where an object store does not answer.
    """
    store = open_store(checkpoint_root(run_dir, location))
    return [store.folder(step) for step in store.steps()]


def newest_checkpoint(run_dir: str | Path, location: str | None = None) -> int:
    """Return the step of the newest complete checkpoint, 0 where there is none; looks at names only."""
    return max(open_store(checkpoint_root(run_dir, location)).steps(), default=0)


def step_of(folder: Path) -> int:
    """Return the step of a checkpoint's folder."""
    return int(folder.name.removeprefix("step-"))


def newest_whole_checkpoint(
    run_dir: str | Path,
    world: World,
    *,
    location: str | None = None,
    before: int | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> Checkpoint | None:
    """Return the newest checkpoint whose every byte is as written, None where there is none at all; collective.

    before: only of earlier steps than this one. Each file is read by one rank. A damaged checkpoint is told about and
    passed over; raises CheckpointError when checkpoints exist but none is whole, or when the ranks see different ones.
    """
    root = checkpoint_root(run_dir, location)
    steps = world.together(lambda: open_store(root).steps())
    steps = [step for step in steps if before is None or step < before]
    seen = world.gather([len(steps), steps[-1] if steps else -1])
    if (seen != seen[0]).any():
        different = f"{shown(root)} is not the same on all ranks; put it on shared storage"
        world.agree(CheckpointError(different))
    damages = []
    for step in reversed(steps):
        folder = open_store(root).folder(step)
        try:
            return world.together(partial(_verified_share, folder, world))
        except CheckpointError as damage:
            damages.append(str(damage))
            tell(f"{damage}; falling back to the checkpoint before {folder.name}")
    if damages:
        world.agree(CheckpointError(f"no whole checkpoint in {shown(root)}: {'; '.join(damages)}"))
    return None


def existing_checkpoints(run_dir: str | Path, step: int | None = None) -> list[Path]:
    """Return the folders of a run's complete checkpoints, oldest first, or the one of `step`.

    Raises CheckpointError where there is no such run, or it has no (such) checkpoint.
    """
    if not is_remote(run_dir) and not Path(run_dir).is_dir():
        raise CheckpointError(f"{run_dir}: no such run; pass the run_dir of a training, such as runs/demo/train")
    folders = {step_of(folder): folder for folder in list_checkpoints(run_dir)}
    if not folders:
        inner = [] if is_remote(run_dir) else [path.parent for path in sorted(Path(run_dir).glob(f"*/{FOLDER}"))]
        advice = f"did you mean {inner[0]}?" if inner else "train it until checkpoint.every_steps, or pass another run"
        raise CheckpointError(f"{shown(run_dir)} has no checkpoint; {advice}")
    if step is None:
        return list(folders.values())
    if step not in folders:
        there = ", ".join(map(str, folders))
        raise CheckpointError(f"{shown(run_dir)} has no checkpoint of step {step}; it has {there}")
    return [folders[step]]


def find_whole_checkpoint(
    run_dir: str | Path, step: int | None = None, *, tell: Callable[[str], None] = lambda _: None
) -> Checkpoint:
    """Return a run's newest checkpoint whose every byte is as written, or the one of `step`; for one process alone.

    Without `step` a damaged one is told about and passed over. Raises CheckpointError where there is none such.
    """
    folders = existing_checkpoints(run_dir, step)
    if step is not None:
        checkpoint = read_checkpoint(folders[0])
        checkpoint.verify()
        return checkpoint
    alone = World(rank=0, size=1, device=torch.device("cpu"), control=None)
    newest = newest_whole_checkpoint(run_dir, alone, tell=tell)
    if newest is None:
        raise CheckpointError(f"{shown(run_dir)}: its checkpoints went away while they were read; try again")
    return newest


def _verified_share(folder: Path, world: World) -> Checkpoint:
    checkpoint = read_checkpoint(folder)
    checkpoint.verify(world.rank, world.size)
    return checkpoint
