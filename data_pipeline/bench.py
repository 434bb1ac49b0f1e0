"""Measure the loader against webdataset and against bare functions, all on the same samples in one process.

raw   triweave    plan the packs, read every planned sample by byte range from mapped tars, checksum it (xxh3)
      webdataset  read every sample of the same tars in its own order, checksum every member (xxh3); no decoding
      bare        slice every sample from the mapped tars in tar order and checksum it; nothing else
full  triweave    the whole pipeline of a rank: plan, read, verify, tokenise, decode, resize, mel, pack
      webdataset  its reader, the same tokenise and decode functions, the same packing of samples as they come
      bare        the tokenise and decode functions alone, on bytes that lie in memory; no packing

Repeats of the loaders are interleaved, in turning order, and medians are reported, so a slow minute of the machine hits
all alike. The samples are the first of every shard, copied to a folder of their own, hence read from the page cache.
Nothing decoded is kept between samples.
"""

from __future__ import annotations

import os
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import xxhash

from triweave.data_pipeline.config import DataConfig, SourceConfig
from triweave.data_pipeline.errors import ConfigError
from triweave.data_pipeline.machine import processor_name
from triweave.data_pipeline.media.geometry import MediaInfo
from triweave.data_pipeline.media.modalities import MODALITIES
from triweave.data_pipeline.shards.index import read_index
from triweave.data_pipeline.shards.manifest import Manifest, ShardEntry, file_xxh3, write_manifest
from triweave.data_pipeline.shards.schema import TextPart, document_from_json
from triweave.data_pipeline.stream.catalog import ShardCatalog
from triweave.data_pipeline.stream.collate import Row, collate
from triweave.data_pipeline.stream.content import Piece, PieceMaker
from triweave.data_pipeline.stream.layout import Run, row_pieces
from triweave.data_pipeline.stream.plan import Planner
from triweave.data_pipeline.stream.reader import ShardReader
from triweave.data_pipeline.text.token_counts import write_token_counts
from triweave.data_pipeline.text.tokenizer import Tokenizer

TAR_END = bytes(1024)
LOADERS = ("triweave", "webdataset", "bare")


@dataclass(frozen=True, kw_only=True)
class BenchRow:
    """One loader's repeats: the median rate, and `seconds` of each.

    ratio_to_bare_decode: samples/s over those of the bare functions; the median of the ratios within each repeat.
    """

    loader: str
    work: str
    samples_per_s: float
    ratio_to_bare_decode: float
    samples: int
    seconds: list[float]


def bench_loader(
    shards: Path,
    tokenizer: Path,
    *,
    raw_samples: int,
    full_samples: int,
    repeats: int,
    sequence_length: int,
    progress: Callable[[str], None],
) -> list[BenchRow]:
    """Measure all loaders; `progress` is told what is measured.

    Raises DataError where shards or tokenizer cannot be read, ConfigError for counts below 1.
    """
    for name, count in (("raw-samples", raw_samples), ("samples", full_samples), ("repeats", repeats)):
        if count < 1:
            raise ConfigError(f"--{name} {count}: must be at least 1")
    from triweave.data_pipeline.stream.transport import tune_memory

    manifest = Manifest.load(shards)
    rows: list[BenchRow] = []
    for work, count in (("raw", raw_samples), ("full", full_samples)):
        with tempfile.TemporaryDirectory() as folder:
            progress(f"copying {min(count, manifest.samples)} samples for the {work} work")
            subset = copy_first_samples(manifest, Path(folder) / "shards", count)
            write_token_counts(subset, tokenizer)
            config = DataConfig(
                sources=[SourceConfig(name="bench", shards=str(subset.root))],
                tokenizer=str(tokenizer),
                sequence_length=sequence_length,
            )
            runs = {"raw": _raw_runs, "full": _full_runs}[work](config, subset)
            seconds: dict[str, list[float]] = {loader: [] for loader in LOADERS}
            seen = dict.fromkeys(LOADERS, 0)
            tune_memory()  # as every loader worker does; here for all three alike
            for repeat in range(repeats):
                for loader in LOADERS if repeat % 2 == 0 else reversed(LOADERS):
                    progress(f"{work} {loader}, {repeat + 1} of {repeats}")
                    began = time.perf_counter()
                    seen[loader] = runs[loader]()
                    seconds[loader].append(time.perf_counter() - began)
        rows += [
            BenchRow(
                loader=loader,
                work=work,
                samples_per_s=seen[loader] / statistics.median(seconds[loader]),
                ratio_to_bare_decode=statistics.median(
                    bare / own for bare, own in zip(seconds["bare"], seconds[loader], strict=True)
                ),
                samples=seen[loader],
                seconds=seconds[loader],
            )
            for loader in LOADERS
        ]
    return rows


def machine() -> dict[str, Any]:
    """Name what was measured on."""
    return {
        "cpu": processor_name(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "processes": 1,
        "storage": "page cache",
    }


def copy_first_samples(manifest: Manifest, out: Path, count: int) -> Manifest:
    """Write shards that hold the first samples of every shard of `manifest`, about `count` in all."""
    out.mkdir(parents=True)
    share = min(1.0, count / max(1, manifest.samples))
    entries = []
    for number, shard in enumerate(manifest.shards):
        samples = min(shard.samples, -int(-shard.samples * share // 1))
        if samples == 0:
            continue
        index = read_index(manifest, number).slice(0, samples)
        end = index["offset"][-1].as_py() + index["size"][-1].as_py()
        with open(manifest.tar_path(number), "rb") as file:
            content = file.read(end)
        tar, parquet = out / f"{shard.name}.tar", out / f"{shard.name}.parquet"
        tar.write_bytes(content + TAR_END)
        pq.write_table(index, parquet)
        entries.append(
            ShardEntry(
                name=shard.name,
                samples=samples,
                tar_bytes=end + len(TAR_END),
                tar_xxh3=file_xxh3(tar),
                index_xxh3=file_xxh3(parquet),
                idx_xxh3="",
            )
        )
    write_manifest(replace(manifest, root=out, shards=tuple(entries)))
    return Manifest.load(out)


Runs = dict[str, Callable[[], int]]


def _raw_runs(config: DataConfig, subset: Manifest) -> Runs:
    tars = _tars(subset)
    ranges = [
        (catalog.tar, *numbers)
        for catalog in _catalogs(Planner(config))
        for numbers in zip(catalog.offsets.tolist(), catalog.sizes.tolist(), catalog.hashes.tolist(), strict=True)
    ]

    def triweave() -> int:
        planner = Planner(config)
        maker = PieceMaker(planner)
        seen = 0
        for block in range(planner.mixture.group_count(0)):
            plan = planner.block(block)
            for row in range(plan.rows):
                for piece in row_pieces(plan, row):
                    maker.fetch(piece)
                    seen += piece.first == 0
        return seen

    def webdataset() -> int:
        seen = 0
        for sample in _webdataset_samples(tars):
            for value in sample.values():
                if isinstance(value, bytes):
                    xxhash.xxh3_64_intdigest(value)
            seen += 1
        return seen

    def bare() -> int:
        reader = ShardReader()
        for tar, offset, size, xxh3 in ranges:
            reader.read(tar, offset, size, xxh3)
        return len(ranges)

    return {"triweave": triweave, "webdataset": webdataset, "bare": bare}


def _full_runs(config: DataConfig, subset: Manifest) -> Runs:
    from triweave.data_pipeline.stream.loader import stream_pipeline
    from triweave.data_pipeline.stream.windows import WindowShape

    tokenizer = Tokenizer.load(config.tokenizer)
    S, geometry = config.sequence_length, config.geometry
    in_memory = [_parts(_members_of(sample)) for sample in _webdataset_samples(_tars(subset))]

    def triweave() -> int:
        planner = Planner(config)
        shape = WindowShape(rank=0, world_size=1, global_batch_rows=1, micro_batch_rows=1)
        rows = sum(planner.block(block).rows for block in range(planner.mixture.group_count(0)))
        seen = 0
        for micro_batch in islice(stream_pipeline(planner, shape, planner.start(), None), rows):
            seen += sum(piece.first == 0 for pieces in micro_batch.task.pieces for piece in pieces)
        return seen

    def webdataset() -> int:
        seen = tokens = 0
        held: list[Piece] = []
        media: dict[int, list[Any]] = defaultdict(list)

        def pack() -> None:
            joined = {kind: np.concatenate(items) for kind, items in media.items()}
            collate([Row(seen, held)], joined, sequence_length=max(S, tokens), pad_id=tokenizer.pad_id)

        for sample in _webdataset_samples(_tars(subset)):
            made, items = _piece(_parts(_members_of(sample)), tokenizer, config)
            if held and tokens + len(made.tokens) > S:
                pack()
                held, tokens = [], 0
                media.clear()
            held.append(made)
            for kind, values in items:
                media[kind].append(values)
            tokens += len(made.tokens)
            seen += 1
        pack()
        return seen

    def bare() -> int:
        for parts in in_memory:
            for modality, content, info in parts:
                if isinstance(content, str):
                    tokenizer.encode(content)
                else:
                    MODALITIES[modality].decode(content, info, geometry)
        return len(in_memory)

    return {"triweave": triweave, "webdataset": webdataset, "bare": bare}


def _tars(subset: Manifest) -> list[str]:
    return [str(subset.tar_path(number)) for number in range(len(subset.shards))]


def _catalogs(planner: Planner) -> list[ShardCatalog]:
    return [planner.catalog(0, shard) for shard in range(len(planner.manifests[0].shards))]


def _webdataset_samples(tars: list[str]) -> Iterator[dict[str, Any]]:
    """Yield webdataset's own samples of tars, through its own tar reader and grouping.

    Its `gopen` refuses even local files once it is locked down, so they are opened here the way it would.
    """
    from triweave.data_pipeline.stream.loader import webdataset

    def opened() -> Iterator[dict[str, Any]]:
        for tar in tars:
            with open(tar, "rb") as stream:
                yield {"url": tar, "stream": stream}

    expand, group = webdataset.tariterators.tar_file_expander, webdataset.tariterators.group_by_keys
    yield from webdataset.DataPipeline(opened, expand, group)


def _members_of(sample: dict[str, Any]) -> dict[str, bytes]:
    return {name: value for name, value in sample.items() if isinstance(value, bytes)}


Part = tuple[str, str | bytes, MediaInfo]


def _parts(members: dict[str, bytes]) -> list[Part]:
    """Return (modality, text or encoded bytes, info) of the parts of a sample that webdataset read."""
    parts: list[Part] = []
    for part in document_from_json(members["json"]).parts:
        if isinstance(part, TextPart):
            parts.append((part.modality, part.text, MediaInfo()))
        else:
            parts.append((part.modality, members[part.member], part.info))
    return parts


def _piece(parts: list[Part], tokenizer: Tokenizer, config: DataConfig) -> tuple[Piece, list[tuple[int, Any]]]:
    """Return a document as the loader would make it, without a plan, and its decoded media."""
    tokens: list[Any] = [[tokenizer.bos_id]]
    runs: list[Run] = []
    media: list[tuple[int, Any]] = []
    text = 1
    for name, content, info in parts:
        if isinstance(content, str):
            tokens.append(tokenizer.encode(content))
            text += len(tokens[-1])
            continue
        modality, markers = MODALITIES[name], tokenizer.media[name]
        values = modality.decode(content, info, config.geometry)
        tokens += [[markers.start_id], np.full(len(values), markers.placeholder_id)]
        runs += [(0, text + 1, text + 1, 1, 1), (modality.id, len(values), *modality.grid(info, config.geometry))]
        media.append((modality.id, values))
        text = 0
    tokens.append([tokenizer.eos_id])
    runs.append((0, text + 1, text + 1, 1, 1))
    row = np.concatenate(tokens).astype(np.int32)
    return Piece(tokens=row, runs=runs, weight=1.0, sample_id="", sample_hash=0), media
