"""The Triton attention kernels in Triton's interpreter, against naive dense attention and the tolerance rule.

Tiles are made small (16 and 32) so that short sequences have many: live ones, dead ones, full and masked ones.
"""

from __future__ import annotations

import mmap

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from triweave.kernels import attention_tiles, reference_attention, tiles
from triweave.kernels.attention import attention
from triweave.kernels.errors import KernelInputError, KernelUnavailableError

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PINNED = attention_tiles.CONFIGS


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
    yield interpreter("attention_triton")
    attention_tiles.CONFIGS = PINNED


def naive(q, k, v, lo, hi, scale=None):
    """Dense attention with an S x T mask, differentiated by autograd."""
    per_group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(per_group, 2), v.repeat_interleave(per_group, 2)
    scores = torch.einsum("bshk,bthk->bhst", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    key = torch.arange(k.shape[1])
    mask = ((key >= lo[:, :, None]) & (key < hi[:, :, None]))[:, None]
    scores = scores.masked_fill(~mask, -torch.inf)
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - torch.where(lse.isinf(), 0, lse)[..., None]).masked_fill(~mask, 0)
    return torch.einsum("bhst,bthk->bshk", weights, v), lse


def draw(batch, rows, keys, heads=2, groups=1, width=16, dtype=torch.float32):
    q, grad = (torch.randn(batch, rows, heads, width).to(dtype) for _ in range(2))
    k, v = (torch.randn(batch, keys, groups, width).to(dtype) for _ in range(2))
    return q, k, v, grad


def as_intervals(pairs):
    return tuple(torch.tensor([[pair[i] for pair in pairs]], dtype=torch.int32) for i in (0, 1))


def from_documents(lengths, **spans):
    return tuple(map(torch.from_numpy, tiles.document_intervals(np.array(lengths), **spans)))


def differentiate(function, q, k, v, grad):
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(out.dtype)), lse.detach()]


def check(q, k, v, grad, lo, hi, **options):
    """Compare out, gradients and lse of fp32 inputs with dense attention in fp64."""
    got = differentiate(lambda *x: attention(*x, lo, hi, impl="triton", **options), q, k, v, grad)
    scale = options.get("scale")
    want = differentiate(lambda *x: naive(*x, lo, hi, scale), *(x.double() for x in (q, k, v, grad)))
    for name, x, y in zip(("out", "dq", "dk", "dv", "lse"), got, want, strict=True):
        assert x.dtype == torch.float32
        assert x.is_contiguous()
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")
    return got


WINDOW = 5
EDGES = {
    "media before any text": as_intervals([(0, 18)] * 18 + [(0, 19), (0, 20)]),
    "a span at the pack's end": as_intervals([(0, 1), (0, 2)] + [(2, 17)] * 15),
    "documents of one token": as_intervals([(i, i + 1) for i in range(17)]),
    "prefix": as_intervals([(0, 6)] * 6 + [(0, i + 1) for i in range(6, 15)]),
    "sliding window": as_intervals([(max(0, i + 1 - WINDOW), i + 1) for i in range(18)]),
    "padding at the end": as_intervals([(0, i + 1) for i in range(6)] + [(0, 0)] * 12),
    "padding in the middle": as_intervals([(0, 1), (0, 2), (0, 0), (9, 9), (3, 4), (3, 5)]),
    "crossed bounds are empty": as_intervals([(3, 1), (0, 2), (5, 0), (1, 6)]),
    "all empty": as_intervals([(0, 0)] * 4),
    "backwards": as_intervals([(i, 12) for i in range(12)]),
}
LARGER = {
    "one causal document": from_documents([75]),
    "packed documents": from_documents([7, 1, 40, 1, 1, 13]),
    "spans": from_documents([30, 21, 9], span_tokens=4, span_every_tokens=9),
    "window clipped by documents": as_intervals([(max(i // 13 * 13, i + 1 - WINDOW), i + 1) for i in range(39)]),
    "a whole pack of one span": as_intervals([(0, 70)] * 70),
}


@pytest.mark.parametrize("name", EDGES)
def test_edges_equal_dense_attention(name):
    lo, hi = EDGES[name]
    check(*draw(1, lo.shape[1], lo.shape[1]), lo, hi)


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGER)
def test_larger_structures_equal_dense_attention(name):
    lo, hi = LARGER[name]
    check(*draw(1, lo.shape[1], lo.shape[1], heads=4, groups=2, width=72), lo, hi)


def test_full_masked_and_dead_tiles_together_in_a_batch():
    """Rows of one document with a span beside another batch row's; a group of three heads; a scale of one's own."""
    lo, hi = (
        torch.cat(x)
        for x in zip(
            from_documents([36]), from_documents([20, 0, 16], span_tokens=9, span_every_tokens=20), strict=True
        )
    )
    table = tiles.tile_table(lo.numpy(), hi.numpy(), keys=36, query_tile=16, key_tile=16)
    assert 0 < table.full_tiles < table.live_tiles < 2 * 3 * 3
    for scale in (0.7, -0.7, 0.0):
        check(*draw(2, 36, 36, heads=3, groups=1), lo, hi, scale=scale)


def test_cross_attention_to_the_media_before_a_token():
    # Two documents: text before any media sees nothing, not even the other document's.
    lo, hi = as_intervals([(0, 0), (0, 0), (0, 4), (0, 4), (0, 7), (7, 7), (7, 29), (7, 29)])
    check(*draw(1, 8, 29), lo, hi)


def test_empty_rows_give_zero_and_minus_infinity_and_no_gradient():
    lo, hi = EDGES["padding in the middle"]
    q, k, v, grad = draw(1, 6, 6)
    out, dq, dk, dv, lse = differentiate(lambda *x: attention(*x, lo, hi, impl="triton"), q, k, v, grad)
    assert out[0, 2:4].eq(0).all()
    assert lse[0, :, 2:4].eq(-torch.inf).all()
    assert dq[0, 2:4].eq(0).all()
    assert dk[0, 2].eq(0).all()  # key 2 is in no interval
    assert dv[0, 2].eq(0).all()
    assert all(x.isfinite().all() for x in (out, dq, dk, dv))


def test_no_rows_or_no_keys():
    nothing = torch.zeros(1, 3, dtype=torch.int32)
    out, dq, dk, dv, lse = differentiate(lambda *x: attention(*x, nothing, nothing, impl="triton"), *draw(1, 3, 0))
    assert out.eq(0).all()
    assert dq.eq(0).all()
    assert lse.eq(-torch.inf).all()
    assert dk.shape == dv.shape == (1, 0, 1, 16)
    none = torch.zeros(1, 0, dtype=torch.int32)
    assert attention(*draw(1, 0, 3)[:3], none, none, impl="triton")[0].shape == (1, 0, 2, 16)


def test_another_document_changes_nothing_at_all():
    lo, hi = from_documents([5, 24, 3], span_tokens=3, span_every_tokens=8)
    q, k, v, grad = draw(1, 32, 32)

    def middle():
        results = differentiate(lambda *x: attention(*x, lo, hi, impl="triton"), q, k, v, grad)
        return [*(x[:, 5:29] for x in results[:4]), results[4][:, :, 5:29]]

    before = middle()
    for x in (q, k, v, grad):
        x[:, :5] = 30.0  # scores so high that exp of them is infinite
        x[:, 29:] = 30.0
    for x, y in zip(before, middle(), strict=True):
        assert torch.equal(x, y)


def test_strided_views_of_one_projection():
    lo, hi = from_documents([11, 9], span_tokens=3, span_every_tokens=8)
    fused = torch.randn(1, 20, 3, 2, 16)
    q, k, v = fused.unbind(2)
    assert not q.is_contiguous()
    grad = torch.randn(1, 2, 20, 16).transpose(1, 2)
    check(q, k, v, grad, lo, hi)
    last_is_strided = torch.randn(1, 20, 16, 2).transpose(2, 3)
    check(last_is_strided, k, v, torch.ones(1).expand(1, 20, 2, 16), lo, hi)


def test_offsets_beyond_two_to_the_31(monkeypatch):
    """Batch row 1 lies 2^31 numbers after row 0, and key 515 more than 2^31 after key 0, in memory never touched."""
    from triton.runtime.interpreter import GridExecutor

    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *_: None)  # copies all memory onto itself
    keys, key_stride, batch_stride = 520, 1 << 22, 1 << 31
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE of Linux
    memory = torch.frombuffer(mmap.mmap(-1, 2 * (keys * key_stride + 1024), flags=flags), dtype=torch.float16)
    q, k, v, grad = draw(2, 3, 3, dtype=torch.float16)
    lo, hi = (x.expand(2, 3) for x in as_intervals([(0, 1), (0, 3), (1, 3)]))
    views = [memory[64 * i :].as_strided(x.shape, (batch_stride, 300, 16, 1)) for i, x in enumerate((q, k, v, grad))]
    for view, x in zip(views, (q, k, v, grad), strict=True):
        view.copy_(x)
    wanted = differentiate(lambda *x: attention(*x, lo, hi, impl="triton"), q, k, v, grad)
    got = differentiate(lambda *x: attention(*x, lo, hi, impl="triton"), *views)
    assert all(map(torch.equal, wanted, got))

    q, k, v, grad = draw(1, 3, keys, dtype=torch.float16)
    lo, hi = as_intervals([(515, 516), (515, 519), (514, 518)])
    k[:, :514], v[:, :514] = 0, 0
    far = [memory[64 * i :].as_strided(x.shape, (key_stride * keys, key_stride, 16, 1)) for i, x in enumerate((k, v))]
    for view, x in zip(far, (k, v), strict=True):
        view[:, 514:] = x[:, 514:]
    wanted = differentiate(lambda *x: attention(*x, lo, hi, impl="triton"), q, k, v, grad)
    got = differentiate(lambda *x: attention(*x, lo, hi, impl="triton"), q, *far, grad)
    assert all(map(torch.equal, wanted, got))


def within_tolerance(dtype, width, rows=37, **options):
    """Hold error against fp64 to twice that of torch's own attention in `dtype`, plus one rounding of the largest."""
    lo, hi = from_documents([rows - 9, 9], span_tokens=7, span_every_tokens=15)
    q, k, v, grad = draw(1, rows, rows, width=width, dtype=dtype, **options)
    mask = ((torch.arange(rows) >= lo[:, :, None]) & (torch.arange(rows) < hi[:, :, None]))[:, None]

    def torch_attention(*heads):
        heads = [x.transpose(1, 2) for x in heads]
        out = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask, enable_gqa=True)
        return out.transpose(1, 2), out

    exact = differentiate(lambda *x: naive(*x, lo, hi), *(x.double() for x in (q, k, v, grad)))
    torchs = differentiate(torch_attention, q, k, v, grad)
    ours = differentiate(lambda *x: attention(*x, lo, hi, impl="triton"), q, k, v, grad)
    assert [x.dtype for x in ours] == [dtype] * 4 + [torch.float32]
    for want, theirs, got in list(zip(exact, torchs, ours, strict=True))[:4]:
        floor = torch.finfo(dtype).eps * want.abs().max()
        assert (got - want).abs().max() <= 2 * (theirs - want).abs().max() + floor
        assert (got - want).square().mean().sqrt() / want.square().mean().sqrt() < 0.005
    torch.testing.assert_close(ours[4].double(), exact[4], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_at_most_twice_that_of_torch(dtype):
    within_tolerance(dtype, 72)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [8, 32, 40, 64, 80, 96, 112, 128, 160, 192, 200, 256])
def test_error_at_every_head_width(dtype, width):
    within_tolerance(dtype, width, heads=2, groups=2)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_with_the_pinned_tiles(dtype, monkeypatch):
    monkeypatch.setattr(attention_tiles, "CONFIGS", PINNED)
    within_tolerance(dtype, 64, rows=150)


@pytest.mark.parametrize(
    ("width", "parts"),
    [(2, (16, 0)), (16, (16, 0)), (24, (32, 0)), (32, (32, 0)), (40, (32, 16)), (64, (64, 0)), (72, (64, 16)),
     (80, (64, 16)), (96, (64, 32)), (112, (128, 0)), (128, (128, 0)), (160, (128, 32)), (256, (256, 0))],
)  # fmt: skip
def test_a_head_is_cut_into_two_powers_of_two(width, parts):
    assert attention_tiles.head_parts(width) == parts
    assert sum(parts) >= width


def any_mask(seed, shape, heads, width, dtype, in_order):
    generator = np.random.default_rng(seed)
    lo, hi = (generator.integers(0, shape[2] + 1, size=shape[:2]).astype(np.int32) for _ in range(2))
    if in_order:
        lo, hi = np.sort(lo, axis=1), np.sort(hi, axis=1)
    torch.manual_seed(seed % 2**31)
    q, k, v, grad = (x.to(dtype) for x in draw(*shape, heads=heads[0], groups=heads[1], width=width))
    lo, hi = torch.from_numpy(lo), torch.from_numpy(hi)
    if dtype == torch.float32:
        check(q, k, v, grad, lo, hi)
        return
    got = differentiate(lambda *x: attention(*x, lo, hi, impl="triton"), q, k, v, grad)
    want = differentiate(lambda *x: naive(*x, lo, hi), *(x.double() for x in (q, k, v, grad)))
    for x, y in zip(got[:4], want[:4], strict=True):
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


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 70), keys=st.integers(1, 70))
def test_the_lists_name_each_live_tile_once_full_ones_first(seed, rows, keys):
    generator = np.random.default_rng(seed)
    lo, hi = (np.sort(generator.integers(0, keys + 1, size=(2, rows)), axis=1).astype(np.int32) for _ in range(2))
    lists = attention_tiles.tile_lists(lo, hi, keys=keys, width=64, number_bytes=2)
    seen = ((np.arange(keys) >= lo[:, :, None]) & (np.arange(keys) < hi[:, :, None])).astype(np.int8)
    sizes = lists[3:9].reshape(3, 2)
    sections = zip(attention_tiles.SECTIONS, lists[:3], lists[9:12], sizes, strict=True)
    for kernel, start, order_start, (query_tile, key_tile) in sections:
        own, other = (key_tile, query_tile) if kernel == "dkv" else (query_tile, key_tile)
        mask = seen.transpose(0, 2, 1) if kernel == "dkv" else seen
        tiles_in_row, others = -(-mask.shape[1] // own), -(-mask.shape[2] // other)
        bounds = lists[start : start + 6 * tiles_in_row].reshape(2, tiles_in_row, 3)
        order = lists[order_start : order_start + 2 * tiles_in_row].reshape(2, tiles_in_row)
        visits = np.take_along_axis(bounds[..., 2] - bounds[..., 0], order, 1)
        assert (np.diff(visits, axis=1) <= 0).all(), "those that visit most come first"
        assert (np.sort(order, axis=1) == np.arange(tiles_in_row)).all()
        for b in range(2):
            for i in range(tiles_in_row):
                first, middle, end = bounds[b, i]
                blocks = [mask[b, i * own : (i + 1) * own, j * other : (j + 1) * other] for j in range(others)]
                live = [j for j in range(others) if blocks[j].any()]
                full = [j for j in live if blocks[j].all() and blocks[j].shape == (own, other)]
                if kernel != "dkv":  # queries beyond the last are computed and not stored
                    full = [j for j in live if blocks[j].all() and blocks[j].shape[1] == other]
                run = [j for place, j in enumerate(full) if j == full[0] + place]
                assert run == full or kernel == "dkv", "a query tile's full tiles have no gap"
                assert lists[first:middle].tolist() == run
                assert lists[middle:end].tolist() == [j for j in live if j not in run]


def test_only_live_tiles_are_visited():
    """Keys that no live tile holds are never read: NaN there changes nothing, although its tile exists."""
    lo, hi = as_intervals([(0, 4)] * 4 + [(40, 44)] * 4)
    q, k, v, grad = draw(1, 8, 64)
    k[:, 32:40], v[:, 32:40] = 0, 0
    before = differentiate(lambda *x: attention(*x, lo, hi, impl="triton"), q, k, v, grad)
    after_k, after_v = k.clone(), v.clone()
    for x in (after_k, after_v):
        x[:, 48:] = torch.nan
    lists = attention_tiles.tile_lists(lo.numpy(), hi.numpy(), keys=64, width=16, number_bytes=4)
    begin = lists[1]
    assert lists[lists[begin] : lists[begin + 2]].tolist() == [0, 2]  # dq: 16 keys a tile
    dq = differentiate(lambda *x: attention(*x, lo, hi, impl="triton"), q, k, v, grad)[1]
    assert torch.equal(before[1], dq)


def test_given_lists_are_used_and_not_made_again(monkeypatch, kernels):
    lo, hi = from_documents([11, 9], span_tokens=3, span_every_tokens=8)
    q, k, v, grad = draw(1, 20, 20)
    plain = differentiate(lambda *x: attention(*x, lo, hi, impl="triton"), q, k, v, grad)
    made = attention_tiles.attention_tables(lo.numpy(), hi.numpy(), keys=20, width=16, number_bytes=4)
    tables = {**made, **tiles.attention_tables(lo.numpy(), hi.numpy())}
    monkeypatch.setattr(kernels, "tile_lists", None)
    again = differentiate(lambda *x: attention(*x, lo, hi, tiles=tables, impl="triton"), q, k, v, grad)
    assert all(map(torch.equal, plain, again))
    wrong = {"tile_lists": made["tile_lists"].copy()}
    wrong["tile_lists"][3] *= 2
    with pytest.raises(KernelInputError, match="make them anew"):
        attention(q, k, v, lo, hi, tiles=wrong, impl="triton")


def test_the_same_bits_every_time_and_the_reference_s_signature(kernels):
    lo, hi = from_documents([11, 9], span_tokens=3, span_every_tokens=8)
    q, k, v, grad = draw(1, 20, 20, dtype=torch.bfloat16)
    results = []
    for _ in range(2):
        out, lse = kernels.attention_forward(q, k, v, lo, hi, None, 0.25)
        results.append([out, lse, *kernels.attention_backward(grad, q, k, v, out, lse, lo, hi, None, 0.25)])
    assert all(map(torch.equal, *results))
    segments = torch.from_numpy(tiles.segments(lo.numpy(), hi.numpy()))
    out, lse = reference_attention.attention_forward(q, k, v, lo, hi, segments, 0.25)
    assert [(x.shape, x.dtype) for x in results[0][:2]] == [(x.shape, x.dtype) for x in (out, lse)]


@pytest.mark.slow
def test_opcheck():
    lo, hi = from_documents([5, 6], span_tokens=2, span_every_tokens=4)
    q, k, v, _ = draw(1, 11, 11)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(torch.ops.triweave.attention.default, (*inputs, lo, hi, None, 0.3, "triton"))


def test_what_it_does_not_serve_is_named():
    lo, hi = from_documents([5])
    with pytest.raises(KernelUnavailableError, match=r"float64, only float32, float16 and bfloat16; use reference"):
        attention(*(x.double() for x in draw(1, 5, 5)[:3]), lo, hi, impl="triton")
    with pytest.raises(KernelUnavailableError, match="at most 256 numbers, not 264"):
        attention(*draw(1, 5, 5, width=264)[:3], lo, hi, impl="triton")


def test_auto_does_not_choose_it():
    lo, hi = from_documents([5])
    q, k, v, _ = draw(1, 5, 5)
    sdpa = attention(q, k, v, lo, hi, impl="sdpa")[0]
    assert torch.equal(attention(q, k, v, lo, hi)[0], sdpa)
