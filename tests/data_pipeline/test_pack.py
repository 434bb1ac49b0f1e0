"""Packing keeps every budget, wastes next to nothing, and is a pure function of the sizes."""

from __future__ import annotations

import numpy as np
import pytest

from triweave.data_pipeline.stream.pack import best_fit_decreasing


def document_sizes(count: int, seed: int) -> np.ndarray:
    """Sizes like those of captioned pictures with and without speech: tokens, image tokens, images, audio ms."""
    generator = np.random.default_rng(seed)
    image_tokens = np.where(generator.random(count) < 0.8, generator.integers(4, 256, count), 0)
    audio_ms = np.where(generator.random(count) < 0.2, generator.integers(500, 4000, count), 0)
    tokens = generator.integers(5, 30, count) + image_tokens + -(-audio_ms // 80)
    return np.stack([tokens, image_tokens, image_tokens > 0, audio_ms], axis=1).astype(np.int64)


def used(sizes: np.ndarray, packs: np.ndarray) -> np.ndarray:
    total = int(packs.max()) + 1
    return np.stack([np.bincount(packs, column, total) for column in sizes.T], axis=1).astype(np.int64)


@pytest.mark.parametrize(
    "caps",
    [
        (1024, 1024, 64, 81_945),
        (1024, 512, 64, 81_945),
        (1024, 1024, 4, 81_945),
        (1024, 1024, 64, 4000),
        (4096, 2048, 64, 24_576),
        (32_768, 16_384, 512, 196_608),
    ],
)
def test_no_pack_passes_a_budget_and_few_are_wasted(caps: tuple[int, ...]) -> None:
    sizes = document_sizes(6000, seed=1)
    packs = best_fit_decreasing(sizes, caps)
    totals = used(sizes, packs)
    assert (totals <= np.asarray(caps)).all()
    assert (totals[:, 0] > 0).all(), "pack numbers have gaps"
    # No packing can use fewer packs than its tightest budget needs.
    lower_bound = max(int(-(-column.sum() // cap)) for column, cap in zip(sizes.T, caps, strict=True))
    assert len(totals) <= 1.03 * lower_bound + 2


def test_tokens_alone_fill_the_packs() -> None:
    sizes = document_sizes(20_000, seed=2)[:, :1]
    packs = best_fit_decreasing(sizes, (4096,))
    fill = used(sizes, packs)[:, 0]
    assert np.sort(fill)[1:].mean() / 4096 >= 0.99


def test_best_fit_by_hand() -> None:
    # 7 opens A (3 left), 6 opens B (4 left); 4 fits B exactly, 3 fits A exactly, 2 opens C.
    packs = best_fit_decreasing(np.asarray([[2], [3], [4], [6], [7]]), (10,))
    c, a3, b4, b6, a7 = packs.tolist()
    assert a3 == a7
    assert b4 == b6
    assert len({c, a7, b6}) == 3


def test_each_item_runs_of_equal_sizes_included_goes_where_item_by_item_best_fit_puts_it() -> None:
    generator = np.random.default_rng(3)
    sizes = generator.integers(1, 13, (400, 1))
    packs = best_fit_decreasing(sizes, (50,))
    rooms: list[int] = []
    for size in np.sort(sizes[:, 0])[::-1].tolist():
        fitting = [room for room in rooms if room >= size]
        if fitting:
            rooms[rooms.index(min(fitting))] -= size
        else:
            rooms.append(50 - size)
    assert sorted(50 - used(sizes, packs)[:, 0]) == sorted(rooms)


def test_the_order_of_the_items_does_not_matter() -> None:
    sizes = document_sizes(3000, seed=4)
    caps = (1024, 600, 16, 9000)
    shuffle = np.random.default_rng(5).permutation(len(sizes))
    straight = used(sizes, best_fit_decreasing(sizes, caps))
    shuffled = used(sizes[shuffle], best_fit_decreasing(sizes[shuffle], caps))
    assert np.array_equal(straight, shuffled)


def test_an_item_that_fits_nowhere_is_refused() -> None:
    with pytest.raises(ValueError, match="fit into a pack of its own"):
        best_fit_decreasing(np.asarray([[5, 9]]), (10, 8))
    with pytest.raises(ValueError, match="at least 1 token"):
        best_fit_decreasing(np.asarray([[0, 0]]), (10, 8))


def test_nothing_to_pack() -> None:
    assert len(best_fit_decreasing(np.empty((0, 4), np.int64), (10, 10, 10, 10))) == 0
