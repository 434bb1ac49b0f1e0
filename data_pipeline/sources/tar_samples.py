"""The samples of a tar: members of one key, found by reading headers alone, and the document that foreign members make.

A member's key is its name up to the first dot. Pickles are refused, because reading them runs code, and so is whatever
would make the listing endless or a sample larger than memory: sparse members, sizes below zero, headers of headers
beyond MAX_HEADER_BYTES, tars of more than MAX_MEMBERS members, members beyond the bounds of their kind.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from triweave.data_pipeline.errors import SourceError
from triweave.data_pipeline.media.modalities import modality_of_extension
from triweave.data_pipeline.shards.media_encoder import MAX_MEDIA_BYTES, MAX_TEXT_BYTES, MediaEncoder
from triweave.data_pipeline.shards.schema import SCHEMA_VERSION, Document, Part, TextPart
from triweave.data_pipeline.sources.base import FilteredError, Row
from triweave.data_pipeline.sources.record import record_document

PICKLES = ("pkl", "pickle", "pyd", "pth", "pt")
MAX_MEMBERS = 4_000_000
"""Most members of one tar; listing one holds about 200 bytes of each."""
MAX_HEADER_BYTES = 16 << 10
"""Longest header that describes another header (a long name, pax records); a name has 4 KiB at most."""
_HEADERS_OF_HEADERS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
_TEXT_ENDINGS = ("txt", "text", "caption")
_READ_ENDINGS = (*_TEXT_ENDINGS, "json", "cls")
_TEXT_FIELDS = ("caption", "text")
_Member = list[Any]
"""[extension, offset, size] of one member."""


class _BoundedHeader(tarfile.TarInfo):
    """A header that refuses what tarfile would follow for ever or read whole.

    Its pax parser takes time quadratic in the header, its parser of sparse maps does not stop at the end of the file,
    and a size below zero leads it back to the same header. The methods are its own hooks; they have no public name.
    """

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        if self.size < 0:
            raise tarfile.ReadError(f"{self.name} has a size of {self.size} bytes")
        if self.type in _HEADERS_OF_HEADERS and self.size > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {self.size} bytes, allowed are {MAX_HEADER_BYTES}")
        if self.type == tarfile.GNUTYPE_SPARSE:
            self._refuse_sparse(self)
        return super()._proc_member(tar)  # type: ignore[misc]

    def _refuse_sparse(self, member: tarfile.TarInfo, *_: object) -> None:
        """Raise: the bytes of such a member do not lie in the tar one after another."""
        raise tarfile.ReadError(f"{member.name} is stored sparse, pack it without --sparse")

    _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _refuse_sparse


def tar_rows(folder: Path, path: str) -> Iterator[Row]:
    """Yield the samples of the tar `path` below `folder`, and a failed row where it cannot be read to its end.

    A row's id is the tar's name without its ending, a slash and the key; its recipe is [path, members].
    """
    base = path.removesuffix(".tar")
    samples: dict[str, list[_Member]] = {}
    problem = None
    if not path.endswith(".tar"):
        problem = "compressed: unpack it to a plain .tar, which can be read by byte range"
    else:
        try:
            _read_headers(folder / path, samples)
        except Exception as error:  # tarfile raises eight kinds for damaged headers; none of them may end the listing
            reason = "headers of headers without end" if isinstance(error, RecursionError) else str(error)
            problem = f"the tar is cut or damaged: {reason}; fetch it again"
    last = next(reversed(samples), None)
    for key, members in samples.items():
        failed = _refusal(members)
        if failed is None and problem is not None and key == last:
            failed = "the last sample before the damage of its tar may lack members"
        yield Row(id=f"{base}/{key}", recipe=[path, members], failed=failed)
    if problem is not None:
        yield Row(id=f"file:{path}", failed=problem)


def _refusal(members: list[_Member]) -> str | None:
    """Return why a sample of these members is not read at all."""
    endings = [extension.rpartition(".")[2] for extension, _, _ in members]
    if len({extension for extension, _, _ in members}) < len(members):
        return "two members of one sample have the same extension"
    for ending, (extension, _, size) in zip(endings, members, strict=True):
        if ending in PICKLES:
            return f"member .{extension} is a pickle, and reading it would run code: convert it"
        most = MAX_MEDIA_BYTES if modality_of_extension(ending) else MAX_TEXT_BYTES
        if size > most and (ending in _READ_ENDINGS or modality_of_extension(ending)):
            return f"member .{extension} has {size} bytes, allowed are {most}: split it"
    return None


def _read_headers(path: Path, samples: dict[str, list[_Member]]) -> None:
    """Add the members of a tar to `samples`. Raises at a damaged header and at a missing end."""
    size = path.stat().st_size
    count = 0
    with tarfile.open(path, "r:", tarinfo=_BoundedHeader) as tar:
        while (member := tar.next()) is not None:
            vars(tar)["members"].clear()  # else it keeps a kilobyte of every member
            count += 1
            if count > MAX_MEMBERS:
                raise tarfile.ReadError(f"more than {MAX_MEMBERS} members, split it")
            if member.size < 0:  # pax records can say so too
                raise tarfile.ReadError(f"{member.name} has a size of {member.size} bytes")
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


def read_members(folder: Path, recipe: Any) -> dict[str, bytes]:
    """Return extension -> bytes of the sample that `tar_rows` listed with `recipe`, of the kinds that are read."""
    path, members = recipe[:2]
    contents = {}
    with open(folder / path, "rb") as file:
        for extension, offset, size in members:
            ending = extension.rpartition(".")[2]
            if ending in _READ_ENDINGS or modality_of_extension(ending):
                file.seek(offset)
                contents[extension] = file.read(size)
    return contents


def json_object(contents: dict[str, bytes]) -> dict[str, Any]:
    """Return the object in a sample's member .json, an empty one where it has no such member."""
    record = json.loads(contents["json"]) if "json" in contents else {}
    if not isinstance(record, dict):
        raise SourceError(f"member .json holds {type(record).__name__}, must be an object")
    return record


def sample_document(document_id: str, folder: Path, recipe: Any, encoder: MediaEncoder) -> Document:
    """Return the document of a listed sample; one of our own shards, told by its JSON, keeps parts and labels."""
    contents = read_members(folder, recipe)
    record = json_object(contents)
    if record.get("v") == SCHEMA_VERSION and "parts" in record:
        return record_document(document_id, record, encoder, read_member=contents.__getitem__)
    return _foreign_document(document_id, PurePosixPath(recipe[0]).stem, contents, record, encoder)


def _foreign_document(
    document_id: str, corpus: str, contents: dict[str, bytes], record: dict[str, Any], encoder: MediaEncoder
) -> Document:
    """Return the document of a sample: media in tar order, then the text; scalars of the JSON are its labels."""
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
    labels = {name: value for name, value in record.items() if name not in _TEXT_FIELDS and is_scalar(value)}
    if "cls" in contents:
        labels["cls"] = contents["cls"].decode().strip()
    return Document(id=document_id, parts=tuple(parts), source={"corpus": corpus}, labels=labels)


def is_scalar(value: Any) -> bool:
    """Return whether a value of a foreign JSON can be a label as it is."""
    return value is not None and isinstance(value, (str, int, float, bool))
