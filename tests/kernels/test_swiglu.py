"""swiglu against silu(gate) * up by autograd."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from triweave.kernels.errors import KernelInputError
from triweave.kernels.swiglu import swiglu


def naive(gate, up):
    return F.silu(gate) * up


def test_equals_torch_on_halves_of_one_projection():
    fused = torch.randn(3, 5, 16, dtype=torch.float64)
    gate, up = (x.requires_grad_() for x in fused.chunk(2, dim=-1))
    got, want = swiglu(gate, up), naive(gate, up)
    assert got.is_contiguous()
    grad = torch.randn(3, 8, 5, dtype=torch.float64).transpose(1, 2)
    gradients = torch.autograd.grad(got, (gate, up), grad)
    torch.testing.assert_close((got, *gradients), (want, *torch.autograd.grad(want, (gate, up), grad)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_that_of_torch(dtype):
    gate, up, grad = (torch.randn(4096).to(dtype) for _ in range(3))

    def differentiate(function, dtype):
        inputs = [x.to(dtype).requires_grad_() for x in (gate, up)]
        out = function(*inputs)
        return [out.detach().double(), *(x.double() for x in torch.autograd.grad(out, inputs, grad.to(dtype)))]

    exact, theirs, ours = (differentiate(*x) for x in [(naive, torch.float64), (naive, dtype), (swiglu, dtype)])
    for want, their, got in zip(exact, theirs, ours, strict=True):
        assert (got - want).abs().max() <= 2 * (their - want).abs().max() + torch.finfo(dtype).eps * want.abs().max()
        assert (got - want).square().mean().sqrt() / want.square().mean().sqrt() < 0.005


def test_large_gates_neither_overflow_nor_leave_a_gradient():
    gate = torch.tensor([-1e4, 1e4], requires_grad=True)
    up = torch.tensor([3.0, 3.0], requires_grad=True)
    out = swiglu(gate, up)
    assert out.tolist() == [0.0, 3e4]
    assert [x.tolist() for x in torch.autograd.grad(out.sum(), (gate, up))] == [[0.0, 3.0], [0.0, 1e4]]


def test_gradcheck_and_opcheck():
    gate, up = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(swiglu, (gate, up))
    torch.library.opcheck(torch.ops.triweave.swiglu.default, (gate, up, "reference"))
    torch.library.opcheck(torch.ops.triweave.swiglu.default, (gate.T, up.T, "reference"))
    gate, up = gate.detach(), up.detach()
    torch.library.opcheck(torch.ops.triweave.swiglu_backward.default, (gate, gate, up, "reference"))


def test_compiles_without_a_graph_break_and_survives_checkpointing():
    gate, up = (torch.randn(3, 4, requires_grad=True) for _ in range(2))
    want = torch.autograd.grad(swiglu(gate * 2, up).sum(), (gate, up))
    compiled = torch.compile(lambda a, b: swiglu(a * 2, b).sum(), fullgraph=True, backend="aot_eager")(gate, up)
    torch.testing.assert_close(torch.autograd.grad(compiled, (gate, up)), want)
    checkpoint(lambda a, b: swiglu(a * 2, b).sum(), gate, up, use_reentrant=False).backward()
    assert torch.equal(gate.grad, want[0])
    assert torch.equal(up.grad, want[1])


def test_wrong_inputs_are_named():
    with pytest.raises(KernelInputError, match="make them equal"):
        swiglu(torch.zeros(3), torch.zeros(4))
