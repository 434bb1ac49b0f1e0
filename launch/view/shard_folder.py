"""One shard folder as the viewer reads it: any sample by its number, through the loader's own reading code.

Samples are numbered from 0 in the order of the shards. Indices are read when a shard is first looked at; the latest of
these tables are kept, TABLES_BYTES at most, so that a folder of any size opens at once and costs little memory.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from triweave.data_pipeline.shards.index import read_index
from triweave.data_pipeline.shards.manifest import Manifest
from triweave.data_pipeline.shards.schema import Document, document_from_json
from triweave.data_pipeline.storage.location import is_remote
from triweave.data_pipeline.stream.reader import CorruptSampleError, ShardReader
from triweave.launch.errors import ViewError

_RANGES = ("offset", "size", "xxh3", "json_offset", "json_size")
ASKED_AHEAD = 32
"""Samples that are sent for together where a search reads from an object store."""
TABLES_BYTES = 192 << 20
"""Most memory that kept indices take; the latest one is kept whatever it takes."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One sample, verified. row: its row of the index. content: its bytes in the tar, from row["offset"] on."""

    number: int
    shard: str
    row: dict[str, Any]
    content: memoryview

    @cached_property
    def json_bytes(self) -> bytes:
        """The JSON of the document as it was written."""
        start = self.row["json_offset"] - self.row["offset"]
        return bytes(self.content[start : start + self.row["json_size"]])

    @cached_property
    def document(self) -> Document:
        """The document; media parts come without their bytes. Raises SchemaError, and RecursionError on a deep one."""
        return document_from_json(self.json_bytes)

    def medium(self, part: int) -> bytes:
        """Return the bytes of a media part, found by the index: what the JSON calls the member does not matter."""
        start = self.row["part_offset"][part] - self.row["offset"]
        if self.row["part_offset"][part] < 0:
            raise ViewError(f"part {part} is text, which has no bytes of its own")
        return bytes(self.content[start : start + self.row["part_size"][part]])


class ShardFolder:
    """A finished shard folder; usable from several threads."""

    def __init__(self, name: str, location: str) -> None:
        """Read the manifest. Raises DataError."""
        self.name = name
        self.location = location
        self.manifest = Manifest.load(location)
        counts = [shard.samples for shard in self.manifest.shards]
        self.first_samples: npt.NDArray[np.int64] = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self._reader = ShardReader()
        self._tables: OrderedDict[int, pa.Table] = OrderedDict()
        self._latest_columns: tuple[int, pa.Table] | None = None
        self._lock = threading.Lock()

    @property
    def samples(self) -> int:
        """Samples of all shards."""
        return int(self.first_samples[-1])

    def place(self, number: int) -> tuple[int, int]:
        """Return (shard, row in it) of a sample. Raises ViewError for a number that the folder does not have."""
        if not 0 <= number < self.samples:
            raise ViewError(f"sample {number}: {self.name} has the samples 0 to {self.samples - 1}")
        shard = int(np.searchsorted(self.first_samples, number, side="right")) - 1
        return shard, number - int(self.first_samples[shard])

    def sample(self, number: int) -> Sample:
        """Read one sample and check its hash. Raises ViewError, DataError and CorruptSampleError."""
        shard, place = self.place(number)
        row = self._table(shard).slice(place, 1).to_pylist()[0]
        with self._lock:
            content = self._reader.read(str(self.manifest.tar_path(shard)), row["offset"], row["size"], row["xxh3"])
        return Sample(number=number, shard=self.manifest.shards[shard].name, row=row, content=content)

    def texts(self, shard: int, places: npt.NDArray[np.int64]) -> Iterator[str | None]:
        """Yield the text parts and alt texts of samples of one shard, a line each; None for one that is damaged.

        For searching: it makes no rows and no documents, which is several times as fast. Raises DataError.
        """
        table = self._table(shard)
        ranges = list(zip(*(table[name].to_numpy()[places].tolist() for name in _RANGES), strict=True))
        tar = str(self.manifest.tar_path(shard))
        for place, (offset, size, xxh3, json_offset, json_size) in enumerate(ranges):
            try:
                with self._lock:
                    if place % ASKED_AHEAD == 0 and is_remote(tar):
                        self._reader.ask((tar, *found[:2]) for found in ranges[place : place + 2 * ASKED_AHEAD])
                    content = self._reader.read(tar, offset, size, xxh3)
                start = json_offset - offset
                parts = json.loads(str(content[start : start + json_size], "utf-8"))["parts"]
                yield "\n".join([part.get("text") or part.get("alt") or "" for part in parts])
            except (CorruptSampleError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
                yield None

    def ask(self, numbers: Sequence[int]) -> None:
        """Send for samples that will be read soon; does nothing for a folder of this machine. Raises DataError."""
        if not is_remote(self.manifest.root):
            return
        rows = [(self.place(number)[0], self.row(number)) for number in numbers]
        with self._lock:
            self._reader.ask((str(self.manifest.tar_path(shard)), row["offset"], row["size"]) for shard, row in rows)

    def row(self, number: int) -> dict[str, Any]:
        """Return the index row of a sample, also of one whose bytes are damaged."""
        shard, place = self.place(number)
        return dict(self._table(shard).slice(place, 1).to_pylist()[0])

    def columns(self, shard: int, names: tuple[str, ...]) -> pa.Table:
        """Return columns of a shard's index; those of the latest shard are kept, for a search in many calls."""
        with self._lock:
            if (table := self._tables.get(shard)) is not None:
                return table.select(names)
            if self._latest_columns and self._latest_columns[0] == shard:
                kept = self._latest_columns[1]
                if set(names) <= set(kept.column_names):
                    return kept.select(names)
            table = read_index(self.manifest, shard, names)
            self._latest_columns = (shard, table)
            return table

    def _table(self, shard: int) -> pa.Table:
        with self._lock:
            if shard not in self._tables:
                self._tables[shard] = read_index(self.manifest, shard)
                while len(self._tables) > 1 and sum(table.nbytes for table in self._tables.values()) > TABLES_BYTES:
                    self._tables.popitem(last=False)
            self._tables.move_to_end(shard)
            return self._tables[shard]
