"""swiglu's Triton kernels in Triton's interpreter, against torch and the reference."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from triweave.kernels.swiglu import swiglu

pytestmark = pytest.mark.usefixtures("interpreter")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def run(impl, gate, up, grad):
    gate, up = (x.detach().requires_grad_() for x in (gate, up))
    out = swiglu(gate, up, impl=impl)
    return [out.detach(), *torch.autograd.grad(out, (gate, up), grad)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_at_most_twice_that_of_torch(dtype):
    gate, up, grad = (torch.randn(5, 411).mul(3).to(dtype) for _ in range(3))  # 2055 numbers: 3 blocks, the last short

    def differentiate(function, dtype):
        inputs = [x.to(dtype).requires_grad_() for x in (gate, up)]
        out = function(*inputs)
        return [out.detach().double(), *(x.double() for x in torch.autograd.grad(out, inputs, grad.to(dtype)))]

    def naive(gate, up):
        return F.silu(gate) * up

    exact, theirs = differentiate(naive, torch.float64), differentiate(naive, dtype)
    ours = differentiate(lambda a, b: swiglu(a, b, impl="triton"), dtype)
    for want, their, got in zip(exact, theirs, ours, strict=True):
        assert (got - want).abs().max() <= 2 * (their - want).abs().max() + torch.finfo(dtype).eps * want.abs().max()
        assert (got - want).square().mean().sqrt() / want.square().mean().sqrt() < 0.005


@pytest.mark.parametrize("width", [1, 7, 1030])
def test_halves_of_a_projection_stay_where_they_are_and_what_lies_between_is_not_read(width):
    fused = torch.full((2, 3, 3 * width), torch.nan, dtype=torch.float64)
    gate, up = fused[..., :width], fused[..., 2 * width :]
    for x in (gate, up):
        x.copy_(torch.randn(2, 3, width, dtype=torch.float64))
    grad = torch.randn(2, width, 3, dtype=torch.float64).transpose(1, 2)
    got, want = (run(impl, gate, up, grad) for impl in ("triton", "reference"))
    assert all(x.is_contiguous() for x in got)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("shape", [(), (3,), (2, 0, 4), (0,)])
def test_few_or_no_numbers(shape):
    gate, up, grad = (torch.randn(shape, dtype=torch.float64) for _ in range(3))
    torch.testing.assert_close(run("triton", gate, up, grad), run("reference", gate, up, grad))


def test_a_gradient_that_is_one_number_everywhere():
    gate, up = torch.randn(2, 4, 6), torch.randn(2, 4, 6)
    got, want = (run(impl, gate, up, torch.tensor(2.0).expand(2, 4, 6)) for impl in ("triton", "reference"))
    torch.testing.assert_close(got, want)


def test_large_gates_neither_overflow_nor_leave_a_gradient():
    out, *gradients = run("triton", torch.tensor([-1e4, 1e4]), torch.tensor([3.0, 3.0]), torch.ones(2))
    assert out.tolist() == [0.0, 3e4]
    assert [x.tolist() for x in gradients] == [[0.0, 3.0], [0.0, 1e4]]


def test_opcheck_compiled_and_checkpointed():
    gate, up = (torch.randn(3, 4, requires_grad=True) for _ in range(2))
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.triweave.swiglu.default, (gate, up, "triton"), test_utils=checks)
    plain = (gate.detach(), gate.detach(), up.detach(), "triton")
    torch.library.opcheck(torch.ops.triweave.swiglu_backward.default, plain, test_utils=checks)

    def function(gate, up):
        return swiglu(gate * 2, up, impl="triton").sum()

    want = torch.autograd.grad(function(gate, up), (gate, up))
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(gate, up)
    assert all(map(torch.equal, torch.autograd.grad(compiled, (gate, up)), want))
    checkpoint(function, gate, up, use_reentrant=False).backward()
    assert all(map(torch.equal, (gate.grad, up.grad), want))
