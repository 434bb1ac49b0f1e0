"""attention against naive dense attention, for every mask structure and every edge the design lists."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from triweave.kernels import sdpa_attention, tiles
from triweave.kernels.attention import attention
from triweave.kernels.errors import KernelInputError

IMPLEMENTATIONS = ["reference", "sdpa"]


def naive(q, k, v, lo, hi, scale=None):
    """Dense attention with an S x T mask, differentiated by autograd."""
    per_group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(per_group, 2), v.repeat_interleave(per_group, 2)
    scores = torch.einsum("bshk,bthk->bhst", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    key = torch.arange(k.shape[1])
    mask = ((key >= lo[:, :, None]) & (key < hi[:, :, None]))[:, None]
    scores = scores.masked_fill(~mask, -torch.inf)
    lse = torch.logsumexp(scores, -1)
    finite = torch.where(lse.isinf(), 0, lse)
    weights = torch.exp(scores - finite[..., None]).masked_fill(~mask, 0)
    return torch.einsum("bhst,bthk->bshk", weights, v), lse


def draw(batch, rows, keys, heads=4, groups=2, width=8, dtype=torch.float64):
    q, grad = (torch.randn(batch, rows, heads, width, dtype=dtype) for _ in range(2))
    k, v = (torch.randn(batch, keys, groups, width, dtype=dtype) for _ in range(2))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), grad


def as_intervals(pairs):
    return tuple(torch.tensor([[pair[i] for pair in pairs]], dtype=torch.int32) for i in (0, 1))


def from_documents(lengths, **spans):
    return tuple(map(torch.from_numpy, tiles.document_intervals(np.array(lengths), **spans)))


def check_against_naive(q, k, v, grad, lo, hi, impl, **options):
    expected, expected_lse = naive(q, k, v, lo, hi, options.get("scale"))
    out, lse = attention(q, k, v, lo, hi, impl=impl, **options)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    expected_gradients = torch.autograd.grad(expected, (q, k, v), grad)
    for name, got, want in zip("qkv", torch.autograd.grad(out, (q, k, v), grad), expected_gradients, strict=True):
        torch.testing.assert_close(got, want, msg=lambda text, name=name: f"d{name}: {text}")


WINDOW = 5
STRUCTURES = {
    "one causal document": from_documents([33]),
    "packed documents": from_documents([7, 1, 40, 1, 1, 13]),
    "spans": from_documents([30, 21, 9], span_tokens=4, span_every_tokens=9),
    "a span at the start and at the pack's end": as_intervals([(0, 3)] * 3 + [(0, 4), (4, 9)] + [(4, 9)] * 4),
    "prefix": as_intervals([(0, 6)] * 6 + [(0, i + 1) for i in range(6, 15)]),
    "sliding window": as_intervals([(max(0, i + 1 - WINDOW), i + 1) for i in range(40)]),
    "window clipped by documents": as_intervals([(max(i // 13 * 13, i + 1 - WINDOW), i + 1) for i in range(39)]),
    "padding at the end": as_intervals([(0, i + 1) for i in range(6)] + [(0, 0)] * 5),
    "padding in the middle": as_intervals([(0, 1), (0, 2), (0, 0), (9, 9), (3, 4), (3, 5)]),
    "crossed bounds are empty": as_intervals([(3, 1), (0, 2), (5, 0), (1, 6)]),
    "all empty": as_intervals([(0, 0)] * 4),
    "backwards": as_intervals([(i, 12) for i in range(12)]),
    "wild": as_intervals([(0, 12), (11, 12), (3, 4), (0, 1), (5, 9), (4, 10), (0, 12), (2, 3)] + [(6, 7)] * 4),
}


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", STRUCTURES)
def test_every_structure_equals_dense_attention(name, impl):
    lo, hi = STRUCTURES[name]
    check_against_naive(*draw(1, lo.shape[1], lo.shape[1]), lo, hi, impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_cross_attention_to_the_media_before_a_token(impl):
    # Two documents: text before any media sees nothing, not even the other document's.
    lo, hi = as_intervals([(0, 0), (0, 0), (0, 4), (0, 4), (0, 7), (7, 7), (7, 9), (7, 9)])
    check_against_naive(*draw(1, 8, 9), lo, hi, impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(1, 70)),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1), (5, 5)]),
    width=st.sampled_from([2, 5, 16]),
    in_order=st.booleans(),
)
def test_any_intervals_equal_dense_attention(impl, seed, shape, heads, width, in_order):
    generator = np.random.default_rng(seed)
    lo, hi = (generator.integers(0, shape[2] + 1, size=shape[:2]).astype(np.int32) for _ in range(2))
    if in_order:
        lo, hi = np.sort(lo, axis=1), np.sort(hi, axis=1)
    torch.manual_seed(seed % 2**31)
    inputs = draw(*shape, heads=heads[0], groups=heads[1], width=width)
    check_against_naive(*inputs, torch.from_numpy(lo), torch.from_numpy(hi), impl)


@pytest.mark.parametrize("spans", [{}, {"span_tokens": 50, "span_every_tokens": 200}])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_strips_with_a_large_open_part_are_merged_exactly(impl, spans):
    lo, hi = from_documents([700, 100], **spans)
    strips = tiles.segments(lo.numpy(), hi.numpy())
    assert ((strips[:, 5] > strips[:, 3]) & (strips[:, 5] < strips[:, 4])).any()
    check_against_naive(*draw(1, 800, 800, heads=2, groups=1), lo, hi, impl, scale=0.7)


def last_span_of(lengths, span_tokens):
    """Causal documents, the last tokens of each of them one span."""
    lo, hi = from_documents(lengths)
    for end in np.cumsum(lengths).tolist():
        hi[0, end - span_tokens : end] = end
    return lo, hi


def long_causal_calls(lo, hi):
    """Return the query rows of the calls of CAUSAL_ROWS rows or more on torch's causal path."""
    segments = torch.from_numpy(tiles.segments(lo.numpy(), hi.numpy()))
    calls = sdpa_attention._calls(segments, lo, hi, torch.float32)
    found = [(rows.start, rows.stop) for _, rows, parts in calls if any(part.causal for part in parts)]
    return [(start, stop) for start, stop in found if stop - start >= sdpa_attention.CAUSAL_ROWS]


@pytest.mark.parametrize(
    ("intervals", "causal"),
    [
        (from_documents([5, 300, 40]), [(5, 305)]),
        (last_span_of([3, 400], 30), [(3, 323)]),
        (as_intervals([(0, 3)] * 3 + [(0, i + 1) for i in range(3, 400)]), []),  # a span first: no triangle
        (as_intervals([(0, i + 2) for i in range(300)] + [(0, 0)]), []),  # moved by one key
        (as_intervals([(max(0, i - 100), i + 1) for i in range(300)]), []),  # a window
        (as_intervals([(0, i + 1 + (i > 200)) for i in range(300)]), []),  # a step
    ],
)
def test_a_long_causal_triangle_takes_torchs_causal_path(monkeypatch, intervals, causal):
    monkeypatch.setattr(sdpa_attention, "CAUSAL_ROWS", 250)
    assert long_causal_calls(*intervals) == causal
    keys = int(intervals[1].max())
    check_against_naive(*draw(1, intervals[0].shape[1], keys), *intervals, "sdpa", scale=0.7)


def test_short_triangles_need_no_mask_and_all_else_has_one():
    lo, hi = from_documents([40, 64])
    hi[0, 70:80] = 80
    lo[0, 20] = 1
    segments = torch.from_numpy(tiles.segments(lo.numpy(), hi.numpy()))
    parts = {rows.start: list(made) for _, rows, made in sdpa_attention._calls(segments, lo, hi, torch.float32)}
    assert [part.causal for made in parts.values() for part in made] == [False] * sum(map(len, parts.values()))
    check_against_naive(*draw(1, 104, 104), lo, hi, "sdpa")
    lo, hi = from_documents([40, 64])
    segments = torch.from_numpy(tiles.segments(lo.numpy(), hi.numpy()))
    parts = [part for *_, made in sdpa_attention._calls(segments, lo, hi, torch.float32) for part in made]
    assert all(part.causal and part.bias is None for part in parts)


@pytest.mark.parametrize("groups", [1, 4])
def test_a_long_causal_triangle_in_every_batch_row_and_dtype(monkeypatch, groups):
    monkeypatch.setattr(sdpa_attention, "CAUSAL_ROWS", 100)
    lo, hi = (
        torch.cat([first, second])
        for first, second in zip(from_documents([20, 130]), from_documents([150]), strict=True)
    )
    check_against_naive(*draw(2, 150, 150, groups=groups), lo, hi, "sdpa")
    for dtype in (torch.bfloat16, torch.float16):
        q, k, v, grad = (x.detach().to(dtype).requires_grad_() for x in draw(2, 150, 150, groups=groups))
        got, want = (attention(q, k, v, lo, hi, impl=impl)[0] for impl in IMPLEMENTATIONS[::-1])
        for ours, theirs in zip(*(torch.autograd.grad(out, (q, k, v), grad) for out in (got, want)), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_empty_rows_give_zero_and_minus_infinity_and_no_gradient(impl):
    lo, hi = STRUCTURES["padding in the middle"]
    q, k, v, grad = draw(1, 6, 6)
    out, lse = attention(q, k, v, lo, hi, impl=impl)
    assert out[0, 2:4].eq(0).all()
    assert lse[0, :, 2:4].eq(-torch.inf).all()
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), grad)
    assert dq[0, 2:4].eq(0).all()
    assert dk[0, 2].eq(0).all()  # key 2 is in no interval
    assert dv[0, 2].eq(0).all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("poison", [7.0, torch.inf, torch.nan])
def test_another_document_changes_nothing_at_all(impl, poison):
    lengths = [40, 301, 17]
    lo, hi = from_documents(lengths, span_tokens=8, span_every_tokens=20)
    q, k, v, grad = draw(1, sum(lengths), sum(lengths), dtype=torch.float32)

    def middle():
        out, lse = attention(q, k, v, lo, hi, impl=impl)
        return [x[:, 40:341] for x in (out, *torch.autograd.grad(out, (q, k, v), grad))] + [lse[:, :, 40:341]]

    before = middle()
    with torch.no_grad():
        for x in (q, k, v, grad):
            x[:, :40] = poison
            x[:, 341:] = poison
    for x, y in zip(before, middle(), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_document_alone_gives_the_same_bits_as_in_a_pack(impl):
    lengths = [19, 301, 30]
    lo, hi = from_documents(lengths, span_tokens=8, span_every_tokens=20)
    q, k, v, grad = draw(1, sum(lengths), sum(lengths), dtype=torch.float32)
    out, _ = attention(q, k, v, lo, hi, impl=impl)
    packed = [x[:, 19:320] for x in (out, *torch.autograd.grad(out, (q, k, v), grad))]
    alone_lo, alone_hi = from_documents([301], span_tokens=8, span_every_tokens=20)
    alone_inputs = [x[:, 19:320].detach().clone().requires_grad_() for x in (q, k, v)]
    alone, _ = attention(*alone_inputs, alone_lo, alone_hi, impl=impl)
    for x, y in zip(packed, (alone, *torch.autograd.grad(alone, alone_inputs, grad[:, 19:320])), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_strided_views_of_one_projection(impl):
    lo, hi = from_documents([20, 13], span_tokens=3, span_every_tokens=8)
    fused = torch.randn(1, 33, 3, 4, 8, dtype=torch.float64)
    q, k, v = (x.requires_grad_() for x in fused.unbind(2))
    assert not q.is_contiguous()
    check_against_naive(q, k, v, torch.randn(1, 4, 33, 8, dtype=torch.float64).transpose(1, 2), lo, hi, impl)
    last_is_strided = torch.randn(1, 33, 8, 4, dtype=torch.float64).transpose(2, 3).requires_grad_()
    check_against_naive(last_is_strided, k, v, torch.ones(1).double().expand(1, 33, 4, 8), lo, hi, impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_the_same_bits_every_time(impl):
    lo, hi = from_documents([200, 56], span_tokens=8, span_every_tokens=20)
    q, k, v, grad = draw(1, 256, 256, dtype=torch.float32)
    results = []
    for _ in range(2):
        out, lse = attention(q, k, v, lo, hi, impl=impl)
        results.append([out, lse, *torch.autograd.grad(out, (q, k, v), grad)])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_that_of_torch(impl, dtype):
    lo, hi = from_documents([300, 211], span_tokens=32, span_every_tokens=100)
    q, k, v, grad = (x.detach().to(dtype) for x in draw(1, 511, 511, heads=2, groups=2, width=32))
    mask = ((torch.arange(511) >= lo[:, :, None]) & (torch.arange(511) < hi[:, :, None]))[:, None]

    def differentiate(function, *tensors):
        inputs = [x.clone().requires_grad_() for x in tensors]
        out = function(*inputs)
        return [out.detach().double(), *(x.double() for x in torch.autograd.grad(out, inputs, grad.to(out.dtype)))]

    def torch_attention(*heads):
        heads = [x.transpose(1, 2) for x in heads]
        return torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(1, 2)

    exact = differentiate(lambda *x: naive(*x, lo, hi)[0], *(x.double() for x in (q, k, v)))
    torchs = differentiate(torch_attention, q, k, v)
    ours = differentiate(lambda *x: attention(*x, lo, hi, impl=impl)[0], q, k, v)
    for want, theirs, got in zip(exact, torchs, ours, strict=True):
        floor = torch.finfo(dtype).eps * want.abs().max()
        assert (got - want).abs().max() <= 2 * (theirs - want).abs().max() + floor
        assert (got - want).square().mean().sqrt() / want.square().mean().sqrt() < 0.005


def test_given_tables_are_used_and_not_computed_again(monkeypatch):
    lo, hi = from_documents([20, 13], span_tokens=3, span_every_tokens=8)
    q, k, v, grad = draw(1, 33, 33)
    out, _ = attention(q, k, v, lo, hi)
    gradients = torch.autograd.grad(out, (q, k, v), grad)
    tables = tiles.attention_tables(lo.numpy(), hi.numpy())
    monkeypatch.setattr(tiles, "segments", None)
    again, _ = attention(q, k, v, lo, hi, tiles=tables)
    assert torch.equal(out, again)
    assert all(map(torch.equal, gradients, torch.autograd.grad(again, (q, k, v), grad)))
    as_tensors = {name: torch.from_numpy(table) for name, table in tables.items()}
    assert torch.equal(out, attention(q, k, v, lo, hi, tiles=as_tensors)[0])


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
    lo, hi = from_documents([rows // 8] * 8, span_tokens=64, span_every_tokens=256)
    q, k, v, grad = (x.detach() for x in draw(1, rows, rows, heads=1, groups=1, width=32, dtype=torch.float32))
    segments = torch.from_numpy(tiles.segments(lo.numpy(), hi.numpy()))
    with LargestTensor() as watch:
        out, lse = sdpa_attention.attention_forward(q, k, v, lo, hi, segments, 1.0)
        sdpa_attention.attention_backward(grad, q, k, v, out, lse, lo, hi, segments, 1.0)
    assert watch.elements == q.numel() == rows * 32


def test_activation_checkpointing_gives_the_same_bits():
    lo, hi = from_documents([20, 13], span_tokens=3, span_every_tokens=8)
    q, k, v, grad = draw(1, 33, 33, dtype=torch.float32)
    plain = torch.autograd.grad(attention(q, k, v, lo, hi)[0], (q, k, v), grad)
    for use_reentrant in (False, True):
        for x in (q, k, v):
            x.grad = None
        out = checkpoint(lambda *x: attention(*x, lo, hi)[0], q, k, v, use_reentrant=use_reentrant)
        out.backward(grad)
        assert all(map(torch.equal, plain, (q.grad, k.grad, v.grad)))


def test_lse_is_not_differentiable():
    lo, hi = from_documents([5])
    q, k, v, _ = draw(1, 5, 5)
    assert not attention(q, k, v, lo, hi)[1].requires_grad


def test_autocast_changes_nothing():
    lo, hi = from_documents([30], span_tokens=3, span_every_tokens=8)
    q, k, v, grad = draw(1, 30, 30, dtype=torch.float32)
    for impl in IMPLEMENTATIONS:
        plain = attention(q, k, v, lo, hi, impl=impl)[0]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = attention(q, k, v, lo, hi, impl=impl)[0]
            gradients = torch.autograd.grad(out, (q, k, v), grad)
        assert torch.equal(out, plain)
        assert all(map(torch.equal, gradients, torch.autograd.grad(plain, (q, k, v), grad)))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_gradcheck(impl):
    lo, hi = as_intervals([(0, 1), (0, 4), (0, 4), (0, 4), (0, 0), (2, 7), (6, 7)])
    q, k, v, _ = draw(1, 7, 7, width=4)
    assert torch.autograd.gradcheck(lambda *x: attention(*x, lo, hi, impl=impl)[0], (q, k, v))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_opcheck(impl):
    lo, hi = from_documents([5, 6], span_tokens=2, span_every_tokens=4)
    q, k, v, grad = draw(1, 11, 11)
    tail = (lo, hi, torch.from_numpy(tiles.segments(lo.numpy(), hi.numpy())), 0.3, impl)
    torch.library.opcheck(torch.ops.triweave.attention.default, (q, k, v, *tail))
    out, lse = (x.detach() for x in torch.ops.triweave.attention(q, k, v, *tail))
    q, k, v = (x.detach() for x in (q, k, v))
    torch.library.opcheck(torch.ops.triweave.attention_backward.default, (grad, q, k, v, out, lse, *tail))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_without_a_graph_break(backend):
    lo, hi = from_documents([20, 13], span_tokens=3, span_every_tokens=8)
    q, k, v, grad = draw(1, 33, 33, dtype=torch.float32)
    tables = {name: torch.from_numpy(table) for name, table in tiles.attention_tables(lo.numpy(), hi.numpy()).items()}

    def function(q, k, v, tables):
        return attention(q * 2, k, v, lo, hi, tiles=tables)[0] + 1

    plain = function(q, k, v, tables)
    compiled = torch.compile(function, fullgraph=True, backend=backend)(q, k, v, tables)
    torch.testing.assert_close(compiled, plain)
    wanted = torch.autograd.grad(plain, (q, k, v), grad)
    for got, want in zip(torch.autograd.grad(compiled, (q, k, v), grad), wanted, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v, lo: (q[..., :4], k, v, lo), "do not fit"),
        (lambda q, k, v, lo: (q[:, :, :3], k, v, lo), "multiple of G"),
        (lambda q, k, v, lo: (q.float(), k, v, lo), "one dtype"),
        (lambda q, k, v, lo: (q, k, v, lo[:, 1:]), "must be"),
    ],
)
def test_wrong_inputs_are_named(change, message):
    lo, hi = from_documents([5])
    q, k, v, _ = draw(1, 5, 5)
    q, k, v, lo = change(q, k, v, lo)
    with pytest.raises(KernelInputError, match=message):
        attention(q, k, v, lo, hi)
