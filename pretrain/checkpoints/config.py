"""When to checkpoint, where to, and what to keep."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from triweave.data_pipeline.errors import StorageError
from triweave.data_pipeline.storage.location import is_remote, object_location
from triweave.pretrain.errors import PretrainError

FOLDER = "checkpoints"
"""Folder of a run_dir that its checkpoints lie in, unless `checkpoint.location` names another place."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to checkpoint, where to, and what to keep."""

    every_steps: int = 1000
    """A checkpoint after each so many steps (and after the last one); 0 only after the last one."""
    keep: int = 2
    """Newest complete checkpoints that stay; older ones are removed."""
    keep_every_steps: int = 0
    """Checkpoints of multiples of so many steps stay for good; 0: none does."""
    background: bool = True
    """Write while training goes on: a step waits only where it would change what is not copied yet."""
    location: str = ""
    """Folder or s3://bucket/prefix of the checkpoints, seen by all ranks; empty: run_dir/checkpoints."""

    def __post_init__(self) -> None:
        for name in ("every_steps", "keep_every_steps"):
            if getattr(self, name) < 0:
                raise PretrainError(f"checkpoint.{name} is {getattr(self, name)}; it must be 0 or above")
        if self.keep < 1:
            raise PretrainError(f"checkpoint.keep is {self.keep}; keep at least 1")
        if self.keep_every_steps and self.every_steps and self.keep_every_steps % self.every_steps:
            raise PretrainError(
                f"checkpoint.keep_every_steps is {self.keep_every_steps}, no multiple of checkpoint.every_steps="
                f"{self.every_steps}, so no checkpoint would be of such a step; set it to a multiple"
            )
        if is_remote(self.location):
            try:
                object_location(self.location)
            except StorageError as error:
                raise PretrainError(f"checkpoint.location: {error}") from None
        elif "://" in self.location:
            raise PretrainError(f"checkpoint.location is {self.location}; it must be a folder or s3://bucket/prefix")

    def due(self, step: int, last_step: int) -> bool:
        """Return whether a checkpoint follows this step."""
        return step == last_step or bool(self.every_steps and step % self.every_steps == 0)

    def root(self, run_dir: str | Path) -> Path:
        """Return where the checkpoints of a run lie: a folder, or a Path of an s3:// prefix."""
        return Path(self.location) if self.location else Path(run_dir) / FOLDER
