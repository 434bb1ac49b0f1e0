"""The contrastive loss by itself: hand-computed values, loops over single pairs, gradients, and what is no negative."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from triweave.pretrain.objectives.contrastive import (
    SegmentTable,
    bounded_scale_gradient,
    contrastive_sums,
    live_segments,
    pair_blocks,
)

TEXT, IMAGE, AUDIO = 0, 1, 2


@pytest.fixture(scope="session")
def tasks(rank_pool):
    return rank_pool.load(Path(__file__).with_name("contrastive_tasks.py"))


def table(*segments: tuple[int, int, int], groups=None, content=None, concepts=None) -> SegmentTable:
    """Return a table of (plan row, item, modality); contents are all different and concepts 0 unless given."""
    plan_rows, items, modalities = (np.array(column, np.int64) for column in zip(*segments, strict=True))
    count = len(segments)
    return SegmentTable(
        plan_rows=plan_rows,
        items=items,
        modalities=modalities,
        groups=np.array(groups if groups is not None else [0] * count, np.int64),
        content_keys=np.array(content if content is not None else range(100, 100 + count), np.uint64),
        group_keys=np.array(concepts if concepts is not None else [0] * count, np.uint64),
    )


TWO_ITEMS = ((0, 0, TEXT), (0, 0, IMAGE), (5, 0, TEXT), (5, 0, IMAGE))
# cosines of text and image: item 0 with itself 1, with item 1: 0; item 1 with itself 0.6, with item 0's image 0.8
VECTORS = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.8, 0.6], [0.0, 1.0]], dtype=torch.float64)


def sums(vectors, known, loss, scale=2.0, bias=-1.0):
    return contrastive_sums(
        vectors, torch.tensor(scale, dtype=vectors.dtype), torch.tensor(bias, dtype=vectors.dtype), pair_blocks(known),
        loss,
    )  # fmt: skip


def test_sigmoid_by_hand():
    """Logits 2 c - 1: positives 1 and 0.2, negatives text 0 - image 1: -1 and text 1 - image 0: 0.6."""
    found = sums(VECTORS, table(*TWO_ITEMS), "sigmoid")
    wanted = sum(math.log1p(math.exp(-z)) for z in (1.0, 0.2, 1.0, -0.6))
    assert float(found.loss) == pytest.approx(wanted, rel=1e-12)
    assert found.pairs == 2
    assert found.hits == 3  # text 1 is nearer to image 0


def test_infonce_by_hand():
    def cross_entropy(right: float, wrong: float) -> float:
        return math.log(math.exp(right) + math.exp(wrong)) - right

    found = sums(VECTORS, table(*TWO_ITEMS), "infonce")
    texts = cross_entropy(2.0, 0.0) + cross_entropy(1.2, 1.6)
    images = cross_entropy(2.0, 1.6) + cross_entropy(1.2, 0.0)
    assert float(found.loss) == pytest.approx((texts + images) / 2, rel=1e-12)
    assert (found.pairs, found.hits) == (2, 3)


def test_segments_of_other_groups_are_no_candidates():
    found = sums(VECTORS, table(*TWO_ITEMS, groups=[0, 0, 1, 1]), "sigmoid")
    assert float(found.loss) == pytest.approx(math.log1p(math.exp(-1)) + math.log1p(math.exp(-0.2)), rel=1e-12)
    assert float(sums(VECTORS, table(*TWO_ITEMS, groups=[0, 0, 1, 1]), "infonce").loss) == 0
    assert found.hits == 4


@pytest.mark.parametrize(
    "keys",
    [
        {"content": [1, 7, 2, 7]},  # the same picture
        {"content": [7, 1, 7, 2]},  # the same caption
        {"content": [7, 1, 2, 7]},  # whatever the modality
        {"concepts": [5, 5, 5, 5]},
        {"concepts": [5, 0, 0, 5]},
    ],
    ids=["picture", "caption", "across", "concept", "concept of one segment"],
)
def test_items_that_share_a_key_are_no_negatives(keys):
    """Without the mask both losses would have the two negatives of the hand-computed cases."""
    known = table(*TWO_ITEMS, **keys)
    assert float(sums(VECTORS, known, "sigmoid").loss) == pytest.approx(
        math.log1p(math.exp(-1)) + math.log1p(math.exp(-0.2)), rel=1e-12
    )
    assert float(sums(VECTORS, known, "infonce").loss) == 0
    assert sums(VECTORS, known, "infonce").hits == 4


def test_a_transcript_shared_through_a_third_segment_masks_picture_and_text():
    """Items (text, image, audio): the clips are the same, so neither one's text is a negative of the other's image."""
    segments = [(row, 0, modality) for row in (0, 1) for modality in (TEXT, IMAGE, AUDIO)]
    apart, shared = table(*segments), table(*segments, content=[1, 2, 9, 3, 4, 9])
    assert [int(block.candidate.sum()) for block in pair_blocks(apart)] == [4, 4, 4]
    assert [int(block.candidate.sum()) for block in pair_blocks(shared)] == [2, 2, 2]


def test_group_key_0_and_other_concepts_mask_nothing():
    for concepts in ([0, 0, 0, 0], [5, 5, 6, 6], [5, 5, 0, 0]):
        assert all(block.candidate.all() for block in pair_blocks(table(*TWO_ITEMS, concepts=concepts)))


def test_a_shared_key_joins_only_the_items_that_hold_it():
    """Item 0 and 1 share a caption, 1 and 2 a picture: 0 and 2 stay each other's negatives."""
    segments = [(row, 0, modality) for row in (0, 1, 2) for modality in (TEXT, IMAGE)]
    (block,) = pair_blocks(table(*segments, content=[7, 1, 7, 8, 2, 8]))
    assert block.candidate.tolist() == [[True, False, True], [False, True, False], [True, False, True]]


def test_large_keys_are_told_apart():
    """Neighbours above 2**63 would be one number as float64, and negative as int64."""
    big = 2**64 - 1
    (apart,) = pair_blocks(table(*TWO_ITEMS, content=[big, big - 1, big - 2, big - 3]))
    (shared,) = pair_blocks(table(*TWO_ITEMS, content=[big, big - 1, big, big - 3]))
    assert apart.candidate.all()
    assert shared.candidate.tolist() == [[True, False], [False, True]]


def random_case(seed: int):
    """Items with some of three modalities over two groups; contents and concepts often shared."""
    generator = np.random.default_rng(seed)
    segments, content, concepts = [], [], []
    for row in range(8):
        for item in range(2):
            present = [m for m in (TEXT, IMAGE, AUDIO) if generator.random() < 0.7]
            concept = int(generator.integers(0, 4))
            for modality in present:
                segments.append((row, item, modality))
                content.append(int(generator.integers(0, 40)))
                concepts.append(concept if generator.random() < 0.5 else 0)
    known = table(*segments, groups=[row // 4 for row, _, _ in segments], content=content, concepts=concepts)
    torch.manual_seed(seed)
    vectors = torch.nn.functional.normalize(torch.randn(len(segments), 5, dtype=torch.float64), dim=1)
    return vectors, known


def loops(tasks, vectors, known, loss, scale=2.0, bias=-1.0):
    entries = [
        {"group": int(group), "item": (int(row), int(item)), "modality": int(modality), "content": int(content),
         "concept": int(concept)}
        for row, item, modality, group, content, concept in zip(
            known.plan_rows, known.items, known.modalities, known.groups, known.content_keys, known.group_keys,
            strict=True,
        )
    ]  # fmt: skip
    return tasks.naive_contrastive(
        vectors, entries, torch.tensor(scale, dtype=vectors.dtype), torch.tensor(bias, dtype=vectors.dtype), loss
    )


@pytest.mark.parametrize("loss", ["sigmoid", "infonce"])
@pytest.mark.parametrize("seed", range(6))
def test_blocks_equal_loops_over_single_pairs(tasks, loss, seed):
    vectors, known = random_case(seed)
    wanted, pairs, hits = loops(tasks, vectors, known, loss)
    found = sums(vectors, known, loss)
    assert pairs > 3
    assert (found.pairs, found.hits) == (pairs, hits)
    torch.testing.assert_close(found.loss, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("loss", ["sigmoid", "infonce"])
def test_gradients_are_those_of_finite_differences(loss):
    vectors, known = random_case(1)
    blocks = pair_blocks(known)
    inputs = (
        vectors.requires_grad_(),
        torch.tensor(2.0, dtype=torch.float64, requires_grad=True),
        torch.tensor(-1.0, dtype=torch.float64, requires_grad=True),
    )
    assert torch.autograd.gradcheck(lambda *values: contrastive_sums(*values, blocks, loss).loss, inputs)


def test_order_of_holding_does_not_matter_after_sorting():
    vectors, known = random_case(2)
    order = known.canonical_order()
    wanted = sums(vectors[order], known.take(order), "sigmoid")
    shuffled = np.random.default_rng(0).permutation(len(vectors))
    held = known.take(shuffled)
    back = held.canonical_order()
    found = sums(vectors[shuffled][back], held.take(back), "sigmoid")
    assert found.loss == wanted.loss  # to the bit


@pytest.mark.parametrize("loss", ["sigmoid", "infonce"])
def test_segments_of_one_modality_and_none_at_all_cost_nothing(loss):
    alone = table((0, 0, TEXT), (1, 0, TEXT))
    for known in (alone, alone.take(np.empty(0, np.int64))):
        vectors = torch.randn(len(known.items), 4, requires_grad=True)
        found = contrastive_sums(vectors, torch.tensor(2.0), torch.tensor(0.0), pair_blocks(known), loss)
        assert (float(found.loss.detach()), found.pairs, found.hits) == (0.0, 0, 0)
        found.loss.backward()
        assert torch.count_nonzero(vectors.grad) == 0


def test_a_query_without_a_partner_asks_nothing_but_is_asked():
    """A lone text in the group: a negative of the image for both losses, and no query of its own."""
    known = table(*TWO_ITEMS[:2], (1, 0, TEXT))
    found = sums(VECTORS[:3], known, "infonce")
    assert float(found.loss) == pytest.approx((0 + math.log(math.exp(2.0) + math.exp(1.6)) - 2.0) / 2, rel=1e-12)
    assert (found.pairs, found.hits) == (1, 2)


def test_masked_candidates_of_every_query_leave_no_nan():
    """A lone text that shares its picture's concept has no candidate at all."""
    known = table(*TWO_ITEMS[:2], (1, 0, TEXT), concepts=[5, 5, 5])
    vectors = VECTORS[:3].clone().requires_grad_()
    found = sums(vectors, known, "infonce")
    found.loss.backward()
    assert float(found.loss.detach()) == 0
    assert vectors.grad.isfinite().all()


def test_the_scale_of_infonce_is_cut_at_100_and_can_come_back():
    vectors, known = random_case(3)
    scale = torch.tensor(150.0, dtype=torch.float64, requires_grad=True)
    blocks = pair_blocks(known)
    found = contrastive_sums(vectors, scale, torch.tensor(0.0), blocks, "infonce")
    assert torch.equal(found.loss.detach(), sums(vectors, known, "infonce", scale=100.0).loss)
    found.loss.backward()
    assert scale.grad > 0  # random vectors want a smaller one, and that is let through
    assert bounded_scale_gradient(150.0, scale.grad, "infonce") == scale.grad
    assert bounded_scale_gradient(150.0, -scale.grad, "infonce") == 0
    assert bounded_scale_gradient(99.0, -scale.grad, "infonce") == -scale.grad
    assert bounded_scale_gradient(150.0, -scale.grad, "sigmoid") == -scale.grad


def test_fillers_and_rows_without_a_group_take_no_part(synthetic):
    item = synthetic.Document(parts=[[20, 21], [22]], alone=True)
    batch = synthetic.pack([[item, *synthetic.with_weight([item], 0.0)], [], [item]], 40)
    assert live_segments(batch).tolist() == [True, True, False, False, True, True]
    batch.contrastive_group[2] = -1
    assert live_segments(batch).tolist() == [True, True, False, False, False, False]
