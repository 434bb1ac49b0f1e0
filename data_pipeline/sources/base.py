"""What a source is: it lists rows cheaply and in a fixed order, and turns one row into a document, in any process."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import xxhash

from triweave.data_pipeline.errors import SourceError
from triweave.data_pipeline.shards.media_encoder import MediaEncoder
from triweave.data_pipeline.shards.schema import Document


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of input, which the ledger will account for.

    id: document id, unique in the corpus.
    recipe: JSON values from which `Source.document` makes the document; contains the sizes of the files it needs, so
        that a changed input is noticed.
    filtered, failed: why the row makes no document, when the listing already knows.
    group: rows of one group stay together when rows are shuffled, because reading them apart would be dear.
    """

    id: str
    recipe: Any = None
    filtered: str | None = None
    failed: str | None = None
    group: str = ""

    @property
    def is_decided(self) -> bool:
        """Return whether the listing already knows that the row makes no document."""
        return self.filtered is not None or self.failed is not None


class FilteredError(Exception):
    """Raised by `Source.document` for a row that is left out on purpose; the message is the ledger's reason."""


class Source(Protocol):
    """A corpus on disk. Instances are picklable: workers receive a copy."""

    @property
    def name(self) -> str:
        """Name in the registry and in the manifest."""

    @property
    def root(self) -> Path:
        """Where the corpus lies."""

    @property
    def options(self) -> dict[str, Any]:
        """Options that decide what comes out, as JSON values, without any path."""

    def rows(self) -> Iterator[Row]:
        """List every row of the input in a fixed order, from names, sizes and small text files only."""

    def document(self, row: Row, encoder: MediaEncoder) -> Document:
        """Make the document of a row; raises FilteredError to leave it out, anything else is a failure."""


def row_hash(row: Row) -> str:
    """Return xxh3_64 (hex) of a row of the listing: another one where its files have other sizes."""
    return xxhash.xxh3_64_hexdigest(_line(row))


def listing_hash(rows: list[Row]) -> str:
    """Return xxh3_128 (hex) of a listing: the fingerprint of an input."""
    digest = xxhash.xxh3_128()
    for row in rows:
        digest.update(_line(row))
    return digest.hexdigest()


def _line(row: Row) -> bytes:
    content = [row.id, row.recipe, row.filtered, row.failed]
    line = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return line.encode("utf-8", "surrogatepass") + b"\n"  # a member's ending need not be UTF-8


def require_folder(root: Path, what: str) -> None:
    """Raise SourceError unless `root` is a folder."""
    if not root.is_dir():
        raise SourceError(f"--input {root}: no such folder; it must be {what}")


def walk_files(root: Path) -> Iterator[tuple[str, int]]:
    """Yield (path relative to root with forward slashes, size in bytes) of every file below root, sorted by path.

    Names that begin with a dot are left out, and links to folders are not followed.
    """
    pending = [""]
    found: list[tuple[str, int]] = []
    while pending:
        folder = pending.pop()
        with os.scandir(root / folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    pending.append(f"{folder}{entry.name}/")
                elif entry.is_file():
                    found.append((f"{folder}{entry.name}", entry.stat().st_size))
    yield from sorted(found)
