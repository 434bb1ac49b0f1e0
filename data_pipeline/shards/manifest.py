"""The manifest of a finished shard folder, written last and atomically: a folder that has one is whole."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import xxhash

from triweave.data_pipeline.errors import DataError
from triweave.data_pipeline.storage.files import read_file
from triweave.data_pipeline.storage.location import is_remote, object_location, shown

MANIFEST_NAME = "manifest.json"
LEDGER_NAME = "ledger.parquet"
MANIFEST_VERSION = 1
_BLOCK_BYTES = 1 << 22


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One shard: `name` is the stem of its three files (`.tar`, `.tar.idx`, `.parquet`); hashes are xxh3_64 in hex."""

    name: str
    samples: int
    tar_bytes: int
    tar_xxh3: str
    index_xxh3: str
    idx_xxh3: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A finished folder of shards.

    root: the folder; where it is remote, a path that `data_pipeline.storage` reads and that is no file of this machine.
    rows: how many input rows were `kept`, `filtered`, `failed` and `duplicate`; kept equals `samples`.
    ledger_xxh3: xxh3_64 of `ledger.parquet` in hex.
    build: source, options and input fingerprint of the build, for provenance; no part of `hash`.
    """

    root: Path
    shards: tuple[ShardEntry, ...]
    rows: dict[str, int] = field(default_factory=dict)
    ledger_xxh3: str = ""
    build: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def hash(self) -> str:
        """Return xxh3_128 (hex) of the shard entries: the same wherever the folder lies."""
        return _entries_hash(self.shards)

    @property
    def location(self) -> str:
        """Return the folder as a user writes it, for messages."""
        return shown(self.root)

    @property
    def samples(self) -> int:
        """Return the samples of all shards."""
        return sum(shard.samples for shard in self.shards)

    def tar_path(self, shard_number: int) -> Path:
        """Return the path of a shard's tar."""
        return self.root / f"{self.shards[shard_number].name}.tar"

    def idx_path(self, shard_number: int) -> Path:
        """Return the path of a shard's Energon offsets."""
        return self.root / f"{self.shards[shard_number].name}.tar.idx"

    def index_path(self, shard_number: int) -> Path:
        """Return the path of a shard's Parquet index."""
        return self.root / f"{self.shards[shard_number].name}.parquet"

    @property
    def ledger_path(self) -> Path:
        """Return the path of the row ledger."""
        return self.root / LEDGER_NAME

    @classmethod
    def load(cls, folder: Path | str) -> Manifest:
        """Read the manifest of a shard folder, here or at `s3://bucket/prefix`.

        Raises DataError when the folder or its manifest is missing, not JSON, of another version, or altered.
        """
        root = Path(folder)
        if is_remote(root):
            object_location(root)
            advice = f"push shards there with `triweave push SHARDS {shown(root)}`, or start that again to finish it"
        else:
            advice = "the build did not finish; run it again"
            if root.is_dir() and next(root.glob("shard-*.tar"), None) is None:
                advice = "this is no shard folder; give the --out of a `triweave build` that has finished"
            if not root.is_dir():
                raise DataError(f"no shard folder at {root}: build one with `triweave build --out {root} ...`")
        path = shown(root / MANIFEST_NAME)
        try:
            content = json.loads(bytes(read_file(path)))
        except FileNotFoundError:
            raise DataError(f"{path} is missing: {advice}") from None
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read ({error}): restore it, or build the shards again") from None
        return cls._from_content(root, path, content)

    @classmethod
    def _from_content(cls, root: Path, path: str, content: Any) -> Manifest:
        try:
            version = content["v"]
            if version != MANIFEST_VERSION:
                raise DataError(f"{path} has version {version!r}, this Triweave reads {MANIFEST_VERSION}: build again")
            shards = tuple(ShardEntry(**shard) for shard in content["shards"])
            for shard in shards:
                if Path(shard.name).name != shard.name:
                    raise DataError(f"{path} names the shard {shard.name!r}, which is not in its folder: build again")
            if content["hash"] != _entries_hash(shards):
                raise DataError(f"{path} was altered (its hash does not fit its shards): restore it, or build again")
            return cls(
                root=root,
                shards=shards,
                rows=content["rows"],
                ledger_xxh3=content["ledger_xxh3"],
                build=content["build"],
            )
        except (KeyError, TypeError) as error:
            raise DataError(f"{path} is no manifest ({type(error).__name__}: {error}): build again") from None


def write_manifest(manifest: Manifest) -> None:
    """Write `manifest.json` into the manifest's folder, atomically and durably."""
    content = {
        "v": MANIFEST_VERSION,
        "hash": manifest.hash,
        "samples": manifest.samples,
        "rows": manifest.rows,
        "ledger_xxh3": manifest.ledger_xxh3,
        "build": manifest.build,
        "shards": [asdict(shard) for shard in manifest.shards],
    }
    write_atomically(manifest.root / MANIFEST_NAME, json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n")


def write_atomically(path: Path, data: bytes) -> None:
    """Write a small file so that a reader sees all of it or none of it, also after a power cut."""
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the renames done in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_xxh3(path: Path) -> str:
    """Return xxh3_64 (hex) of a file's bytes, read in blocks."""
    digest = xxhash.xxh3_64()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _entries_hash(shards: Sequence[ShardEntry]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps([asdict(shard) for shard in shards], sort_keys=True).encode())
