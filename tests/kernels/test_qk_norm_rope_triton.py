"""qk_norm_rope's Triton kernels in Triton's interpreter, against the reference and complex numbers."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from triweave.kernels.errors import KernelInputError
from triweave.kernels.qk_norm_rope import qk_norm_rope

pytestmark = pytest.mark.usefixtures("interpreter")
EPS = 1e-6
SECTIONS = (3, 2, 1)
OPTIONS = {"sections": SECTIONS, "theta": 100.0, "eps": EPS}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(*, batch=2, length=3, q_heads=4, k_heads=2, width=12, dtype=torch.float64):
    q, k = (torch.randn(batch, length, heads, width, dtype=dtype) for heads in (q_heads, k_heads))
    q_weight, k_weight = torch.randn(2, width, dtype=dtype)
    positions = torch.randint(0, 60, (batch, length, 3), dtype=torch.int32)
    return q, k, q_weight, k_weight, positions


def run(impl, q, k, q_weight, k_weight, positions, grads=None, **options):
    """Return q, k and the gradients of what is there, with `grads` or with ones growing from place to place."""
    inputs = [None if x is None else x.detach().requires_grad_() for x in (q, k, q_weight, k_weight)]
    outs = qk_norm_rope(
        *inputs[:2], positions, q_weight=inputs[2], k_weight=inputs[3], impl=impl, **{**OPTIONS, **options}
    )
    if grads is None:
        grads = [torch.arange(x.numel(), dtype=x.dtype).sin().view_as(x) for x in outs]
    leaves = [x for x in inputs if x is not None]
    return [*(x.detach() for x in outs), *torch.autograd.grad(outs, leaves, grads)]


def both(*inputs, **options):
    return [run(impl, *inputs, **options) for impl in ("triton", "reference")]


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("sections", [(3, 2, 1), (6, 0, 0), (1, 1, 1, 1, 1, 1)])
def test_equals_the_reference(interleaved, sections):
    got, want = both(*draw(), interleaved=interleaved, sections=sections)
    torch.testing.assert_close(got, want)
    assert all(x.is_contiguous() for x in got)


@pytest.mark.parametrize(("width", "interleaved"), [(72, False), (72, True), (32, False)])
def test_widths_between_powers_of_two_and_more_heads_than_a_tile(width, interleaved):
    inputs = draw(batch=1, length=2, q_heads=35, k_heads=1, width=width)
    got, want = both(*inputs, sections=(width // 2,), interleaved=interleaved)
    torch.testing.assert_close(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("width", [2, 32, 64, 80, 96, 128, 192, 256])
def test_every_width(width, interleaved):
    sections = (width // 2 - width // 4, width // 4)
    got, want = both(*draw(q_heads=9, k_heads=3, width=width), sections=sections, interleaved=interleaved)
    torch.testing.assert_close(got, want)


def test_a_head_too_wide_for_the_kernel_is_refused():
    q, k, *_, positions = draw(width=258)
    with pytest.raises(KernelInputError, match="at most 256 wide, not 258; use auto"):
        qk_norm_rope(q, k, positions, sections=(129,), impl="triton")


@pytest.mark.parametrize("absent", ["q", "k", "both"])
def test_without_weights(absent):
    q, k, q_weight, k_weight, positions = draw()
    weights = (None if absent in ("q", "both") else q_weight, None if absent in ("k", "both") else k_weight)
    got, want = both(q, k, *weights, positions)
    assert len(got) == (4 if absent == "both" else 5)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_at_most_twice_that_of_torch(dtype):
    q, k, q_weight, _, positions = draw(dtype=dtype)
    grad = torch.randn_like(q)

    def naive(x, weight):
        """The norm, then pairs (j, j + K/2) as complex numbers times exp(i angle)."""
        x = F.rms_norm(x, (12,), weight, EPS)
        axis = [run for run, count in enumerate(SECTIONS) for _ in range(count)]
        frequency = 100.0 ** (-torch.arange(0, 12, 2, dtype=torch.float64) / 12)
        turn = torch.polar(torch.ones(()).double(), positions[..., axis].double() * frequency).unsqueeze(2)
        pairs = torch.view_as_complex(x.unflatten(-1, (2, -1)).transpose(-1, -2).double().contiguous())
        return torch.view_as_real(pairs * turn).to(x.dtype).transpose(-1, -2).flatten(-2)

    def ours(x, weight):
        return qk_norm_rope(x, k.to(x.dtype), positions, q_weight=weight, impl="triton", **OPTIONS)[0]

    def differentiate(function, dtype):
        inputs = [x.to(dtype).requires_grad_() for x in (q, q_weight)]
        out = function(*inputs)
        return [out.detach().double(), *(x.double() for x in torch.autograd.grad(out, inputs, grad.to(dtype)))]

    results = [differentiate(*x) for x in [(naive, torch.float64), (naive, dtype), (ours, dtype)]]
    for want, theirs, got in zip(*results, strict=True):
        # fp32 angles up to 60 carry up to 60 eps / 2, which the fp64 angles of the naive version do not.
        floor = torch.finfo(dtype).eps * want.abs().max() + 30 * torch.finfo(torch.float32).eps * want.abs().max()
        assert (got - want).abs().max() <= 2 * (theirs - want).abs().max() + floor
        assert (got - want).square().mean().sqrt() / want.square().mean().sqrt() < 0.005


def test_far_positions_turn_as_exactly_as_near_ones():
    """Positions up to a million and below zero; the frequencies 1, 0.1, 0.01, ... give every quadrant."""
    q, k, *_ = draw(batch=1, length=9, q_heads=1, k_heads=1, dtype=torch.float32)
    places = torch.tensor([0, 1, 2, 3, 5, -7, 99_999, 1_000_000, 131_071])
    positions = places[None, :, None].expand(1, 9, 3)
    angles = places.float()[:, None] * (100.0 ** (-torch.arange(0, 12, 2).double() / 12)).float()
    got, _ = qk_norm_rope(q, k, positions, impl="triton", **OPTIONS)
    turn = torch.polar(torch.ones(()).double(), angles.double())
    normed = F.rms_norm(q.double(), (12,), eps=EPS)[0, :, 0]
    want = torch.complex(normed[:, :6], normed[:, 6:]) * turn
    error = (got[0, :, 0].double() - torch.cat([want.real, want.imag], -1)).abs().max()
    assert error < 4 * torch.finfo(torch.float32).eps * normed.abs().max()


def test_views_of_one_projection_and_gradients_of_other_strides():
    *_, q_weight, k_weight, positions = draw()
    fused = torch.full((2, 3, 8, 12), torch.nan, dtype=torch.float64)
    fused[:, :, :6] = torch.randn(2, 3, 6, 12)
    q, k = fused[:, :, :4], fused[:, :, 4:6]
    grads = [torch.randn(2, heads, 3, 12, dtype=torch.float64).transpose(1, 2) for heads in (4, 2)]
    got = run("triton", q, k, q_weight, k_weight, positions, grads)
    want = run("reference", q.contiguous(), k.contiguous(), q_weight, k_weight, positions, grads)
    torch.testing.assert_close(got, want)
    q = q.transpose(-1, -2).contiguous().transpose(-1, -2)
    torch.testing.assert_close(run("triton", q, k, q_weight, k_weight, positions, grads), want)


@pytest.mark.parametrize("programs", [1, 4])
def test_several_tokens_in_a_program(monkeypatch, interpreter, programs):
    monkeypatch.setattr(interpreter("qk_norm_rope_triton"), "BACKWARD_PROGRAMS", programs)
    got, want = both(*draw(batch=3, q_heads=3, k_heads=1))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (0, 3), (2, 0)])
def test_one_token_or_none(batch, length):
    got, want = both(*draw(batch=batch, length=length, q_heads=1, k_heads=1))
    torch.testing.assert_close(got, want)


def test_the_same_bits_every_time():
    inputs = draw(dtype=torch.bfloat16)
    assert all(map(torch.equal, run("triton", *inputs), run("triton", *inputs)))


def test_opcheck_compiled_and_checkpointed():
    q, k, q_weight, k_weight, positions = draw(batch=1, length=2, dtype=torch.float32)
    tail = (positions, q_weight, None, list(SECTIONS), True, 100.0, EPS, "triton")
    checks = {"test_utils": ("test_schema", "test_faketensor")}
    torch.library.opcheck(torch.ops.triweave.qk_norm_rope.default, (q, k, *tail), **checks)
    torch.library.opcheck(torch.ops.triweave.qk_norm_rope_backward.default, (q, k, q, k, *tail), **checks)
    inputs = [x.requires_grad_() for x in (q, k, q_weight, k_weight)]

    def function(q, k, q_weight, k_weight):
        a, b = qk_norm_rope(q * 2, k, positions, q_weight=q_weight, k_weight=k_weight, impl="triton", **OPTIONS)
        return (a**3).sum() + (b**3).sum()

    want = torch.autograd.grad(function(*inputs), inputs)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(torch.autograd.grad(compiled, inputs), want)
    checkpoint(function, *inputs, use_reentrant=False).backward()
    assert all(map(torch.equal, (x.grad for x in inputs), want))
