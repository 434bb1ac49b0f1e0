"""The unit of parallel and of resumable work: a chunk of rows, encoded by one process into a spool.

Which rows a chunk holds depends on the listing and the seed alone, never on the number of workers. A chunk is two
files: `00000012.tar` (the samples' tar bytes end to end) and `00000012.json` (one entry per encoded row), which appears
last and marks the chunk as complete. Memory is one document. Rows that the listing has decided travel with their chunk
but cost no encoding.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import xxhash

from triweave.data_pipeline.filters.apply import filtered
from triweave.data_pipeline.filters.options import FilterOptions
from triweave.data_pipeline.shards.index import IndexRow
from triweave.data_pipeline.shards.ledger import LedgerRow
from triweave.data_pipeline.shards.manifest import file_xxh3
from triweave.data_pipeline.shards.media_encoder import MediaEncoder, MediaOptions
from triweave.data_pipeline.shards.schema import content_hash, document_key
from triweave.data_pipeline.shards.writer import EncodedSample, encode_sample
from triweave.data_pipeline.sources.base import FilteredError, Row, Source
from triweave.data_pipeline.worker_process import prepare_worker

CHUNK_ROWS = 256
_REASON_CHARACTERS = 300
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


class StoppedError(Exception):
    """Raised inside a worker when the build was interrupted."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Consecutive rows of the build order, CHUNK_ROWS of them undecided.

    start_row: position of the first in the build order.
    rows: each with its number in the listing.
    """

    number: int
    start_row: int
    rows: tuple[tuple[int, Row], ...]

    @property
    def end_row(self) -> int:
        """Return the position behind the last row in the build order."""
        return self.start_row + len(self.rows)

    @property
    def undecided(self) -> Chunk:
        """Return the chunk with only the rows that a worker must look at."""
        return replace(self, rows=tuple(item for item in self.rows if not item[1].is_decided))


@dataclass(frozen=True, kw_only=True)
class ChunkJob:
    """All a process needs to encode chunks: the source, the media options, the filters and the folder of spools."""

    source: Source
    media: MediaOptions
    filters: FilterOptions
    folder: Path

    def spool_path(self, number: int) -> Path:
        """Return the file of a chunk's samples."""
        return self.folder / f"{number:08d}.tar"

    def entries_path(self, number: int) -> Path:
        """Return the file of a chunk's entries, its completion marker."""
        return self.folder / f"{number:08d}.json"


class ChunkEncoder:
    """Encode chunks in one process."""

    def __init__(self, job: ChunkJob, stop: Event | None = None) -> None:
        cache_folder = job.folder / "media"
        cache_folder.mkdir(exist_ok=True)  # no parents: a worker of a killed build must not bring them back
        self._job = job
        root = job.source.root
        self._place = f"{root if root.is_dir() else root.parent}{os.sep}"  # where a corpus lies is not in its ledger
        self._media = MediaEncoder(job.media, cache_folder)
        self._stop = stop

    def encode(self, chunk: Chunk) -> None:
        """Write the two files of a chunk's undecided rows. Raises StoppedError between rows after an interrupt."""
        spool, entries = self._job.spool_path(chunk.number), self._job.entries_path(chunk.number)
        temporary = [path.with_name(f"{path.name}.{os.getpid()}.tmp") for path in (spool, entries)]
        contents: list[dict[str, Any]] = []
        digest = xxhash.xxh3_64()
        try:
            with open(temporary[0], "wb") as file:
                for number, row in chunk.undecided.rows:
                    if self._stop is not None and self._stop.is_set():
                        raise StoppedError
                    ledger_row, sample = self._encode_row(number, row)
                    contents.append({"ledger": vars(ledger_row), "index": sample and vars(sample.row)})
                    if sample is not None:
                        file.write(sample.data)
                        digest.update(sample.data)
            temporary[1].write_text(json.dumps({"xxh3": digest.hexdigest(), "rows": contents}), encoding="utf-8")
            temporary[0].replace(spool)
            temporary[1].replace(entries)
        finally:
            for path in temporary:
                path.unlink(missing_ok=True)

    def _encode_row(self, number: int, row: Row) -> tuple[LedgerRow, EncodedSample | None]:
        try:
            document = filtered(self._job.source.document(row, self._media), self._job.filters)
            sample = encode_sample(document_key(row.id), document)
            content = content_hash(document.parts)
        except FilteredError as why:
            return LedgerRow(row=number, id=row.id, status="filtered", reason=_one_line(str(why))), None
        except Exception as error:  # one bad row of a million must not end a build; the ledger names it
            reason = _one_line(f"{type(error).__name__}: {error}".replace(self._place, ""))
            return LedgerRow(row=number, id=row.id, status="failed", reason=reason), None
        kept = LedgerRow(
            row=number,
            id=row.id,
            status="kept",
            reason=_one_line(document.left_out),
            key=sample.row.key,
            content_xxh3=content,
        )
        return kept, sample


def _one_line(reason: str) -> str:
    """Return a reason as one line without memory addresses, which would make two equal builds differ."""
    line = _ADDRESS.sub("", " ".join(reason.split()))
    return line[:_REASON_CHARACTERS].encode("utf-8", "backslashreplace").decode()


def is_complete(job: ChunkJob, number: int) -> bool:
    """Return whether a chunk's files are there and whole; a spool that a power cut damaged is not."""
    try:
        entries = json.loads(job.entries_path(number).read_bytes())
        return bool(file_xxh3(job.spool_path(number)) == entries["xxh3"])
    except (OSError, ValueError):
        return False


def read_chunk(job: ChunkJob, chunk: Chunk) -> Iterator[tuple[LedgerRow, EncodedSample | None]]:
    """Yield each row of a complete chunk, with its sample if it became one."""
    encoded = iter(json.loads(job.entries_path(chunk.number).read_bytes())["rows"])
    with open(job.spool_path(chunk.number), "rb") as spool:
        for number, row in chunk.rows:
            if row.is_decided:
                yield _decided_row(number, row), None
                continue
            content = next(encoded)
            sample = None
            if content["index"] is not None:
                index_row = IndexRow(**content["index"])
                sample = EncodedSample(data=spool.read(index_row.size), row=index_row)
            yield LedgerRow(**content["ledger"]), sample


def _decided_row(number: int, row: Row) -> LedgerRow:
    if row.failed is not None:
        return LedgerRow(row=number, id=row.id, status="failed", reason=_one_line(row.failed))
    return LedgerRow(row=number, id=row.id, status="filtered", reason=_one_line(str(row.filtered)))


def remove_chunk(job: ChunkJob, number: int) -> None:
    """Remove a chunk whose rows are all in finished shards."""
    job.entries_path(number).unlink(missing_ok=True)
    job.spool_path(number).unlink(missing_ok=True)


def cut_chunks(rows: Sequence[Row], order: Sequence[int]) -> Iterator[Chunk]:
    """Yield the chunks of rows taken in `order`: each ends at its CHUNK_ROWS-th undecided row, or with the rows."""
    number = start_row = undecided = 0
    chosen: list[tuple[int, Row]] = []
    for position, index in enumerate(order):
        chosen.append((index, rows[index]))
        undecided += not rows[index].is_decided
        if undecided == CHUNK_ROWS or position + 1 == len(order):
            yield Chunk(number=number, start_row=start_row, rows=tuple(chosen))
            number, start_row, undecided, chosen = number + 1, position + 1, 0, []


_encoder: ChunkEncoder | None = None


def start_worker(job: ChunkJob, stop: Event) -> None:
    """Prepare a worker process."""
    global _encoder
    prepare_worker()
    _encoder = ChunkEncoder(job, stop)


def encode_in_worker(chunk: Chunk) -> None:
    """Encode a chunk in a prepared worker process."""
    assert _encoder is not None, "start_worker was not called"
    _encoder.encode(chunk)
