"""A folder of pictures and clips with sidecar text: files of one stem make one document.

    birds/owl.jpg   birds/owl.flac   birds/owl.txt             picture, clip, text
    birds/jay.png   birds/jay.json   {"text": "A jay.", "labels": {"language": "en"}, "source": {"license": "CC0-1.0"}}
    notes.txt                                                  text alone

Order of parts: media by modality and file ending, then the text. The id is the path without the ending.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from triweave.data_pipeline.errors import SourceError
from triweave.data_pipeline.media.modalities import MODALITIES, modality_of_extension
from triweave.data_pipeline.shards.media_encoder import MAX_TEXT_BYTES, MediaEncoder
from triweave.data_pipeline.shards.schema import Document, Part, TextPart
from triweave.data_pipeline.sources.base import FilteredError, Row, require_folder, walk_files

SIDECAR_FIELDS = ("text", "labels", "source")
_TEXT_SUFFIX = ".txt"
_JSON_SUFFIX = ".json"
SIDECAR_ENDINGS = (_TEXT_SUFFIX, _JSON_SUFFIX)


@dataclass(frozen=True, kw_only=True)
class FolderSource:
    """Media files with sidecars below `root`."""

    root: Path
    name: str = "folder"

    @property
    def options(self) -> dict[str, Any]:
        """Return no options."""
        return {}

    def rows(self) -> Iterator[Row]:
        """List one row per stem, and one filtered row per file of an unknown kind."""
        require_folder(self.root, "a folder of media files with .txt or .json beside them")
        stems: dict[str, list[list[Any]]] = {}
        unknown: list[Row] = []
        for path, size in walk_files(self.root):
            file = PurePosixPath(path)
            if file.suffix.lower() in SIDECAR_ENDINGS or modality_of_extension(file.suffix):
                stems.setdefault(str(file.with_suffix("")), []).append([path, size])
            else:
                reason = f"no modality takes {file.suffix or 'files without an ending'}"
                unknown.append(Row(id=f"file:{path}", recipe=[path, size], filtered=reason))
        for stem, files in stems.items():
            yield Row(id=stem, recipe=files)
        yield from unknown

    def document(self, row: Row, encoder: MediaEncoder) -> Document:
        """Make the document of one stem."""
        paths = [PurePosixPath(path) for path, _ in row.recipe]
        media: list[Part] = []
        for name in MODALITIES:
            modality_paths = [path for path in paths if _modality_name(path) == name]
            media += [encoder.encode_file(self.root / path, name) for path in modality_paths]
        text, labels, source = read_sidecars(self.root, paths)
        parts = (*media, TextPart(text=text)) if text else tuple(media)
        if not parts:
            raise FilteredError("no media and no text")
        return Document(id=row.id, parts=parts, source={"corpus": self.root.name, **source}, labels=labels)


def read_sidecars(root: Path, paths: Iterable[PurePosixPath]) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Return (text, labels, source) of the sidecars among files below `root`; the .txt gives the text if both do.

    Raises SourceError for one that is too large or has another shape.
    """
    content: dict[str, Any] = {}
    for path in sorted(paths, key=lambda path: path.suffix.lower() == _TEXT_SUFFIX):
        if path.suffix.lower() not in SIDECAR_ENDINGS:
            continue
        if (root / path).stat().st_size > MAX_TEXT_BYTES:
            raise SourceError(f"{path}: is larger than {MAX_TEXT_BYTES} bytes")
        if path.suffix.lower() == _TEXT_SUFFIX:
            content["text"] = (root / path).read_text(encoding="utf-8-sig")
        else:
            content = json.loads((root / path).read_bytes())
            check_sidecar(content, str(path))
    return str(content.get("text", "")).strip(), dict(content.get("labels", {})), dict(content.get("source", {}))


def check_sidecar(content: Any, where: str) -> None:
    """Raise SourceError unless `content` is an object of `text`, `labels` and `source` of the right types."""
    if not isinstance(content, dict):
        raise SourceError(f"{where}: must hold one JSON object")
    unknown = sorted(set(content) - set(SIDECAR_FIELDS))
    if unknown:
        raise SourceError(f"{where}: unknown field {unknown[0]!r}; allowed are {', '.join(SIDECAR_FIELDS)}")
    for name, kind in (("text", str), ("labels", dict), ("source", dict)):
        if name in content and not isinstance(content[name], kind):
            raise SourceError(f"{where}: {name} must be {'a string' if kind is str else 'an object'}")


def _modality_name(path: PurePosixPath) -> str | None:
    modality = modality_of_extension(path.suffix)
    return modality.name if modality else None
