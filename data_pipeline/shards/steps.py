"""The seam between a source and the shards: what is done to a document on its way, and in which order.

    source -> steps before the filters (language) -> filters -> other steps, in the order given (blocklist, scrub,
    annotate) -> signature -> sample                                  in any worker process
    exact duplicates -> near duplicates -> shard                      in the process that writes, in build order

Everything here is pickled into the workers and belongs to the build's fingerprint through `name` and `options`, so a
step must be a function of the document and its options alone: no clock, no state from one document to the next.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from triweave.data_pipeline.shards.schema import Document


class DocumentStep(Protocol):
    """Change a document or leave it out. Instances are small and picklable; load models when first used."""

    @property
    def name(self) -> str:
        """Name of the step, unique in a build: its key in the manifest and its stage in the throughput."""

    @property
    def before_filters(self) -> bool:
        """Whether the filters are to see what the step finds; later steps work on fewer documents."""

    @property
    def options(self) -> dict[str, Any]:
        """Everything that decides the result, as JSON values (hashes of files instead of their paths)."""

    def apply(self, document: Document) -> Document:
        """Return the document as it goes on; what was taken out is said in `left_out`, findings go into `labels`.

        Raises FilteredError to leave the document out; anything else that is raised fails its row alone.
        """


@dataclass(frozen=True, kw_only=True)
class Twin:
    """An earlier kept document that one is too much like: its id, and the ledger's reason, which counts by kind."""

    id: str
    reason: str


class SignatureIndex(Protocol):
    """The signatures of the documents kept so far; lives in the writing process, which asks in build order."""

    def twin(self, signature: bytes) -> Twin | None:
        """Return the first kept document that is near, None if there is none."""

    def add(self, document_id: str, signature: bytes) -> None:
        """Remember a kept document. After a restart the build adds those of the finished shards again, in order."""


class NearDuplicates(Protocol):
    """How near duplicates are found. Instances are picklable; the signature is made in the workers."""

    @property
    def options(self) -> dict[str, Any]:
        """Everything that decides the result, as JSON values."""

    def signature(self, document: Document) -> bytes:
        """Return what the document is compared by: about a kilobyte, from its stored parts alone; empty for none."""

    def index(self, folder: Path) -> SignatureIndex:
        """Return an empty index, which may keep files without a name in `folder`."""
