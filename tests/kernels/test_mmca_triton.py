"""The Triton kernels of mmca in Triton's interpreter, against two dense softmaxes and the tolerance rule.

Tiles are made small (16 and 32) so that short sequences have many: of text, media and both; full, masked and dead.
"""

from __future__ import annotations

import mmap

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from triweave.kernels import attention_tiles, mmca_tiles, tiles
from triweave.kernels.errors import KernelInputError, KernelUnavailableError
from triweave.kernels.mmca import mmca

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PINNED = attention_tiles.CONFIGS


@pytest.fixture(scope="module", autouse=True)
def kernels(interpreter):
    """The interpreted module, with tiles of 16 queries and 32 keys forward, 16 x 16 for dq, 32 x 16 for dk and dv."""
    small = {"forward": (16, 32), "dq": (16, 16), "dkv": (32, 16)}
    attention_tiles.CONFIGS = {
        kernel: {
            (size, 256): attention_tiles.TileConfig(query_tile=rows, key_tile=keys, warps=4, stages=1)
            for size in (2, 4)
        }
        for kernel, (rows, keys) in small.items()
    }
    yield interpreter("mmca_triton")
    attention_tiles.CONFIGS = PINNED


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


def draw(batch, rows, keys, heads=2, groups=1, width=16, dtype=torch.float32):
    q, grad = (torch.randn(batch, rows, heads, width).to(dtype) for _ in range(2))
    k, v = (torch.randn(batch, keys, groups, width).to(dtype) for _ in range(2))
    return q, k, v, grad


def as_intervals(pairs):
    return tuple(torch.tensor([[pair[i] for pair in pairs]], dtype=torch.int32) for i in (0, 1))


def self_mask(intervals, text):
    """'ttia' is two tokens of text and one each of two other modalities."""
    modality = torch.tensor([["tia".index(letter) for letter in text]], dtype=torch.int8)
    return *as_intervals(intervals), modality, modality


def interleaved(lengths, span_tokens, span_every_tokens):
    """Return the mask of packed documents whose spans are media that see themselves only."""
    lo, hi = tiles.document_intervals(np.array(lengths), span_tokens=span_tokens, span_every_tokens=span_every_tokens)
    in_span = np.zeros(lo.shape, dtype=bool)
    for row in np.flatnonzero(hi[0] > np.arange(lo.shape[1]) + 1):
        in_span[0, row : hi[0, row]] = True
    lo = mmca_tiles.own_spans(lo, np.where(in_span, hi, -1))
    modality = torch.from_numpy(in_span.astype(np.int8))
    return torch.from_numpy(lo), torch.from_numpy(hi), modality, modality


def differentiate(function, q, k, v, grad):
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(out.dtype))]


def ours(mask, inputs, **options):
    return differentiate(lambda *x: mmca(*x, *mask, impl="triton", **options), *inputs)


def check(inputs, mask, **options):
    """Compare out and gradients of fp32 inputs with dense arithmetic in fp64."""
    got = ours(mask, inputs, **options)
    scale = options.get("scale")
    want = differentiate(lambda *x: naive(*x, *mask, scale), *(x.double() for x in inputs))
    for name, x, y in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        assert x.dtype == torch.float32
        assert x.is_contiguous()
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")
    return got


SLIDING = [(max(0, i - 4), i + 1) for i in range(20)]
EDGES = {
    "text only": self_mask([(0, i + 1) for i in range(18)], "t" * 18),
    "media only": self_mask([(0, 17)] * 17 + [(17, 18)], "i" * 18),
    "a whole pack of one span, its last tile of queries not full": self_mask([(0, 36)] * 36, "i" * 36),
    "media before any text": self_mask([(0, 17)] * 17 + [(0, 18), (0, 19)], "i" * 17 + "tt"),
    "a span at the pack's end": self_mask([(0, 1), (0, 2)] + [(2, 17)] * 15, "tt" + "a" * 15),
    "documents of one token": self_mask([(i, i + 1) for i in range(17)], "tia" * 5 + "tt"),
    "sliding window over text and media": self_mask(SLIDING, "ttiit" * 4),
    "media that see earlier media and no text": self_mask([(0, i + 1) for i in range(18)], "tii" * 6),
    "padding in the middle": self_mask([(0, 1), (0, 2), (0, 0), (9, 9), (2, 4), (3, 6)], "tittit"),
    "crossed bounds are empty": self_mask([(3, 1), (0, 2), (5, 0), (1, 4)], "titt"),
    "all empty": self_mask([(0, 0)] * 4, "titi"),
}


@pytest.mark.parametrize("name", EDGES)
def test_edges_equal_two_dense_softmaxes(name):
    mask = EDGES[name]
    check(draw(1, mask[0].shape[1], mask[0].shape[1]), mask)


@pytest.mark.slow
@pytest.mark.parametrize("spans", [(4, 9), (16, 33), (40, 60)])
def test_larger_structures_equal_two_dense_softmaxes(spans):
    mask = interleaved([70, 1, 40, 13], *spans)
    check(draw(1, 124, 124, heads=4, groups=2, width=72), mask)


def test_tiles_of_text_of_media_and_of_both_in_a_batch():
    """A group of three heads; another batch row has its own numbers of text and media; a scale of one's own."""
    first, second = interleaved([50], 16, 20), interleaved([44, 0, 6], 4, 22)
    lo, hi, modality, _ = (torch.cat(pair) for pair in zip(first, second, strict=True))
    made = mmca_tiles.layout(*(x.numpy() for x in (lo, hi, modality, modality)))
    table = tiles.tile_table(*mmca_tiles.class_intervals(made, 50), keys=50, query_tile=16, key_tile=16)
    assert 0 < table.full_tiles < table.live_tiles < 4 * 4 * 4
    for scale in (0.7, -0.7):
        check(draw(2, 50, 50, heads=3, groups=1), (lo, hi, modality, modality), scale=scale)


def test_keys_of_their_own_axis():
    lo, hi = as_intervals([(0, 0), (0, 9), (3, 30), (0, 37), (29, 37)])
    generator = torch.Generator().manual_seed(0)
    key = torch.randint(0, 2, (1, 37), generator=generator, dtype=torch.int32)
    query = torch.tensor([[0, 0, 1, 0, 1]])
    check(draw(1, 5, 37), (lo, hi, key, query))


def test_what_has_no_key_gets_zero_and_no_gradient():
    mask = self_mask([(0, 1), (0, 0), (0, 2), (3, 4), (0, 2)], "titit")
    out, dq, dk, dv = check(draw(1, 5, 5), mask)
    assert out[0, 1].eq(0).all()
    assert dq[0, 1].eq(0).all()
    assert dk[0, [2, 4]].eq(0).all()
    assert dv[0, [2, 4]].eq(0).all()


def test_no_rows_or_no_keys():
    nothing, modality = torch.zeros(1, 3, dtype=torch.int32), torch.zeros(1, 3, dtype=torch.int8)
    out, dq, dk, dv = ours((nothing, nothing, modality[:, :0], modality), draw(1, 3, 0))
    assert out.eq(0).all()
    assert dq.eq(0).all()
    assert dk.shape == dv.shape == (1, 0, 1, 16)
    none = nothing[:, :0]
    assert mmca(*draw(1, 0, 3)[:3], none, none, modality, none, impl="triton").shape == (1, 0, 2, 16)


def test_another_document_changes_nothing_at_all():
    mask = interleaved([5, 24, 3], 3, 8)
    inputs = draw(1, 32, 32)
    before = [x[:, 5:29] for x in ours(mask, inputs)]
    for x in inputs:
        x[:, :5] = 30.0  # scores so high that exp of them is infinite
        x[:, 29:] = 30.0
    assert all(map(torch.equal, before, (x[:, 5:29] for x in ours(mask, inputs))))


def test_strided_views_of_one_projection():
    mask = interleaved([11, 9], 3, 8)
    fused = torch.randn(1, 20, 3, 2, 16)
    q, k, v = fused.unbind(2)
    assert not q.is_contiguous()
    check((q, k, v, torch.randn(1, 2, 20, 16).transpose(1, 2)), mask)
    last_is_strided = torch.randn(1, 20, 16, 2).transpose(2, 3)
    check((last_is_strided, k, v, torch.ones(1).expand(1, 20, 2, 16)), mask)


def test_offsets_beyond_two_to_the_31(monkeypatch):
    """Batch row 1 of q lies 2^31 numbers after row 0, and its query 515 more than 2^31 after query 0."""
    from triton.runtime.interpreter import GridExecutor

    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *_: None)  # copies all memory onto itself
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE of Linux
    memory = torch.frombuffer(mmap.mmap(-1, 2 * (520 * (1 << 22) + 1024), flags=flags), dtype=torch.float16)
    mask = (
        *(x.expand(2, 4) for x in as_intervals([(0, 1), (0, 3), (1, 3), (0, 4)])),
        *torch.tensor(2 * [[[0, 1, 0, 0]] * 2]),
    )
    q, k, v, grad = draw(2, 4, 4, dtype=torch.float16)
    far = memory.as_strided(q.shape, (1 << 31, 300, 16, 1)).copy_(q)
    assert all(map(torch.equal, ours(mask, (q, k, v, grad)), ours(mask, (far, k, v, grad))))

    q, k, v, grad = draw(1, 520, 4, dtype=torch.float16)
    lo, hi = torch.zeros(2, 1, 520, dtype=torch.int32)
    hi[:, 515:] = 4
    q[:, :515] = 0
    mask = (lo, hi, torch.tensor([[0, 1, 0, 0]]), torch.zeros(1, 520, dtype=torch.int8))
    with torch.no_grad():
        wanted = mmca(q, k, v, *mask, impl="triton")
        far = memory[64:].as_strided(q.shape, (520 << 22, 1 << 22, 16, 1))
        far[:, 515:] = q[:, 515:]
        assert torch.equal(wanted, mmca(far, k, v, *mask, impl="triton"))


def torch_mmca(mask):
    """MMCA as two calls of torch's attention; what has no key left gets one and is taken out, for torch gives NaN."""
    lo, hi, key_modality, query_modality = mask
    key = torch.arange(key_modality.shape[1])
    seen, is_text = (key >= lo[0, :, None]) & (key < hi[0, :, None]), key_modality[0] == 0
    masks = (seen & is_text & (query_modality[0] == 0)[:, None], seen & ~is_text)

    def run(*heads):
        heads = [x.transpose(1, 2) for x in heads]
        out = sum(
            torch.nn.functional.scaled_dot_product_attention(
                *heads, attn_mask=mask | ~mask.any(1, keepdim=True), enable_gqa=True
            )
            * mask.any(1, keepdim=True)
            for mask in masks
        )
        return out.transpose(1, 2)

    return run


def within_tolerance(dtype, width, lengths=(28, 9), spans=(7, 15), amplify=1.0, **options):
    """Hold error against fp64 to twice that of torch in `dtype`, plus one rounding of the largest."""
    mask = interleaved(lengths, *spans)
    inputs = draw(1, sum(lengths), sum(lengths), width=width, dtype=dtype, **options)
    inputs[2].mul_(torch.where(mask[2] == 0, 1.0, amplify)[..., None, None].to(dtype))
    exact = differentiate(lambda *x: naive(*x, *mask), *(x.double() for x in inputs))
    theirs = differentiate(torch_mmca(mask), *inputs)
    for want, their, got in zip(exact, theirs, ours(mask, inputs), strict=True):
        assert got.dtype == dtype
        floor = torch.finfo(dtype).eps * want.abs().max()
        assert (got - want).abs().max() <= 2 * (their - want).abs().max() + floor
        assert (got - want).square().mean().sqrt() / want.square().mean().sqrt() < 0.005


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_at_most_twice_that_of_torch(dtype):
    within_tolerance(dtype, 72)


@pytest.mark.parametrize("amplify", [1 / 64, 64.0])
def test_error_where_one_class_is_much_larger_than_the_other(amplify):
    """The backward takes A_media as out - A_text, both of them rounded."""
    within_tolerance(torch.bfloat16, 32, amplify=amplify)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [8, 40, 64, 80, 96, 112, 128, 160, 256])
def test_error_at_every_head_width(dtype, width):
    within_tolerance(dtype, width, heads=2, groups=2)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_with_the_pinned_tiles(dtype, monkeypatch):
    monkeypatch.setattr(attention_tiles, "CONFIGS", PINNED)
    within_tolerance(dtype, 64, lengths=(130, 20), spans=(20, 45))


def any_mask(seed, shape, heads, width, dtype, in_order):
    generator = np.random.default_rng(seed)
    lo, hi = (generator.integers(0, shape[2] + 1, size=shape[:2]).astype(np.int32) for _ in range(2))
    if in_order:
        lo, hi = np.sort(lo, axis=1), np.sort(hi, axis=1)
    torch.manual_seed(seed % 2**31)
    inputs = draw(*shape, heads=heads[0], groups=heads[1], width=width, dtype=dtype)
    modalities = torch.randint(-1, 3, (shape[0], shape[2])), torch.randint(0, 2, shape[:2], dtype=torch.int8)
    mask = (torch.from_numpy(lo), torch.from_numpy(hi), *modalities)
    if dtype == torch.float32:
        check(inputs, mask)
        return
    want = differentiate(lambda *x: naive(*x, *mask), *(x.double() for x in inputs))
    for x, y in zip(ours(mask, inputs), want, strict=True):
        # relative to the inputs, which are about 1: the gradients of a row that sees one key alone cancel to 0
        error = 12 * torch.finfo(dtype).eps * max(1.0, float(y.abs().max()))
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
def test_any_mask_equals_two_dense_softmaxes(seed, shape, heads, width, dtype, in_order):
    any_mask(seed, shape, heads, width, dtype, in_order)


@pytest.mark.slow
@settings(max_examples=200, **DRAWN)
@MASKS
def test_two_hundred_masks_equal_two_dense_softmaxes(seed, shape, heads, width, dtype, in_order):
    any_mask(seed, shape, heads, width, dtype, in_order)


def test_given_lists_are_used_and_not_made_again(monkeypatch):
    mask = interleaved([11, 9], 3, 8)
    inputs = draw(1, 20, 20)
    plain = ours(mask, inputs)
    arrays = [x.numpy() for x in mask]
    tables = {
        **mmca_tiles.strip_tables(*arrays),
        **mmca_tiles.triton_tables(*arrays, width=16, number_bytes=4),
    }
    monkeypatch.setattr(mmca_tiles, "layout", None)
    assert all(map(torch.equal, plain, ours(mask, inputs, tiles=tables)))
    tables["mmca_tile_lists"] = tables["mmca_tile_lists"].copy()
    tables["mmca_tile_lists"][3] *= 2
    with pytest.raises(KernelInputError, match="make them anew"):
        ours(mask, inputs, tiles=tables)


def test_only_live_tiles_are_visited():
    """Keys of tiles of which nothing is live are never read: NaN there changes nothing."""
    mask = self_mask([(0, i + 1) for i in range(8)] + [(0, 0)] * 120, "ttttiitt" + "t" * 58 + "i" * 62)
    inputs = draw(1, 128, 128)
    before = ours(mask, inputs)
    made = mmca_tiles.triton_tables(*(x.numpy() for x in mask), width=16, number_bytes=4)["mmca_tile_lists"]
    # dq takes 16 keys a time: text begins at position 0 and media (keys 4 and 5) at position 64
    text, media = (made[made[1] + 3 * program :][:3] for program in (0, 8))
    assert made[text[0] : text[2]].tolist() == [0]
    assert made[media[0] : media[2]].tolist() == [4]
    for x in inputs[1:3]:
        x[:, 34:66] = torch.nan  # text at positions 32 to 63
        x[:, 96:] = torch.nan  # media at positions 96 to 127
    out, dq, _, _ = ours(mask, inputs)
    assert torch.equal(before[0], out)
    assert torch.equal(before[1], dq)


def test_the_same_bits_every_time_and_without_a_gradient():
    mask = interleaved([11, 9], 3, 8)
    inputs = draw(1, 20, 20, dtype=torch.bfloat16)
    first, second = (ours(mask, inputs) for _ in range(2))
    assert all(map(torch.equal, first, second))
    with torch.no_grad():
        assert torch.equal(mmca(*inputs[:3], *mask, impl="triton"), first[0])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_bits(use_reentrant):
    mask = interleaved([11, 9], 3, 8)
    *inputs, grad = draw(1, 20, 20)
    plain = ours(mask, (*inputs, grad))[1:]
    for x in inputs:
        x.requires_grad_()
    run = lambda *x: mmca(*x, *mask, impl="triton")  # noqa: E731
    checkpoint(run, *inputs, use_reentrant=use_reentrant).backward(grad)
    assert all(torch.equal(want, x.grad) for want, x in zip(plain, inputs, strict=True))


@pytest.mark.slow
def test_opcheck():
    mask = interleaved([5, 6], 2, 4)
    q, k, v, _ = draw(1, 11, 11)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(torch.ops.triweave.mmca.default, (*inputs, *mask, None, None, 0.3, True, "triton"))


@pytest.mark.slow
def test_compiles_without_a_graph_break():
    lo, hi, modality, _ = interleaved([11, 9], 3, 8)
    inputs = draw(1, 20, 20)

    def function(q, k, v):
        return mmca(q * 2, k, v, lo, hi, modality, modality, impl="triton") + 1

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    plain, got = (differentiate(run, *inputs) for run in (function, compiled))
    for x, y in zip(got, plain, strict=True):
        torch.testing.assert_close(x, y)


def test_what_it_does_not_serve_is_named():
    mask = interleaved([5], 2, 4)
    with pytest.raises(KernelUnavailableError, match=r"mmca.*float64, only float32, float16 and bfloat16"):
        mmca(*(x.double() for x in draw(1, 5, 5)[:3]), *mask, impl="triton")
    with pytest.raises(KernelUnavailableError, match="at most 256 numbers, not 264"):
        mmca(*draw(1, 5, 5, width=264)[:3], *mask, impl="triton")
