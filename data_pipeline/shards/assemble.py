"""Put encoded samples into shards, in build order: one process, plain copying, duplicates dropped, shards sealed.

A sealed shard is recorded by a marker `shard-000003.json` (its entry and how many rows it accounts for) beside its
piece of the ledger. A build that is run again continues behind the last marker.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from triweave.data_pipeline.errors import BuildError
from triweave.data_pipeline.shards.ledger import LedgerRow, read_ledger, write_ledger
from triweave.data_pipeline.shards.manifest import ShardEntry, write_atomically
from triweave.data_pipeline.shards.row_encoder import EncodedRow
from triweave.data_pipeline.shards.steps import NearDuplicates, Twin
from triweave.data_pipeline.shards.writer import ShardWriter

_SIGNATURES = pa.schema([("id", pa.string()), ("signature", pa.binary())])


@dataclass(frozen=True, kw_only=True)
class SealedShard:
    """A finished shard; `end_row` rows of the build order are accounted for by it and those before it."""

    entry: ShardEntry | None
    end_row: int


class Assembler:
    """Write shards from a stream of rows in build order.

    folder: where shards appear. markers: the folder of markers and ledger pieces.
    near: finds near duplicates; None leaves them in.
    Memory: one sample, one shard's index rows and ledger rows, and one hash per kept row of the whole input, with its
    signature where near duplicates are looked for.
    """

    def __init__(
        self,
        folder: Path,
        markers: Path,
        *,
        shard_size_bytes: int,
        deduplicate: bool,
        near: NearDuplicates | None = None,
    ) -> None:
        self._folder = folder
        self._markers = markers
        self._shard_size_bytes = shard_size_bytes
        self._deduplicate = deduplicate
        self._first_with: dict[bytes, str] = {}
        self._near = None if near is None else near.index(markers)
        self._signatures: list[dict[str, Any]] = []
        self._writer: ShardWriter | None = None
        self._ledger: list[LedgerRow] = []
        self.sealed: list[SealedShard] = []
        self.rows_done = 0
        self._recover()

    @property
    def sealed_rows(self) -> int:
        """Return how many rows of the build order the sealed shards account for."""
        return self.sealed[-1].end_row if self.sealed else 0

    @property
    def entries(self) -> tuple[ShardEntry, ...]:
        """Return the entries of the sealed shards."""
        return tuple(shard.entry for shard in self.sealed if shard.entry is not None)

    def ledger_pieces(self) -> list[Path]:
        """Return the ledger pieces of the sealed shards, in order."""
        return [self._ledger_path(number) for number in range(len(self.sealed))]

    def add(self, encoded: EncodedRow) -> None:
        """Account for the next row of the build order, and store its sample unless it is a duplicate."""
        row, sample = encoded.ledger, encoded.sample
        settled = row.status == "duplicate"  # by an earlier build, where the first of its kind may have been another
        if (sample is not None or settled) and (twin := self._twin(row, encoded.signature)) is not None:
            row = replace(row, status="duplicate", reason=twin.reason, duplicate_of=twin.id, key="")
            sample = None
        if sample is not None:
            if self._writer is not None and self._writer.tar_bytes + len(sample.data) > self._shard_size_bytes:
                self.seal()
            if self._writer is None:
                self._writer = ShardWriter(self._folder, shard_name(len(self.sealed)))
            self._writer.append(sample)
            row = replace(row, shard=self._writer.name)
            self._remember(row.id, row.content_xxh3, encoded.signature)
            if encoded.signature:
                self._signatures.append({"id": row.id, "signature": encoded.signature})
        self._ledger.append(row)
        self.rows_done += 1

    def _twin(self, row: LedgerRow, signature: bytes) -> Twin | None:
        """Return the kept row that a new one repeats, exactly or nearly."""
        if self._deduplicate and (first := self._first_with.get(bytes.fromhex(row.content_xxh3))) is not None:
            return Twin(id=first, reason="same parts")
        return self._near.twin(signature) if self._near is not None and signature else None

    def _remember(self, row_id: str, content_xxh3: str, signature: bytes) -> None:
        """Take a kept row for one that later rows may repeat."""
        if self._deduplicate:
            self._first_with[bytes.fromhex(content_xxh3)] = row_id
        if self._near is not None and signature:
            self._near.add(row_id, signature)

    def seal(self) -> None:
        """Finish the open shard and record it; rows that follow the last sample may have no shard of their own."""
        if not self._ledger:
            return
        entry = None
        if self._writer is not None:
            entry = self._writer.seal()
            self._writer = None
        number = len(self.sealed)
        shard = SealedShard(entry=entry, end_row=self.rows_done)
        write_ledger(self._ledger_path(number), self._ledger)
        if self._near is not None:
            table = pa.Table.from_pylist(self._signatures, schema=_SIGNATURES)
            pq.write_table(table, self._signatures_path(number), compression="zstd")
        self._ledger, self._signatures = [], []
        content = {"entry": entry and asdict(entry), "end_row": shard.end_row}
        write_atomically(self._marker_path(number), json.dumps(content).encode())
        self.sealed.append(shard)

    def close(self) -> None:
        """Drop the open shard, if any."""
        if self._writer is not None:
            self._writer.__exit__(None, None, None)
            self._writer = None
        for path in self._folder.glob("shard-*.tmp"):  # of an interrupt between a file's opening and `_writer`
            path.unlink(missing_ok=True)

    def _recover(self) -> None:
        """Take over the shards that an earlier run sealed."""
        while self._marker_path(len(self.sealed)).exists():
            marker: dict[str, Any] = json.loads(self._marker_path(len(self.sealed)).read_bytes())
            entry = ShardEntry(**marker["entry"]) if marker["entry"] else None
            if entry is not None:
                require_size(self._folder, entry)
            self._recall(len(self.sealed))
            self.sealed.append(SealedShard(entry=entry, end_row=marker["end_row"]))
        self.rows_done = self.sealed_rows

    def _recall(self, number: int) -> None:
        """Remember the kept rows of a sealed shard."""
        ledger = read_ledger(self._ledger_path(number), ["id", "status", "content_xxh3"]).to_pylist()
        signature: dict[str, bytes] = {}
        if self._near is not None:
            table = pq.ParquetFile(self._signatures_path(number)).read(use_threads=False)
            signature = dict(zip(table["id"].to_pylist(), table["signature"].to_pylist(), strict=True))
        for row in ledger:
            if row["status"] == "kept":
                self._remember(row["id"], row["content_xxh3"], signature.get(row["id"], b""))

    def _marker_path(self, number: int) -> Path:
        return self._markers / f"{shard_name(number)}.json"

    def _ledger_path(self, number: int) -> Path:
        return self._markers / f"{shard_name(number)}.ledger.parquet"

    def _signatures_path(self, number: int) -> Path:
        return self._markers / f"{shard_name(number)}.signatures.parquet"


def shard_name(number: int) -> str:
    """Return the name of shard `number`, the stem of its files."""
    return f"shard-{number:06d}"


def require_size(folder: Path, entry: ShardEntry) -> None:
    """Raise BuildError unless the tar of a finished shard is there with its size, and both indices too."""
    tar = folder / f"{entry.name}.tar"
    missing = [path for path in (tar, folder / f"{entry.name}.tar.idx", folder / f"{entry.name}.parquet")
               if not path.is_file()]  # fmt: skip
    if missing:
        raise BuildError(f"{missing[0]} was finished and is gone: restore it, or build everything with --overwrite")
    if tar.stat().st_size != entry.tar_bytes:
        raise BuildError(
            f"{tar} has {tar.stat().st_size} bytes instead of {entry.tar_bytes}: restore it, or build everything "
            "with --overwrite"
        )
