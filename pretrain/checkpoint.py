"""Checkpoints: atomic, verified, and loadable by any world size and ZeRO stage.

    RUN/checkpoints/step-0000010/
        rank-00000.safetensors ...   what each rank owned: named fp32 fragments of weights and moments, RNG states
        config.yaml                  the resolved config
        manifest.json                parameters, files with sizes and xxh3, the run's other state; written last

A checkpoint is written to a hidden folder and becomes visible by one rename, so that a kill at any moment leaves the
previous one untouched. No pickle anywhere. The folder must be on storage that all ranks share.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from safetensors import SafetensorError

from triweave.pretrain.errors import CheckpointError, PretrainError
from triweave.pretrain.fragment_files import FragmentReader, flush, hash_file, write_fragments
from triweave.pretrain.world import World

if TYPE_CHECKING:
    from triweave.pretrain.zero import Engine

FORMAT = 1
FOLDER = "checkpoints"
MANIFEST = "manifest.json"
CONFIG = "config.yaml"
RANK_LIMIT = 1 << 20
STEP_NAME = re.compile(r"step-(\d{7,})")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to checkpoint and how many to keep."""

    every_steps: int = 1000
    """A checkpoint after each so many steps (and after the last one); 0 only after the last one."""
    keep: int = 2
    """Newest complete checkpoints that stay on disk; older ones are removed."""

    def __post_init__(self) -> None:
        if self.every_steps < 0:
            raise PretrainError(f"checkpoint.every_steps is {self.every_steps}; it must be 0 or above")
        if self.keep < 1:
            raise PretrainError(f"checkpoint.keep is {self.keep}; keep at least 1")

    def due(self, step: int, last_step: int) -> bool:
        """Return whether a checkpoint follows this step."""
        return step == last_step or bool(self.every_steps and step % self.every_steps == 0)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint on disk: its folder and its manifest."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    @property
    def state(self) -> dict[str, Any]:
        """What the run stored beside the engine: stream, lineage."""
        state: dict[str, Any] = self.manifest["state"]
        return state

    def verify(self, rank: int = 0, size: int = 1) -> None:
        """Check sizes and xxh3 of every size-th file; raises CheckpointError naming the first damaged one."""
        for number, (name, entry) in enumerate(sorted(self.manifest["files"].items())):
            if number % size == rank:
                path = self.folder / name
                if not path.is_file():
                    raise CheckpointError(f"{path} is missing")
                try:
                    size_bytes, digest = path.stat().st_size, hash_file(path)
                except OSError as error:
                    raise CheckpointError(f"{path} cannot be read: {error}") from error
                if size_bytes != entry["bytes"]:
                    raise CheckpointError(f"{path} is damaged: {size_bytes} of {entry['bytes']} bytes")
                if digest != entry["xxh3"]:
                    raise CheckpointError(f"{path} is damaged: its xxh3 is not the manifest's")

    def load_into(self, engine: Engine) -> None:
        """Restore weights, moments, step counts and RNG of this rank; collective.

        Bit-identical where the layout is the one that wrote it. Raises CheckpointError on all ranks where the model
        has other parameters.
        """
        engine.world.together(lambda: self._restore_fragments(engine))
        engine.publish()
        engine.step = self.step

    def _restore_fragments(self, engine: Engine) -> None:
        stored = self.manifest["parameters"]
        if missing := sorted(set(engine.shapes) ^ set(stored)):
            where = "the model" if missing[0] in engine.shapes else "the checkpoint"
            raise CheckpointError(
                f"{self.folder}: parameter {missing[0]} is only in {where} ({len(missing)} differ); "
                "resume with the config of the run that wrote it, or start a new run_dir"
            )
        for name, shape in engine.shapes.items():
            if tuple(stored[name]["shape"]) != shape:
                raise CheckpointError(
                    f"{self.folder}: parameter {name} is {stored[name]['shape']} there and {list(shape)} in the model; "
                    "resume with the config of the run that wrote it, or start a new run_dir"
                )
        reader = FragmentReader(self.folder, {file: entry["fragments"] for file, entry in self._rank_files().items()})
        for fragment in engine.fragments():
            for kind, target in fragment.tensors.items():
                reader.read_into(target, kind, fragment.name, fragment.offset)
            if fragment.steps is not None:
                fragment.steps.fill_(stored[fragment.name]["steps"])
        if self.manifest["world_size"] == engine.world.size:
            _set_rng(reader.rng(_rank_file(engine.world.rank)))
        else:  # no rank's stream can go on; new ones, that no earlier step has drawn from
            torch.manual_seed(self.step * RANK_LIMIT + engine.world.rank)

    def _rank_files(self) -> dict[str, Any]:
        return {name: entry for name, entry in self.manifest["files"].items() if "fragments" in entry}


def save_checkpoint(
    run_dir: str | Path, engine: Engine, config: CheckpointConfig, *, state: dict[str, Any], config_yaml: str
) -> Path:
    """Write a checkpoint of the engine's present step, remove those beyond `config.keep`, return its folder.

    Collective. state: JSON to keep beside the engine's own. Raises CheckpointError on all ranks where any cannot write.
    """
    world, root = engine.world, Path(run_dir) / FOLDER
    final, working = root / f"step-{engine.step:07d}", root / f".writing-step-{engine.step:07d}"

    def prepare() -> None:
        if world.rank == 0:
            shutil.rmtree(working, ignore_errors=True)
            working.mkdir(parents=True)

    def write_rank() -> None:
        fragments = engine.fragments()
        path = working / _rank_file(world.rank)
        table = write_fragments(path, fragments, _rng())
        steps = {part.name: float(part.steps) for part in fragments if part.steps is not None}
        note = {"bytes": path.stat().st_size, "xxh3": hash_file(path), "fragments": table, "steps": steps}
        path.with_suffix(".json").write_text(json.dumps(note), encoding="utf-8")

    def complete() -> None:
        if world.rank == 0:
            (working / CONFIG).write_text(config_yaml, encoding="utf-8")
            flush(working / CONFIG)
            _write_manifest(working, engine, state)
            _make_visible(working, final)
            prune(run_dir, config.keep, step=engine.step)

    for action in (prepare, write_rank, complete):
        _together(world, action, working)
    return final


def list_checkpoints(run_dir: str | Path) -> list[Path]:
    """Return the folders of complete checkpoints, oldest first; those being written are not among them."""
    root = Path(run_dir) / FOLDER
    found = [path for path in root.glob("step-*") if STEP_NAME.fullmatch(path.name) and (path / MANIFEST).is_file()]
    return sorted(found, key=_step_of)


def newest_checkpoint(run_dir: str | Path) -> int:
    """Return the step of the newest complete checkpoint, 0 where there is none; looks at names only."""
    return max(map(_step_of, list_checkpoints(run_dir)), default=0)


def read_checkpoint(folder: str | Path) -> Checkpoint:
    """Return the checkpoint in a folder; raises CheckpointError where its manifest is missing or damaged."""
    path = Path(folder) / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        digest = manifest.pop("xxh3")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if digest != xxhash.xxh3_128_hexdigest(_canonical(manifest)):
        raise CheckpointError(f"{path} is damaged: its xxh3 is not its own")
    if manifest["format"] != FORMAT:
        raise CheckpointError(f"{path} has format {manifest['format']}; this version reads {FORMAT}")
    return Checkpoint(folder=Path(folder), manifest=manifest)


def newest_whole_checkpoint(
    run_dir: str | Path, world: World, *, tell: Callable[[str], None] = lambda _: None
) -> Checkpoint | None:
    """Return the newest checkpoint whose every byte is as written, None where there is none at all; collective.

    Each file is hashed by one rank. A damaged checkpoint is told about and passed over; raises CheckpointError when
    checkpoints exist but none is whole, or when the ranks see different ones.
    """
    folders = list_checkpoints(run_dir)
    seen = world.gather([len(folders), _step_of(folders[-1]) if folders else -1])
    if (seen != seen[0]).any():
        different = f"{Path(run_dir) / FOLDER} is not the same on all ranks; put run_dir on shared storage"
        world.agree(CheckpointError(different))
    damages = []
    for folder in reversed(folders):
        try:
            return world.together(partial(_verified_share, folder, world))
        except CheckpointError as damage:
            damages.append(str(damage))
            tell(f"{damage}; falling back to the checkpoint before {folder.name}")
    if damages:
        world.agree(CheckpointError(f"no whole checkpoint in {Path(run_dir) / FOLDER}: {'; '.join(damages)}"))
    return None


def _verified_share(folder: Path, world: World) -> Checkpoint:
    checkpoint = read_checkpoint(folder)
    checkpoint.verify(world.rank, world.size)
    return checkpoint


def prune(run_dir: str | Path, keep: int, *, step: int) -> None:
    """Remove all but the newest `keep` complete checkpoints up to `step`, and what killed writers left behind.

    Later ones go too: they were damaged, and the run has been resumed from before them.
    """
    folders = list_checkpoints(run_dir)
    reached = [folder for folder in folders if _step_of(folder) <= step]
    for folder in folders:
        if folder not in reached[-keep:]:
            _discard(folder)
    for left in (Path(run_dir) / FOLDER).glob(".*-step-*"):
        shutil.rmtree(left, ignore_errors=True)


def _together(world: World, action: Callable[[], None], path: Path) -> None:
    def write() -> None:
        try:
            action()
        except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
            raise CheckpointError(
                f"cannot write {path} on rank {world.rank}: {error}; free space or change run_dir"
            ) from error

    world.together(write)


def _write_manifest(working: Path, engine: Engine, state: dict[str, Any]) -> None:
    files: dict[str, Any] = {}
    steps: dict[str, float] = {}
    for rank in range(engine.world.size):
        note = working / Path(_rank_file(rank)).with_suffix(".json")
        entry = json.loads(note.read_text(encoding="utf-8"))
        steps.update(entry.pop("steps"))
        files[_rank_file(rank)] = entry
        note.unlink()
    files[CONFIG] = {"bytes": (working / CONFIG).stat().st_size, "xxh3": hash_file(working / CONFIG)}
    manifest = {
        "format": FORMAT,
        "step": engine.step,
        "world_size": engine.world.size,
        "parameters": {
            name: {"shape": list(shape), "steps": steps.get(name, 0.0)} for name, shape in engine.shapes.items()
        },
        "files": files,
        "state": state,
    }
    manifest["xxh3"] = xxhash.xxh3_128_hexdigest(_canonical(manifest))
    (working / MANIFEST).write_bytes(_canonical(manifest))
    flush(working / MANIFEST)


def _make_visible(working: Path, final: Path) -> None:
    flush(working)
    if final.exists():  # written by an attempt that a resume from an older checkpoint has overtaken
        _discard(final)
    working.rename(final)
    flush(final.parent)


def _discard(folder: Path) -> None:
    """Take a checkpoint out of sight in one act, then delete it."""
    hidden = folder.with_name(f".discarded-{folder.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    folder.rename(hidden)
    shutil.rmtree(hidden)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _canonical(manifest: dict[str, Any]) -> bytes:
    return json.dumps(manifest, sort_keys=True, indent=1).encode()


def _rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def _rng() -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():  # not by a run on CPU, even where there is a device
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_rng(states: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(states["cuda"])
