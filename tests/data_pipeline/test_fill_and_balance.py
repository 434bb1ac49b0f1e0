"""Packs of mixed corpora are as full as they can be with every cap set, and ranks get the same work.

The metadata is generated in the shapes of Tux Paint (picture, caption, sometimes speech), the GIMP manual (long texts
with several pictures) and asterisk's prompts (speech and its transcript). `-s` prints the figures.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt
import pytest

from triweave.data_pipeline.config import PackingConfig
from triweave.data_pipeline.media.geometry import MediaGeometry
from triweave.data_pipeline.stream.mixture import keyed_order
from triweave.data_pipeline.stream.pack import best_fit_decreasing
from triweave.data_pipeline.stream.row_order import CLUSTER_ROWS, row_order
from triweave.data_pipeline.stream.windows import assign_rows

SAMPLES = {4096: 42_000, 32_768: 65_536}


def corpus_sizes(count: int, caps: dict[str, int]) -> npt.NDArray[np.int64]:
    """Budgets of documents drawn 80 : 12 : 8 from the three corpora: tokens, image tokens, images, audio ms, encoder
    cost (2 for an image token, 1 for an audio token); those that no pack holds are left out."""
    draw = np.random.default_rng(1)
    corpus = draw.choice(3, count, p=[0.8, 0.12, 0.08])
    image_tokens, images, audio_ms, text = np.zeros((4, count), np.int64)
    stamps, pages, prompts = (corpus == number for number in range(3))
    image_tokens[stamps] = draw.choice([16, 36, 42, 48, 56, 64], stamps.sum())
    images[stamps], text[stamps] = 1, draw.integers(6, 26, stamps.sum())
    spoken = stamps & (draw.random(count) < 0.12)
    audio_ms[spoken] = draw.lognormal(7.1, 0.35, spoken.sum())
    images[pages] = draw.poisson(4, pages.sum())
    image_tokens[pages] = [draw.integers(8, 64, number).sum() for number in images[pages]]
    text[pages] = np.minimum(draw.lognormal(6.3, 0.9, pages.sum()) + 10, 3500)
    audio_ms[prompts] = np.minimum(draw.lognormal(7.6, 0.7, prompts.sum()), 60_000)
    text[prompts] = draw.integers(3, 60, prompts.sum())
    audio_tokens = -(-audio_ms // 80)
    tokens = text + image_tokens + images + audio_tokens + (audio_ms > 0) + 2
    sizes = np.stack([tokens, image_tokens, images, audio_ms, 2 * image_tokens + audio_tokens], axis=1)
    return sizes[(sizes <= list(caps.values())).all(axis=1)]


def caps_of(length: int) -> dict[str, int]:
    """Every cap set, each below what some documents alone would fill a pack with."""
    packing = PackingConfig(image_tokens=length // 2, images=length // 64, audio_ms=6 * length, encoder_cost=length)
    return packing.caps(length, MediaGeometry())


@cache
def packed(length: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Sizes of the items, and the pack of each."""
    caps = caps_of(length)
    sizes = corpus_sizes(SAMPLES[length], caps)
    return sizes, best_fit_decreasing(sizes, tuple(caps.values()))


@pytest.mark.parametrize("length", [4096, 32_768])
def test_fill_is_what_the_tightest_budget_allows(length: int) -> None:
    sizes, packs = packed(length)
    caps = np.asarray(list(caps_of(length).values()))
    rows = int(packs.max()) + 1
    used = np.stack([np.bincount(packs, column, rows) for column in sizes.T], axis=1)
    assert (used <= caps).all()
    bound = int((-(-sizes.sum(axis=0) // caps)).max())
    print(f"L={length}: {rows} packs, no packing has fewer than {bound}: {bound / rows:.2%} of the achievable fill")
    assert rows >= 200
    assert bound / rows >= 0.995
    by_tokens = best_fit_decreasing(sizes[:, :1], (length,))
    over = np.stack([np.bincount(by_tokens, column) for column in sizes.T], axis=1) > caps
    assert over.any(), "the caps should bind, or there is nothing to show"


@pytest.mark.parametrize("length", [4096, 32_768])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ranks_get_the_same_work_in_every_step(length: int, ranks: int) -> None:
    sizes, packs = packed(length)
    rows = int(packs.max()) + 1
    attention = sizes[:, 0] ** 2 / PackingConfig().attention_cost_tokens
    costs = np.bincount(packs, sizes[:, 0] + sizes[:, 4] + attention, rows)
    mean, worst = imbalance(costs[row_order(costs, 0, "rows", 0)], ranks)
    print(f"L={length}, {ranks} ranks: max/mean {mean:.4f}, worst step {worst:.4f}")
    assert worst <= 1.05


def imbalance(costs: npt.NDArray[np.float64], ranks: int) -> tuple[float, float]:
    """Largest over mean work of the ranks with 8 rows each: over all steps together, and in the worst one."""
    largest, mean = [], []
    for first in range(0, len(costs) - 8 * ranks + 1, 8 * ranks):
        step = costs[first : first + 8 * ranks].tolist()
        work = [sum(step[row] for row in mine) for mine in assign_rows(step, ranks, 8)]
        largest.append(max(work))
        mean.append(sum(work) / ranks)
    return sum(largest) / sum(mean), max(np.divide(largest, mean))


def rows_with_outliers(seed: int) -> npt.NDArray[np.float64]:
    """200 rows, 7 in a hundred of which hold a document of most of their length, as the manual's longest pages do."""
    draw = np.random.default_rng(seed)
    costs = draw.uniform(68_000, 80_000, 200)
    costs[draw.choice(200, 14, replace=False)] = draw.choice([410_000, 312_000, 211_000], 14)
    return costs


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_rare_rows_that_cost_several_others_are_shared_by_the_ranks(ranks: int) -> None:
    blocks = [rows_with_outliers(seed) for seed in range(20)]
    drawn = np.concatenate([costs[keyed_order(200, 0, "rows", block)] for block, costs in enumerate(blocks)])
    costs = np.concatenate([costs[row_order(costs, 0, "rows", block)] for block, costs in enumerate(blocks)])
    before, after = imbalance(drawn, ranks), imbalance(costs, ranks)
    print(f"{ranks} ranks: max/mean {after[0]:.4f}, worst {after[1]:.4f}; as drawn {before[0]:.4f}, {before[1]:.4f}")
    assert after[0] <= 1.05
    assert before[0] - 1 > 3 * (after[0] - 1)


def test_the_order_of_rows_is_drawn_but_for_the_rare_heavy_ones() -> None:
    even = np.random.default_rng(0).uniform(1, 1.9, 500)
    assert row_order(even, 7, "rows").tolist() == keyed_order(500, 7, "rows").tolist()
    common = np.where(np.arange(500) % 5, 1.0, 4.0)
    assert row_order(common, 7, "rows").tolist() == keyed_order(500, 7, "rows").tolist()
    assert row_order(np.empty(0), 7, "rows").tolist() == []
    rare = even.copy()
    rare[::20] = np.arange(5.0, 30.0)
    order = row_order(rare, 7, "rows")
    assert sorted(order.tolist()) == list(range(500))
    heavy = np.flatnonzero(rare[order] > 4)
    starts = heavy[np.flatnonzero(np.diff(heavy, prepend=-2) > 1)]
    assert starts.tolist() == sorted(starts.tolist())
    assert (starts % CLUSTER_ROWS == 0).all(), "clusters begin where steps of as many rows do"
    assert len(starts) <= 2
    light = [row for row in keyed_order(500, 7, "rows").tolist() if row % 20]
    assert [row for row in order.tolist() if row % 20] == light, "the others keep the order that was drawn"


def test_a_clusters_place_is_drawn() -> None:
    rare = np.ones(500)
    rare[:4] = 5.0
    places = {int(np.flatnonzero(row_order(rare, seed, "rows") < 4)[0]) for seed in range(40)}
    assert len(places) > 10
