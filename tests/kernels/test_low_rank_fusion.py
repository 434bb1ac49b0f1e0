"""low_rank_fusion's reference against naive torch: the tolerance rule, its edges, and what an op must bear."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from triweave.kernels import reference_low_rank_fusion
from triweave.kernels.errors import KernelInputError
from triweave.kernels.low_rank_fusion import low_rank_fusion

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def naive(xs, factors, epilogue):
    """The formula as it stands, by concatenation and einsum."""
    product = 1
    for x, factor in zip(xs, factors, strict=True):
        product = product * torch.einsum("nd,rde->nre", torch.cat([x, x.new_ones(len(x), 1)], 1), factor)
    y = product.sum(1)
    return y if epilogue == "none" else torch.nn.functional.normalize(y.sign() * y.abs().sqrt(), dim=1)


def draw(rows, depths, rank, width, dtype=torch.float32):
    xs = [torch.randn(rows, depth).to(dtype) for depth in depths]
    factors = [torch.randn(rank, depth + 1, width).div((depth + 1) ** 0.5).to(dtype) for depth in depths]
    return xs, factors, torch.randn(rows, width).to(dtype)


def run(function, xs, factors, grad):
    leaves = [x.detach().requires_grad_() for x in (*xs, *factors)]
    out = function(leaves[: len(xs)], leaves[len(xs) :])
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("epilogue", ["none", "mfb"])
@pytest.mark.parametrize("depths", [(33, 7), (5, 40, 17)])
def test_error_is_at_most_twice_that_of_torch(depths, epilogue, dtype):
    xs, factors, grad = draw(37, depths, 3, 29, dtype)
    if epilogue == "mfb":  # near 0 the root's slope, and any error in y with it, grows without bound
        xs, factors = ([x.abs() for x in tensors] for tensors in (xs, factors))
    exact = run(lambda x, w: naive(x, w, epilogue), *([y.double() for y in z] for z in (xs, factors)), grad.double())
    theirs = run(lambda x, w: naive(x, w, epilogue), xs, factors, grad)
    ours = run(lambda x, w: low_rank_fusion(x, w, epilogue=epilogue), xs, factors, grad)
    for want, their, got in zip(exact, theirs, ours, strict=True):
        their, got = their.double(), got.double()
        assert (got - want).abs().max() <= 2 * (their - want).abs().max() + torch.finfo(dtype).eps * want.abs().max()
        assert (got - want).square().mean().sqrt() / want.square().mean().sqrt() < 0.005


@pytest.mark.parametrize("epilogue", ["none", "mfb"])
@pytest.mark.parametrize("numbers", [1, 100, 1 << 23])
def test_chunks_of_rows_change_nothing(monkeypatch, epilogue, numbers):
    monkeypatch.setattr(reference_low_rank_fusion, "NUMBERS_PER_CHUNK", numbers)
    xs, factors, grad = draw(11, (4, 6, 3), 2, 5, torch.float64)
    want = run(lambda x, w: naive(x, w, epilogue), xs, factors, grad)
    torch.testing.assert_close(run(lambda x, w: low_rank_fusion(x, w, epilogue=epilogue), xs, factors, grad), want)


@pytest.mark.parametrize("epilogue", ["none", "mfb"])
@pytest.mark.parametrize("depths", [(2, 3), (2, 1, 3)])
def test_gradcheck(depths, epilogue):
    xs, factors, _ = draw(3, depths, 2, 4, torch.float64)
    leaves = [x.requires_grad_() for x in (*xs, *factors)]

    def function(*leaves):
        return low_rank_fusion(leaves[: len(xs)], leaves[len(xs) :], epilogue=epilogue)

    assert torch.autograd.gradcheck(function, leaves)


def test_without_bias_and_with_ones_it_is_the_sum_of_products():
    ones = torch.ones(1, 3, 2)
    ones[:, -1] = 0
    out = low_rank_fusion([torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 5.0]])], [ones, ones])
    assert out.tolist() == [[24.0, 24.0]]
    mfb = low_rank_fusion([torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 5.0]])], [ones, -ones], epilogue="mfb")
    torch.testing.assert_close(mfb, torch.full((1, 2), -(0.5**0.5)))


def test_zeros_stay_zero_and_send_back_no_gradient_and_no_nan():
    """The root has no derivative at 0: plain torch gives NaN there, in this row and in the factors' gradient."""
    xs, factors, grad = draw(4, (3, 5), 2, 6)
    for factor in factors:
        factor[:, -1] = 0
    xs[0][1] = 0  # a row of zeros
    factors[0][:, :, 2] = 0  # a column of zeros, in all rows
    assert run(lambda x, w: naive(x, w, "mfb"), xs, factors, grad)[1].isnan().any()
    out, *gradients = run(lambda x, w: low_rank_fusion(x, w, epilogue="mfb"), xs, factors, grad)
    assert all(x.isfinite().all() for x in (out, *gradients))
    assert out[1].eq(0).all()
    assert out[:, 2].eq(0).all()
    assert gradients[0][1].eq(0).all()
    assert out[0].norm() == pytest.approx(1)


def test_numbers_too_small_for_a_root_count_as_zero():
    tiny = torch.tensor([[1e-39, 1.0], [1e-39, -1e-40]])
    ones = torch.ones(2, 2)
    assert reference_low_rank_fusion.mfb_forward(tiny).tolist() == [[0.0, 1.0], [0.0, 0.0]]
    back = reference_low_rank_fusion.mfb_backward(ones, tiny)
    assert back.tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_sums_over_rows_do_not_overflow_in_half_precision():
    xs = [torch.full((300, 1), 20.0, dtype=torch.float16), torch.full((300, 1), 1.0, dtype=torch.float16)]
    factors = [torch.ones(1, 2, 1, dtype=torch.float32) for _ in xs]
    weight_grad = run(low_rank_fusion, xs, factors, torch.full((300, 1), 10.0, dtype=torch.float16))[3]
    assert weight_grad[0, 0] == 300 * 20 * 10 * 2


def test_strided_inputs_and_factors_of_another_dtype():
    xs, factors, grad = draw(6, (4, 8), 2, 10, torch.bfloat16)
    wide = [factor.float() for factor in factors]
    want = run(low_rank_fusion, xs, factors, grad)
    views = [torch.cat([x, x], 1).T.contiguous().T[:, : x.shape[1]] for x in xs]
    got = run(low_rank_fusion, views, wide, grad.T.contiguous().T)
    assert [x.dtype for x in got[3:]] == [torch.float32] * 2
    assert all(x.is_contiguous() for x in got)
    for mine, other in zip(got, want, strict=True):
        torch.testing.assert_close(mine.to(other.dtype), other)


@pytest.mark.parametrize("epilogue", ["none", "mfb"])
def test_no_rows(epilogue):
    xs, factors, grad = draw(0, (4, 8), 2, 10)
    out, *gradients = run(lambda x, w: low_rank_fusion(x, w, epilogue=epilogue), xs, factors, grad)
    assert out.shape == (0, 10)
    assert [x.shape for x in gradients] == [x.shape for x in (*xs, *factors)]
    assert all(x.eq(0).all() for x in gradients)


def test_an_input_without_numbers_leaves_the_appended_one():
    xs, factors, _ = draw(5, (0, 3), 2, 4)
    torch.testing.assert_close(low_rank_fusion(xs, factors), naive(xs, factors, "none"))


def test_autocast_changes_nothing():
    xs, factors, grad = draw(5, (6, 3), 2, 4)
    want = run(low_rank_fusion, xs, factors, grad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(map(torch.equal, run(low_rank_fusion, xs, factors, grad), want))


@pytest.mark.parametrize(("depths", "epilogue"), [((2, 3), "none"), ((2, 4, 3), "mfb")])
def test_opcheck_compiled_and_checkpointed(depths, epilogue):
    xs, factors, grad = draw(5, depths, 2, 4)
    leaves = [x.requires_grad_() for x in (*xs, *factors)]
    torch.library.opcheck(torch.ops.triweave.low_rank_fusion.default, (xs, factors, epilogue, "reference"))
    with torch.no_grad():
        fused = torch.ops.triweave.low_rank_fusion(xs, factors, epilogue, "reference")[1]
    plain = [[x.detach() for x in tensors] for tensors in (xs, factors)]
    arguments = (grad, *plain, fused, epilogue, "reference")
    torch.library.opcheck(torch.ops.triweave.low_rank_fusion_backward.default, arguments)

    def function(*leaves):
        return low_rank_fusion([leaves[0] * 2, *leaves[1 : len(xs)]], leaves[len(xs) :], epilogue=epilogue)

    want = torch.autograd.grad(function(*leaves), leaves, grad)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*leaves)
    assert all(map(torch.equal, torch.autograd.grad(compiled, leaves, grad), want))
    for reentrant in (False, True):
        recomputed = checkpoint(function, *leaves, use_reentrant=reentrant)
        recomputed.backward(grad)
        assert all(map(torch.equal, (x.grad for x in leaves), want))
        for x in leaves:
            x.grad = None


def test_an_input_without_gradient_and_a_result_nobody_uses():
    xs, factors, _ = draw(5, (6, 3), 2, 4)
    factors[1].requires_grad_()
    low_rank_fusion(xs, factors).sum().backward()
    assert factors[1].grad.abs().sum() > 0
    assert xs[0].grad is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda xs, factors: (xs[:1], factors[:1], "none"), "1 inputs and 1 factors; it takes two or three"),
        (lambda xs, factors: (xs, factors[:1], "none"), "2 inputs and 1 factors"),
        (lambda xs, factors: ([xs[0], xs[1][1:]], factors, "none"), r"input 1 is \(4, 8\), its factor \(2, 9, 10\)"),
        (lambda xs, factors: (xs, [factors[0], factors[1][:, 1:]], "none"), r"its factor \(2, 8, 10\)"),
        (lambda xs, factors: (xs, [factors[0], factors[1][..., 1:]], "none"), r"its factor \(2, 9, 9\)"),
        (lambda xs, factors: (xs, [factors[0], factors[1][0]], "none"), r"its factor \(9, 10\)"),
        (lambda xs, factors: (xs, [x[..., :0] for x in factors], "none"), r"its factor \(2, 5, 0\)"),
        (lambda xs, factors: ([xs[0], xs[1].double()], factors, "none"), "input 1 is torch.float64, input 0"),
        (lambda xs, factors: (xs, factors, "mlb"), "epilogue is 'mlb'; it must be one of none, mfb"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    xs, factors, _ = draw(5, (4, 8), 2, 10)
    xs, factors, epilogue = change(xs, factors)
    with pytest.raises(KernelInputError, match=message):
        low_rank_fusion(xs, factors, epilogue=epilogue)
