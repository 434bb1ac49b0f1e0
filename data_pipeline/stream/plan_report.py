"""What a config's packs look like, before anything is read: fill, balance, shuffling, reading, and planning's own time.

Everything but `plan_seconds`, `plan_us_per_sample` and `first_batch_plan_s` follows from metadata alone, so it is the
same on every machine. What is read and what of it is cached is a model: see `read_model.py`.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from triweave.data_pipeline.config import DataConfig
from triweave.data_pipeline.storage.location import is_remote
from triweave.data_pipeline.storage.settings import StorageSettings
from triweave.data_pipeline.stream.plan import ALONE, BlockPlan, Planner
from triweave.data_pipeline.stream.read_model import Reads, rows_read
from triweave.data_pipeline.stream.shuffle_quality import ShuffleQuality
from triweave.data_pipeline.stream.windows import StepWalk, WindowShape, assign_rows
from triweave.data_pipeline.text.tokenizer import Tokenizer

FILL_BORDERS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 1.0)
"""Lower borders of the fill histogram's bins; the last bin holds full packs only."""
UNSTEPPED_ROWS = 64
"""Rows looked at together where no batch size is given."""


@dataclass(frozen=True, kw_only=True)
class PlanReport:
    """The packs of one epoch at one sequence length.

    rows, samples: packs, and the samples drawn for them.
    tokens_per_modality: modality name -> tokens (text includes bos, eos and start markers).
    alone_tokens: tokens in one-span segments; they are in `tokens_per_modality` as well.
    segments_per_group, items_per_group: one-span segments, and the documents they are from, in a contrastive group:
        their number in the epoch x contrastive_group_rows / rows (with fewer rows than that, all of them).
    fill: tokens / (rows x sequence_length). fill_without_last: the same without each block's emptiest pack, which is
        what is left over when a block ends.
    left_out: reason -> parts or documents.
    fill_counts: packs per bin of FILL_BORDERS.
    steps_per_epoch: steps until every row of the epoch is taken; None without a batch size.
    max_over_mean_rank_cost: sum over steps of the costliest rank / sum of the mean rank, on `ranks` ranks: how much
        longer steps take than with perfect balance. worst_step_rank_cost: the same ratio of the worst step. None
        without a batch size.
    shuffle_distance, shuffle_entropy: see `shuffle_quality.py`; 1 is a uniformly random order.
    bytes_to_read: of the planned samples, by all ranks together; a document that is split is read for every piece.
    requests_to_read, bytes_from_store, cache_bytes: model of an object store and its cache, 0 where all shards are
        local; `cache_bytes` is what one machine that reads all rows must hold to ask for nothing twice in a block.
    first_batch_plan_s: measured here, from nothing to the plan of the first block. first_batch_bytes,
        first_batch_samples: what the first step reads. first_batch_read_s: model, from `link_mb_per_s` and
        `link_latency_ms`, of that and of the first block's metadata; None where all shards are local.
    plan_seconds, plan_us_per_sample: measured time to draw, pack and order, with the shards' metadata loaded.
    """

    sequence_length: int
    plan_hash: str
    blocks: int
    rows: int
    samples: int
    pieces: int
    tokens_per_modality: dict[str, int]
    alone_tokens: int
    segments_per_group: float
    items_per_group: float
    fill: float
    fill_without_last: float
    left_out: dict[str, int]
    fill_counts: list[int]
    ranks: int
    steps_per_epoch: int | None
    max_over_mean_rank_cost: float | None
    worst_step_rank_cost: float | None
    shuffle_distance: float | None
    shuffle_entropy: float | None
    bytes_to_read: int
    requests_to_read: int
    bytes_from_store: int
    cache_bytes: int
    first_batch_samples: int
    first_batch_bytes: int
    first_batch_plan_s: float
    first_batch_read_s: float | None
    plan_seconds: float
    plan_us_per_sample: float


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What a plan is looked at for.

    global_batch_rows, micro_batch_rows: rows of a step, and of a forward pass of a rank; None where no step is meant.
    ranks: ranks that the rows of a step are dealt to.
    link_mb_per_s, link_latency_ms: of the model of the time to the first batch from an object store.
    """

    global_batch_rows: int | None = None
    micro_batch_rows: int = 1
    ranks: int = 1
    link_mb_per_s: float = 200.0
    link_latency_ms: float = 20.0

    def read_s(self, reads: Reads, settings: StorageSettings) -> float:
        """Return the modelled seconds that `reads` take: bytes / rate + rounds of requests x latency."""
        rounds = -(-reads.requests // settings.connections)
        return reads.request_bytes / (self.link_mb_per_s * 1e6) + rounds * self.link_latency_ms / 1e3


@dataclass(kw_only=True)
class _Sums:
    """What is added up block by block."""

    tokens: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    fills: list[npt.NDArray[np.float64]] = field(default_factory=list)
    without_last: list[npt.NDArray[np.float64]] = field(default_factory=list)
    samples: int = 0
    pieces: int = 0
    alone_tokens: int = 0
    segments: int = 0
    items: int = 0
    bytes_to_read: int = 0
    requests: int = 0
    request_bytes: int = 0
    cache_bytes: int = 0
    plan_s: float = 0.0

    def add(self, plan: BlockPlan, sequence_length: int) -> None:
        """Add a block."""
        self.samples += plan.drawn_samples
        self.pieces += len(plan.samples)
        self.alone_tokens += int((plan.end_tokens - plan.first_tokens)[plan.kinds == ALONE].sum())
        self.segments += int(plan.segments.sum())
        self.items += int((plan.kinds == ALONE).sum())
        self.tokens.update(plan.modality_tokens)
        self.left_out.update(plan.left_out)
        fill = np.sort(plan.row_tokens / sequence_length)
        self.fills.append(fill)
        self.without_last.append(fill[1:])

    def add_reads(self, reads: Reads, *, remote: bool) -> None:
        """Add what a block reads; requests and cache only where there is an object store."""
        self.bytes_to_read += reads.sample_bytes
        if remote:
            self.requests += reads.requests
            self.request_bytes += reads.request_bytes
            self.cache_bytes = max(self.cache_bytes, reads.cache_bytes)


def report_plan(config: DataConfig, sequence_length: int, options: PlanOptions) -> PlanReport:
    """Plan one epoch of the config's first plan segment and sum it up.

    For a mixture an epoch is what `Mixture.epoch_samples` says. Memory: two blocks' metadata, and 16 bytes per row.

    Raises DataError as the planner does, WindowError where the ranks do not fit the batch.
    """
    began = time.perf_counter()
    planner = Planner(replace(config, sequence_length=sequence_length, schedule=[]), Tokenizer.load(config.tokenizer))
    planner.load_catalogs(0)
    planner.block(0)
    first_plan_s = time.perf_counter() - began
    planner.forget()
    sums, steps = _Sums(), _Steps(planner, options)
    remote = any(is_remote(source.shards) for source in config.sources)
    settings = StorageSettings.from_environment()
    for block in range(planner.mixture.epoch_blocks):
        planner.load_catalogs(block)
        began = time.perf_counter()
        plan = planner.block(block)
        sums.plan_s += time.perf_counter() - began
        sums.add(plan, sequence_length)
        reads = rows_read(planner, plan, range(plan.rows), steps.most_rows, settings)
        sums.add_reads(reads, remote=remote)
        if block == 0:
            first = rows_read(planner, plan, range(min(steps.most_rows, plan.rows)), steps.most_rows, settings)
        steps.add(plan)
    steps.finish()
    rows = steps.planned_rows
    groups = max(1.0, rows / config.packing.contrastive_group_rows)
    return PlanReport(
        sequence_length=sequence_length,
        plan_hash=planner.plan_hash,
        blocks=planner.mixture.epoch_blocks,
        rows=rows,
        samples=sums.samples,
        pieces=sums.pieces,
        tokens_per_modality=dict(sums.tokens),
        alone_tokens=sums.alone_tokens,
        segments_per_group=sums.segments / groups,
        items_per_group=sums.items / groups,
        left_out=dict(sums.left_out),
        **_fills(sums),
        **steps.figures(options),
        bytes_to_read=sums.bytes_to_read,
        requests_to_read=sums.requests,
        bytes_from_store=sums.request_bytes,
        cache_bytes=sums.cache_bytes,
        first_batch_samples=first.samples,
        first_batch_bytes=first.sample_bytes,
        first_batch_plan_s=first_plan_s,
        first_batch_read_s=options.read_s(first, settings) if remote else None,
        plan_seconds=sums.plan_s,
        plan_us_per_sample=sums.plan_s / max(1, sums.samples) * 1e6,
    )


def _fills(sums: _Sums) -> dict[str, Any]:
    fill, trimmed = np.concatenate(sums.fills), np.concatenate(sums.without_last)
    bins = np.searchsorted(FILL_BORDERS, fill, side="right") - 1
    return {
        "fill": float(fill.mean()) if len(fill) else 0.0,
        "fill_without_last": float(trimmed.mean()) if len(trimmed) else 0.0,
        "fill_counts": np.bincount(bins, minlength=len(FILL_BORDERS)).tolist(),
    }


class _Steps:
    """Walks the steps of an epoch behind its blocks, while these are in memory.

    most_rows: rows of a step, or rows looked at together. planned_rows: of the blocks so far.
    """

    def __init__(self, planner: Planner, options: PlanOptions) -> None:
        self.most_rows = options.global_batch_rows or UNSTEPPED_ROWS
        self.planned_rows = 0
        self.shuffling = ShuffleQuality(planner)
        self._shape = WindowShape(
            rank=0,
            world_size=options.ranks,
            global_batch_rows=max(self.most_rows, 0 if options.global_batch_rows else options.ranks),
            micro_batch_rows=options.micro_batch_rows,
        )
        self._planner = planner
        self._walk: StepWalk | None = None
        self._costliest = self._mean = 0.0
        self._worst: float | None = None

    def add(self, plan: BlockPlan) -> None:
        """Count a block and take the steps that end within it."""
        self.planned_rows += plan.rows
        self.shuffling.add_block(plan)
        self._walk = self._walk or StepWalk(self._planner, self._planner.start())
        while self._walk.next_row + self.most_rows <= self.planned_rows:
            self._step(self._walk)

    def finish(self) -> None:
        """Take the steps that are left of the epoch; the last one goes on into the next."""
        while self._walk and self._walk.next_row < self.planned_rows:
            self._step(self._walk)

    def figures(self, options: PlanOptions) -> dict[str, Any]:
        """Return the report's figures on steps; None for those that need a batch size where there is none."""
        with_batch = options.global_batch_rows is not None
        balance = self._costliest / self._mean if self._mean else None
        return {
            "ranks": options.ranks,
            "steps_per_epoch": self._walk.steps if self._walk and with_batch else None,
            "max_over_mean_rank_cost": balance if with_batch else None,
            "worst_step_rank_cost": self._worst if with_batch else None,
            "shuffle_distance": self.shuffling.distance,
            "shuffle_entropy": self.shuffling.entropy,
        }

    def _step(self, walk: StepWalk) -> None:
        window = walk.step(self.most_rows)
        self.shuffling.add_step(window)
        costs = [float(plan.row_costs[row]) for plan, row in window]
        ranks = assign_rows(costs, self._shape.world_size, self._shape.rank_rows)
        loads = [sum(costs[row] for row in rows) for rows in ranks]
        mean = sum(loads) / len(loads)
        self._costliest += max(loads)
        self._mean += mean
        if mean:
            self._worst = max(self._worst or 0.0, max(loads) / mean)
