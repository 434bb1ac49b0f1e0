"""qk_norm_rope against a norm and a multiplication by complex numbers."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from triweave.kernels.errors import KernelInputError
from triweave.kernels.qk_norm_rope import qk_norm_rope

EPS = 1e-6
SECTIONS = (3, 2, 1)
OPTIONS = {"sections": SECTIONS, "interleaved": False, "theta": 100.0, "eps": EPS}


def naive(x, weight, positions, sections, interleaved, theta):
    """Norm, then pairs as complex numbers times exp(i angle)."""
    width = x.shape[-1]
    x = F.rms_norm(x, (width,), weight, EPS)
    axis = [run % 3 for run, count in enumerate(sections) for _ in range(count)]
    frequency = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    turn = torch.polar(torch.ones(()).double(), positions[..., axis].double() * frequency).unsqueeze(2)
    pairs = x.unflatten(-1, (-1, 2)) if interleaved else x.unflatten(-1, (2, -1)).transpose(-1, -2)
    turned = torch.view_as_real(torch.view_as_complex(pairs.double().contiguous()) * turn).to(x.dtype)
    return (turned if interleaved else turned.transpose(-1, -2)).flatten(-2)


def draw(dtype=torch.float64, width=12):
    q, k = (torch.randn(2, 5, heads, width, dtype=dtype).requires_grad_() for heads in (4, 2))
    weights = (torch.randn(width, dtype=dtype).requires_grad_() for _ in range(2))
    return q, k, *weights, torch.randint(0, 60, (2, 5, 3), dtype=torch.int32)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("sections", [(3, 2, 1), (6, 0, 0), (1, 1, 1, 1, 1, 1)])
def test_equals_a_norm_and_a_complex_rotation(interleaved, weighted, sections):
    q, k, q_weight, k_weight, positions = draw()
    inputs = (q, k, q_weight, k_weight) if weighted else (q, k)
    weights = {"q_weight": q_weight, "k_weight": k_weight} if weighted else {}
    options = {"sections": sections, "interleaved": interleaved, "theta": 100.0}
    got = qk_norm_rope(q, k, positions, **weights, **options, eps=EPS)
    want = [
        naive(x, weight if weighted else None, positions, **options) for x, weight in [(q, q_weight), (k, k_weight)]
    ]
    grads = [torch.randn_like(x) for x in want]
    torch.testing.assert_close(list(got), want)
    torch.testing.assert_close(torch.autograd.grad(got, inputs, grads), torch.autograd.grad(want, inputs, grads))


def test_scores_depend_only_on_distances():
    q, k, q_weight, k_weight, positions = draw()

    def scores(shift):
        a, b = qk_norm_rope(q, k, positions + shift, q_weight=q_weight, k_weight=k_weight, **OPTIONS)
        return torch.einsum("bshk,btgk->bhgst", a, b)

    torch.testing.assert_close(scores(torch.tensor([7, 0, 31])), scores(0))
    assert not torch.allclose(scores(torch.arange(5)[:, None]), scores(0))


def test_position_zero_is_only_a_norm():
    q, k, *_ = draw()
    turned, _ = qk_norm_rope(q, k, torch.zeros(2, 5, 3, dtype=torch.int32), **OPTIONS)
    torch.testing.assert_close(turned, F.rms_norm(q, (12,), eps=EPS))


def test_strided_views_of_one_projection():
    *_, q_weight, k_weight, positions = draw()
    fused = torch.randn(2, 5, 6, 12, dtype=torch.float64)
    q, k = (x.requires_grad_() for x in fused.split([4, 2], dim=2))
    got = qk_norm_rope(q, k, positions, q_weight=q_weight, k_weight=k_weight, **OPTIONS)
    want = qk_norm_rope(q.contiguous(), k.contiguous(), positions, q_weight=q_weight, k_weight=k_weight, **OPTIONS)
    assert all(map(torch.equal, got, want))
    assert got[0].is_contiguous()
    grads = [torch.randn(2, heads, 5, 12, dtype=torch.float64).transpose(1, 2) for heads in (4, 2)]
    gradients = [torch.autograd.grad(x, (q, k, q_weight, k_weight), grads) for x in (got, want)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_that_of_torch(dtype):
    q, k, q_weight, k_weight, positions = (x.detach() for x in draw())
    q, k, q_weight, k_weight = (x.to(dtype) for x in (q, k, q_weight, k_weight))
    grad = torch.randn_like(q)

    def differentiate(function, dtype):
        inputs = [x.to(dtype).requires_grad_() for x in (q, q_weight)]
        out = function(*inputs)
        return [out.detach().double(), *(x.double() for x in torch.autograd.grad(out, inputs, grad.to(dtype)))]

    def torchs(x, weight):
        return naive(x, weight, positions, SECTIONS, False, 100.0)

    def ours(x, weight):
        return qk_norm_rope(x, k.to(x.dtype), positions, q_weight=weight, **OPTIONS)[0]

    results = [differentiate(*x) for x in [(torchs, torch.float64), (torchs, dtype), (ours, dtype)]]
    for want, theirs, got in zip(*results, strict=True):
        # fp32 angles up to 60 carry up to 60 eps / 2, which the fp64 angles of the naive version do not.
        floor = torch.finfo(dtype).eps * want.abs().max() + 30 * torch.finfo(torch.float32).eps * want.abs().max()
        assert (got - want).abs().max() <= 2 * (theirs - want).abs().max() + floor
        assert (got - want).square().mean().sqrt() / want.square().mean().sqrt() < 0.005


def test_gradcheck_and_opcheck():
    q, k, q_weight, k_weight, positions = draw()
    q, k = (x.detach()[:1, :2].clone().requires_grad_() for x in (q, k))
    assert torch.autograd.gradcheck(
        lambda a, b, c, d: qk_norm_rope(a, b, positions[:1, :2], q_weight=c, k_weight=d, **OPTIONS),
        (q, k, q_weight, k_weight),
    )
    tail = (positions[:1, :2], q_weight, None, list(SECTIONS), True, 100.0, EPS, "reference")
    torch.library.opcheck(torch.ops.triweave.qk_norm_rope.default, (q, k, *tail))
    q, k = q.detach(), k.detach()
    tail = (tail[0], q_weight.detach(), *tail[2:])
    torch.library.opcheck(torch.ops.triweave.qk_norm_rope_backward.default, (q, k, q, k, *tail))


def test_compiles_without_a_graph_break_and_survives_checkpointing():
    q, k, q_weight, k_weight, positions = draw(torch.float32)
    inputs = (q, k, q_weight, k_weight)

    def function(q, k, q_weight, k_weight):
        a, b = qk_norm_rope(q * 2, k, positions, q_weight=q_weight, k_weight=k_weight, **OPTIONS)
        return (a**3).sum() + (b**3).sum()

    want = torch.autograd.grad(function(*inputs), inputs)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(torch.autograd.grad(compiled, inputs), want)
    checkpoint(function, *inputs, use_reentrant=False).backward()
    assert all(map(torch.equal, (x.grad for x in inputs), want))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sections": (3, 2, 2)}, "half the head width"),
        ({"sections": (7, 0, -1)}, "half the head width"),
        ({"k": torch.zeros(2, 4, 2, 12)}, "only the number"),
        ({"positions": torch.zeros(2, 5, 2)}, "positions has shape"),
    ],
)
def test_wrong_inputs_are_named(change, message):
    q, k, _, _, positions = draw()
    with pytest.raises(KernelInputError, match=message):
        qk_norm_rope(**{"q": q, "k": k, "positions": positions, **OPTIONS, **change})
