"""cross_attention on the CPU path against naive gated attention, at every edge its docstring promises."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from triweave.kernels import tiles
from triweave.kernels.cross_attention import cross_attention
from triweave.kernels.errors import KernelInputError

IMPLEMENTATIONS = ["reference", "sdpa"]


def naive(q, k, v, lo, hi, gate, scale=None):
    """Dense attention with an S x T mask, gated, differentiated by autograd."""
    per_group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(per_group, 2), v.repeat_interleave(per_group, 2)
    scores = torch.einsum("bshk,bthk->bhst", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    key = torch.arange(k.shape[1])
    mask = ((key >= lo[:, :, None]) & (key < hi[:, :, None]))[:, None]
    weights = torch.softmax(scores.masked_fill(~mask, -1e30), -1).masked_fill(~mask, 0)
    return torch.einsum("bhst,bthk->bshk", weights, v) * torch.tanh(gate)[:, None].to(q.dtype)


def draw(batch, rows, keys, heads=4, groups=2, width=8, dtype=torch.float64):
    """Return q, k, v, gate and the result's gradient."""
    q, grad = (torch.randn(batch, rows, heads, width, dtype=dtype) for _ in range(2))
    k, v = (torch.randn(batch, keys, groups, width, dtype=dtype) for _ in range(2))
    gate = torch.randn(heads, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    return *(x.requires_grad_() for x in (q, k, v, gate)), grad


def as_intervals(pairs):
    return tuple(torch.tensor([[pair[i] for pair in pairs]], dtype=torch.int32) for i in (0, 1))


def flamingo(seen="immediate", rows=60, keys_per_span=None):
    """Return the intervals of a pack of three documents with images, and T."""
    spans = np.full((1, rows), -1, dtype=np.int32)
    for number, (first, end) in enumerate([(5, 12), (20, 24), (24, 25), (41, 50)]):
        spans[0, first:end] = number
    documents = np.repeat([0, 1, 2, -1], [22, 18, rows - 45, 5])[None]
    lo, hi = tiles.media_intervals(documents, spans, seen=seen, keys_per_span=keys_per_span)
    return *map(torch.from_numpy, (lo, hi)), int(hi.max())


def differentiate(inputs, grad, *options, function=cross_attention, **named):
    q, k, v, gate = inputs
    out = function(q, k, v, *options[:2], gate, **named)
    return [out, *torch.autograd.grad(out, inputs, grad)]


def check_against_naive(q, k, v, gate, grad, lo, hi, impl, **options):
    got = differentiate((q, k, v, gate), grad, lo, hi, impl=impl, **options)
    want = differentiate((q, k, v, gate), grad, lo, hi, function=naive, **options)
    for name, x, y in zip(("out", "dq", "dk", "dv", "dgate"), got, want, strict=True):
        assert x.is_contiguous()
        torch.testing.assert_close(x, y, msg=lambda text, name=name: f"{name}: {text}")


STRUCTURES = {
    "the latest medium": flamingo(),
    "all media so far": flamingo("preceding"),
    "latents of a resampler": flamingo(keys_per_span=3),
    "empty rows between": (*as_intervals([(0, 0), (0, 2), (4, 4), (9, 3), (3, 4), (3, 5)]), 6),
    "all empty": (*as_intervals([(0, 0)] * 4), 6),
    "no order": (*as_intervals([(4, 6), (0, 1), (5, 6), (0, 6), (2, 3), (1, 5)]), 6),
    "one row": (*as_intervals([(1, 5)]), 6),
}


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", STRUCTURES)
def test_every_structure_equals_dense_attention(name, impl):
    lo, hi, keys = STRUCTURES[name]
    check_against_naive(*draw(1, lo.shape[1], keys), lo, hi, impl)


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
    check_against_naive(*inputs, torch.from_numpy(lo), torch.from_numpy(hi), impl, scale=0.4)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_closed_gate_gives_nothing_and_has_a_gradient_itself(impl):
    lo, hi, keys = flamingo()
    q, k, v, gate, grad = draw(1, 60, keys)
    with torch.no_grad():
        gate[1] = 0
    out, dq, dk, dv, dgate = differentiate((q, k, v, gate), grad, lo, hi, impl=impl)
    assert out[:, :, 1].eq(0).all()
    assert out[:, 5:20, 0].ne(0).all()
    assert dq[:, :, 1].eq(0).all()
    ungated = differentiate((q, k, v, gate), grad, lo, hi, function=naive)
    torch.testing.assert_close(dgate, ungated[4])
    assert dgate[1].abs() > 1e-3
    with torch.no_grad():
        gate.zero_()
    *_, dk, dv, dgate = differentiate((q, k, v, gate), grad, lo, hi, impl=impl)
    assert dk.eq(0).all()
    assert dv.eq(0).all()
    assert dgate.ne(0).all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("poison", [7.0, torch.inf, torch.nan])
def test_empty_rows_give_zero_and_no_gradient_whatever_they_hold(impl, poison):
    lo, hi, keys = flamingo()
    empty = (hi <= lo)[0]
    q, k, v, gate, grad = draw(1, 60, keys)
    before = differentiate((q, k, v, gate), grad, lo, hi, impl=impl)
    assert before[0][:, empty].eq(0).all()
    assert before[1][:, empty].eq(0).all()
    with torch.no_grad():
        for x in (q, grad):
            x[:, empty] = poison
    assert all(map(torch.equal, before, differentiate((q, k, v, gate), grad, lo, hi, impl=impl)))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("poison", [7.0, torch.inf, torch.nan])
def test_another_document_s_media_change_nothing_at_all(impl, poison):
    lo, hi, keys = flamingo("preceding")
    q, k, v, gate, grad = draw(1, 60, keys)
    own = slice(22, 40)
    media = slice(int(lo[0, 39]), int(hi[0, 39]))
    assert media.stop - media.start == 3  # the second document's

    def middle():
        out, dq, dk, dv, _ = differentiate((q, k, v, gate), grad, lo, hi, impl=impl)
        return [out[:, own], dq[:, own], dk[:, media], dv[:, media]]

    before = middle()
    with torch.no_grad():
        for x, kept in ((q, own), (grad, own), (k, media), (v, media)):
            x[:, : kept.start] = poison
            x[:, kept.stop :] = poison
    assert all(map(torch.equal, before, middle()))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_strided_views(impl):
    lo, hi, keys = flamingo()
    q = torch.randn(1, 4, 60, 8, dtype=torch.float64).transpose(1, 2).requires_grad_()
    k, v = (x.requires_grad_() for x in torch.randn(1, keys, 2, 2, 8, dtype=torch.float64).unbind(2))
    gate, grad = torch.randn(8, dtype=torch.float64)[::2].requires_grad_(), torch.ones(1).double().expand(1, 60, 4, 8)
    check_against_naive(q, k, v, gate, grad, lo, hi, impl)
    last_is_strided = torch.randn(1, 60, 8, 4, dtype=torch.float64).transpose(2, 3).requires_grad_()
    check_against_naive(last_is_strided, k, v, gate, last_is_strided.detach() + 1, lo, hi, impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_that_of_torch(impl, dtype):
    lo, hi, keys = flamingo("preceding", rows=250, keys_per_span=30)
    q, k, v, gate, grad = (x.detach() for x in draw(1, 250, keys, heads=2, groups=2, width=32))
    q, k, v, grad = (x.to(dtype) for x in (q, k, v, grad))
    gate = gate.float()

    def results(function, wide):
        inputs = [x.double() if wide else x.clone() for x in (q, k, v, gate)]
        inputs = [x.requires_grad_() for x in inputs]
        return [x.detach().double() for x in differentiate(inputs, grad.to(inputs[0].dtype), lo, hi, function=function)]

    def torch_attention(q, k, v, lo, hi, gate):
        key = torch.arange(k.shape[1])
        mask = ((key >= lo[:, :, None]) & (key < hi[:, :, None]))[:, None]
        heads = [x.transpose(1, 2) for x in (q, k, v)]
        out = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(1, 2)
        return out.nan_to_num(0) * torch.tanh(gate).to(dtype)[:, None]

    exact, theirs = results(naive, True), results(torch_attention, False)
    ours = results(lambda *x: cross_attention(*x, impl=impl), False)
    for want, their, got in zip(exact, theirs, ours, strict=True):
        floor = torch.finfo(dtype).eps * want.abs().max()
        assert (got - want).abs().max() <= 2 * (their - want).abs().max() + floor
        assert (got - want).square().mean().sqrt() / want.square().mean().sqrt() < 0.005


def test_given_tables_are_used_and_not_computed_again(monkeypatch):
    lo, hi, keys = flamingo()
    q, k, v, gate, grad = draw(1, 60, keys)
    plain = differentiate((q, k, v, gate), grad, lo, hi)
    tables = tiles.attention_tables(lo.numpy(), hi.numpy())
    monkeypatch.setattr(tiles, "segments", None)
    for given_tables in (tables, {name: torch.from_numpy(table) for name, table in tables.items()}):
        assert all(map(torch.equal, plain, differentiate((q, k, v, gate), grad, lo, hi, tiles=given_tables)))


def test_the_gate_keeps_its_own_dtype_and_autocast_changes_nothing():
    lo, hi, keys = flamingo()
    q, k, v, gate, grad = draw(1, 60, keys, dtype=torch.float32)
    for impl in IMPLEMENTATIONS:
        plain = differentiate((q, k, v, gate), grad, lo, hi, impl=impl)
        assert [x.dtype for x in plain] == [torch.float32] * 5
        with torch.autocast("cpu", dtype=torch.bfloat16):
            again = differentiate((q, k, v, gate), grad, lo, hi, impl=impl)
        assert all(map(torch.equal, plain, again))
        narrow = [x.detach().bfloat16().requires_grad_() for x in (q, k, v)]
        dtypes = [x.dtype for x in differentiate((*narrow, gate), grad.bfloat16(), lo, hi, impl=impl)]
        assert dtypes == [torch.bfloat16] * 4 + [torch.float32]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_gradcheck_and_opcheck(impl):
    lo, hi = as_intervals([(0, 0), (0, 4), (0, 4), (4, 7), (0, 0), (2, 7), (6, 7)])
    q, k, v, gate, grad = draw(1, 7, 7, width=4)
    assert torch.autograd.gradcheck(
        lambda q, k, v, gate: cross_attention(q, k, v, lo, hi, gate, impl=impl), (q, k, v, gate)
    )
    tail = (lo, hi, gate, torch.from_numpy(tiles.segments(lo.numpy(), hi.numpy())), 0.3, impl)
    torch.library.opcheck(torch.ops.triweave.cross_attention.default, (q, k, v, *tail))
    out, attended, lse = torch.ops.triweave.cross_attention(q, k, v, *tail)
    assert [x.requires_grad for x in (out, attended, lse)] == [True, False, False]
    plain = [x.detach() if isinstance(x, torch.Tensor) else x for x in (grad, q, k, v, attended, lse, *tail)]
    torch.library.opcheck(torch.ops.triweave.cross_attention_backward.default, tuple(plain))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_without_a_graph_break(backend):
    lo, hi, keys = flamingo()
    q, k, v, gate, grad = draw(1, 60, keys, dtype=torch.float32)

    def function(q, k, v, lo, hi, gate):
        return cross_attention(q * 2, k, v, lo, hi, gate) + 1

    plain = differentiate((q, k, v, gate), grad, lo, hi, function=function)
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    torch.testing.assert_close(differentiate((q, k, v, gate), grad, lo, hi, function=compiled), plain)


def test_activation_checkpointing_gives_the_same_bits():
    lo, hi, keys = flamingo()
    q, k, v, gate, grad = draw(1, 60, keys, dtype=torch.float32)
    plain = differentiate((q, k, v, gate), grad, lo, hi)[1:]
    for use_reentrant in (False, True):
        for x in (q, k, v, gate):
            x.grad = None
        checkpoint(cross_attention, q, k, v, lo, hi, gate, use_reentrant=use_reentrant).backward(grad)
        assert all(map(torch.equal, plain, (q.grad, k.grad, v.grad, gate.grad)))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_the_gate_may_move_between_forward_and_backward(impl):
    """ZeRO-3 frees a parameter's storage after the forward and gathers it into another before the backward."""
    lo, hi, keys = flamingo()
    q, k, v, gate, grad = draw(1, 60, keys)
    gate = torch.nn.Parameter(gate.detach())
    want = differentiate((q, k, v, gate), grad, lo, hi, impl=impl)[1:]
    out = cross_attention(q, k, v, lo, hi, gate, impl=impl)
    full = gate.data.clone()
    gate.data = torch.empty(0, dtype=torch.float64)
    gate.data = full
    assert all(map(torch.equal, want, torch.autograd.grad(out, (q, k, v, gate), grad)))


def test_frozen_media_and_gate():
    """As in Flamingo, whose encoder gets no gradient: only what asks for one is given one."""
    lo, hi, keys = flamingo()
    q, k, v, gate, grad = draw(1, 60, keys)
    want = differentiate((q, k, v, gate), grad, lo, hi)[1]
    out = cross_attention(q, k.detach(), v.detach(), lo, hi, gate.detach())
    assert torch.equal(torch.autograd.grad(out, q, grad)[0], want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.update(q=x["q"][..., :4]), "do not fit"),
        (lambda x: x.update(k=x["k"][:, :, :1], v=x["v"][:, :2, :1]), "do not fit"),
        (lambda x: x.update(q=x["q"][:, :, :3]), "multiple of G"),
        (lambda x: x.update(q=x["q"].float()), "one dtype"),
        (lambda x: x.update(media_lo=x["media_lo"][:, 1:]), r"must be \[B, S\]"),
        (lambda x: x.update(gate=x["gate"][1:]), r"floating-point \[H\], \(4,\)"),
        (lambda x: x.update(gate=x["gate"].long()), r"gate is torch.int64"),
    ],
)
def test_wrong_inputs_are_named(change, message):
    lo, hi, keys = flamingo()
    q, k, v, gate, _ = draw(1, 60, keys)
    arguments = {"q": q, "k": k, "v": v, "media_lo": lo, "media_hi": hi, "gate": gate}
    change(arguments)
    with pytest.raises(KernelInputError, match=message):
        cross_attention(**arguments)
