"""Orders of samples: each sample once per epoch, shares by weight, the same in every process."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from triweave.data_pipeline.stream.mixture import Mixture, SourceShape, keyed_order

EXPECTED_ORDER = [4, 6, 1, 2, 7, 0, 5, 3]


def samples_of(mixture: Mixture, blocks: range) -> list[tuple[int, int, int, int]]:
    """(source, epoch, shard, sample) in the order of the stream."""
    result = []
    for block in blocks:
        for draw in mixture.draws(block):
            shards, rows = mixture.order(draw)
            result += [(draw.source, draw.epoch, int(s), int(r)) for s, r in zip(shards, rows, strict=True)]
    return result


def test_keyed_order_is_a_permutation_fixed_for_all_time() -> None:
    order = keyed_order(8, 0, "samples", "birds", 3)
    assert sorted(order.tolist()) == list(range(8))
    # Written down: a numpy or xxhash that changes this would silently reorder every resumed run.
    assert order.tolist() == EXPECTED_ORDER
    assert keyed_order(8, 1, "samples", "birds", 3).tolist() != EXPECTED_ORDER


@pytest.mark.parametrize("shard_samples", [(7,), (5, 0, 9, 1, 30, 2), (10,) * 12, (100, 1, 1)])
@pytest.mark.parametrize("block_samples", [1, 8, 20, 1000])
def test_one_source_comes_whole_in_every_epoch(shard_samples: tuple[int, ...], block_samples: int) -> None:
    shape = SourceShape(name="a", weight=2.0, shard_samples=shard_samples)
    mixture = Mixture([shape], block_samples=block_samples, seed=3)
    groups = mixture.group_count(0)
    for epoch in range(3):
        drawn = samples_of(mixture, range(epoch * groups, (epoch + 1) * groups))
        assert sorted(drawn) == [(0, epoch, s, r) for s, n in enumerate(shard_samples) for r in range(n)]
        assert mixture.cursors(epoch * groups)["a"].epoch == epoch
        assert mixture.cursors(epoch * groups)["a"].sample == 0


def test_epochs_groups_and_seeds_differ() -> None:
    shape = SourceShape(name="a", weight=1.0, shard_samples=(50, 50, 50, 50))
    mixture = Mixture([shape], block_samples=100, seed=0)
    first, second = samples_of(mixture, range(2)), samples_of(mixture, range(2, 4))
    assert [s[2:] for s in first] != [s[2:] for s in second]
    other = Mixture([shape], block_samples=100, seed=1)
    assert samples_of(other, range(2)) != first
    # A block is a group of whole shards, each read in one block of an epoch only.
    assert len({shard for _, _, shard, _ in first[:100]}) == 2
    assert not {s[2] for s in first[:100]} & {s[2] for s in first[100:]}


def test_several_sources_share_by_weight_and_lose_nothing() -> None:
    shapes = [
        SourceShape(name="large", weight=3.0, shard_samples=(40, 50, 60)),
        SourceShape(name="small", weight=1.0, shard_samples=(3, 4)),
        SourceShape(name="rare", weight=0.5, shard_samples=(20,)),
    ]
    mixture = Mixture(shapes, block_samples=64, seed=9)
    drawn = samples_of(mixture, range(40))
    assert len(set(drawn)) == len(drawn), "a sample came twice in one epoch"
    counts = Counter(source for source, *_ in drawn)
    for source, share in ((0, 3 / 4.5), (1, 1 / 4.5), (2, 0.5 / 4.5)):
        assert abs(counts[source] - share * len(drawn)) <= 1.5
    for source, shape in enumerate(shapes):
        whole_epochs, _ = divmod(counts[source], shape.samples)
        per_epoch = Counter(epoch for s, epoch, *_ in drawn if s == source)
        assert all(per_epoch[epoch] == shape.samples for epoch in range(whole_epochs))
    cursor = mixture.cursors(40)["small"]
    assert cursor.epoch * 7 + cursor.sample == counts[1]


def test_the_order_of_a_source_does_not_depend_on_its_partners() -> None:
    shape = SourceShape(name="a", weight=1.0, shard_samples=(9, 9, 9))
    other = SourceShape(name="b", weight=1.0, shard_samples=(9, 9, 9))
    alone = Mixture([shape], block_samples=64, seed=2)
    blended = Mixture([shape, other], block_samples=27, seed=2)
    of_a = [s for s in samples_of(blended, range(4)) if s[0] == 0]
    assert of_a[:27] == samples_of(alone, range(1))


def test_parts_of_an_epoch_join_without_a_seam() -> None:
    shapes = [SourceShape(name=n, weight=1.0, shard_samples=(11, 5, 8)) for n in "ab"]
    mixture = Mixture(shapes, block_samples=10, seed=4)
    drawn = [s for s in samples_of(mixture, range(20)) if s[0] == 1]
    assert drawn[:24] == sorted(drawn[:24], key=lambda s: s[1])
    assert len({s[2:] for s in drawn[:24]}) == 24
    assert np.all(np.diff([s[1] for s in drawn]) >= 0)


@pytest.mark.parametrize("block_samples", [1, 8, 20, 1000])
def test_the_blocks_of_an_epoch_of_a_mixture_draw_as_many_samples_as_there_are(block_samples: int) -> None:
    shapes = [
        SourceShape(name="a", weight=3.0, shard_samples=(7, 5)),
        SourceShape(name="b", weight=1.0, shard_samples=(30,)),
    ]
    mixture = Mixture(shapes, block_samples=block_samples, seed=3)
    drawn = len(samples_of(mixture, range(mixture.epoch_blocks)))
    assert mixture.epoch_samples <= drawn + 1 < mixture.epoch_samples + mixture.block_samples + 2


def test_a_mixture_goes_on_where_another_one_ended() -> None:
    shapes = [
        SourceShape(name="a", weight=3.0, shard_samples=(7, 5, 9)),
        SourceShape(name="b", weight=1.0, shard_samples=(4, 6)),
    ]
    first = Mixture(shapes, block_samples=8, seed=3)
    drawn = samples_of(first, range(5))
    for weights in ((1.0, 1.0), (0.0, 2.0), (1.0, 0.0)):
        later = [replace(shape, weight=weight) for shape, weight in zip(shapes, weights, strict=True)]
        second = Mixture(later, block_samples=8, seed=3, starts=first.positions(5))
        assert second.cursors(0) == first.cursors(5)
        more = samples_of(second, range(30))
        assert len({*drawn, *more}) == len(drawn) + len(more), "a sample came twice in one epoch"
        for source, shape in enumerate(shapes):
            counts = Counter(epoch for s, epoch, *_ in [*drawn, *more] if s == source)
            ended = second.cursors(30)[shape.name]
            assert all(counts[epoch] == shape.samples for epoch in range(ended.epoch))
            assert counts[ended.epoch] == ended.sample
            assert any(s == source for s, *_ in more) == (weights[source] > 0)


def test_a_pass_may_draw_a_source_for_a_part_of_an_epoch() -> None:
    sizes, epochs = (40, 10, 30), (1.0, 2.5, 0.5)
    shapes = [
        SourceShape(name=name, weight=share * size, shard_samples=(size,))
        for name, size, share in zip("abc", sizes, epochs, strict=True)
    ]
    mixture = Mixture(shapes, block_samples=1000, seed=0, pass_samples=80)
    assert mixture.epoch_blocks == 1
    for passes in (1, 2):
        counts = Counter(source for source, *_ in samples_of(mixture, range(passes)))
        assert [counts[source] for source in range(3)] == [passes * n for n in (40, 25, 15)]
