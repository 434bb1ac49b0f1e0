"""Data-stall telemetry: a stage that is slowed down is the one that is blamed, with a setting that helps."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest

from triweave.data_pipeline.config import DataConfig, SourceConfig
from triweave.data_pipeline.media.geometry import MediaGeometry
from triweave.data_pipeline.stream import loader as loader_module
from triweave.data_pipeline.stream import windows
from triweave.data_pipeline.stream.loader import StepLoader
from triweave.data_pipeline.stream.reader import ShardReader
from triweave.data_pipeline.stream.stalls import START_STEPS, STEPS_KEPT, StallMeter, StepLoad
from triweave.data_pipeline.text.tokenizer import SentencePieceTokenizer

STEPS = 6
CALL_S, BATCH_S = 0.02, 0.15
"""What a call per part or sample, and one per micro-batch, takes longer."""


def loader_of(data: Any, *, workers: int, rows: int = 2) -> StepLoader:
    config = DataConfig(
        sources=[SourceConfig(name="birds", shards=str(data.birds))],
        tokenizer=str(data.tokenizer),
        sequence_length=128,
        geometry=MediaGeometry(image_patch_px=8, image_max_tokens=100),
        workers=workers,
    )
    return StepLoader(config, rank=0, world_size=1, global_batch_rows=rows, micro_batch_rows=1)


def slow_down(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, seconds: float) -> None:
    """Let every call of a function take longer."""
    original: Callable[..., Any] = getattr(owner, name)

    def slowed(*arguments: Any, **options: Any) -> Any:
        time.sleep(seconds)
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, slowed)


def slow_stage(monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    if stage == "storage":
        slow_down(monkeypatch, ShardReader, "read", CALL_S)
    elif stage == "tokenise":
        slow_down(monkeypatch, SentencePieceTokenizer, "encode", CALL_S)
    elif stage == "decode":
        slow_down(monkeypatch, loader_module.PieceMaker, "_decoded", CALL_S)
    elif stage == "packing":
        slow_down(monkeypatch, loader_module, "collate", BATCH_S)
    else:
        slow_down(monkeypatch, windows, "assign_rows", BATCH_S)


def meter_after(loader: StepLoader, *, work_s: float) -> StallMeter:
    meter = StallMeter.of(loader.config)
    stream = iter(loader)
    try:
        for window in islice(stream, STEPS):
            time.sleep(work_s)
            meter.add(window.load, work_s)
    finally:
        stream.close()
    return meter


@pytest.mark.parametrize(
    ("stage", "setting", "workers"),
    [
        ("storage", "faster disk", 1),
        ("tokenise", "data.sequence_length", 0),
        ("decode", "--image-max-side", 1),
        ("packing", "train.micro_batch_rows", 0),
        ("planning", "data.block_samples", 0),
    ],
)
def test_the_slow_stage_is_named_with_a_setting_that_helps(
    stream_data: Any, monkeypatch: pytest.MonkeyPatch, stage: str, setting: str, workers: int
) -> None:
    slow_stage(monkeypatch, stage)
    stall = meter_after(loader_of(stream_data, workers=workers), work_s=0.0).stall()
    assert stall is not None
    assert stall.bound == stage
    assert stall.wait_share > 0.5
    assert setting in str(stall)
    assert f"you are {stage} bound" in str(stall)


def test_batches_lie_ready_for_a_slow_rank(stream_data: Any) -> None:
    assert meter_after(loader_of(stream_data, workers=1), work_s=0.15).figures()["queue_depth"] >= 1


def test_a_whole_step_lies_ready_where_that_is_more_than_prefetch(stream_data: Any) -> None:
    loader = loader_of(stream_data, workers=1, rows=6)
    assert loader.config.prefetch == 2
    assert meter_after(loader, work_s=0.4).figures()["queue_depth"] > 4


def test_a_rank_that_hardly_waits_hears_nothing() -> None:
    for wait_s, waits in ((0.04, False), (0.06, True)):
        meter = StallMeter(workers=2, remote=False)
        for _ in range(START_STEPS + STEPS_KEPT):
            meter.add(load(50.0, wait_s=wait_s), 1.0 - wait_s)
        assert (meter.stall() is not None) == (meter.news() is not None) == waits


def test_figures_are_those_of_the_samples_that_were_read(stream_data: Any) -> None:
    loader = loader_of(stream_data, workers=0)
    windows_taken = list(islice(iter(loader), 4))
    for window in windows_taken:
        plan_rows = [int(row) for batch in window.micro_batches for row in batch.plan_rows]
        plan = loader.planner.block(0)
        spans = [range(plan.row_starts[row], plan.row_starts[row + 1]) for row in plan_rows]
        sizes = [
            int(loader.planner.catalog(0, plan.shards[at]).sizes[plan.samples[at]]) for span in spans for at in span
        ]
        assert window.load.counts == {"samples": len(sizes), "read_bytes": sum(sizes)}
        assert len(window.load.stages_ms) == 2
        for timings in window.load.stages_ms:
            assert set(timings) == {"plan", "fetch", "tokenise", "decode", "pack"}
            assert all(value >= 0 for value in timings.values())
        assert window.load.wait_s * 1000 >= sum(sum(timings.values()) for timings in window.load.stages_ms) * 0.9


def load(decode_ms: float, *, wait_s: float = 1.0, **counts: float) -> StepLoad:
    return StepLoad(wait_s=wait_s, queue_depth=3, stages_ms=[{"fetch": 1.0, "decode": decode_ms}], counts=counts)


def test_percentiles_means_and_sums_leave_the_start_out() -> None:
    meter = StallMeter(workers=2, remote=False)
    for _ in range(START_STEPS):
        meter.add(load(10_000.0, wait_s=60.0), 1.0)
    assert meter.figures() == {}
    assert meter.stall() is None
    for number in range(100, 0, -1):
        meter.add(load(float(number), samples=2, read_bytes=2e6), 1.0)
    figures = meter.figures()
    assert figures["decode_ms_p50"] == pytest.approx((STEPS_KEPT + 1) / 2)
    assert STEPS_KEPT - 1 < figures["decode_ms_p99"] <= STEPS_KEPT
    assert figures["wait_s"] == 1.0
    assert figures["queue_depth"] == 3
    assert figures["samples"] == 2 * STEPS_KEPT
    assert figures["read_mb_per_s"] == pytest.approx(1.0)
    assert "pack_ms_p50" not in figures


def test_news_come_once_and_again_when_the_cause_changes() -> None:
    meter = StallMeter(workers=2, remote=False)
    told = []
    for _ in range(START_STEPS + 2 * STEPS_KEPT):
        meter.add(load(50.0), 1.0)
        told.append(meter.news())
    for _ in range(2 * STEPS_KEPT):
        meter.add(StepLoad(wait_s=1.0, queue_depth=0, stages_ms=[{"fetch": 900.0, "decode": 50.0}]), 1.0)
        told.append(meter.news())
    lines = [line for line in told if line]
    assert ["decode bound" in line for line in lines] == [True, False]
    assert told.index(lines[0]) == START_STEPS + STEPS_KEPT - 1
    assert "storage bound: 50% of the time" in lines[1]


def test_the_worst_of_all_ranks_is_named() -> None:
    """Three ranks, of which the first has nothing to say; they compare in the same step."""
    ranks = [StallMeter(workers=2, remote=False) for _ in range(3)]
    waits = (0.0, 0.5, 1.0)
    for step in range(START_STEPS + STEPS_KEPT):
        for meter, wait_s in zip(ranks, waits, strict=True):
            meter.add(StepLoad(wait_s=wait_s, queue_depth=0, stages_ms=[{"decode": 900.0}]), 1.0)
        if step < START_STEPS + STEPS_KEPT - 1:
            assert ranks[0].news(lambda _: pytest.fail("asked too early")) is None
    texts: list[str] = []

    def hear(text: str) -> list[str]:
        texts.append(text)
        return [text]

    for meter in ranks[1:]:
        meter.news(hear)
    line = ranks[0].news(lambda text: [text, *texts])
    assert line is not None
    assert line.startswith("data: you are decode bound on rank 2 of 3, which waits most: 50% of the time")
    assert ranks[0].worst is not None
    assert (ranks[0].worst.rank, ranks[0].worst.bound) == (2, "decode")
    assert "rank" not in str(ranks[1].stall())


def test_a_remote_store_has_settings_of_its_own() -> None:
    advice = {}
    for retries in (0, 30):
        meter = StallMeter(workers=2, remote=True)
        for _ in range(START_STEPS + 1):
            meter.add(load(0.1, requests=100, retries=retries), 1.0)
        advice[retries] = str(meter.stall())
    assert "raise TRIWEAVE_S3_READ_AHEAD" in advice[0]
    assert "lower TRIWEAVE_S3_CONNECTIONS" in advice[30]
