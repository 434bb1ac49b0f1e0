"""A complete checkpoint: its manifest, and loading from it.

The manifest is JSON with a checksum of its own: parameters with shapes and optimizer steps, files with sizes, checksums
and fragments, the resolved config, and what the run keeps beside the engine.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xxhash

from triweave.data_pipeline.storage.location import shown
from triweave.pretrain.checkpoints.reader import CheckpointReader, Wanted
from triweave.pretrain.checkpoints.snapshot import set_rng_states
from triweave.pretrain.checkpoints.stores import MANIFEST, read_manifest
from triweave.pretrain.errors import CheckpointError

if TYPE_CHECKING:
    from triweave.pretrain.engine.zero import Engine

FORMAT = 3
RANK_LIMIT = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint: its folder (or the Path of an s3:// prefix) and its manifest."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps behind it."""
        return int(self.manifest["step"])

    @property
    def state(self) -> dict[str, Any]:
        """What the run stored beside the engine: stream, lineage."""
        state: dict[str, Any] = self.manifest["state"]
        return state

    @property
    def config_yaml(self) -> str:
        """The resolved config of the run that wrote it."""
        return str(self.manifest["config"])

    @property
    def bytes(self) -> int:
        """Bytes of all its files but the manifest."""
        return sum(entry["bytes"] for entry in self.manifest["files"].values())

    @property
    def elements(self) -> int:
        """Elements of all its parameters."""
        return sum(math.prod(entry["shape"]) for entry in self.manifest["parameters"].values())

    @cached_property
    def reader(self) -> CheckpointReader:
        """Reads its parameters by name and range."""
        return CheckpointReader(self.folder, self.manifest["files"])

    def verify(self, rank: int = 0, size: int = 1) -> None:
        """Check every byte of every size-th file; raises CheckpointError naming the first damaged one."""
        self.reader.verify(sorted(self.manifest["files"])[rank::size])

    def load_into(self, engine: Engine) -> None:
        """Restore weights, moments, step counts and RNG of this rank; collective.

        Reads only what this rank needs. Bit-identical where the layout is the one that wrote it. Raises CheckpointError
        on all ranks where the model has other parameters. No save may be under way.
        """
        engine.world.together(lambda: self._restore_fragments(engine))
        engine.publish()
        engine.step = self.step

    def _restore_fragments(self, engine: Engine) -> None:
        stored = self.manifest["parameters"]
        if missing := sorted(set(engine.shapes) ^ set(stored)):
            where = "the model" if missing[0] in engine.shapes else "the checkpoint"
            raise CheckpointError(
                f"{shown(self.folder)}: parameter {missing[0]} is only in {where} ({len(missing)} differ); "
                "resume with the config of the run that wrote it, or start a new run_dir"
            )
        for name, shape in engine.shapes.items():
            if tuple(stored[name]["shape"]) != shape:
                raise CheckpointError(
                    f"{shown(self.folder)}: parameter {name} is {stored[name]['shape']} there and {list(shape)} in the "
                    "model; resume with the config of the run that wrote it, or start a new run_dir"
                )
        fragments = engine.fragments()
        self.reader.read(
            Wanted(target=target, kind=kind, name=fragment.name, offset=fragment.offset)
            for fragment in fragments
            for kind, target in fragment.tensors.items()
        )
        for fragment in fragments:
            if fragment.steps is not None:
                fragment.steps.fill_(stored[fragment.name]["steps"])
        if self.manifest["world_size"] == engine.world.size:
            set_rng_states(self.reader.rng(engine.world.rank))
        else:  # no rank's stream can go on; new ones, that no earlier step has drawn from
            torch.manual_seed(self.step * RANK_LIMIT + engine.world.rank)


def read_checkpoint(folder: str | Path) -> Checkpoint:
    """Return the checkpoint in a folder; raises CheckpointError where its manifest is missing or damaged."""
    path = Path(folder) / MANIFEST
    try:
        manifest = json.loads(read_manifest(Path(folder)).decode())
        digest = manifest.pop("xxh3")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{shown(path)} is damaged: {error}") from error
    if digest != xxhash.xxh3_128_hexdigest(_canonical(manifest)):
        raise CheckpointError(f"{shown(path)} is damaged: its xxh3 is not its own")
    if manifest["format"] != FORMAT:
        raise CheckpointError(f"{shown(path)} has format {manifest['format']}; this version reads {FORMAT}")
    return Checkpoint(folder=Path(folder), manifest=manifest)


def seal(manifest: dict[str, Any]) -> bytes:
    """Return the bytes of a manifest's file, its own checksum in it."""
    return _canonical({**manifest, "xxh3": xxhash.xxh3_128_hexdigest(_canonical(manifest))})


def _canonical(manifest: dict[str, Any]) -> bytes:
    return json.dumps(manifest, sort_keys=True, indent=1).encode()
