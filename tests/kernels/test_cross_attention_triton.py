"""The gated cross-attention kernels in Triton's interpreter, against naive dense attention and the tolerance rule.

Tiles are made small (16 and 32) so that short sequences have many: live ones, dead ones, full and masked ones.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from triweave.kernels import attention_tiles, tiles
from triweave.kernels.cross_attention import cross_attention
from triweave.kernels.errors import KernelInputError, KernelUnavailableError

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PINNED = attention_tiles.CONFIGS
NAMES = ("out", "dq", "dk", "dv", "dgate")


@pytest.fixture(scope="module", autouse=True)
def kernels(interpreter):
    """The interpreted module, with tiles of 16 rows and 32 keys forward, 16 x 16 for dq, 32 x 16 for dk and dv."""
    small = {"forward": (16, 32), "dq": (16, 16), "dkv": (32, 16)}
    attention_tiles.CONFIGS = {
        kernel: {
            (size, 256): attention_tiles.TileConfig(query_tile=rows, key_tile=keys, warps=4, stages=1)
            for size in (2, 4)
        }
        for kernel, (rows, keys) in small.items()
    }
    yield interpreter("cross_attention_triton")
    attention_tiles.CONFIGS = PINNED


def naive(q, k, v, lo, hi, gate, scale=None):
    """Dense attention with an S x T mask, gated, differentiated by autograd."""
    per_group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(per_group, 2), v.repeat_interleave(per_group, 2)
    scores = torch.einsum("bshk,bthk->bhst", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    key = torch.arange(k.shape[1])
    mask = ((key >= lo[:, :, None]) & (key < hi[:, :, None]))[:, None]
    weights = torch.softmax(scores.masked_fill(~mask, -1e30), -1).masked_fill(~mask, 0)
    return torch.einsum("bhst,bthk->bshk", weights, v) * torch.tanh(gate)[:, None].to(q.dtype)


def triton_attention(*inputs, **options):
    return cross_attention(*inputs, impl="triton", **options)


def draw(batch, rows, keys, heads=2, groups=1, width=16, dtype=torch.float32):
    """Return q, k, v, gate and the result's gradient."""
    q, grad = (torch.randn(batch, rows, heads, width).to(dtype) for _ in range(2))
    k, v = (torch.randn(batch, keys, groups, width).to(dtype) for _ in range(2))
    return q, k, v, torch.randn(heads), grad


def as_intervals(pairs):
    return tuple(torch.tensor([[pair[i] for pair in pairs]], dtype=torch.int32) for i in (0, 1))


def flamingo(seen="immediate", rows=44, keys_per_span=None):
    """Return the intervals of a pack of three documents, the second with two images side by side, and T."""
    spans = np.full((1, rows), -1, dtype=np.int32)
    for number, (first, end) in enumerate([(3, 12), (14, 18), (18, 19), (rows - 20, rows - 4)]):
        spans[0, first:end] = number
    documents = np.repeat([0, 1, 2, -1], [13, 8, rows - 23, 2])[None]
    lo, hi = tiles.media_intervals(documents, spans, seen=seen, keys_per_span=keys_per_span)
    return *map(torch.from_numpy, (lo, hi)), int(hi.max())


def differentiate(function, q, k, v, gate, grad, lo, hi, **options):
    inputs = [x.detach().requires_grad_() for x in (q, k, v, gate)]
    out = function(*inputs[:3], lo, hi, inputs[3], **options)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(out.dtype))]


def check(q, k, v, gate, grad, lo, hi, **options):
    """Compare out and gradients of fp32 inputs with dense attention in fp64."""
    got = differentiate(triton_attention, q, k, v, gate, grad, lo, hi, **options)
    options.pop("tiles", None)
    want = differentiate(naive, *(x.double() for x in (q, k, v, gate, grad)), lo, hi, **options)
    for name, x, y in zip(NAMES, got, want, strict=True):
        assert x.dtype == torch.float32
        assert x.is_contiguous()
        torch.testing.assert_close(x.double(), y, rtol=2e-5, atol=3e-5, msg=lambda text, name=name: f"{name}: {text}")
    return got


EDGES = {
    "the latest medium": flamingo(),
    "all media so far": flamingo("preceding"),
    "latents of a resampler": flamingo(keys_per_span=9),
    "empty rows between": (*as_intervals([(0, 0), (0, 2), (4, 4), (9, 3), (3, 4), (3, 5)]), 6),
    "all empty": (*as_intervals([(0, 0)] * 4), 6),
    "whole tiles": (*as_intervals([(0, 32)] * 32), 32),
    "no order": (*as_intervals([(4, 36), (0, 1), (35, 36), (0, 36), (2, 3), (1, 25)]), 36),
}


@pytest.mark.parametrize("name", EDGES)
def test_edges_equal_dense_attention(name):
    lo, hi, keys = EDGES[name]
    check(*draw(1, lo.shape[1], keys), lo, hi)


@pytest.mark.slow
@pytest.mark.parametrize("seen", ["immediate", "preceding"])
def test_groups_of_heads_with_a_gate_each_and_a_scale_of_one_s_own(seen):
    lo, hi, keys = flamingo(seen, rows=100, keys_per_span=32)
    table = tiles.tile_table(lo.numpy(), hi.numpy(), keys=keys, query_tile=16, key_tile=16)
    assert 0 < table.full_tiles < table.live_tiles < table.query_tiles_per_row * table.key_tiles_per_row
    lo, hi = (torch.cat([x, x.flip(1)]) for x in (lo, hi))
    check(*draw(2, 100, keys, heads=6, groups=2, width=72), lo, hi, scale=0.2)


def test_a_closed_gate_gives_nothing_and_has_a_gradient_itself():
    lo, hi, keys = flamingo()
    q, k, v, gate, grad = draw(1, 44, keys, heads=2, groups=1)
    gate[1] = 0
    out, dq, _, _, dgate = check(q, k, v, gate, grad, lo, hi)
    assert out[:, :, 1].eq(0).all()
    assert out[:, 4:13, 0].ne(0).all()
    assert dq[:, :, 1].eq(0).all()
    assert dgate[1].abs() > 1e-3
    *_, dk, dv, dgate = check(q, k, v, torch.zeros(2), grad, lo, hi)
    assert dk.eq(0).all()
    assert dv.eq(0).all()
    assert dgate.ne(0).all()


def test_a_wide_open_and_a_barely_open_gate():
    lo, hi, keys = flamingo()
    q, k, v, _, grad = draw(1, 44, keys)
    wide, barely = check(q, k, v, torch.tensor([30.0, 1e-6]), grad, lo, hi)[0].unbind(2)
    ungated = naive(*(x.double() for x in (q, k, v)), lo, hi, torch.tensor([30.0, 30.0]).double())
    torch.testing.assert_close(wide.double(), ungated[:, :, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(barely.double(), 1e-6 * ungated[:, :, 1], rtol=1e-4, atol=1e-12)


def test_empty_rows_give_zero_and_no_gradient():
    lo, hi, keys = flamingo()
    empty = (hi <= lo)[0]
    assert empty[:3].all()  # text before the first medium
    assert empty[-2:].all()  # padding
    q, k, v, gate, grad = draw(1, 44, keys)
    before = differentiate(triton_attention, q, k, v, gate, grad, lo, hi)
    assert before[0][:, empty].eq(0).all()
    assert before[1][:, empty].eq(0).all()
    assert all(x.isfinite().all() for x in before)
    q[:, empty], grad[:, empty] = 30.0, -7.0
    assert all(map(torch.equal, before, differentiate(triton_attention, q, k, v, gate, grad, lo, hi)))


def test_another_document_s_media_change_nothing_at_all():
    lo, hi, keys = flamingo("preceding")
    q, k, v, gate, grad = draw(1, 44, keys)
    own, media = slice(13, 21), slice(int(lo[0, 20]), int(hi[0, 20]))
    assert media.stop - media.start == 5

    def middle():
        out, dq, dk, dv, _ = differentiate(triton_attention, q, k, v, gate, grad, lo, hi)
        return [out[:, own], dq[:, own], dk[:, media], dv[:, media]]

    before = middle()
    for x, kept in ((q, own), (grad, own), (k, media), (v, media)):
        x[:, : kept.start] = 30.0  # scores so high that exp of them is infinite
        x[:, kept.stop :] = 30.0
    assert all(map(torch.equal, before, middle()))


def test_no_rows_or_no_media():
    nothing = torch.zeros(1, 3, dtype=torch.int32)
    out, dq, dk, dv, dgate = differentiate(triton_attention, *draw(1, 3, 0), nothing, nothing)
    assert out.eq(0).all()
    assert dq.eq(0).all()
    assert dgate.eq(0).all()
    assert dk.shape == dv.shape == (1, 0, 1, 16)
    none = torch.zeros(1, 0, dtype=torch.int32)
    out, dq, dk, dv, dgate = differentiate(triton_attention, *draw(1, 0, 3), none, none)
    assert out.shape == dq.shape == (1, 0, 2, 16)
    assert all(x.eq(0).all() for x in (dk, dv, dgate))


def test_strided_views():
    lo, hi, keys = flamingo()
    q = torch.randn(1, 2, 44, 16).transpose(1, 2)
    k, v = torch.randn(1, keys, 2, 1, 16).unbind(2)
    assert not k.is_contiguous()
    check(q, k, v, torch.randn(4)[::2], torch.ones(1).expand(1, 44, 2, 16), lo, hi)
    last_is_strided, grad = (torch.randn(1, 44, 16, 2).transpose(2, 3) for _ in range(2))
    check(last_is_strided, k, v, torch.randn(1).expand(2), grad, lo, hi)


def within_tolerance(dtype, width, rows=44, **options):
    """Hold error against fp64 to twice that of torch's own attention in `dtype`, plus one rounding of the largest."""
    lo, hi, keys = flamingo("preceding", rows=rows, keys_per_span=11)
    mask = ((torch.arange(keys) >= lo[:, :, None]) & (torch.arange(keys) < hi[:, :, None]))[:, None]
    q, k, v, gate, grad = draw(1, rows, keys, width=width, dtype=dtype, **options)

    def torch_attention(q, k, v, lo, hi, gate):  # noqa: ARG001
        heads = [x.transpose(1, 2) for x in (q, k, v)]
        out = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask, enable_gqa=True)
        return out.transpose(1, 2).nan_to_num(0) * torch.tanh(gate).to(dtype)[:, None]

    exact = differentiate(naive, *(x.double() for x in (q, k, v, gate, grad)), lo, hi)
    torchs = differentiate(torch_attention, q, k, v, gate, grad, lo, hi)
    ours = differentiate(triton_attention, q, k, v, gate, grad, lo, hi)
    assert [x.dtype for x in ours] == [dtype] * 4 + [torch.float32]
    for want, theirs, got in zip(exact, torchs, ours, strict=True):
        floor = torch.finfo(dtype).eps * want.abs().max()
        assert (got - want).abs().max() <= 2 * (theirs - want).abs().max() + floor
        assert (got - want).square().mean().sqrt() / want.square().mean().sqrt() < 0.005


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_at_most_twice_that_of_torch(dtype):
    within_tolerance(dtype, 72)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [8, 32, 64, 80, 96, 128, 256])
def test_error_at_every_head_width(dtype, width):
    within_tolerance(dtype, width, heads=2, groups=2)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_with_the_pinned_tiles(dtype, monkeypatch):
    monkeypatch.setattr(attention_tiles, "CONFIGS", PINNED)
    within_tolerance(dtype, 64, rows=150)


def any_mask(seed, shape, heads, width, dtype, in_order):
    generator = np.random.default_rng(seed)
    lo, hi = (generator.integers(0, shape[2] + 1, size=shape[:2]).astype(np.int32) for _ in range(2))
    if in_order:
        lo, hi = np.sort(lo, axis=1), np.sort(hi, axis=1)
    torch.manual_seed(seed % 2**31)
    q, k, v, gate, grad = draw(*shape, heads=heads[0], groups=heads[1], width=width, dtype=dtype)
    lo, hi = torch.from_numpy(lo), torch.from_numpy(hi)
    if dtype == torch.float32:
        check(q, k, v, gate, grad, lo, hi)
        return
    got = differentiate(triton_attention, q, k, v, gate, grad, lo, hi)
    want = differentiate(naive, *(x.double() for x in (q, k, v, gate, grad)), lo, hi)
    for x, y in zip(got, want, strict=True):
        # relative to the inputs, which are about 1: the gradients of a row that sees one key alone cancel to 0
        error = 8 * torch.finfo(dtype).eps * max(1.0, float(y.abs().max()))
        torch.testing.assert_close(x.double(), y, rtol=0, atol=error)


MASKS = given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(1, 2), st.integers(1, 35), st.integers(1, 35)),
    heads=st.sampled_from([(1, 1), (2, 1), (3, 1), (2, 2)]),
    width=st.sampled_from([2, 5, 16, 24, 40]),
    dtype=st.sampled_from(DTYPES),
    in_order=st.booleans(),
)
DRAWN = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
    "phases": [Phase.explicit, Phase.reuse, Phase.generate],  # shrinking takes minutes here
}


@settings(max_examples=5, **DRAWN)
@MASKS
def test_any_intervals_equal_dense_attention(seed, shape, heads, width, dtype, in_order):
    any_mask(seed, shape, heads, width, dtype, in_order)


@pytest.mark.slow
@settings(max_examples=200, **DRAWN)
@MASKS
def test_two_hundred_masks_equal_dense_attention(seed, shape, heads, width, dtype, in_order):
    any_mask(seed, shape, heads, width, dtype, in_order)


def test_given_lists_are_used_and_the_same_bits_come_every_time(monkeypatch, kernels):
    lo, hi, keys = flamingo()
    inputs = (*draw(1, 44, keys, dtype=torch.bfloat16), lo, hi)
    plain = differentiate(triton_attention, *inputs)
    assert all(map(torch.equal, plain, differentiate(triton_attention, *inputs)))
    made = attention_tiles.attention_tables(lo.numpy(), hi.numpy(), keys=keys, width=16, number_bytes=2)
    monkeypatch.setitem(kernels.launch_forward.__globals__, "tile_lists", None)
    assert all(map(torch.equal, plain, differentiate(triton_attention, *inputs, tiles=made)))
    made["tile_lists"][3] *= 2
    with pytest.raises(KernelInputError, match=r"cross_attention: the tile lists .* make them anew"):
        triton_attention(*inputs[:3], lo, hi, inputs[3], tiles=made)


def test_checkpointing_gives_the_same_bits_and_nothing_but_the_inputs_is_kept_with_the_result():
    lo, hi, keys = flamingo()
    q, k, v, gate, grad = draw(1, 44, keys)
    plain = differentiate(triton_attention, q, k, v, gate, grad, lo, hi)
    kept = []
    inputs = [x.detach().requires_grad_() for x in (q, k, v, gate)]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        triton_attention(*inputs[:3], lo, hi, inputs[3])
    own = {x.untyped_storage().data_ptr() for x in (*inputs, lo, hi)}
    made = [x for x in kept if x.untyped_storage().data_ptr() not in own]
    assert sum(x.numel() for x in made) == 2 * 44  # the log-sum-exp alone
    for use_reentrant in (False, True):
        for x in inputs:
            x.grad = None
        checkpoint(triton_attention, *inputs[:3], lo, hi, inputs[3], use_reentrant=use_reentrant).backward(grad)
        assert all(map(torch.equal, plain[1:], (x.grad for x in inputs)))


@pytest.mark.slow
def test_opcheck_and_compiled():
    lo, hi, keys = flamingo()
    q, k, v, gate, grad = draw(1, 44, keys)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    tail = (lo, hi, gate.requires_grad_(), None, 0.3, "triton")
    torch.library.opcheck(torch.ops.triweave.cross_attention.default, (*inputs, *tail))
    plain = differentiate(triton_attention, q, k, v, gate, grad, lo, hi)
    compiled = torch.compile(triton_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(differentiate(compiled, q, k, v, gate, grad, lo, hi), plain)


def test_what_it_does_not_serve_is_named():
    lo, hi, keys = flamingo()
    q, k, v, gate, _ = draw(1, 44, keys)
    with pytest.raises(KernelUnavailableError, match=r"cross_attention: .*float64, only float32.*; use reference"):
        triton_attention(q.double(), k.double(), v.double(), lo, hi, gate)
