"""flash-attn as a backend, against a stand-in of the package's interface in plain torch: its kernels need a GPU.

What is tested is ours: which masks it is given, how documents and padding are laid out, and what comes back.
"""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import torch

from triweave.kernels import backends, flash_attention, tiles
from triweave.kernels.attention import attention
from triweave.kernels.errors import KernelUnavailableError
from triweave.kernels.flash_attention import packed_documents


def documents_in_torch(q, k, v, starts, longest, scale):
    """Causal attention of each document [starts[n], starts[n + 1]) of q [L, H, K]; (out, lse [H, L])."""
    per_group = q.shape[1] // k.shape[1]
    assert starts.dtype == torch.int32
    assert int(starts.diff().max()) == longest
    outs, lses = [], []
    for first, end in zip(starts.tolist(), starts.tolist()[1:], strict=False):
        keys, values = (x[first:end].repeat_interleave(per_group, 1) for x in (k, v))
        scores = torch.einsum("shk,thk->hst", q[first:end].float(), keys.float()) * scale
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
        lses.append(scores.logsumexp(-1))
        outs.append(torch.einsum("hst,thk->shk", scores.softmax(-1), values.float()).to(q.dtype))
    return torch.cat(outs), torch.cat(lses, 1)


def version_2(
    q, k, v, starts, starts_k, longest, longest_k, *, softmax_scale, causal, deterministic, return_attn_probs
):
    assert starts is starts_k
    assert longest == longest_k
    assert causal and deterministic and return_attn_probs  # noqa: PT018
    return *documents_in_torch(q, k, v, starts, longest, softmax_scale), None


def version_4(
    q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, deterministic, return_lse
):
    assert cu_seqlens_q is cu_seqlens_k
    assert max_seqlen_q == max_seqlen_k
    assert causal and deterministic and return_lse  # noqa: PT018
    return documents_in_torch(q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale)


@pytest.fixture
def install(monkeypatch):
    """Let "flash" serve on the CPU, and put stand-ins in place: `install(2)`, `install(4)`, `install()` for none."""
    monkeypatch.setitem(backends.ONLY_ON, "flash", ("cpu",))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    backends._choose.cache_clear()
    flash_attention._varlen.cache_clear()

    def put(*versions):
        for name, version, function in (("flash_attn", 2, version_2), ("flash_attn.cute", 4, version_4)):
            module = types.ModuleType(name)
            if version in versions:
                module.flash_attn_varlen_func = function
            monkeypatch.setitem(sys.modules, name, module)

    yield put
    backends._choose.cache_clear()
    flash_attention._varlen.cache_clear()


def draw(batch, rows, heads=4, groups=2, width=16, dtype=torch.bfloat16):
    shapes = [(batch, rows, heads, width)] + 2 * [(batch, rows, groups, width)] + [(batch, rows, heads, width)]
    return [torch.randn(shape).to(dtype) for shape in shapes]


def packed():
    """Two packs of 40: documents with padding between and after them, and one document that fills its pack."""
    lo, hi = (np.zeros((2, 40), dtype=np.int32) for _ in range(2))
    for row, first, end in ((0, 0, 13), (0, 13, 14), (0, 20, 35), (1, 0, 40)):
        lo[row, first:end], hi[row, first:end] = first, np.arange(first, end) + 1
    return torch.from_numpy(lo), torch.from_numpy(hi)


def test_documents_and_the_rows_that_see_something():
    lo, hi = (x.numpy() for x in packed())
    found = packed_documents(lo, hi)
    assert found.live.tolist() == [*range(14), *range(20, 35), *range(40, 80)]
    assert found.starts.tolist() == [0, 13, 14, 29, 69]
    assert found.longest == 40
    nothing = packed_documents(np.zeros((1, 3), np.int32), np.zeros((1, 3), np.int32))
    assert nothing.live.size == nothing.longest == 0


@pytest.mark.parametrize("version", [2, 4])
def test_forward_and_backward_equal_the_reference(version, install):
    install(version)
    lo, hi = packed()
    q, k, v, grad = draw(2, 40)
    results = {}
    for impl in ("flash", "reference"):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out, lse = attention(*inputs, lo, hi, impl=impl, scale=0.2)
        assert not lse.requires_grad
        results[impl] = [out.detach(), *torch.autograd.grad(out, inputs, grad), lse]
    for x, y in zip(results["flash"], results["reference"], strict=True):
        assert x.shape == y.shape
        assert x.dtype == y.dtype
        torch.testing.assert_close(x, y, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(results["flash"][4], results["reference"][4], rtol=1e-5, atol=1e-5)
    for x in results["flash"][:4]:
        assert x[0, 14:20].eq(0).all()
        assert x[0, 35:].eq(0).all()


def test_what_padding_holds_is_never_read(install):
    install(2)
    lo, hi = packed()
    q, k, v, grad = draw(2, 40)
    clean = attention(q, k, v, lo, hi, impl="flash")[0]
    for x in (q, k, v):
        x[0, 14:20] = torch.nan
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = attention(*inputs, lo, hi, impl="flash")[0]
    assert torch.equal(out, clean)
    assert all(x.isfinite().all() for x in torch.autograd.grad(out, inputs, grad))


def test_a_batch_of_padding_alone(install):
    install(2)
    nothing = torch.zeros(1, 3, dtype=torch.int32)
    out, lse = attention(*draw(1, 3)[:3], nothing, nothing, impl="flash")
    assert out.eq(0).all()
    assert lse.eq(-torch.inf).all()


MASKS = {
    "a bidirectional span": tiles.document_intervals(np.array([30]), span_tokens=4, span_every_tokens=10),
    "a sliding window": (np.array([[0, 0, 1, 2]], np.int32), np.array([[1, 2, 3, 4]], np.int32)),
    "a document with a gap": (np.zeros((1, 5), np.int32), np.array([[1, 2, 0, 4, 5]], np.int32)),
    "a later start": (np.array([[0, 0, 1]], np.int32), np.array([[1, 2, 3]], np.int32)),
    "the batch row before": (np.array([[0, 0], [0, 0]], np.int32), np.array([[1, 2], [0, 2]], np.int32)),
}


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_it_cannot_say_is_refused_with_rows_named(name, install):
    install(2, 4)
    lo, hi = MASKS[name]
    lo, hi = (torch.from_numpy(np.ascontiguousarray(x)) for x in (lo, hi))
    with pytest.raises(KernelUnavailableError, match=r"rows are not that \(row \d+ of \d+ sees \[\d+, \d+\).*use auto"):
        attention(*draw(*lo.shape)[:3], lo, hi, impl="flash")


def test_the_newer_package_serves_on_hopper_and_newer_only(install, monkeypatch):
    install(2, 4)
    assert flash_attention._varlen().__name__ == "run"
    flash_attention._varlen.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert flash_attention._varlen().__name__ == "run_older"


def test_what_it_cannot_serve_is_named(install):
    install()
    lo, hi = packed()
    with pytest.raises(KernelUnavailableError, match="which is not installed here; use auto"):
        attention(*draw(2, 40)[:3], lo, hi, impl="flash")
    with pytest.raises(KernelUnavailableError, match=r"16 numbers in torch.float32; it takes multiples of 8 up to 256"):
        attention(*draw(2, 40, dtype=torch.float32)[:3], lo, hi, impl="flash")
    with pytest.raises(KernelUnavailableError, match="heads of 20 numbers"):
        attention(*draw(2, 40, width=20)[:3], lo, hi, impl="flash")
    q, k, v, _ = draw(2, 40)
    with pytest.raises(KernelUnavailableError, match="40 rows and 20 keys"):
        attention(q, k[:, :20], v[:, :20], lo, hi, impl="flash")
