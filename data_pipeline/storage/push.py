"""Copy a finished shard folder to an object store, its manifest last: a prefix that has one is whole.

Every file is hashed against the local manifest on its way out, and its xxh3 goes with it as metadata, so that readers
check what has no hash in the manifest as well. What is there already with the same hash is not sent again: a push that
was interrupted goes on, and new token counts are sent alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import xxhash

from triweave.data_pipeline.errors import ShardDamagedError, ShardMissingError, StorageError
from triweave.data_pipeline.shards.manifest import LEDGER_NAME, MANIFEST_NAME, Manifest, file_xxh3
from triweave.data_pipeline.shards.throughput import THROUGHPUT_NAME
from triweave.data_pipeline.storage.client import ObjectClient, client_of
from triweave.data_pipeline.storage.location import ObjectLocation, is_remote, object_location

SIDECARS = "*.tokens-*.parquet"
_OURS = re.compile(r"shard-\d+\.(tar|tar\.idx|parquet|tokens-[0-9a-f]+\.parquet)")


@dataclass(frozen=True, kw_only=True)
class PushReport:
    """Files of the folder and their bytes: sent now, and there before."""

    sent: int
    sent_bytes: int
    kept: int
    kept_bytes: int
    removed: int


def push(
    folder: Path, url: str, *, overwrite: bool = False, progress: Callable[[int, int], None] | None = None
) -> PushReport:
    """Copy the shards of `folder` to `url`; `progress(files done, files in all)` is told after each.

    overwrite: replace other shards at `url`; they stop being readable first, and what is no longer listed is removed.

    Raises ShardDamagedError and ShardMissingError where a local file is not what the manifest says, StorageError where
    the prefix holds other shards or the store cannot be written.
    """
    if is_remote(folder) or not is_remote(url):
        raise StorageError(f"push {folder} {url}: must be a local shard folder, then s3://BUCKET/PREFIX")
    manifest, target = Manifest.load(folder), object_location(url)
    client = client_of(target.bucket)
    listing = (folder / MANIFEST_NAME).read_bytes()
    files = _files(manifest)
    there = client.names(target.key)
    same = _same_manifest(client, target, listing, there) if MANIFEST_NAME in there else None
    if same is False and not overwrite:
        raise StorageError(f"{target}: holds other shards; choose another prefix, or --overwrite to replace them")
    leftovers = [name for name in there if _OURS.fullmatch(name) and name not in files]
    if same is False:
        client.delete(target.child(MANIFEST_NAME).key)
        for name in leftovers:
            client.delete(target.child(name).key)
    sent = kept = sent_bytes = kept_bytes = 0
    for number, (name, expected) in enumerate(files.items()):
        size = _send(client, manifest.root / name, target.child(name), expected, there.get(name))
        sent, sent_bytes = sent + (size > 0), sent_bytes + max(0, size)
        kept, kept_bytes = kept + (size <= 0), kept_bytes + max(0, -size)
        if progress is not None:
            progress(number + 1, len(files) + 1)
    if not same:
        try:
            digest = xxhash.xxh3_64_hexdigest(listing)
            client.put(target.child(MANIFEST_NAME).key, listing, digest, "create")
        except FileExistsError:
            if not _same_manifest(client, target, listing, {}):
                raise StorageError(
                    f"{target}: another push of other shards finished meanwhile, so what is there may be of both; push "
                    "again with --overwrite, or to another prefix"
                ) from None
        sent, sent_bytes = sent + 1, sent_bytes + len(listing)
    else:
        kept, kept_bytes = kept + 1, kept_bytes + len(listing)
    if progress is not None:
        progress(len(files) + 1, len(files) + 1)
    removed = len(leftovers) if same is False else 0
    return PushReport(sent=sent, sent_bytes=sent_bytes, kept=kept, kept_bytes=kept_bytes, removed=removed)


def _files(manifest: Manifest) -> dict[str, str]:
    """Return name -> xxh3 that the manifest gives it, empty for what it does not list: token counts, throughput."""
    files = {}
    for number, shard in enumerate(manifest.shards):
        files[manifest.tar_path(number).name] = shard.tar_xxh3
        files[manifest.idx_path(number).name] = shard.idx_xxh3
        files[manifest.index_path(number).name] = shard.index_xxh3
    files[LEDGER_NAME] = manifest.ledger_xxh3
    beside = [*sorted(manifest.root.glob(SIDECARS)), manifest.root / THROUGHPUT_NAME]
    return files | {path.name: "" for path in beside if path.exists()}


def _send(client: ObjectClient, path: Path, target: ObjectLocation, expected: str, size_there: int | None) -> int:
    """Send a file unless it is there. Returns its size, negative where it was there."""
    try:
        digest, size = file_xxh3(path), path.stat().st_size
    except FileNotFoundError:
        raise ShardMissingError(f"{path} is missing: restore it, or build the shards again") from None
    if expected and digest != expected:
        raise ShardDamagedError(f"{path} is damaged (not the bytes that were written): run `triweave verify`")
    if size_there == size and client.info(target.key).xxh3 == digest:
        return -size
    client.put(target.key, path, digest, "overwrite")
    return size


def _same_manifest(client: ObjectClient, target: ObjectLocation, listing: bytes, there: dict[str, int]) -> bool:
    """Return whether the manifest at the prefix is `listing`; `there` spares the request where sizes tell."""
    size = there.get(MANIFEST_NAME)
    if size is not None and size != len(listing):
        return False
    key = target.child(MANIFEST_NAME).key
    info = client.info(key)
    return info.size == len(listing) and bytes(client.range(key, 0, info.size, info)) == listing
