"""A source for the build tests, in a module of its own so that worker processes can import it, and run as a script.

    python slow_source.py OUT WORKERS KILL_AT SECONDS_PER_ROW [ENGINE]

builds 1,400 short documents; at row KILL_AT the whole build is killed with SIGKILL, once per OUT (-1: never).
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from triweave.data_pipeline.errors import MediaError
from triweave.data_pipeline.shards.build import BuildOptions, build
from triweave.data_pipeline.shards.media_encoder import MediaEncoder
from triweave.data_pipeline.shards.schema import Document, TextPart
from triweave.data_pipeline.shards.steps import Twin
from triweave.data_pipeline.sources.base import FilteredError, Row

ROWS = 1400
SHARD_SIZE_BYTES = 400_000


@dataclass(frozen=True, kw_only=True)
class NumberSource:
    """Documents `number N`; some are filtered, fail, or repeat an earlier text.

    nodes: folder for an empty file named after each machine (TEST_NODE in the environment) that made one.
    """

    root: Path = Path("numbers")
    rows_total: int = ROWS
    kill_at: int = -1
    kill_marker: Path | None = None
    kill_pid: int = 0
    seconds_per_row: float = 0.0
    nodes: Path | None = None
    name: str = "numbers"

    @property
    def options(self) -> dict[str, Any]:
        """Return no options."""
        return {}

    def rows(self) -> Iterator[Row]:
        """List the numbers; every 50th is filtered by the listing."""
        for number in range(self.rows_total):
            yield Row(id=f"row {number}", recipe=number, filtered="a fiftieth" if number % 50 == 49 else None)

    def document(self, row: Row, encoder: MediaEncoder) -> Document:  # noqa: ARG002 - the protocol's signature
        """Make one document, or kill the build."""
        number = int(row.recipe)
        time.sleep(self.seconds_per_row)
        if self.nodes is not None:
            (self.nodes / os.environ["TEST_NODE"]).touch()
        if number == self.kill_at and self.kill_marker is not None and not self.kill_marker.exists():
            self.kill_marker.touch()
            os.kill(self.kill_pid, signal.SIGKILL)
            time.sleep(60)
        if number % 50 == 7:
            raise FilteredError("a seventh")
        if number % 50 == 11:
            raise MediaError(f"number {number} is damaged")
        text = f"number {number - 1 if number % 50 == 13 else number} " + "x" * (number % 300)
        if number % 50 == 13:
            text = f"number {number - 1} " + "x" * ((number - 1) % 300)
        return Document(id=row.id, parts=(TextPart(text=text),), labels={"number": number})


@dataclass(frozen=True, kw_only=True)
class SuffixStep:
    """Put a suffix behind every text; documents of numbers that 5 divides are left out, those of 101 fail."""

    suffix: str
    name: str = "suffix"
    before_filters: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Return the suffix."""
        return {"suffix": self.suffix}

    def apply(self, document: Document) -> Document:
        """Return the longer document."""
        (part,) = document.parts
        assert isinstance(part, TextPart)
        if document.labels["number"] % 5 == 0:
            raise FilteredError("a fifth")
        if document.labels["number"] == 101:
            raise ValueError("no suffix for 101")
        labels = document.labels | {"length": len(part.text)}
        return replace(document, parts=(TextPart(text=part.text + self.suffix),), labels=labels, left_out="lengthened")


@dataclass(frozen=True, kw_only=True)
class NeighbourTwins:
    """Take numbers of the same ten for near duplicates; those below 100 have no signature."""

    @property
    def options(self) -> dict[str, Any]:
        """Return how near."""
        return {"numbers": 10}

    def signature(self, document: Document) -> bytes:
        """Return the ten of the number that the text begins with."""
        (part,) = document.parts
        assert isinstance(part, TextPart)
        number = int(part.text.split()[1])
        return b"" if number < 100 else str(number // 10).encode()

    def index(self, folder: Path) -> TenIndex:
        """Return an empty index."""
        assert folder.is_dir()
        return TenIndex()


class TenIndex:
    """Ten -> the first kept document."""

    def __init__(self) -> None:
        self._first: dict[bytes, str] = {}

    def twin(self, signature: bytes) -> Twin | None:
        """Return the first of the same ten."""
        first = self._first.get(signature)
        return None if first is None else Twin(id=first, reason="the same ten")

    def add(self, document_id: str, signature: bytes) -> None:
        """Remember a kept one, which is the first of its ten."""
        assert self._first.setdefault(signature, document_id) == document_id


def main() -> None:
    """Build as the arguments say."""
    out, workers, kill_at, seconds_per_row = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
    source = NumberSource(
        kill_at=kill_at,
        kill_marker=out.with_suffix(".killed"),
        kill_pid=os.getpid(),
        seconds_per_row=seconds_per_row,
    )
    try:
        engine = "ray" if sys.argv[5:] == ["ray"] else "local"
        build(source, out, BuildOptions(shard_size_bytes=SHARD_SIZE_BYTES, workers=workers, engine=engine))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
