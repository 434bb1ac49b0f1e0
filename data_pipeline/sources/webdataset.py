"""Foreign WebDataset tars: the members of one key make one document.

    owl.jpg  owl.flac  owl.txt  owl.cls  owl.json       picture, clip, text; label `cls`; further labels from the JSON

A member's key is its name up to the first dot. Media come in tar order, then the text (`.txt`, or `caption` or `text`
of the JSON). Our own shards are recognised by their JSON and keep parts, order, labels and source.

Refused: pickles (`.pkl`, `.pyd`, ...), because reading them runs code; compressed tars, because they cannot be read by
byte range. A tar that is cut is a failed row, and so is its last sample, which may lack members.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triweave.data_pipeline.errors import SourceError
from triweave.data_pipeline.shards.media_encoder import MediaEncoder
from triweave.data_pipeline.shards.schema import Document
from triweave.data_pipeline.sources.base import Row, walk_files
from triweave.data_pipeline.sources.tar_samples import sample_document, tar_rows

_TARS = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")


@dataclass(frozen=True, kw_only=True)
class WebDatasetSource:
    """Tars below the folder `root`, or the one tar `root`."""

    root: Path
    name: str = "webdataset"

    @property
    def options(self) -> dict[str, Any]:
        """Return no options."""
        return {}

    @property
    def _folder(self) -> Path:
        return self.root if self.root.is_dir() else self.root.parent

    def rows(self) -> Iterator[Row]:
        """List the samples of every tar by reading its headers."""
        if self.root.is_dir():
            tars = [path for path, _ in walk_files(self.root) if path.endswith(_TARS)]
        elif self.root.is_file():
            tars = [self.root.name]
        else:
            raise SourceError(f"--input {self.root}: no such file or folder")
        if not tars:
            raise SourceError(f"--input {self.root}: no .tar file in it")
        for path in tars:
            yield from tar_rows(self._folder, path)

    def document(self, row: Row, encoder: MediaEncoder) -> Document:
        """Make the document of one sample."""
        return sample_document(row.id, self._folder, row.recipe, encoder)
