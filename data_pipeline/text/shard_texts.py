"""Read the text parts of a shard, sample by sample, straight from the JSON members by byte range."""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import xxhash

from triweave.data_pipeline.errors import ShardDamagedError, ShardMissingError
from triweave.data_pipeline.shards.index import read_index
from triweave.data_pipeline.shards.manifest import Manifest
from triweave.data_pipeline.shards.schema import TEXT
from triweave.data_pipeline.storage.files import local_files
from triweave.data_pipeline.storage.location import shown

_COLUMNS = ("key", "json_offset", "json_size", "part_modality", "part_xxh3")


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleTexts:
    """The texts of one sample; `texts` has one entry per part, None where the part is no text."""

    key: str
    texts: list[str | None]


def read_texts(manifest: Manifest, shard_number: int, *, split: str | None = None) -> Iterator[SampleTexts]:
    """Yield the texts of every sample of a shard, in tar order; media bytes are not touched.

    Every text is checked against its hash in the index. `split`: only samples whose label `split` is this.

    Raises ShardMissingError where the tar is gone, ShardDamagedError where a text differs from the index.
    """
    columns = read_index(manifest, shard_number, [*_COLUMNS, *(["labels"] if split else [])]).to_pydict()
    labels = columns.pop("labels", None)
    path = shown(manifest.tar_path(shard_number))
    if not columns["key"]:
        return
    with _mapped(manifest, shard_number) as view:
        rows = zip(*(columns[name] for name in _COLUMNS), strict=True)
        for number, (key, offset, size, modalities, hashes) in enumerate(rows):
            if labels is not None and json.loads(labels[number]).get("split") != split:
                continue
            texts = _texts_of(view[offset : offset + size], modalities, hashes)
            if texts is None:
                raise ShardDamagedError(
                    f"{path}: the text of {key} differs from the index; run `triweave verify {manifest.location}`"
                )
            yield SampleTexts(key=key, texts=texts)


@contextmanager
def _mapped(manifest: Manifest, shard_number: int) -> Iterator[mmap.mmap]:
    """Yield a shard's tar, mapped; a remote one is copied here for as long."""
    path = manifest.tar_path(shard_number)
    with local_files(manifest.root, [path.name]) as folder:
        try:
            with open(folder / path.name, "rb") as file:
                view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise ShardMissingError(f"{shown(path)} is missing: restore it, or build the shards again") from None
        except (OSError, ValueError) as error:
            advice = f"run `triweave verify {manifest.location}`"
            raise ShardDamagedError(f"{shown(path)} cannot be read ({error}): {advice}") from None
        with view:
            yield view


def _texts_of(json_bytes: bytes, modalities: list[str], hashes: list[int]) -> list[str | None] | None:
    """Return the sample's texts, or None where the JSON does not hold what the index says."""
    try:
        parts = json.loads(json_bytes)["parts"]
        if [part["modality"] for part in parts] != modalities:
            return None
        texts: list[str | None] = [
            part["text"] if modality == TEXT else None for part, modality in zip(parts, modalities, strict=True)
        ]
        for text, expected in zip(texts, hashes, strict=True):
            if text is not None and xxhash.xxh3_64_intdigest(text.encode()) != expected:
                return None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return texts
