"""What the saving threads of all ranks say to each other, beside the training and unseen by its heartbeat."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from triweave.data_pipeline.errors import DataError
from triweave.pretrain.engine.world import World
from triweave.pretrain.errors import CheckpointError, PretrainError

PATIENCE = timedelta(hours=6)
"""How long a rank that has written waits for the slowest one."""
MESSAGE_BYTES = 4096
Result = TypeVar("Result")


class Peers:
    """A gloo group of its own for one thread of every rank. All methods but `close` are collective."""

    def __init__(self, world: World) -> None:
        """Open the group; collective, in the threads that train."""
        self.rank, self.size = world.rank, world.size
        self._group: Any = dist.new_group(backend="gloo", timeout=PATIENCE) if world.size > 1 else None

    def together(self, action: Callable[[], Result]) -> Result:
        """Return this rank's `action()`; raise CheckpointError on every rank if it fails on any."""
        result: list[Result] = []
        said = ""
        try:
            result.append(action())
        except (PretrainError, DataError, OSError, MemoryError) as error:
            said = f"{error or type(error).__name__}"[: MESSAGE_BYTES // 4]
        failures = [message for message in self._all(said) if message]
        if failures:
            raise CheckpointError(failures[0])
        return result[0]

    def to_first(self, text: str) -> list[str]:
        """Return every rank's text on rank 0, nothing elsewhere."""
        if self.size == 1:
            return [text]
        mine = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(mine)]), group=self._group)
        padded = torch.zeros(max(int(size) for size in sizes), dtype=torch.uint8)
        padded[: len(mine)] = mine
        rows = [torch.empty_like(padded) for _ in sizes] if self.rank == 0 else None
        dist.gather(padded, rows, dst=0, group=self._group)
        return [row[: int(size)].numpy().tobytes().decode() for row, size in zip(rows or (), sizes, strict=False)]

    def sum(self, number: int) -> int:
        """Return the sum of every rank's number."""
        total = torch.tensor([number])
        if self.size > 1:
            dist.all_reduce(total, group=self._group)
        return int(total)

    def close(self) -> None:
        """Leave the group."""
        if self._group is not None:
            dist.destroy_process_group(self._group)

    def _all(self, message: str) -> list[str]:
        """Return every rank's message."""
        if self.size == 1:
            return [message]
        mine = torch.zeros(MESSAGE_BYTES, dtype=torch.uint8)
        encoded = bytearray(message.encode(errors="backslashreplace"))
        if encoded:
            mine[: len(encoded)] = torch.frombuffer(encoded, dtype=torch.uint8)
        rows = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(rows, mine, group=self._group)
        return [row.numpy().tobytes().rstrip(b"\0").decode(errors="replace") for row in rows]
