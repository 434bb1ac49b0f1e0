"""The finished build that `--retry-failed` starts from: what it settled is copied, what failed is tried again.

The result is what a fresh build of the present input would be, byte for byte, as long as the codecs are of the same
versions. So the listing may differ from the earlier one in the rows that failed alone, and where near duplicates are
looked for, the rows that were duplicates are encoded again: a row that now succeeds may be another one's first twin.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pyarrow as pa
import pyarrow.compute as pc

from triweave.data_pipeline.errors import BuildError
from triweave.data_pipeline.shards.index import IndexRow, read_index
from triweave.data_pipeline.shards.ledger import LedgerRow, read_ledger
from triweave.data_pipeline.shards.manifest import Manifest
from triweave.data_pipeline.shards.row_encoder import EncodedRow, RowPipeline
from triweave.data_pipeline.shards.stored_documents import stored_document
from triweave.data_pipeline.shards.writer import EncodedSample
from triweave.data_pipeline.sources.base import Row, row_hash
from triweave.data_pipeline.stream.reader import CorruptSampleError, ShardReader

_BLOCK_ROWS = 4096


@dataclass(frozen=True, kw_only=True)
class EarlierBuild:
    """A finished build and the pipeline that made it.

    Memory: its ledger, and the index of one shard.
    """

    manifest: Manifest
    pipeline: RowPipeline
    ledger: pa.Table = field(repr=False)

    @classmethod
    def load(cls, manifest: Manifest, pipeline: RowPipeline) -> EarlierBuild:
        """Read the ledger. Raises BuildError for one that does not know the rows' inputs."""
        ledger = read_ledger(manifest.ledger_path)
        if "input_xxh3" not in ledger.column_names:
            raise BuildError(f"{manifest.ledger_path}: does not say what its rows were made from: use --overwrite")
        return cls(manifest=manifest, pipeline=pipeline, ledger=ledger)

    def require_same_listing(self, rows: list[Row], order: list[int]) -> None:
        """Raise BuildError unless the listing is the earlier one, but for the rows that failed."""
        advice = "--retry-failed takes changes of failed rows alone; build everything with --overwrite"
        if self.ledger["row"].to_pylist() != order:
            raise BuildError(f"{self.manifest.root}: rows were added, removed or renamed since it was built: {advice}")
        there, statuses = self.ledger["input_xxh3"].to_pylist(), self.ledger["status"].to_pylist()
        for position, number in enumerate(order):
            row = rows[number]
            if statuses[position] != "failed" and there[position] != row_hash(row):
                raise BuildError(f"{self.manifest.root}: row {row.id!r} has changed since it was built: {advice}")

    def settled(self) -> frozenset[int]:
        """Return the rows of the listing whose result is taken over."""
        retried = ("failed",) if self.pipeline.near_duplicates is None else ("failed", "duplicate")
        again = pc.is_in(self.ledger["status"], pa.array(retried))
        return frozenset(self.ledger.filter(pc.invert(again))["row"].to_pylist())

    def results(self, start_row: int) -> Iterator[EncodedRow]:
        """Yield the rows of the build order from `start_row` on; samples and signatures come with the kept ones.

        Raises BuildError where a sample is damaged.
        """
        kept_before = pc.sum(pc.equal(self.ledger["status"].slice(0, start_row), "kept")).as_py() or 0
        samples = self._samples(kept_before)
        for start in range(start_row, len(self.ledger), _BLOCK_ROWS):
            for content in self.ledger.slice(start, _BLOCK_ROWS).to_pylist():
                row = replace(LedgerRow(**content), shard="")
                sample, signature = next(samples) if row.status == "kept" else (None, b"")
                yield EncodedRow(ledger=row, sample=sample, signature=signature)

    def _samples(self, skipped: int) -> Iterator[tuple[EncodedSample, bytes]]:
        """Yield sample and signature of each kept row as it stands in its shard, without the first `skipped`."""
        near, reader = self.pipeline.near_duplicates, ShardReader()
        for number, shard in enumerate(self.manifest.shards):
            if skipped >= shard.samples:
                skipped -= shard.samples
                continue
            index = read_index(self.manifest, number)
            for start in range(skipped, len(index), _BLOCK_ROWS):
                for content in index.slice(start, _BLOCK_ROWS).to_pylist():
                    row = IndexRow(**content)
                    data = bytes(self._read(reader, number, row))
                    signature = b"" if near is None else near.signature(stored_document(data, row))
                    yield EncodedSample(data=data, row=row.moved_to(0)), signature
            skipped = 0

    def _read(self, reader: ShardReader, number: int, row: IndexRow) -> memoryview:
        try:
            return reader.read(str(self.manifest.tar_path(number)), row.offset, row.size, row.xxh3)
        except CorruptSampleError as error:
            raise BuildError(
                f"{self.manifest.tar_path(number)}, {row.key}: {error}: run `triweave verify {self.manifest.root}`"
            ) from None
