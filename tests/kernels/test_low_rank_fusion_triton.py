"""low_rank_fusion's Triton kernels in Triton's interpreter, against naive torch and the reference."""

import itertools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from triweave.kernels import reference_low_rank_fusion
from triweave.kernels.errors import KernelUnavailableError
from triweave.kernels.low_rank_fusion import low_rank_fusion

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module", autouse=True)
def kernels(interpreter):
    """The interpreted module, with tiles so small that few numbers have several in every direction."""
    module = interpreter("low_rank_fusion_triton")
    for config in [config for sizes in module.CONFIGS.values() for config in sizes.values()]:
        config.update({name: 16 for name in ("ROWS", "COLUMNS", "DEPTH", "BLOCK") if name in config})
    return module


def naive(xs, factors, epilogue):
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


def fused(epilogue="none", impl="triton"):
    return lambda xs, factors: low_rank_fusion(xs, factors, epilogue=epilogue, impl=impl)


QUICK = {((33, 7), "mfb", torch.float32), ((33, 7), "none", torch.float16), ((5, 40, 17), "mfb", torch.bfloat16)}


@pytest.mark.parametrize(
    ("depths", "epilogue", "dtype"),
    [
        pytest.param(*cell, marks=() if cell in QUICK else pytest.mark.slow)
        for cell in itertools.product([(33, 7), (5, 40, 17)], ["none", "mfb"], DTYPES)
    ],
)
def test_error_is_at_most_twice_that_of_torch(depths, epilogue, dtype):
    xs, factors, grad = draw(37, depths, 3, 29, dtype)
    if epilogue == "mfb":  # near 0 the root's slope, and any error in y with it, grows without bound
        xs, factors = ([x.abs() for x in tensors] for tensors in (xs, factors))
    exact = run(lambda x, w: naive(x, w, epilogue), *([y.double() for y in z] for z in (xs, factors)), grad.double())
    theirs = run(lambda x, w: naive(x, w, epilogue), xs, factors, grad)
    for want, their, got in zip(exact, theirs, run(fused(epilogue), xs, factors, grad), strict=True):
        their, got = their.double(), got.double()
        assert (got - want).abs().max() <= 2 * (their - want).abs().max() + torch.finfo(dtype).eps * want.abs().max()
        assert (got - want).square().mean().sqrt() / want.square().mean().sqrt() < 0.005


@pytest.mark.parametrize("epilogue", ["none", "mfb"])
@pytest.mark.parametrize(
    ("rows", "depths", "rank", "width"), [(1, (1, 1), 1, 1), (16, (16, 32), 2, 32), (9, (3, 1, 0), 2, 5)]
)
def test_one_number_whole_tiles_and_nothing(epilogue, rows, depths, rank, width):
    xs, factors, grad = draw(rows, depths, rank, width)
    want = run(fused(epilogue, "reference"), xs, factors, grad)
    torch.testing.assert_close(run(fused(epilogue), xs, factors, grad), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("epilogue", ["none", "mfb"])
def test_chunks_of_rows_change_nothing(monkeypatch, epilogue):
    xs, factors, grad = draw(23, (4, 6), 2, 5)
    want = run(fused(epilogue), xs, factors, grad)
    monkeypatch.setattr(reference_low_rank_fusion, "NUMBERS_PER_CHUNK", 70)
    torch.testing.assert_close(run(fused(epilogue), xs, factors, grad), want)


def test_zeros_stay_zero_and_send_back_no_gradient_and_no_nan():
    xs, factors, grad = draw(20, (3, 5), 2, 18)
    for factor in factors:
        factor[:, -1] = 0
    xs[0][17] = 0  # a row of zeros
    factors[0][:, :, 2] = 0  # a column of zeros, in all rows
    out, *gradients = run(fused("mfb"), xs, factors, grad)
    assert all(x.isfinite().all() for x in (out, *gradients))
    assert out[17].eq(0).all()
    assert out[:, 2].eq(0).all()
    assert gradients[0][17].eq(0).all()
    torch.testing.assert_close(
        [out, *gradients], run(fused("mfb", "reference"), xs, factors, grad), rtol=1e-4, atol=1e-4
    )


def test_numbers_too_small_for_a_root_count_as_zero():
    ones = torch.ones(1, 2, 2)
    ones[:, -1] = 0
    xs = [torch.full((2, 1), 1e-20), torch.ones(2, 1)]
    factors = [torch.tensor([[[1e-19, 1e20], [0.0, 0.0]]]), ones]
    out, dx, *_ = run(fused("mfb"), xs, factors, torch.ones(2, 2))
    assert out.tolist() == [[0.0, 1.0]] * 2
    assert dx.isfinite().all()


def test_rows_apart_from_one_another_are_not_copied_and_what_lies_between_is_not_read(interpreter):
    xs, factors, grad = draw(20, (5, 18), 2, 18)
    wide = [torch.full((20, 3 * x.shape[1]), torch.nan) for x in xs]
    views = [room[:, x.shape[1] : 2 * x.shape[1]].copy_(x) for room, x in zip(wide, xs, strict=True)]
    taken, *_ = interpreter("low_rank_fusion_triton")._arguments(views, factors)
    assert taken[1].data_ptr() == views[1].data_ptr()
    want = run(fused("mfb"), xs, factors, grad)
    got = run(fused("mfb"), views, factors, grad.T.contiguous().T)
    assert all(x.is_contiguous() for x in got)
    assert all(map(torch.equal, got, want))


def test_factors_of_another_dtype_and_a_gradient_that_is_one_number_everywhere():
    xs, factors, _ = draw(20, (5, 18), 2, 18, torch.bfloat16)
    grad = torch.tensor(2.0, dtype=torch.bfloat16).expand(20, 18)
    want = run(fused(), xs, factors, grad.contiguous())
    got = run(fused(), xs, [factor.float() for factor in factors], grad)
    assert [x.dtype for x in got[3:]] == [torch.float32] * 2
    for mine, other in zip(got, want, strict=True):
        torch.testing.assert_close(mine.to(other.dtype), other)


@pytest.mark.parametrize("epilogue", ["none", "mfb"])
def test_no_rows(epilogue):
    xs, factors, grad = draw(0, (4, 8), 2, 10)
    out, *gradients = run(fused(epilogue), xs, factors, grad)
    assert out.shape == (0, 10)
    assert all(x.eq(0).all() for x in gradients)


def test_the_same_bits_every_time():
    xs, factors, grad = draw(20, (5, 18), 2, 18, torch.bfloat16)
    first, second = (run(fused("mfb"), xs, factors, grad) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_fp64_is_refused():
    xs, factors, _ = draw(2, (3, 4), 1, 2, torch.float64)
    with pytest.raises(KernelUnavailableError, match=r"cannot serve torch.float64, only float32.*use reference"):
        fused()(xs, factors)


@pytest.mark.parametrize("epilogue", ["none", "mfb"])
def test_opcheck_compiled_and_checkpointed(epilogue):
    xs, factors, grad = draw(5, (2, 4, 3), 2, 4)
    leaves = [x.requires_grad_() for x in (*xs, *factors)]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    operation = torch.ops.triweave.low_rank_fusion
    torch.library.opcheck(operation.default, (xs, factors, epilogue, "triton"), test_utils=checks)
    plain = [[x.detach() for x in tensors] for tensors in (xs, factors)]
    arguments = (grad, *plain, operation(*plain, epilogue, "triton")[1], epilogue, "triton")
    torch.library.opcheck(torch.ops.triweave.low_rank_fusion_backward.default, arguments, test_utils=checks)

    def function(*leaves):
        return fused(epilogue)([leaves[0] * 2, *leaves[1:3]], leaves[3:])

    want = torch.autograd.grad(function(*leaves), leaves, grad)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*leaves)
    assert all(map(torch.equal, torch.autograd.grad(compiled, leaves, grad), want))
    checkpoint(function, *leaves, use_reentrant=False).backward(grad)
    assert all(map(torch.equal, (x.grad for x in leaves), want))
