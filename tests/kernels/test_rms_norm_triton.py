"""rms_norm's Triton kernels in Triton's interpreter, against torch and the reference."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from triweave.kernels.errors import KernelInputError
from triweave.kernels.rms_norm import rms_norm

pytestmark = pytest.mark.usefixtures("interpreter")
EPS = 1e-5
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def run(impl, x, weight, grad, *, residual=None, modality=None, total_grad=None):
    """Return out (and the sum), dx (and dresidual) and dweight."""
    x, weight = (y.detach().requires_grad_() for y in (x, weight))
    if residual is None:
        out = rms_norm(x, weight, modality=modality, eps=EPS, impl=impl)
        return [out.detach(), *torch.autograd.grad(out, (x, weight), grad)]
    residual = residual.detach().requires_grad_()
    outs = rms_norm(x, weight, residual=residual, modality=modality, eps=EPS, impl=impl)
    return [*(y.detach() for y in outs), *torch.autograd.grad(outs, (x, residual, weight), (grad, total_grad))]


def naive(x, weight, residual=None, modality=None):
    total = x if residual is None else x + residual
    rows = weight if modality is None else weight[modality.clamp(min=0).long()]
    normed = F.rms_norm(total, (x.shape[-1],), rows if modality is None else None, EPS)
    return normed if modality is None else normed * rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["plain", "residual", "modality"])
def test_error_is_at_most_twice_that_of_torch(kind, dtype):
    x, grad = torch.randn(41, 75).to(dtype), torch.randn(41, 75).to(dtype)
    modality = torch.randint(-1, 3, (41,)) if kind == "modality" else None
    residual = torch.randn(41, 75).to(dtype) if kind == "residual" else None
    weight = torch.randn(*((3, 75) if kind == "modality" else (75,))).to(dtype)

    def differentiate(function, dtype):
        leaves = [y.to(dtype).requires_grad_() for y in (x, weight)]
        added = None if residual is None else residual.to(dtype)
        out = function(*leaves, added)
        return [out.detach().double(), *(y.double() for y in torch.autograd.grad(out, leaves, grad.to(dtype)))]

    def ours(x, weight, residual):
        result = rms_norm(x, weight, residual=residual, modality=modality, eps=EPS, impl="triton")
        return result if residual is None else result[0]

    def torchs(x, weight, residual):
        return naive(x, weight, residual, modality)

    exact, theirs = (differentiate(torchs, kind) for kind in (torch.float64, dtype))
    for want, their, got in zip(exact, theirs, differentiate(ours, dtype), strict=True):
        assert (got - want).abs().max() <= 2 * (their - want).abs().max() + torch.finfo(dtype).eps * want.abs().max()
        assert (got - want).square().mean().sqrt() / want.square().mean().sqrt() < 0.005


@pytest.mark.parametrize("width", [1, 3, 64, 65, 300, 1000, 2049])
def test_every_width_has_a_tile(width):
    x, grad = (torch.randn(2, 3, width, dtype=torch.float64) for _ in range(2))
    weight = torch.randn(width, dtype=torch.float64)
    torch.testing.assert_close(run("triton", x, weight, grad), run("reference", x, weight, grad))


@pytest.mark.slow
@pytest.mark.parametrize("width", [4096, 5120, 8192, 16384])
@pytest.mark.parametrize("modalities", [1, 4])
def test_wide_rows(width, modalities):
    x, grad = (torch.randn(9, width, dtype=torch.float64) for _ in range(2))
    weight, modality = torch.randn(modalities, width, dtype=torch.float64), torch.arange(9) % modalities
    got, want = (run(impl, x, weight, grad, modality=modality) for impl in ("triton", "reference"))
    torch.testing.assert_close(got, want)


def test_a_row_too_wide_for_the_kernel_is_refused():
    with pytest.raises(KernelInputError, match="at most 16384 numbers, not 16385; use auto"):
        rms_norm(torch.zeros(1, 16385), torch.zeros(16385), eps=EPS, impl="triton")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_sum_with_the_residual_is_rounded_as_torch_rounds_it(dtype):
    x, residual = torch.randn(37, 33).to(dtype), torch.randn(37, 33).mul(100).to(dtype)
    grad, total_grad = torch.randn(2, 37, 33).to(dtype)
    weight = torch.randn(33)
    out, total, dx, dresidual, dweight = run("triton", x, weight, grad, residual=residual, total_grad=total_grad)
    assert torch.equal(total, x + residual)
    assert torch.equal(out, rms_norm(x + residual, weight, eps=EPS, impl="triton"))
    assert torch.equal(dx, dresidual)
    assert dweight.dtype == torch.float32
    want = run("reference", total.double(), weight.double(), grad.double())[1] + total_grad.double()
    assert ((dx.double() - want).abs() <= torch.finfo(dtype).eps * want.abs().clamp(min=0.01)).all()


def test_residual_strides_and_the_case_that_only_the_sum_is_used():
    x, residual, grad, total_grad = (torch.randn(4, 8, 6, dtype=torch.float64).transpose(1, 2) for _ in range(4))
    weight = torch.randn(8, dtype=torch.float64)
    got, want = (
        run(impl, x, weight, grad, residual=residual, total_grad=total_grad) for impl in ("triton", "reference")
    )
    assert all(y.is_contiguous() for y in got)
    torch.testing.assert_close(got, want)
    *_, dx, dresidual, dweight = run("triton", x, weight, grad * 0, residual=residual, total_grad=total_grad)
    assert torch.equal(dx, total_grad)
    assert torch.equal(dresidual, total_grad)
    assert dweight.eq(0).all()


def test_rows_apart_from_one_another_are_not_copied_and_what_lies_between_is_not_read(interpreter):
    wide = torch.full((5, 30), torch.nan, dtype=torch.float64)
    x = wide[:, 10:20].copy_(torch.randn(5, 10))
    assert interpreter("rows_triton").as_rows(x).data_ptr() == x.data_ptr()
    weight, grad = torch.randn(10, dtype=torch.float64), torch.randn(1, 10, dtype=torch.float64).expand(5, 10)
    torch.testing.assert_close(run("triton", x, weight, grad), run("reference", x, weight, grad))


@pytest.mark.parametrize("integer", [torch.int8, torch.int64])
@pytest.mark.parametrize("programs", [1, 3, 256])
def test_modalities_in_any_number_of_programs(monkeypatch, interpreter, programs, integer):
    monkeypatch.setattr(interpreter("rms_norm_triton"), "BACKWARD_PROGRAMS", programs)
    x, grad = (torch.randn(2, 37, 70, dtype=torch.float64) for _ in range(2))  # 74 rows in tiles of 8
    weight, modality = torch.randn(3, 70, dtype=torch.float64), torch.randint(-1, 2, (37, 2), dtype=integer).T
    got, want = (run(impl, x, weight, grad, modality=modality) for impl in ("triton", "reference"))
    torch.testing.assert_close(got, want)
    assert got[2][2].eq(0).all()  # nobody has modality 2


def test_a_modality_without_a_weight_gives_nan_and_leaves_the_others_alone():
    x, grad, weight = torch.randn(6, 9), torch.randn(6, 9), torch.randn(2, 9)
    modality = torch.tensor([0, 1, 2, 100, -1, 1])
    out, dx, dweight = run("triton", x, weight, grad, modality=modality)
    known = modality < 2
    want = run("reference", x[known], weight, grad[known], modality=modality[known])
    torch.testing.assert_close([out[known], dx[known], dweight], want)
    assert out[~known].isnan().all()
    assert dx[~known].isnan().all()


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 4), (5,)])
def test_few_or_no_rows(shape):
    x, grad, weight = (torch.randn(y, dtype=torch.float64) for y in (shape, shape, shape[-1:]))
    torch.testing.assert_close(run("triton", x, weight, grad), run("reference", x, weight, grad))


def test_the_same_bits_every_time():
    x, grad, weight = torch.randn(50, 16).bfloat16(), torch.randn(50, 16).bfloat16(), torch.randn(2, 16)
    first, second = (run("triton", x, weight, grad, modality=torch.arange(50) % 2) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_opcheck_compiled_and_checkpointed():
    x, residual = (torch.randn(3, 4, requires_grad=True) for _ in range(2))
    weight, modality = torch.randn(2, 4, requires_grad=True), torch.tensor([1, -1, 0])
    checks = {"test_utils": ("test_schema", "test_autograd_registration", "test_faketensor")}
    ops = torch.ops.triweave
    torch.library.opcheck(ops.rms_norm.default, (x, weight, modality, EPS, "triton"), **checks)
    torch.library.opcheck(ops.rms_norm_residual.default, (x, residual, weight, modality, EPS, "triton"), **checks)
    plain = (x.detach(), x.detach(), weight.detach(), modality, EPS, x.detach(), "triton")
    torch.library.opcheck(ops.rms_norm_backward.default, plain, **checks)

    def function(x, residual, weight):
        normed, total = rms_norm(x * 2, weight, residual=residual, modality=modality, eps=EPS, impl="triton")
        return (normed * total).sum()

    inputs = (x, residual, weight)
    want = torch.autograd.grad(function(*inputs), inputs)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs)
    assert all(map(torch.equal, torch.autograd.grad(compiled, inputs), want))
    checkpoint(function, *inputs, use_reentrant=False).backward()
    assert all(map(torch.equal, (y.grad for y in inputs), want))
