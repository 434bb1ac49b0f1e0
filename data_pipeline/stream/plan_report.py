"""What a config's packs look like: fill, rows, tokens, what is left out, and how long planning takes."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from triweave.data_pipeline.config import DataConfig
from triweave.data_pipeline.stream.plan import ALONE, Planner
from triweave.data_pipeline.text.tokenizer import Tokenizer

FILL_BORDERS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 1.0)
"""Lower borders of the fill histogram's bins; the last bin holds full packs only."""


@dataclass(frozen=True, kw_only=True)
class PlanReport:
    """The packs of one epoch at one sequence length.

    rows, samples: packs, and the samples drawn for them.
    tokens: modality name -> tokens (text includes bos, eos and start markers).
    alone_tokens: tokens in one-span segments; they are in `tokens` as well.
    segments_per_group, items_per_group: one-span segments, and the documents they are from, in a contrastive group:
        their number in the epoch x contrastive_group_rows / rows (with fewer rows than that, all of them).
    fill: tokens / (rows x sequence_length). fill_without_last: the same without each block's emptiest pack, which is
        what is left over when a block ends.
    left_out: reason -> parts or documents.
    fill_counts: packs per bin of FILL_BORDERS.
    steps_per_epoch: rows / global_batch_rows rounded up; None without a batch size.
    plan_seconds, plan_us_per_sample: time to draw, pack and order, with the shards' metadata loaded.
    """

    sequence_length: int
    plan_hash: str
    blocks: int
    rows: int
    samples: int
    pieces: int
    tokens: dict[str, int]
    alone_tokens: int
    segments_per_group: float
    items_per_group: float
    fill: float
    fill_without_last: float
    left_out: dict[str, int]
    fill_counts: list[int]
    steps_per_epoch: int | None
    plan_seconds: float
    plan_us_per_sample: float


def report_plan(config: DataConfig, sequence_length: int, global_batch_rows: int | None) -> PlanReport:
    """Plan one epoch (for a mixture: as many blocks as hold all sources' samples once) and sum it up."""
    planner = Planner(replace(config, sequence_length=sequence_length), Tokenizer.load(config.tokenizer))
    mixture = planner.mixture
    if len(mixture.sources) == 1:
        blocks = mixture.group_count(0)
    else:
        blocks = -(-mixture.epoch_samples // mixture.block_samples)
    tokens: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    fills: list[npt.NDArray[np.float64]] = []
    without_last: list[npt.NDArray[np.float64]] = []
    samples = pieces = alone_tokens = segments = items = 0
    seconds = 0.0
    for block in range(blocks):
        planner.load_catalogs(block)
        began = time.perf_counter()
        plan = planner.block(block)
        seconds += time.perf_counter() - began
        samples += plan.drawn_samples
        pieces += len(plan.samples)
        alone_tokens += int((plan.end_tokens - plan.first_tokens)[plan.kinds == ALONE].sum())
        segments += int(plan.segments.sum())
        items += int((plan.kinds == ALONE).sum())
        tokens.update(plan.modality_tokens)
        left_out.update(plan.left_out)
        fill = np.sort(plan.row_tokens / sequence_length)
        fills.append(fill)
        without_last.append(fill[1:])
    fill = np.concatenate(fills)
    groups = max(1.0, len(fill) / config.packing.contrastive_group_rows)
    trimmed = np.concatenate(without_last)
    return PlanReport(
        sequence_length=sequence_length,
        plan_hash=planner.plan_hash,
        blocks=blocks,
        rows=len(fill),
        samples=samples,
        pieces=pieces,
        tokens=dict(tokens),
        alone_tokens=alone_tokens,
        segments_per_group=segments / groups,
        items_per_group=items / groups,
        fill=float(fill.mean()) if len(fill) else 0.0,
        fill_without_last=float(trimmed.mean()) if len(trimmed) else 0.0,
        left_out=dict(left_out),
        fill_counts=np.bincount(
            np.searchsorted(FILL_BORDERS, fill, side="right") - 1, minlength=len(FILL_BORDERS)
        ).tolist(),
        steps_per_epoch=-(-len(fill) // global_batch_rows) if global_batch_rows else None,
        plan_seconds=seconds,
        plan_us_per_sample=seconds / max(1, samples) * 1e6,
    )
