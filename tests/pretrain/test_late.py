"""The operators of the late family against their definitions, and what they make of what an item lacks."""

import dataclasses
import itertools
import typing

import pytest
import torch

from triweave.pretrain.errors import PretrainError
from triweave.pretrain.late.bilinear import FactorizedBilinear, FullTensor, LowRankTensor, Mutan
from triweave.pretrain.late.config import OPERATORS as NAMES
from triweave.pretrain.late.config import LateConfig
from triweave.pretrain.late.features import PartFeatures, by_modality
from triweave.pretrain.late.fusion import OPERATORS, LateFusion
from triweave.pretrain.late.operators import ModalityAttention, SpanGraph, Vote
from triweave.pretrain.model.config import ModelConfig
from triweave.pretrain.model.model import initialise

WIDTH = 6
TEXT, IMAGE, AUDIO = 0, 1, 2
PARTS = ((0, TEXT), (0, IMAGE), (0, AUDIO), (1, AUDIO), (1, TEXT), (2, IMAGE), (2, IMAGE), (2, TEXT), (4, IMAGE))
"""(item, modality) of each part; item 0 has all, 1 no picture, 2 two pictures and no sound, 3 nothing, 4 one part."""
ITEMS = 5


def config(operator, **options):
    return LateConfig(**({"operator": operator, "width": 3, "rank": 2} | options))


def build(operator, **options):
    module = LateFusion(config(operator, **options), WIDTH)
    initialise(module, ModelConfig(), 0)
    with torch.no_grad():  # so that nothing is decided by what starts at 0
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.linspace(-1, 1, len(parameter)))
    return module


@pytest.fixture
def features():
    return torch.randn(len(PARTS), WIDTH, generator=torch.Generator().manual_seed(1))


def fuse(module, features, parts=PARTS, count=ITEMS):
    items, modalities = (torch.tensor(column) for column in zip(*parts, strict=True))
    return module(features, modalities, items, count)


def means(features):
    """Return item -> modality -> mean feature, written out anew."""
    found = {}
    for item, modality in sorted(set(PARTS)):
        chosen = [row for row, part in enumerate(PARTS) if part == (item, modality)]
        found.setdefault(item, {})[modality] = features[chosen].mean(0)
    return found


def test_the_registry_and_the_config_name_the_same_operators():
    hint = typing.get_type_hints(LateConfig)["operator"]
    assert tuple(OPERATORS) == NAMES == typing.get_args(hint)


def test_vote_is_the_weighted_mean_of_one_vote_of_logits_per_modality(features):
    module, head = build("vote"), torch.randn(4, WIDTH)
    operator = typing.cast(Vote, module.operator)
    logits = fuse(module, features) @ head.t()
    for item, found in means(features).items():
        weight = {modality: operator.votes[modality].exp() for modality in found}
        votes = [weight[m] * (head @ (x @ operator.members[m])) for m, x in found.items()]
        torch.testing.assert_close(logits[item], sum(votes) / sum(weight.values()))


def test_attention_weighs_by_what_the_features_say(features):
    module = build("attention")
    operator = typing.cast(ModalityAttention, module.operator)
    fused = fuse(module, features)
    for item, found in means(features).items():
        scores = {m: (torch.tanh(x @ operator.keys[m]) @ operator.query[0]).exp() for m, x in found.items()}
        expected = sum(scores[m] * (x @ operator.values[m]) for m, x in found.items()) / sum(scores.values())
        torch.testing.assert_close(fused[item], expected)


def test_mfb_is_its_definition(features):
    module = build("mfb")
    operator = typing.cast(FactorizedBilinear, module.operator)
    fused = fuse(module, features)
    for item, found in means(features).items():
        product = torch.stack([x @ operator.factors[m] for m, x in found.items()]).prod(0)
        pooled = product.view(3, 2).sum(1)
        powered = pooled.sign() * pooled.abs().sqrt()
        expected = operator.out.weight @ (powered / powered.norm())
        torch.testing.assert_close(fused[item], expected, rtol=1e-3, atol=1e-3)  # the roots are smoothed


def test_mutan_is_a_tucker_tensor_with_a_core_of_low_rank(features):
    """Of three modalities at once: the core, an einsum over the rank, against the projections of all three."""
    module = build("mutan")
    operator = typing.cast(Mutan, module.operator)
    core = torch.einsum("rao,rbo,rco->abco", *operator.terms.unbind(1))
    y = {m: torch.tanh(x @ operator.projections[m]) for m, x in means(features)[0].items()}
    expected = operator.out.weight @ torch.einsum("abco,a,b,c->o", core, y[TEXT], y[IMAGE], y[AUDIO])
    torch.testing.assert_close(fuse(module, features)[0], expected)


def test_tfn_is_every_product_of_at_most_one_number_of_each_modality(features):
    module = build("tfn")
    operator = typing.cast(FullTensor, module.operator)
    fused = fuse(module, features)
    for item, found in means(features).items():
        vectors = [torch.cat([torch.ones(1), torch.zeros(3)]) for _ in range(3)]
        for m, x in found.items():
            vectors[m][1:] = x @ operator.projections[m]
        tensor = torch.einsum("a,b,c->abc", *vectors).flatten()
        torch.testing.assert_close(fused[item], operator.out.weight @ tensor)


def test_lmf_of_full_rank_is_tfn(features):
    full = build("tfn")
    places = list(itertools.product(range(4), repeat=3))
    low = LateFusion(config("lmf", rank=len(places)), WIDTH)
    tensor, factors = typing.cast(FullTensor, full.operator), typing.cast(LowRankTensor, low.operator)
    with torch.no_grad():
        factors.projections.copy_(tensor.projections)
        factors.factors.zero_()
        for rank, place in enumerate(places):
            for modality, row in enumerate(place):
                factors.factors[rank, modality, row] = 1
            factors.factors[rank, 0, place[0]] = tensor.out.weight[:, rank]
    torch.testing.assert_close(fuse(low, features), fuse(full, features))


def test_graph_passes_messages_between_all_other_parts_of_the_document(features):
    module = build("graph")
    operator = typing.cast(SpanGraph, module.operator)
    nodes = list(features)
    for own, relations in zip(operator.own, operator.relations, strict=True):
        updated = []
        for place, (item, _) in enumerate(PARTS):
            heard = nodes[place] @ own
            for modality in (TEXT, IMAGE, AUDIO):
                near = [j for j, part in enumerate(PARTS) if part == (item, modality) and j != place]
                if near:
                    heard = heard + torch.stack([nodes[j] for j in near]).mean(0) @ relations[modality]
            updated.append(nodes[place] + torch.nn.functional.silu(heard))
        nodes = updated
    fused = fuse(module, features)
    for item in (0, 1, 2, 4):
        mine = torch.stack([node for node, part in zip(nodes, PARTS, strict=True) if part[0] == item])
        torch.testing.assert_close(fused[item], operator.out(mine.mean(0)))


@pytest.mark.parametrize("name", OPERATORS)
def test_an_item_depends_on_its_own_parts_only_and_nothing_on_what_is_left_out(name, features):
    module = build(name, modalities=["text", "image"])
    without = [row for row, (_, modality) in enumerate(PARTS) if modality != AUDIO]
    poisoned = features.clone()
    poisoned[[row for row, (_, modality) in enumerate(PARTS) if modality == AUDIO]] = float("nan")
    fused = fuse(module, poisoned)
    shorter = fuse(module, features[without], [PARTS[row] for row in without])
    torch.testing.assert_close(fused, shorter, rtol=1e-6, atol=1e-6)
    assert fused[3].abs().max() == 0
    for item in (0, 1, 2, 4):
        chosen = [row for row in without if PARTS[row][0] == item]
        alone = fuse(module, features[chosen], [(0, PARTS[row][1]) for row in chosen], 1)
        torch.testing.assert_close(fused[item], alone[0], rtol=1e-6, atol=1e-6)
    assert fused[[0, 1, 2, 4]].abs().amax(1).min() > 1e-3


@pytest.mark.parametrize("name", OPERATORS)
def test_absent_modalities_and_empty_batches_give_gradients_of_exactly_zero(name, features):
    module = build(name)
    images = [row for row, (_, modality) in enumerate(PARTS) if modality == IMAGE]
    fuse(module, features[images], [PARTS[row] for row in images]).square().sum().backward()
    operator = module.operator
    sliced = {
        "concatenation": lambda: operator.joined.weight.grad[:, :WIDTH],
        "vote": lambda: operator.members.grad[[TEXT, AUDIO]],
        "hybrid": lambda: operator.members.grad[[TEXT, AUDIO]],
        "attention": lambda: operator.keys.grad[[TEXT, AUDIO]],
        "mfb": lambda: operator.factors.grad[[TEXT, AUDIO]],
        "mutan": lambda: operator.terms.grad[:, [TEXT, AUDIO]],
        "lmf": lambda: operator.projections.grad[[TEXT, AUDIO]],
        "tfn": lambda: operator.projections.grad[[TEXT, AUDIO]],
        "graph": lambda: operator.relations.grad[:, [TEXT, AUDIO]],
    }
    assert sliced[name]().abs().max() == 0
    assert max(parameter.grad.abs().max() for parameter in module.parameters()) > 0
    module.zero_grad(set_to_none=True)
    nothing = torch.empty(0, dtype=torch.int64)
    module(features[:0], nothing, nothing, 0).sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in module.parameters())


def test_two_parts_of_one_modality_count_as_their_mean(features):
    items, modalities = (torch.tensor(column) for column in zip(*PARTS, strict=True))
    found = by_modality(PartFeatures(features, modalities, items, ITEMS), 3)
    torch.testing.assert_close(found.values[2, IMAGE], (features[5] + features[6]) / 2)
    assert found.present.tolist() == [[1, 1, 1], [1, 0, 1], [1, 1, 0], [0, 0, 0], [0, 1, 0]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modalities": ["text", "text"]}, "each modality once"),
        ({"width": 0}, "late.width is 0; it must be at least 1"),
        ({"operator": "tfn", "width": 400}, "operator=lmf"),
    ],
)
def test_settings_that_cannot_work_are_refused(options, message):
    with pytest.raises(PretrainError, match=message):
        LateConfig(**options)


def test_an_unknown_modality_is_refused_with_the_known_ones():
    with pytest.raises(PretrainError, match=r"names 'smell'; known: text, image, audio"):
        LateFusion(dataclasses.replace(LateConfig(), modalities=["smell"]), WIDTH)
