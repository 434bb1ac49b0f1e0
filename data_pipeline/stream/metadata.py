"""Manifests and catalogs of the sources of a plan; from an object store, several files at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby
from operator import itemgetter

from triweave.data_pipeline.config import DataConfig, SourceConfig
from triweave.data_pipeline.shards.manifest import Manifest
from triweave.data_pipeline.storage.location import is_remote
from triweave.data_pipeline.storage.settings import StorageSettings
from triweave.data_pipeline.storage.side_by_side import side_by_side
from triweave.data_pipeline.stream.catalog import ShardCatalog, shard_catalogs, shard_tables
from triweave.data_pipeline.text.tokenizer import Tokenizer

BATCH_SAMPLES = 16_384
"""Samples of the shards whose catalogs are made together, which live together as well."""


def load_manifests(sources: Sequence[SourceConfig]) -> list[Manifest]:
    """Return the manifest of each source. Raises DataError as `Manifest.load`, of the sources that fail the first's."""
    return list(side_by_side([partial(Manifest.load, source.shards) for source in sources], _threads(sources)))


def load_catalogs(
    shards: Sequence[tuple[int, int]], *, config: DataConfig, manifests: Sequence[Manifest], tokenizer: Tokenizer
) -> Iterator[ShardCatalog]:
    """Yield the catalog of each (source, shard) by number. Raises DataError as `shard_catalogs`, the first in order."""
    sources = [config.sources[source] for source, _ in shards]
    reads = [
        read
        for source, (number, shard) in zip(sources, shards, strict=True)
        for read in shard_tables(manifests[number], shard, source=source, tokenizer=tokenizer)
    ]
    tables = side_by_side(reads, _threads(sources))
    for number, batch in _batches(shards, manifests):
        yield from shard_catalogs(
            manifests[number],
            batch,
            [(next(tables), next(tables)) for _ in batch],
            source=config.sources[number],
            tokenizer=tokenizer,
            geometry=config.geometry,
            caps=config.caps,
            encoder_weights=config.packing.encoder_weights,
        )


def _batches(shards: Sequence[tuple[int, int]], manifests: Sequence[Manifest]) -> Iterator[tuple[int, list[int]]]:
    """Yield (source, its next shards): as many as have BATCH_SAMPLES together, but at least one."""
    for number, group in groupby(shards, key=itemgetter(0)):
        batch, samples = list[int](), 0
        for _, shard in group:
            size = manifests[number].shards[shard].samples
            if batch and samples + size > BATCH_SAMPLES:
                yield number, batch
                batch, samples = [], 0
            batch.append(shard)
            samples += size
        yield number, batch


def _threads(sources: Sequence[SourceConfig]) -> int:
    """Return how many files to read at a time: local ones are mapped faster than a thread is started."""
    remote = any(is_remote(source.shards) for source in sources)
    return StorageSettings.from_environment().connections if remote else 1
