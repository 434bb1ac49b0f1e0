"""rms_norm against torch's own, with residual, with one weight per modality."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from triweave.kernels.errors import KernelInputError
from triweave.kernels.rms_norm import rms_norm

EPS = 1e-5


def draw(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype).requires_grad_()


def naive(x, weight, modality=None):
    rows = weight if modality is None else weight[modality.clamp(min=0).long()]
    return F.rms_norm(x, (x.shape[-1],), eps=EPS) * rows


@pytest.mark.parametrize("shape", [(5,), (3, 7), (2, 3, 4, 8)])
def test_plain_equals_torch(shape):
    x, weight = draw(*shape), draw(shape[-1])
    got, want = rms_norm(x, weight, eps=EPS), naive(x, weight)
    torch.testing.assert_close(got, want)
    grad = torch.randn_like(want)
    torch.testing.assert_close(
        torch.autograd.grad(got, (x, weight), grad), torch.autograd.grad(want, (x, weight), grad)
    )


@pytest.mark.parametrize("both_used", [True, False])
def test_residual_equals_an_addition_and_a_norm(both_used):
    x, residual, weight = draw(2, 6, 8), draw(2, 6, 8), draw(8)
    got, got_total = rms_norm(x, weight, residual=residual, eps=EPS)
    want_total = x + residual
    want = naive(want_total, weight)
    torch.testing.assert_close((got, got_total), (want, want_total))
    a, b = torch.randn_like(want), torch.randn_like(want)
    gradients = [
        torch.autograd.grad((normed * a).sum() + (total * b).sum() * both_used, (x, residual, weight))
        for normed, total in [(got, got_total), (want, want_total)]
    ]
    torch.testing.assert_close(*gradients)


def test_only_the_residual_used_passes_its_gradient_through():
    x, residual, weight = draw(3, 4), draw(3, 4), draw(4)
    gradients = torch.autograd.grad(rms_norm(x, weight, residual=residual, eps=EPS)[1].sum(), (x, residual, weight))
    assert gradients[0].eq(1).all()
    assert gradients[1].eq(1).all()
    assert gradients[2].eq(0).all()


def test_each_modality_takes_its_own_weight_and_padding_the_first():
    x, weight = draw(2, 6, 8), draw(3, 8)
    modality = torch.tensor([[0, 1, 1, 0, -1, -1], [1, 0, 0, 0, 1, -1]], dtype=torch.int8)
    got, want = rms_norm(x, weight, modality=modality, eps=EPS), naive(x, weight, modality)
    torch.testing.assert_close(got, want)
    grad = torch.randn_like(want)
    gradients = torch.autograd.grad(got, (x, weight), grad)
    torch.testing.assert_close(gradients, torch.autograd.grad(want, (x, weight), grad))
    assert gradients[1][2].eq(0).all()  # nobody has modality 2


def test_strided_input_and_gradient():
    x, weight = torch.randn(4, 8, 6, dtype=torch.float64).transpose(1, 2).requires_grad_(), draw(8)
    grad = torch.randn(4, 8, 6, dtype=torch.float64).transpose(1, 2)
    got, want = rms_norm(x, weight, eps=EPS), naive(x, weight)
    assert got.is_contiguous()
    gradients = torch.autograd.grad(got, (x, weight), grad)
    torch.testing.assert_close((got, *gradients), (want, *torch.autograd.grad(want, (x, weight), grad)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_that_of_torch(dtype):
    x, weight, grad = torch.randn(64, 96).to(dtype), torch.randn(96).to(dtype), torch.randn(64, 96).to(dtype)

    def differentiate(function, dtype):
        inputs = [y.to(dtype).requires_grad_() for y in (x, weight)]
        out = function(*inputs)
        return [out.detach().double(), *(y.double() for y in torch.autograd.grad(out, inputs, grad.to(dtype)))]

    exact, theirs = (differentiate(lambda a, b: F.rms_norm(a, (96,), b, EPS), kind) for kind in (torch.float64, dtype))
    ours = differentiate(lambda a, b: rms_norm(a, b, eps=EPS), dtype)
    for want, their, got in zip(exact, theirs, ours, strict=True):
        assert (got - want).abs().max() <= 2 * (their - want).abs().max() + torch.finfo(dtype).eps * want.abs().max()
        assert (got - want).square().mean().sqrt() / want.square().mean().sqrt() < 0.005


def test_narrow_input_with_wide_weight_and_the_same_bits_every_time():
    x, weight, modality = draw(50, 16, dtype=torch.bfloat16), draw(2, 16, dtype=torch.float32), torch.arange(50) % 2
    out = rms_norm(x, weight, modality=modality, eps=EPS)
    gradients = torch.autograd.grad(out.float().square().sum(), (x, weight))
    again = rms_norm(x, weight, modality=modality, eps=EPS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        repeated = torch.autograd.grad(again.float().square().sum(), (x, weight))
    assert out.dtype == gradients[0].dtype == torch.bfloat16
    assert gradients[1].dtype == torch.float32
    assert torch.equal(out, again)
    assert all(map(torch.equal, gradients, repeated))


def test_the_weight_may_move_between_forward_and_backward():
    """ZeRO-3 frees a parameter's storage after the forward and gathers it into another before the backward."""
    x, weight = draw(5, 8), torch.nn.Parameter(torch.randn(8, dtype=torch.float64))
    grad = torch.randn(5, 8, dtype=torch.float64)
    want = torch.autograd.grad(rms_norm(x, weight, eps=EPS), (x, weight), grad)
    out = rms_norm(x, weight, eps=EPS)
    full = weight.data.clone()
    weight.data = torch.empty(0, dtype=torch.float64)
    weight.data = full
    assert all(map(torch.equal, want, torch.autograd.grad(out, (x, weight), grad)))


def test_gradcheck():
    x, residual, weight = draw(3, 4), draw(3, 4), draw(2, 4)
    modality = torch.tensor([1, -1, 0])
    assert torch.autograd.gradcheck(lambda *a: rms_norm(a[0], a[1], modality=modality, eps=EPS), (x, weight))
    assert torch.autograd.gradcheck(
        lambda *a: rms_norm(a[0], a[1], residual=a[2], modality=modality, eps=EPS), (x, weight, residual)
    )


def test_opcheck():
    x, residual, weight, modality = draw(3, 4), draw(3, 4), draw(2, 4), torch.tensor([1, -1, 0])
    torch.library.opcheck(torch.ops.triweave.rms_norm.default, (x, weight, modality, EPS, "reference"))
    torch.library.opcheck(
        torch.ops.triweave.rms_norm_residual.default, (x, residual, weight, modality, EPS, "reference")
    )
    torch.library.opcheck(
        torch.ops.triweave.rms_norm_backward.default,
        (x.detach(), x.detach(), weight.detach(), modality, EPS, None, "reference"),
    )


def test_compiles_without_a_graph_break_and_survives_checkpointing():
    x, residual, weight = (draw(*shape, dtype=torch.float32) for shape in [(3, 8), (3, 8), (8,)])

    def function(x, residual, weight):
        normed, total = rms_norm(x * 2, weight, residual=residual, eps=EPS)
        return normed * total

    plain = function(x, residual, weight)
    want = torch.autograd.grad(plain.sum(), (x, residual, weight))
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(x, residual, weight)
    torch.testing.assert_close(compiled, plain)
    torch.testing.assert_close(torch.autograd.grad(compiled.sum(), (x, residual, weight)), want)
    checkpoint(function, x, residual, weight, use_reentrant=False).sum().backward()
    assert all(map(torch.equal, (y.grad for y in (x, residual, weight)), want))


def test_wrong_inputs_are_named():
    x, weight = draw(3, 4), draw(4)
    with pytest.raises(KernelInputError, match="weight has shape"):
        rms_norm(x, weight[1:], eps=EPS)
    with pytest.raises(KernelInputError, match="modality has shape"):
        rms_norm(x, draw(2, 4), modality=torch.zeros(4, dtype=torch.long), eps=EPS)
    with pytest.raises(KernelInputError, match="residual is"):
        rms_norm(x, weight, residual=x.float(), eps=EPS)
