"""What an engine is: the processes that encode chunks. Which ones never shows in the bytes."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Protocol

from triweave.data_pipeline.shards.chunks import Chunk, ChunkJob


class Engine(Protocol):
    """Encodes chunks in other processes or in this one."""

    def encoded(self, job: ChunkJob, chunks: Iterator[Chunk]) -> Generator[Chunk, None, None]:
        """Yield the chunks in order, each once its files are in the job's folder; closing it ends all work.

        Chunks whose files are there already are not encoded again. Raises BuildError where processes die.
        """
