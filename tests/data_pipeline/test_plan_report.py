"""The plan report: what it says of balance, shuffling and reading, from metadata."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from triweave.data_pipeline.config import BatchCaps, DataConfig, PackingConfig, SourceConfig
from triweave.data_pipeline.errors import WindowError
from triweave.data_pipeline.media.geometry import MediaGeometry
from triweave.data_pipeline.shards.build import BuildOptions, build
from triweave.data_pipeline.sources.manifest import ManifestSource
from triweave.data_pipeline.storage.settings import StorageSettings
from triweave.data_pipeline.stream import read_model
from triweave.data_pipeline.stream.plan import BlockPlan, Planner
from triweave.data_pipeline.stream.plan_report import PlanOptions, report_plan
from triweave.data_pipeline.stream.read_model import rows_read
from triweave.data_pipeline.stream.shuffle_quality import ShuffleQuality, entropy_bits
from triweave.data_pipeline.stream.windows import WindowShape, micro_batch_tasks
from triweave.data_pipeline.text.token_counts import write_token_counts

S = 256
BATCH = PlanOptions(global_batch_rows=4, micro_batch_rows=2, ranks=2)


def config_of(data: Any, names: tuple[str, ...] = ("birds",), **changes: Any) -> DataConfig:
    sources = [SourceConfig(name=name, shards=str(getattr(data, name))) for name in names]
    options: dict[str, Any] = {
        "sequence_length": S,
        "geometry": MediaGeometry(image_patch_px=8, image_max_tokens=400),
        "block_samples": 40,
    }
    return DataConfig(sources=sources, tokenizer=str(data.tokenizer), **(options | changes))


def plan_of(samples: list[int], *, shards: list[int], rows: int) -> BlockPlan:
    """A block of whole documents, dealt in this order to rows of equal length."""
    count = len(samples)
    zeros = np.zeros(count, np.int64)
    return BlockPlan(
        block=0,
        row_starts=np.arange(rows + 1) * (count // rows),
        sources=zeros.astype(np.int32),
        epochs=zeros.astype(np.int32),
        shards=np.asarray(shards, np.int32),
        samples=np.asarray(samples, np.int32),
        kinds=zeros.astype(np.int8),
        first_tokens=zeros,
        end_tokens=zeros + 1,
        segments=zeros,
        row_tokens=np.ones(rows, np.int64),
        row_budgets=np.ones((rows, 1), np.int64),
        row_costs=np.ones(rows),
        modality_tokens={},
        drawn_samples=count,
        left_out={},
    )


def test_steps_are_those_that_the_loader_takes(stream_data: Any) -> None:
    config = config_of(stream_data)
    report = report_plan(config, S, BATCH)
    planner = Planner(config)
    assert planner.mixture.epoch_blocks == report.blocks == 2
    shapes = [WindowShape(rank=rank, world_size=2, global_batch_rows=4, micro_batch_rows=2) for rank in (0, 1)]
    streams = [micro_batch_tasks(planner, shape, planner.start()) for shape in shapes]
    costs = np.concatenate([planner.block(block).row_costs for block in range(3)])
    steps, worst, costliest, mean = 0, 0.0, 0.0, 0.0
    while steps * 4 < report.rows:
        loads = [sum(costs[row] for row in next(stream).plan_rows if row >= 0) for stream in streams]
        costliest, mean = costliest + max(loads), mean + sum(loads) / 2
        worst = max(worst, max(loads) * 2 / sum(loads))
        steps += 1
    assert report.steps_per_epoch == steps
    assert report.max_over_mean_rank_cost == pytest.approx(costliest / mean)
    assert report.worst_step_rank_cost == pytest.approx(worst)
    assert 1 < costliest / mean < worst
    alone = report_plan(config, S, replace(BATCH, ranks=1))
    assert alone.max_over_mean_rank_cost == alone.worst_step_rank_cost == 1.0


def test_caps_of_a_step_make_more_steps(stream_data: Any) -> None:
    packing = PackingConfig(images=8)
    free = report_plan(config_of(stream_data, packing=packing), S, BATCH)
    capped = report_plan(config_of(stream_data, packing=packing, batch_caps=BatchCaps(images=8)), S, BATCH)
    assert free.rows == capped.rows
    assert free.steps_per_epoch is not None
    assert capped.steps_per_epoch is not None
    assert capped.steps_per_epoch > free.steps_per_epoch


def test_without_a_batch_size_nothing_is_said_of_steps(stream_data: Any) -> None:
    report = report_plan(config_of(stream_data), S, PlanOptions(ranks=8))
    assert (report.steps_per_epoch, report.max_over_mean_rank_cost, report.worst_step_rank_cost) == (None, None, None)
    with pytest.raises(WindowError, match="global_batch_rows=4"):
        report_plan(config_of(stream_data), S, replace(BATCH, ranks=5))


def test_bytes_to_read_are_those_of_the_planned_samples(stream_data: Any) -> None:
    config = config_of(stream_data, ("birds", "talk"))
    report = report_plan(config, S, BATCH)
    planner = Planner(config)
    total = 0
    for block in range(report.blocks):
        plan = planner.block(block)
        for source, shard, sample in zip(plan.sources, plan.shards, plan.samples, strict=True):
            total += int(planner.catalog(source, shard).sizes[sample])
    assert report.bytes_to_read == total
    assert 0 < report.first_batch_bytes < total
    assert report.requests_to_read == report.cache_bytes == report.bytes_from_store == 0, "the shards are local"
    assert report.first_batch_read_s is None
    assert report.first_batch_plan_s > 0


def test_pages_and_requests_of_a_store(stream_data: Any) -> None:
    config = config_of(stream_data, block_samples=200)
    planner = Planner(config)
    plan = planner.block(0)
    settings = StorageSettings(cache_dir=Path("unused"), page_bytes=4096, request_bytes=4 * 4096, connections=2)
    pages: dict[tuple[int, int], list[int]] = {}
    for row in range(plan.rows):
        for piece in range(plan.row_starts[row], plan.row_starts[row + 1]):
            shard = int(plan.shards[piece])
            catalog = planner.catalog(0, shard)
            first = int(catalog.offsets[plan.samples[piece]])
            last = first + int(catalog.sizes[plan.samples[piece]]) - 1
            for page in range(first // 4096, last // 4096 + 1):
                pages.setdefault((shard, page), []).append(row // 3)
    requests = 0
    for step in range(-(-plan.rows // 3)):
        new = sorted(page for page, uses in pages.items() if min(uses) == step)
        run = 0
        for at, page in enumerate(new):
            run = run % 4 + 1 if at and new[at - 1] == (page[0], page[1] - 1) else 1
            requests += run == 1
    held = max(sum(min(uses) <= step <= max(uses) for uses in pages.values()) for step in range(-(-plan.rows // 3)))
    reads = rows_read(planner, plan, range(plan.rows), 3, settings)
    assert (reads.requests, reads.request_bytes, reads.cache_bytes) == (requests, 4096 * len(pages), 4096 * held)
    assert reads.samples == len(plan.samples)
    whole = rows_read(planner, plan, range(plan.rows), plan.rows, settings)
    assert whole.requests < reads.requests, "more that is asked for together is fewer requests"
    options = PlanOptions(link_mb_per_s=1.0, link_latency_ms=100.0)
    seconds = reads.request_bytes / 1e6 + -(-reads.requests // 2) * 0.1
    assert options.read_s(reads, settings) == pytest.approx(seconds)


def test_neighbouring_pages_of_two_steps_are_two_requests() -> None:
    together, apart = np.array([0, 0]), np.array([0, 1])
    assert read_model._requests(np.array([4, 5]), together, 8) == 1
    assert read_model._requests(np.array([4, 5]), apart, 8) == 2
    assert read_model._requests(np.array([4, 5]), together, 1) == 2


def test_distance_and_entropy_know_storage_order_from_a_shuffle(stream_data: Any) -> None:
    planner = Planner(config_of(stream_data, block_samples=200))
    sizes = planner.mixture.sources[0].shard_samples
    stored = [(shard, sample) for shard, size in enumerate(sizes) for sample in range(size)]
    assert len(stored) == 72
    assert len(sizes) > 2
    orders = {"stored": stored, "random": [stored[at] for at in np.random.default_rng(1).permutation(72)]}
    found = {}
    for name, order in orders.items():
        plan = plan_of([sample for _, sample in order], shards=[shard for shard, _ in order], rows=12)
        quality = ShuffleQuality(planner)
        quality.add_block(plan)
        for row in range(12):
            quality.add_step([(plan, row)])
        found[name] = quality
    assert found["stored"].distance == pytest.approx(0)
    assert found["random"].distance == pytest.approx(1, abs=0.15)
    assert found["stored"].entropy is not None
    assert found["stored"].entropy < 0.5
    assert found["random"].entropy == pytest.approx(1, abs=0.15)
    report = report_plan(planner.config, S, BATCH)
    assert report.shuffle_distance == pytest.approx(1, abs=0.2)


def test_documents_of_equal_size_do_not_stay_with_their_shard(stream_data: Any, tmp_path: Path) -> None:
    """Packed in the order they are stored, they would fill packs shard by shard."""
    records = tmp_path / "even.jsonl"
    parts = [[{"modality": "text", "text": f"{number:03d}" + " and" * (number % 3)}] for number in range(400)]
    lines = [json.dumps({"id": f"even-{number}", "parts": part}) for number, part in enumerate(parts)]
    records.write_text("\n".join(lines))
    manifest = build(ManifestSource(root=records), tmp_path / "even", BuildOptions(shard_size_bytes=40_000))
    assert len(manifest.shards) > 10
    write_token_counts(manifest, stream_data.tokenizer)
    sources = [SourceConfig(name="even", shards=str(manifest.root))]
    config = replace(config_of(stream_data, block_samples=1000), sources=sources)
    report = report_plan(config, S, PlanOptions(global_batch_rows=1))
    assert report.blocks == 1
    assert report.shuffle_entropy == pytest.approx(1, abs=0.04)


def test_small_blocks_move_far_and_mix_little(stream_data: Any) -> None:
    whole = report_plan(config_of(stream_data, block_samples=200), S, BATCH)
    small = report_plan(config_of(stream_data, block_samples=10), S, BATCH)
    assert small.blocks > whole.blocks
    assert whole.shuffle_entropy is not None
    assert small.shuffle_entropy is not None
    assert small.shuffle_entropy < 0.8 * whole.shuffle_entropy


def test_entropy_of_a_histogram() -> None:
    assert entropy_bits(np.array([5, 5, 0, 5, 5])) == pytest.approx(2)
    assert entropy_bits(np.array([7])) == 0
