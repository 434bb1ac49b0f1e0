"""Foreign WebDataset tars, read with the standard library: members of one key make one document.

    owl.jpg  owl.flac  owl.txt  owl.cls  owl.json       picture, clip, text; label `cls`; further labels from the JSON

A member's key is its name up to the first dot. Media come in tar order, then the text (`.txt`, or `caption` or `text`
of the JSON). Our own shards are recognised by their JSON and keep parts, order, labels and source.

Refused: pickles (`.pkl`, `.pyd`, ...), because reading them runs code; compressed tars, because they cannot be read by
byte range. A tar that is cut is a failed row, and so is its last sample, which may lack members.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from triweave.data_pipeline.errors import SourceError
from triweave.data_pipeline.media.modalities import modality_of_extension
from triweave.data_pipeline.shards.media_encoder import MediaEncoder
from triweave.data_pipeline.shards.schema import SCHEMA_VERSION, Document, Part, TextPart
from triweave.data_pipeline.sources.base import FilteredError, Row, walk_files
from triweave.data_pipeline.sources.record import record_document

PICKLES = ("pkl", "pickle", "pyd", "pth", "pt")
_TEXT_ENDINGS = ("txt", "text", "caption")
_TEXT_FIELDS = ("caption", "text")
_Member = list[Any]
"""[extension, offset, size] of one member."""


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
            tars = [path for path, _ in walk_files(self.root) if _is_tar(path)]
        elif self.root.is_file():
            tars = [self.root.name]
        else:
            raise SourceError(f"--input {self.root}: no such file or folder")
        if not tars:
            raise SourceError(f"--input {self.root}: no .tar file in it")
        for path in tars:
            yield from _tar_rows(self._folder, path)

    def document(self, row: Row, encoder: MediaEncoder) -> Document:
        """Make the document of one sample."""
        path, members = row.recipe
        with open(self._folder / path, "rb") as file:
            contents = {extension: _read(file, offset, size) for extension, offset, size in members}
        record = _json_object(contents)
        if record.get("v") == SCHEMA_VERSION and "parts" in record:
            return record_document(row.id, record, encoder, read_member=contents.__getitem__)
        return _foreign_document(row.id, PurePosixPath(path).stem, contents, record, encoder)


def _is_tar(path: str) -> bool:
    return path.endswith((".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst"))


def _tar_rows(folder: Path, path: str) -> Iterator[Row]:
    """Yield the samples of one tar, and a failed row when it cannot be read to its end."""
    base = path.removesuffix(".tar")
    samples: dict[str, list[_Member]] = {}
    problem = None
    if not path.endswith(".tar"):
        problem = "compressed: unpack it to a plain .tar, which can be read by byte range"
    else:
        try:
            _read_headers(folder / path, samples)
        except (tarfile.TarError, OSError, EOFError) as error:
            problem = f"the tar is cut or damaged: {error}; fetch it again"
    last = next(reversed(samples), None)
    for key, members in samples.items():
        refused = next((extension for extension, _, _ in members if extension.rpartition(".")[2] in PICKLES), None)
        failed = None
        if len({extension for extension, _, _ in members}) < len(members):
            failed = "two members of one sample have the same extension"
        elif refused is not None:
            failed = f"member .{refused} is a pickle, and reading it would run code: convert it"
        elif problem is not None and key == last:
            failed = "the last sample before the damage of its tar may lack members"
        yield Row(id=f"{base}/{key}", recipe=[path, members], failed=failed)
    if problem is not None:
        yield Row(id=f"file:{path}", failed=problem)


def _read_headers(path: Path, samples: dict[str, list[_Member]]) -> None:
    """Add the members of a tar to `samples`. Raises TarError at a damaged header and at a missing end."""
    size = path.stat().st_size
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            if member.size < 0:  # would lead tarfile back to this very header, for ever
                raise tarfile.ReadError(f"{member.name} has a size of {member.size} bytes")
            if member.issparse():  # its bytes do not lie in the tar one after another
                raise tarfile.ReadError(f"{member.name} is stored sparse, pack it without --sparse")
            if not member.isreg():
                continue
            if member.offset_data + member.size > size:
                raise tarfile.ReadError(f"{member.name} ends at byte {member.offset_data + member.size} of {size}")
            name = PurePosixPath(member.name)
            key, dot, extension = name.name.partition(".")
            if dot and key:
                members = samples.setdefault((name.parent / key).as_posix(), [])
                members.append([extension.lower(), member.offset_data, member.size])
        end = tar.offset
    with open(path, "rb") as file:
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"no end-of-archive mark at byte {end}")


def _read(file: Any, offset: int, size: int) -> bytes:
    file.seek(offset)
    return bytes(file.read(size))


def _json_object(contents: dict[str, bytes]) -> dict[str, Any]:
    record = json.loads(contents["json"]) if "json" in contents else {}
    if not isinstance(record, dict):
        raise SourceError(f"member .json holds {type(record).__name__}, must be an object")
    return record


def _foreign_document(
    document_id: str, corpus: str, contents: dict[str, bytes], record: dict[str, Any], encoder: MediaEncoder
) -> Document:
    parts: list[Part] = []
    for extension, data in contents.items():
        modality = modality_of_extension(extension.rpartition(".")[2])
        if modality is not None:
            parts.append(encoder.encode(modality.name, data))
    texts = [contents[ending].decode("utf-8-sig") for ending in _TEXT_ENDINGS if ending in contents]
    texts += [record[name] for name in _TEXT_FIELDS if isinstance(record.get(name), str)]
    text = next((text.strip() for text in texts if text.strip()), "")
    if text:
        parts.append(TextPart(text=text))
    if not parts:
        raise FilteredError("no media and no text")
    labels = {name: value for name, value in record.items() if name not in _TEXT_FIELDS and _is_scalar(value)}
    if "cls" in contents:
        labels["cls"] = contents["cls"].decode().strip()
    return Document(id=document_id, parts=tuple(parts), source={"corpus": corpus}, labels=labels)


def _is_scalar(value: Any) -> bool:
    return value is not None and isinstance(value, (str, int, float, bool))
