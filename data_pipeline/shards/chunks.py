"""The unit of parallel and of resumable work: a chunk of rows, encoded by one process into a spool.

Which rows a chunk holds depends on the listing and the seed alone, never on the number of workers. A chunk is two
files: `00000012.tar` (the samples' tar bytes end to end) and `00000012.json` (one entry per encoded row), which appears
last and marks the chunk as complete. Memory is one document. Rows that the listing has decided travel with their chunk
but cost no encoding.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from triweave.data_pipeline.shards.index import IndexRow
from triweave.data_pipeline.shards.ledger import LedgerRow
from triweave.data_pipeline.shards.manifest import file_xxh3
from triweave.data_pipeline.shards.row_encoder import EncodedRow, RowEncoder, RowPipeline, decided_row
from triweave.data_pipeline.shards.writer import EncodedSample
from triweave.data_pipeline.sources.base import Row

CHUNK_ROWS = 64
"""Few enough that two hundred documents of a dozen clips each keep four processes busy; no byte depends on it."""


class StoppedError(Exception):
    """Raised inside a worker when the build was interrupted."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Consecutive rows of the build order, CHUNK_ROWS of them undecided.

    start_row: position of the first in the build order.
    rows: each with its number in the listing.
    settled: numbers of those whose result an earlier build gives.
    """

    number: int
    start_row: int
    rows: tuple[tuple[int, Row], ...]
    settled: frozenset[int] = frozenset()

    @property
    def end_row(self) -> int:
        """Return the position behind the last row in the build order."""
        return self.start_row + len(self.rows)

    @property
    def undecided(self) -> Chunk:
        """Return the chunk with only the rows that a worker must look at."""
        open_rows = (item for item in self.rows if not item[1].is_decided and item[0] not in self.settled)
        return replace(self, rows=tuple(open_rows), settled=frozenset())


@dataclass(frozen=True, kw_only=True)
class ChunkJob:
    """All a process needs to encode chunks: what makes a sample of a row, and the folder of spools."""

    pipeline: RowPipeline
    folder: Path

    def spool_path(self, number: int) -> Path:
        """Return the file of a chunk's samples."""
        return self.folder / f"{number:08d}.tar"

    def entries_path(self, number: int) -> Path:
        """Return the file of a chunk's entries, its completion marker."""
        return self.folder / f"{number:08d}.json"


class ChunkEncoder:
    """Encode chunks in one process, into the folder of spools."""

    def __init__(self, job: ChunkJob, stop: Event | None = None) -> None:
        cache_folder = job.folder / "media"
        cache_folder.mkdir(exist_ok=True)  # no parents: a worker of a killed build must not bring them back
        self._job = job
        self._rows = RowEncoder(job.pipeline, cache_folder)
        self._stop = stop

    def encode(self, chunk: Chunk) -> None:
        """Write the two files of a chunk's undecided rows. Raises StoppedError between rows after an interrupt."""
        with _chunk_files(self._job, chunk.number) as (spool, entries), open(spool, "wb") as file:
            entries.write_bytes(encode_rows(self._rows, chunk, file, self._stop))


def encode_rows(encoder: RowEncoder, chunk: Chunk, spool: BinaryIO, stop: Event | None = None) -> bytes:
    """Write the samples of a chunk's undecided rows to `spool` and return the bytes of its entries file."""
    contents: list[dict[str, Any]] = []
    digest = xxhash.xxh3_64()
    for number, row in chunk.undecided.rows:
        if stop is not None and stop.is_set():
            raise StoppedError
        encoded = encoder.encode(number, row)
        entry = {"ledger": vars(encoded.ledger), "index": encoded.sample and vars(encoded.sample.row)}
        contents.append(entry | {"signature": base64.b64encode(encoded.signature).decode()})
        if encoded.sample is not None:
            spool.write(encoded.sample.data)
            digest.update(encoded.sample.data)
    whole = {"xxh3": digest.hexdigest(), "seconds": encoder.clock.take(), "rows": contents}
    return json.dumps(whole).encode()


def store_chunk(job: ChunkJob, number: int, spool: bytes, entries: bytes) -> None:
    """Write the two files of a chunk that was encoded elsewhere."""
    with _chunk_files(job, number) as (spool_path, entries_path):
        spool_path.write_bytes(spool)
        entries_path.write_bytes(entries)


@contextmanager
def _chunk_files(job: ChunkJob, number: int) -> Iterator[tuple[Path, Path]]:
    """Yield the paths to write spool and entries to; they take their names together, the entries last."""
    finals = (job.spool_path(number), job.entries_path(number))
    spool, entries = (path.with_name(f"{path.name}.{os.getpid()}.tmp") for path in finals)
    try:
        yield spool, entries
        spool.replace(finals[0])
        entries.replace(finals[1])
    finally:
        for path in (spool, entries):
            path.unlink(missing_ok=True)


def is_complete(job: ChunkJob, number: int) -> bool:
    """Return whether a chunk's files are there and whole; a spool that a power cut damaged is not."""
    try:
        entries = json.loads(job.entries_path(number).read_bytes())
        return bool(file_xxh3(job.spool_path(number)) == entries["xxh3"])
    except (OSError, ValueError):
        return False


def read_chunk(job: ChunkJob, chunk: Chunk, earlier: Iterator[EncodedRow] | None = None) -> Iterator[EncodedRow]:
    """Yield each row of a complete chunk, with its sample if it became one.

    earlier: what an earlier build made of this chunk's rows, of every one in order; the settled rows are taken from it.
    """
    encoded = iter(json.loads(job.entries_path(chunk.number).read_bytes())["rows"])
    with open(job.spool_path(chunk.number), "rb") as spool:
        for number, row in chunk.rows:
            before = next(earlier) if earlier is not None else None
            if row.is_decided:
                yield EncodedRow(ledger=decided_row(number, row))
            elif before is not None and number in chunk.settled:
                yield before
            else:
                yield _read_row(spool, next(encoded))


def _read_row(spool: BinaryIO, content: dict[str, Any]) -> EncodedRow:
    sample = None
    if content["index"] is not None:
        index_row = IndexRow(**content["index"])
        sample = EncodedSample(data=spool.read(index_row.size), row=index_row)
    signature = base64.b64decode(content["signature"])
    return EncodedRow(ledger=LedgerRow(**content["ledger"]), sample=sample, signature=signature)


def chunk_seconds(job: ChunkJob, number: int) -> dict[str, float]:
    """Return stage -> seconds that the rows of a complete chunk took its worker."""
    return dict(json.loads(job.entries_path(number).read_bytes())["seconds"])


def remove_chunk(job: ChunkJob, number: int) -> None:
    """Remove a chunk whose rows are all in finished shards."""
    job.entries_path(number).unlink(missing_ok=True)
    job.spool_path(number).unlink(missing_ok=True)


def cut_chunks(rows: Sequence[Row], order: Sequence[int], settled: Container[int] = frozenset()) -> Iterator[Chunk]:
    """Yield the chunks of rows taken in `order`: each ends at its CHUNK_ROWS-th undecided row, or with the rows."""
    number = start_row = undecided = 0
    chosen: list[tuple[int, Row]] = []
    for position, index in enumerate(order):
        chosen.append((index, rows[index]))
        undecided += not rows[index].is_decided and index not in settled
        if undecided == CHUNK_ROWS or position + 1 == len(order):
            known = frozenset(at for at, _ in chosen if at in settled)
            yield Chunk(number=number, start_row=start_row, rows=tuple(chosen), settled=known)
            number, start_row, undecided, chosen = number + 1, position + 1, 0, []
