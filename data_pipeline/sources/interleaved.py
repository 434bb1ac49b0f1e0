"""Parquet of interleaved web pages: OBELICS, OmniCorpus, MINT-1T and what follows their layout.

    texts   list of strings and nulls        ["Owls", null, "hunt at night."]
    images  list of URLs, bytes or structs   [null, "https://example.org/owl.jpg", null]

Position i of a page is its text or its picture, or, where both are set, the picture and then the text. A picture is in
the row (bytes, or a struct with `bytes`) or a file of the folder `media`, named by the sha256 of its URL in hexadecimal
with the ending of a kind of picture, in the folder itself or below its first two letters. `metadata` (JSON or a list of
structs, one per position) gives `alt_text`, `general_metadata` or `url` the page's URL. Pictures that cannot be had are
left out, and the ledger's kept row says how many and which. The folder `media` is no part of the input's fingerprint:
after more was downloaded into it, build anew with --overwrite.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triweave.data_pipeline.errors import SourceError
from triweave.data_pipeline.media.modalities import MODALITIES
from triweave.data_pipeline.shards.media_encoder import MediaEncoder
from triweave.data_pipeline.shards.schema import Document
from triweave.data_pipeline.sources.base import FilteredError, Row, walk_files
from triweave.data_pipeline.sources.collected_parts import CollectedParts
from triweave.data_pipeline.sources.parquet_rows import open_parquet, read_parquet_row

COLUMNS = ("texts", "images")
_ENDING = ".parquet"


@dataclass(frozen=True, kw_only=True)
class InterleavedSource:
    """The rows of a .parquet file or of all those below a folder.

    media: folder of downloaded pictures, see above; without it only pictures in the rows are taken.
    """

    root: Path
    media: Path | None = None
    name: str = "interleaved"

    @property
    def options(self) -> dict[str, Any]:
        """Return whether pictures come from a folder."""
        return {"media": self.media is not None}

    def rows(self) -> Iterator[Row]:
        """List one row per row of every file."""
        if self.media is not None and not self.media.is_dir():
            raise SourceError(
                f"--media {self.media}: no such folder; it holds pictures named by the sha256 of their URL"
            )
        files = self._files()
        for name, path in files:
            try:
                file = open_parquet(path, COLUMNS)
            except SourceError:
                if len(files) == 1:
                    raise
                problem = f"is no whole Parquet file with the columns {' and '.join(COLUMNS)}; fetch it again"
                yield Row(id=f"file:{name}", recipe=[name, path.stat().st_size], failed=problem)
                continue
            for group in range(file.num_row_groups):
                metadata = file.metadata.row_group(group)
                for position in range(metadata.num_rows):
                    place = f"{name}:{group}:{position}"
                    recipe = [name, group, position, metadata.total_byte_size]
                    yield Row(id=place, recipe=recipe, group=f"{name}:{group}")

    def document(self, row: Row, encoder: MediaEncoder) -> Document:
        """Make the document of one page."""
        name, group, position = row.recipe[:3]
        path = self.root if self.root.is_file() else self.root / name
        record = read_parquet_row(path, group, position)
        texts, images = record["texts"] or [], record["images"] or []
        notes = _list(record.get("metadata"))
        collected = CollectedParts(root=self.media or path.parent, encoder=encoder)
        for number in range(max(len(texts), len(images))):
            image = images[number] if number < len(images) else None
            note = notes[number] if number < len(notes) and isinstance(notes[number], dict) else {}
            if image is not None:
                self._add_image(collected, image, note.get("alt_text") or None)
            if number < len(texts) and texts[number] is not None:
                collected.add_text(str(texts[number]))
        if not collected.parts:
            raise FilteredError(collected.left_out or "no text and no picture")
        source = {"corpus": self.root.stem, **_page_url(record)}
        labels = {"language": record["language"]} if isinstance(record.get("language"), str) else {}
        return Document(
            id=row.id, parts=tuple(collected.parts), source=source, labels=labels, left_out=collected.left_out
        )

    def _files(self) -> list[tuple[str, Path]]:
        if self.root.is_file() and self.root.suffix == _ENDING:
            return [(self.root.name, self.root)]
        if not self.root.is_dir():
            raise SourceError(f"--input {self.root}: must be a {_ENDING} file or a folder of them")
        found = [(name, self.root / name) for name, _ in walk_files(self.root) if name.endswith(_ENDING)]
        if not found:
            raise SourceError(f"--input {self.root}: no {_ENDING} file in it")
        return found

    def _add_image(self, collected: CollectedParts, image: Any, alt: str | None) -> None:
        data = image.get("bytes") if isinstance(image, dict) else image
        url = (image.get("url") or image.get("path") or "") if isinstance(image, dict) else image
        if isinstance(data, bytes):
            collected.add_bytes("image", data, str(url)[:200] if isinstance(url, str) and url else "a picture", alt=alt)
        elif isinstance(url, str) and url:
            file = None if self.media is None else picture_of_url(self.media, url)
            if file is None:
                collected.leave_out(f"{url[:200]} is not there")
            else:
                collected.add_file(file, "image", alt=alt)
        else:
            collected.leave_out("a picture without bytes or URL")


def picture_of_url(folder: Path, url: str) -> str | None:
    """Return the name below `folder` of the file that holds the picture of `url`, None where there is none."""
    name = hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()
    candidates = (
        f"{place}{name}.{ending}" for place in ("", f"{name[:2]}/") for ending in MODALITIES["image"].extensions
    )
    return next((candidate for candidate in candidates if (folder / candidate).is_file()), None)


def _list(value: Any) -> list[Any]:
    """Return a list that is one or is written as JSON; an empty one for anything else."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return []
    return value if isinstance(value, list) else []


def _page_url(record: dict[str, Any]) -> dict[str, str]:
    general = record.get("general_metadata")
    if isinstance(general, str):
        try:
            general = json.loads(general)
        except ValueError:
            general = None
    url = record.get("url") or (general.get("url") if isinstance(general, dict) else None)
    return {"url": url} if isinstance(url, str) else {}
