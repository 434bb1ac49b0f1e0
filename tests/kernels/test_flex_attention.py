"""FlexAttention as a backend, in torch's uncompiled form on the CPU; its compiled kernels need a GPU.

torch refuses a backward on CPUs although its uncompiled form has one. `with_backward` takes that refusal away, so that
the gradients through our block mask can be compared; nothing but these tests does so.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.attention.flex_attention as torch_flex
from torch.utils.checkpoint import checkpoint

from triweave.kernels import flex_attention, tiles
from triweave.kernels.attention import attention
from triweave.kernels.errors import KernelUnavailableError

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.fixture
def with_backward(monkeypatch):
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    monkeypatch.setattr(flex_attention, "_check_served", lambda *_: None)


def draw(batch, rows, keys, heads=2, groups=1, width=16, dtype=torch.float32):
    q, grad = (torch.randn(batch, rows, heads, width).to(dtype) for _ in range(2))
    k, v = (torch.randn(batch, keys, groups, width).to(dtype) for _ in range(2))
    return q, k, v, grad


def packed(*lengths, padding=0):
    """Causal documents with spans, and padding rows after them."""
    lo, hi = tiles.document_intervals(np.array(lengths), span_tokens=7, span_every_tokens=15)
    return tuple(torch.from_numpy(np.pad(x, ((0, 0), (0, padding)))) for x in (lo, hi))


def any_intervals(seed, batch, rows, keys, in_order):
    generator = np.random.default_rng(seed)
    lo, hi = generator.integers(0, keys + 1, size=(2, batch, rows)).astype(np.int32)
    return (np.sort(lo, axis=1), np.sort(hi, axis=1)) if in_order else (lo, hi)


def differentiate(q, k, v, grad, lo, hi, impl, **options):
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = attention(*inputs, lo, hi, impl=impl, **options)
    assert not lse.requires_grad
    return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(out.dtype)), lse]


@pytest.mark.parametrize(("rows", "keys"), [(1, 1), (127, 300), (128, 128), (300, 129), (400, 500)])
@pytest.mark.parametrize("in_order", [False, True])
def test_the_blocks_are_the_tile_table_s(rows, keys, in_order):
    for seed in range(10):
        lo, hi = any_intervals(seed, 2, rows, keys, in_order)
        if seed == 0:
            lo[:], hi[:] = 0, keys
        table = tiles.tile_table(lo, hi, keys=keys, query_tile=128, key_tile=128)
        live, full = flex_attention.blocks(torch.from_numpy(lo), torch.from_numpy(hi), keys)
        assert np.array_equal(live.numpy().nonzero()[2], table.key_tiles)
        assert np.array_equal(full[live].numpy(), table.query_full == 1)


def test_full_and_masked_blocks_come_in_order():
    lo, hi = packed(300)
    mask = flex_attention.block_mask(lo, hi, 300)
    counts, indices = mask.full_kv_num_blocks[0, 0], mask.full_kv_indices[0, 0]
    assert [indices[i, :n].tolist() for i, n in enumerate(counts)] == [[], [0], [0, 1]]
    counts, indices = mask.kv_num_blocks[0, 0], mask.kv_indices[0, 0]
    assert [indices[i, :n].tolist() for i, n in enumerate(counts)] == [[0], [1], [2]]
    assert mask.seq_lengths == (300, 300)


MASKS = {
    "documents, spans and padding": packed(130, 1, 40, 20, padding=9),
    "one document of several blocks": packed(280),
    "in no order": tuple(map(torch.from_numpy, any_intervals(0, 2, 140, 90, False))),
    "all empty": (torch.zeros(1, 5, dtype=torch.int32),) * 2,
}


@pytest.mark.parametrize("name", MASKS)
def test_forward_and_backward_equal_the_reference(name, with_backward):  # noqa: ARG001
    lo, hi = MASKS[name]
    keys = 90 if name == "in no order" else lo.shape[1]
    q, k, v, grad = draw(*lo.shape, keys, heads=4, groups=2)
    got = differentiate(q, k, v, grad, lo, hi, "flex", scale=0.3)
    want = differentiate(q, k, v, grad, lo, hi, "reference", scale=0.3)
    for x, y in zip(got, want, strict=True):
        assert x.shape == y.shape
        assert x.dtype == y.dtype
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    empty = hi <= lo
    assert got[0][empty].eq(0).all()
    assert got[4].transpose(1, 2)[empty].eq(-torch.inf).all()
    assert got[1][empty].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_error_is_at_most_twice_that_of_torch(dtype, with_backward):  # noqa: ARG001
    lo, hi = packed(45, 20)
    mask = ((torch.arange(65) >= lo[:, :, None]) & (torch.arange(65) < hi[:, :, None]))[:, None]
    q, k, v, grad = draw(1, 65, 65, groups=2, width=40, dtype=dtype)
    ours = differentiate(q, k, v, grad, lo, hi, "flex")
    exact = differentiate(*(x.double() for x in (q, k, v, grad)), lo, hi, "reference")
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    heads = [x.transpose(1, 2) for x in inputs]
    out = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(1, 2)
    torchs = [out.detach(), *torch.autograd.grad(out, inputs, grad)]
    for want, theirs, got in zip(exact, torchs, ours, strict=False):
        floor = torch.finfo(dtype).eps * want.abs().max()
        assert (got - want).abs().max() <= 2 * (theirs - want).abs().max() + floor
        assert (got - want).square().mean().sqrt() / want.square().mean().sqrt() < 0.005


def test_strided_views_and_no_rows_or_keys(with_backward):  # noqa: ARG001
    lo, hi = packed(20)
    q, k, v = torch.randn(1, 20, 3, 2, 16).unbind(2)
    torch.testing.assert_close(
        attention(q, k, v, lo, hi, impl="flex"), attention(q, k, v, lo, hi, impl="reference"), rtol=1e-5, atol=1e-5
    )
    none = torch.zeros(1, 0, dtype=torch.int32)
    assert attention(*draw(1, 0, 3)[:3], none, none, impl="flex")[0].shape == (1, 0, 2, 16)
    nothing = torch.zeros(1, 3, dtype=torch.int32)
    out, dq, dk, dv, lse = differentiate(*draw(1, 3, 0), nothing, nothing, "flex")
    assert out.eq(0).all()
    assert dq.eq(0).all()
    assert dk.shape == dv.shape == (1, 0, 1, 16)
    assert lse.eq(-torch.inf).all()


def test_a_cpu_has_no_backward_and_the_error_says_so():
    lo, hi = packed(20)
    q, k, v, _ = draw(1, 20, 20)
    with pytest.raises(KernelUnavailableError, match=r"no backward on a CPU.*; use sdpa or reference"):
        attention(q.requires_grad_(), k, v, lo, hi, impl="flex")
    with torch.no_grad():
        out = attention(q, k, v, lo, hi, impl="flex")[0]
    torch.testing.assert_close(out, attention(q, k, v, lo, hi, impl="sdpa")[0], rtol=1e-5, atol=1e-5)


def test_autocast_changes_nothing():
    lo, hi = packed(30)
    q, k, v, _ = draw(1, 30, 30)
    plain = attention(q, k, v, lo, hi, impl="flex")[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attention(q, k, v, lo, hi, impl="flex")[0], plain)


def test_activation_checkpointing_gives_the_same_bits(with_backward):  # noqa: ARG001
    lo, hi = packed(20, 13)
    q, k, v, grad = draw(1, 33, 33)
    plain = differentiate(q, k, v, grad, lo, hi, "flex")
    for use_reentrant in (False, True):
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        out = checkpoint(lambda *x: attention(*x, lo, hi, impl="flex")[0], *inputs, use_reentrant=use_reentrant)
        gradients = torch.autograd.grad(out, inputs, grad) if not use_reentrant else out.backward(grad)
        gradients = gradients or [x.grad for x in inputs]
        assert all(map(torch.equal, plain[1:4], gradients))


def test_compiles_without_a_graph_break():
    lo, hi = packed(20, 13)
    q, k, v, _ = draw(1, 33, 33)

    def function(q, k, v, lo, hi):
        return attention(q * 2, k, v, lo, hi, impl="flex")[0] + 1

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(q, k, v, lo, hi)
    torch.testing.assert_close(compiled, function(q, k, v, lo, hi))


def test_what_its_compiled_kernels_do_not_take_is_named():
    assert flex_attention.why_not(torch.bfloat16, 16) is None
    for dtype, width in ((torch.float64, 64), (torch.bfloat16, 8), (torch.bfloat16, 264)):
        assert "heads of 16 to 256 numbers, in float32" in flex_attention.why_not(dtype, width)
