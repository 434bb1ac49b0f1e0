"""One row of input into one sample: source, filters, document steps, tar bytes. The same bytes in any process."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triweave.data_pipeline.errors import BlockedMediaError
from triweave.data_pipeline.filters.apply import filtered
from triweave.data_pipeline.filters.options import FilterOptions
from triweave.data_pipeline.scrub.blocklist_step import BlocklistStep
from triweave.data_pipeline.scrub.step import ScrubStep
from triweave.data_pipeline.shards.ledger import LedgerRow, RowStatus
from triweave.data_pipeline.shards.media_encoder import MediaEncoder, MediaOptions
from triweave.data_pipeline.shards.schema import Document, content_hash, document_key
from triweave.data_pipeline.shards.stage_times import StageClock
from triweave.data_pipeline.shards.steps import DocumentStep, NearDuplicates
from triweave.data_pipeline.shards.writer import EncodedSample, encode_sample
from triweave.data_pipeline.sources.base import FilteredError, Row, Source, row_hash

_REASON_CHARACTERS = 300
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


@dataclass(frozen=True, kw_only=True)
class RowPipeline:
    """All that decides what becomes of a row; small and picklable."""

    source: Source
    media: MediaOptions
    filters: FilterOptions
    steps: tuple[DocumentStep, ...] = ()
    near_duplicates: NearDuplicates | None = None


@dataclass(frozen=True, kw_only=True)
class EncodedRow:
    """What became of a row: its ledger row, its sample if it became one, and what near duplicates are found by."""

    ledger: LedgerRow
    sample: EncodedSample | None = None
    signature: bytes = b""


class RowEncoder:
    """Encode rows in one process.

    cache_folder: where re-encoded media that many rows share are kept, for all processes that are given the same one.
    clock: sums the time of the stages.
    """

    def __init__(self, pipeline: RowPipeline, cache_folder: Path | None = None) -> None:
        root = pipeline.source.root
        self.clock = StageClock()
        self._pipeline = pipeline
        self._place = f"{root if root.is_dir() else root.parent}{os.sep}"  # where a corpus lies is not in its ledger
        blocked = {sha256: why for step in pipeline.steps if isinstance(step, BlocklistStep)
                   for sha256, why in step.media.items()}  # fmt: skip
        self._media = MediaEncoder(pipeline.media, cache_folder, self.clock, blocked)
        self._scrub = next((step for step in pipeline.steps if isinstance(step, ScrubStep)), None)

    def encode(self, number: int, row: Row) -> EncodedRow:
        """Return what becomes of a row of the listing that is not decided; never raises because of the row."""
        identity: dict[str, Any] = {"row": number, "id": row.id, "input_xxh3": row_hash(row)}
        try:
            document = self._document(row)
            with self.clock.stage("write"):
                sample = encode_sample(document_key(row.id), document)
                content = content_hash(document.parts)
            signature = self._signature(document)
        except (FilteredError, BlockedMediaError) as why:
            return EncodedRow(ledger=LedgerRow(**identity, status="filtered", reason=self._reason(str(why))))
        except Exception as error:  # one bad row of a million must not end a build; the ledger names it
            reason = self._reason(f"{type(error).__name__}: {error}".replace(self._place, ""))
            return EncodedRow(ledger=LedgerRow(**identity, status="failed", reason=reason))
        left_out = self._reason(document.left_out)
        kept = LedgerRow(**identity, status="kept", reason=left_out, key=sample.row.key, content_xxh3=content)
        return EncodedRow(ledger=kept, sample=sample, signature=signature)

    def _reason(self, reason: str) -> str:
        """Return a reason for the ledger; a message that quotes a row is scrubbed as the row would be."""
        return one_line(reason if self._scrub is None else self._scrub.clean(reason))

    def _document(self, row: Row) -> Document:
        with self.clock.stage("read"):
            document = self._pipeline.source.document(row, self._media)
        document = self._after_steps(document, before_filters=True)
        with self.clock.stage("filter"):
            document = filtered(document, self._pipeline.filters)
        return self._after_steps(document, before_filters=False)

    def _after_steps(self, document: Document, *, before_filters: bool) -> Document:
        for step in self._pipeline.steps:
            if step.before_filters == before_filters:
                with self.clock.stage(step.name):
                    document = step.apply(document)
        return document

    def _signature(self, document: Document) -> bytes:
        if self._pipeline.near_duplicates is None:
            return b""
        with self.clock.stage("dedup"):
            return self._pipeline.near_duplicates.signature(document)


def decided_row(number: int, row: Row) -> LedgerRow:
    """Return the ledger row of a row that the listing has decided."""
    status: RowStatus = "filtered" if row.failed is None else "failed"
    reason = one_line(str(row.filtered if row.failed is None else row.failed))
    return LedgerRow(row=number, id=row.id, status=status, reason=reason, input_xxh3=row_hash(row))


def one_line(reason: str) -> str:
    """Return a reason as one line without memory addresses, which would make two equal builds differ."""
    line = _ADDRESS.sub("", " ".join(reason.split()))
    return line[:_REASON_CHARACTERS].encode("utf-8", "backslashreplace").decode()
