"""mmca on the CPU path against dense attention with two softmaxes, and every edge its docstring promises."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from triweave.kernels import mmca_tiles, reference_mmca, sdpa_attention, tiles
from triweave.kernels.attention import attention
from triweave.kernels.errors import KernelInputError
from triweave.kernels.mmca import mmca

IMPLEMENTATIONS = ["reference", "sdpa"]


def naive(q, k, v, lo, hi, key_modality, query_modality, scale=None):
    """Two dense softmaxes with S x T masks, differentiated by autograd."""
    per_group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(per_group, 2), v.repeat_interleave(per_group, 2)
    scores = torch.einsum("bshk,bthk->bhst", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    key = torch.arange(k.shape[1])
    seen = (key >= lo[:, :, None]) & (key < hi[:, :, None])
    is_text, text_query = (key_modality == 0)[:, None], (query_modality == 0)[:, :, None]
    out = torch.zeros_like(q)
    for mask in (seen & is_text & text_query, seen & ~is_text):
        hidden = ~mask[:, None]
        weights = torch.softmax(scores.masked_fill(hidden, -1e30), -1).masked_fill(hidden, 0)
        out = out + torch.einsum("bhst,bthk->bshk", weights, v)
    return out


def draw(batch, rows, keys, heads=4, groups=2, width=8, dtype=torch.float64):
    q, grad = (torch.randn(batch, rows, heads, width, dtype=dtype) for _ in range(2))
    k, v = (torch.randn(batch, keys, groups, width, dtype=dtype) for _ in range(2))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), grad


def as_intervals(pairs):
    return tuple(torch.tensor([[pair[i] for pair in pairs]], dtype=torch.int32) for i in (0, 1))


def as_modality(text):
    """'ttiia' is text, text, two tokens of modality 1 and one of modality 2."""
    return torch.tensor([["tia".index(letter) for letter in text]], dtype=torch.int8)


def interleaved(lengths, span_tokens, span_every_tokens):
    """Return (lo, hi, modality): packed documents whose spans are media that see themselves only."""
    lo, hi = tiles.document_intervals(np.array(lengths), span_tokens=span_tokens, span_every_tokens=span_every_tokens)
    index = np.arange(lo.shape[1])
    in_span = np.zeros(lo.shape, dtype=bool)
    for row in np.flatnonzero(hi[0] > index + 1):
        in_span[0, row : hi[0, row]] = True
    spans = np.where(in_span, hi, -1)
    lo = mmca_tiles.own_spans(lo, spans)
    return torch.from_numpy(lo), torch.from_numpy(hi), torch.from_numpy(in_span.astype(np.int8))


def differentiate(function, inputs, grad):
    out = function(*inputs)
    return [out, *torch.autograd.grad(out, inputs, grad)]


def check(inputs, grad, mask, impl, **options):
    got = differentiate(lambda *x: mmca(*x, *mask, impl=impl, **options), inputs, grad)
    want = differentiate(lambda *x: naive(*x, *mask, **options), inputs, grad)
    for name, x, y in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        assert x.is_contiguous()
        torch.testing.assert_close(x, y, msg=lambda text, name=name: f"{name}: {text}")
    return got


def self_mask(intervals, text):
    return *as_intervals(intervals), as_modality(text), as_modality(text)


CAUSAL = [(0, i + 1) for i in range(8)]
STRUCTURES = {
    "text only": self_mask(CAUSAL, "tttttttt"),
    "media only": self_mask([(0, 3)] * 3 + [(3, 8)] * 5, "iiiiiiii"),
    "the docstring's": self_mask([(0, 1), (0, 2), (2, 4), (2, 4), (0, 5), (5, 6), (0, 7)], "ttiitit"),
    "media before any text": self_mask([(0, 3)] * 3 + [(0, 4), (0, 5)], "iiatt"),
    "a span at the pack's end": self_mask([(0, 1), (0, 2)] + [(2, 6)] * 4, "ttaaaa"),
    "documents of one token": self_mask([(i, i + 1) for i in range(6)], "titati"),
    "packed documents": self_mask([(0, 1), (1, 3), (1, 3), (0, 4), (4, 5), (4, 6), (6, 7), (4, 8)], "tiittatt"),
    "sliding window over text and media": self_mask([(max(0, i - 2), i + 1) for i in range(8)], "titiaatt"),
    "media that see earlier media and no text": self_mask([(0, 1), (1, 2), (0, 3), (0, 4)], "tiai"),
    "padding in the middle and at the end": self_mask([(0, 1), (0, 0), (9, 9), (3, 4), (0, 0)], "tittt"),
    "crossed bounds are empty": self_mask([(3, 1), (0, 2), (4, 0), (1, 5)], "tttt"),
    "all empty": self_mask([(0, 0)] * 4, "titi"),
    "modality alternates": self_mask(CAUSAL, "titititi"),
}


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", STRUCTURES)
def test_every_structure_equals_two_dense_softmaxes(name, impl):
    mask = STRUCTURES[name]
    *inputs, grad = draw(1, mask[0].shape[1], mask[0].shape[1])
    check(inputs, grad, mask, impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(1, 70)),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1), (5, 5)]),
    width=st.sampled_from([2, 5, 16]),
    in_order=st.booleans(),
    integer=st.sampled_from([torch.int8, torch.int32, torch.int64]),
)
def test_any_mask_and_any_modalities(impl, seed, shape, heads, width, in_order, integer):
    generator = np.random.default_rng(seed)
    lo, hi = (generator.integers(0, shape[2] + 1, size=shape[:2]).astype(np.int32) for _ in range(2))
    if in_order:
        lo, hi = np.sort(lo, axis=1), np.sort(hi, axis=1)
    torch.manual_seed(seed % 2**31)
    *inputs, grad = draw(*shape, heads=heads[0], groups=heads[1], width=width)
    key_modality = torch.randint(-1, 3, (shape[0], shape[2]), dtype=integer)
    query_modality = torch.randint(0, 2, shape[:2], dtype=integer)
    check(inputs, grad, (torch.from_numpy(lo), torch.from_numpy(hi), key_modality, query_modality), impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_long_packs_of_several_strips(impl):
    lo, hi, modality = interleaved([500, 3, 297], 40, 110)
    table = mmca_tiles.strip_tables(lo.numpy(), hi.numpy(), modality.numpy(), modality.numpy())["mmca_segments"]
    assert set(table[:, 0]) == {0, 1}  # both classes
    assert len(table) > 6
    *inputs, grad = draw(1, 800, 800, heads=2, groups=1)
    check(inputs, grad, (lo, hi, modality, modality), impl, scale=0.7)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_text_alone_is_attention_and_media_alone_is_attention(impl):
    lo, hi, _ = interleaved([20, 13], 3, 8)
    *inputs, grad = draw(1, 33, 33)
    want = differentiate(lambda *x: attention(*x, lo, hi, impl=impl)[0], inputs, grad)
    for modality in (torch.zeros(1, 33, dtype=torch.int8), torch.ones(1, 33, dtype=torch.int8)):
        got = differentiate(lambda *x, m=modality: mmca(*x, lo, hi, m, m, impl=impl), inputs, grad)
        assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_weights_of_each_class_sum_to_one(impl):
    lo, hi, modality = interleaved([20, 13], 3, 8)
    q, k, _, _ = draw(1, 33, 33)
    out = mmca(q, k, torch.ones_like(k), lo, hi, modality, modality, impl=impl)[0, :, 0, 0].detach()
    text = modality[0] == 0
    assert out[~text].allclose(torch.ones(1).double())
    seen_media = torch.tensor([bool(modality[0, lo[0, i] : hi[0, i]].any()) for i in range(33)])
    assert seen_media[text].any()
    assert not seen_media[text].all()
    assert out[text].allclose(1.0 + seen_media[text].double())


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_what_has_no_key_gets_zero_and_no_gradient(impl):
    mask = self_mask([(0, 1), (0, 0), (0, 2), (3, 4), (0, 2)], "titit")
    *inputs, grad = draw(1, 5, 5)
    # Query 1 is padding; key 2 is in no interval of its class, key 4 in none at all.
    out, dq, dk, dv = check(inputs, grad, mask, impl)
    assert out[0, 1].eq(0).all()
    assert dq[0, 1].eq(0).all()
    assert dk[0, [2, 4]].eq(0).all()
    assert dv[0, [2, 4]].eq(0).all()


def test_a_media_query_sees_no_text_even_in_its_interval():
    lo, hi = as_intervals([(0, 3)] * 3)
    key, query = as_modality("tti"), as_modality("iti")
    *inputs, grad = draw(1, 3, 3)
    out, _, dk, _ = check(inputs, torch.cat([grad[:, :1], grad[:, 1:] * 0], 1), (lo, hi, key, query), "reference")
    assert torch.equal(out[0, 0], inputs[2][0, 2].repeat_interleave(2, 0))
    assert dk[0, :2].eq(0).all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_no_rows_or_no_keys(impl):
    nothing, modality = torch.zeros(1, 3, dtype=torch.int32), torch.zeros(1, 3, dtype=torch.int8)
    *inputs, grad = draw(1, 3, 0)
    out, dq, dk, _ = differentiate(
        lambda *x: mmca(*x, nothing, nothing, modality[:, :0], modality, impl=impl), inputs, grad
    )
    assert out.eq(0).all()
    assert dq.eq(0).all()
    assert dk.shape == (1, 0, 2, 8)
    none = nothing[:, :0]
    assert mmca(*draw(1, 0, 3)[:3], none, none, modality, none, impl=impl).shape == (1, 0, 4, 8)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("poison", [7.0, torch.inf, torch.nan])
def test_another_document_changes_nothing_at_all(impl, poison):
    lo, hi, modality = interleaved([40, 301, 17], 8, 20)
    q, k, v, grad = draw(1, 358, 358, dtype=torch.float32)

    def middle():
        results = differentiate(lambda *x: mmca(*x, lo, hi, modality, modality, impl=impl), (q, k, v), grad)
        return [x[:, 40:341] for x in results]

    before = middle()
    with torch.no_grad():
        for x in (q, k, v, grad):
            x[:, :40] = poison
            x[:, 341:] = poison
    assert all(map(torch.equal, before, middle()))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_strided_views_of_one_projection(impl):
    lo, hi, modality = interleaved([20, 13], 3, 8)
    fused = torch.randn(1, 33, 3, 4, 8, dtype=torch.float64)
    q, k, v = (x.requires_grad_() for x in fused.unbind(2))
    assert not q.is_contiguous()
    mask = (lo, hi, modality, modality)
    check((q, k, v), torch.randn(1, 4, 33, 8, dtype=torch.float64).transpose(1, 2), mask, impl)
    last_is_strided = torch.randn(1, 33, 8, 4, dtype=torch.float64).transpose(2, 3).requires_grad_()
    check((last_is_strided, k, v), torch.ones(1).double().expand(1, 33, 4, 8), mask, impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_that_of_torch(impl, dtype):
    lo, hi, modality = interleaved([300, 211], 32, 100)
    *inputs, grad = (x.detach().to(dtype) for x in draw(1, 511, 511, heads=2, groups=2, width=32))
    key = torch.arange(511)
    seen, text = (key >= lo[0, :, None]) & (key < hi[0, :, None]), modality[0] == 0
    masks = (seen & text & text[:, None], seen & ~text)

    def torch_mmca(*heads):
        heads = [x.transpose(1, 2) for x in heads]
        # what no key is left to gets one and is taken out again, for torch gives NaN there
        parts = [
            torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask | ~mask.any(1, keepdim=True))
            * mask.any(1, keepdim=True)
            for mask in masks
        ]
        return sum(parts).transpose(1, 2)

    def run(function, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        return [x.detach().double() for x in differentiate(function, leaves, grad.to(dtype))]

    exact = run(lambda *x: naive(*x, lo, hi, modality, modality), torch.float64)
    theirs = run(torch_mmca, dtype)
    ours = run(lambda *x: mmca(*x, lo, hi, modality, modality, impl=impl), dtype)
    for want, their, got in zip(exact, theirs, ours, strict=True):
        floor = torch.finfo(dtype).eps * want.abs().max()
        assert (got - want).abs().max() <= 2 * (their - want).abs().max() + floor
        assert (got - want).square().mean().sqrt() / want.square().mean().sqrt() < 0.005


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_the_same_bits_every_time_with_and_without_a_gradient(impl):
    lo, hi, modality = interleaved([200, 56], 8, 20)
    *inputs, grad = draw(1, 256, 256, dtype=torch.float32)
    run = lambda *x: mmca(*x, lo, hi, modality, modality, impl=impl)  # noqa: E731
    first, second = (differentiate(run, inputs, grad) for _ in range(2))
    assert all(map(torch.equal, first, second))
    with torch.no_grad():
        assert torch.equal(run(*inputs), first[0])


def test_nothing_is_kept_without_a_gradient():
    mask = STRUCTURES["packed documents"]
    q, k, v, _ = draw(1, 8, 8)
    tail = (*mask, None, None, 0.3)
    for keep in (False, True):
        _, text, lse = torch.ops.triweave.mmca(q, k, v, *tail, keep, "reference")
        assert text.shape == (q.shape if keep else (0,))
        assert lse.shape == (2, 1, 4, 8)


def test_given_tables_are_used_and_not_computed_again(monkeypatch):
    lo, hi, modality = interleaved([20, 13], 3, 8)
    *inputs, grad = draw(1, 33, 33)
    plain = differentiate(lambda *x: mmca(*x, lo, hi, modality, modality), inputs, grad)
    tables = mmca_tiles.strip_tables(*(x.numpy() for x in (lo, hi, modality, modality)))
    monkeypatch.setattr(mmca_tiles, "layout", None)
    again = differentiate(lambda *x: mmca(*x, lo, hi, modality, modality, tiles=tables), inputs, grad)
    assert all(map(torch.equal, plain, again))
    as_tensors = {name: torch.from_numpy(table) for name, table in tables.items()}
    assert torch.equal(plain[0], mmca(*inputs, lo, hi, modality, modality, tiles=as_tensors))


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return result


def test_no_tensor_is_larger_than_the_inputs():
    rows = 4096
    lo, hi, modality = interleaved([rows // 8] * 8, 64, 256)
    q, k, v, grad = (x.detach() for x in draw(1, rows, rows, heads=1, groups=1, width=32, dtype=torch.float32))
    tables = mmca_tiles.strip_tables(*(x.numpy() for x in (lo, hi, modality, modality)))
    tables = [torch.from_numpy(x) for x in tables.values()]
    with LargestTensor() as watch:
        out, text, lse = reference_mmca.mmca_forward(sdpa_attention, q, k, v, *tables, 1.0, True)
        reference_mmca.mmca_backward(sdpa_attention, grad, q, k, v, out, text, lse, *tables, 1.0)
    assert watch.elements == q.numel() == rows * 32


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_bits(use_reentrant):
    lo, hi, modality = interleaved([20, 13], 3, 8)
    *inputs, grad = draw(1, 33, 33, dtype=torch.float32)
    run = lambda *x: mmca(*x, lo, hi, modality, modality)  # noqa: E731
    plain = differentiate(run, inputs, grad)[1:]
    checkpoint(run, *inputs, use_reentrant=use_reentrant).backward(grad)
    assert all(torch.equal(want, x.grad) for want, x in zip(plain, inputs, strict=True))


def test_autocast_changes_nothing():
    lo, hi, modality = interleaved([30], 3, 8)
    *inputs, grad = draw(1, 30, 30, dtype=torch.float32)
    for impl in IMPLEMENTATIONS:
        run = lambda *x, impl=impl: mmca(*x, lo, hi, modality, modality, impl=impl)  # noqa: E731
        plain = differentiate(run, inputs, grad)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert all(map(torch.equal, plain, differentiate(run, inputs, grad)))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_gradcheck(impl):
    mask = self_mask([(0, 1), (1, 3), (1, 3), (0, 4), (0, 0), (2, 6), (5, 7)], "tiitatt")
    q, k, v, _ = draw(1, 7, 7, heads=2, groups=1, width=2)
    assert torch.autograd.gradcheck(lambda *x: mmca(*x, *mask, impl=impl), (q, k, v))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_opcheck(impl):
    lo, hi, modality = interleaved([5, 6], 2, 4)
    q, k, v, grad = draw(1, 11, 11)
    arrays = [x.numpy() for x in (lo, hi, modality, modality)]
    tables = [torch.from_numpy(x) for x in mmca_tiles.strip_tables(*arrays).values()]
    mask = (lo, hi, modality, modality, *tables)
    torch.library.opcheck(torch.ops.triweave.mmca.default, (q, k, v, *mask, 0.3, True, impl))
    q, k, v = (x.detach() for x in (q, k, v))
    out, text, lse = torch.ops.triweave.mmca(q, k, v, *mask, 0.3, True, impl)
    torch.library.opcheck(torch.ops.triweave.mmca_backward.default, (grad, q, k, v, out, text, lse, *mask, 0.3, impl))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_without_a_graph_break(backend):
    lo, hi, modality = interleaved([20, 13], 3, 8)
    *inputs, grad = draw(1, 33, 33, dtype=torch.float32)

    def function(q, k, v, lo, hi, modality):
        return mmca(q * 2, k, v, lo, hi, modality, modality) + 1

    mask = (lo, hi, modality)
    plain = differentiate(lambda *x: function(*x, *mask), inputs, grad)
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    got = differentiate(lambda *x: compiled(*x, *mask), inputs, grad)
    for x, y in zip(got, plain, strict=True):
        torch.testing.assert_close(x, y)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs, *mask), plain[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v, lo, m: (q[..., :4], k, v, lo, m), "do not fit"),
        (lambda q, k, v, lo, m: (q[:, :, :3], k, v, lo, m), "multiple of G"),
        (lambda q, k, v, lo, m: (q.float(), k, v, lo, m), "one dtype"),
        (
            lambda q, k, v, lo, m: (q, k, v, lo[:, 1:], m),
            r"kv_lo is torch.int32 \(1, 4\); it must be .* \[B, S\]",
        ),
        (lambda q, k, v, lo, m: (q, k, v, lo, m[:, 1:]), r"key_modality .* \[B, T\], \(1, 5\)"),
        (lambda q, k, v, lo, m: (q, k, v, lo, m.float()), "key_modality is torch.float32"),
    ],
)
def test_wrong_inputs_are_named(change, message):
    lo, hi, modality = interleaved([5], 2, 4)
    q, k, v, _ = draw(1, 5, 5)
    q, k, v, lo, key_modality = change(q, k, v, lo, modality)
    with pytest.raises(KernelInputError, match=message):
        mmca(q, k, v, lo, hi, key_modality, modality)


def test_own_spans():
    # one document: text, an image, at once another, text, audio that is causal; then padding
    spans = np.array([[-1, 4, 4, 7, 7, 7, -1, 2, 2, -1]])
    lo = np.zeros((1, 10), dtype=np.int32)
    assert mmca_tiles.own_spans(lo, spans).tolist() == [[0, 1, 1, 3, 3, 3, 0, 7, 7, 0]]
    window = np.full((1, 10), 5, dtype=np.int32)
    assert mmca_tiles.own_spans(window, spans).tolist() == [[5, 5, 5, 5, 5, 5, 5, 7, 7, 5]]
    two_packs = np.array([[-1, 3], [3, 3]])
    assert mmca_tiles.own_spans(np.zeros((2, 2), dtype=np.int32), two_packs).tolist() == [[0, 1], [0, 0]]


def test_the_layout_keeps_tiles_to_one_class():
    """Reference distribution, a quarter of the tokens in 64-token images: 1.17x the mask's area, 73 % full tiles."""
    area = live = full = count = unsorted = 0
    for lengths in tiles.lognormal_packs(16, 8192):
        lo, hi, modality = (x.numpy() for x in interleaved(lengths, 64, 256))
        made = mmca_tiles.layout(lo, hi, modality, modality)
        intervals = mmca_tiles.class_intervals(made, 8192)
        table = tiles.tile_table(*intervals, keys=8192, query_tile=128, key_tile=64)
        area += tiles.mask_area(*intervals)
        unsorted += tiles.tile_table(lo, hi, keys=8192, query_tile=128, key_tile=64).live_area
        live, full, count = live + table.live_area, full + table.full_tiles, count + table.live_tiles
    assert live < 1.2 * area
    assert full > 0.7 * count
    assert unsorted > 1.4 * area
