"""linear_cross_entropy's Triton kernels in Triton's interpreter, against torch on the full logits and the reference."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from triweave.kernels import reference
from triweave.kernels.errors import KernelUnavailableError
from triweave.kernels.linear_cross_entropy import linear_cross_entropy

pytestmark = pytest.mark.usefixtures("interpreter")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MODALITIES = 4


def draw(count=13, vocabulary=37, width=16, dtype=torch.float32, shape=(2, 11)):
    """Return hidden, weight, targets, row_index, row_weight, row_modality."""
    hidden = torch.randn(*shape, width).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width).to(dtype).requires_grad_()
    row_index = torch.randperm(hidden.shape[:-1].numel())[:count].sort().values
    rows = torch.randint(vocabulary, (count,)), row_index, torch.rand(count)
    return hidden, weight, *rows, torch.randint(MODALITIES, (count,), dtype=torch.int8)


def run(impl, inputs, **options):
    """Return sum, per_modality_sums, lse and the gradients of hidden and weight."""
    got = linear_cross_entropy(*inputs, modalities=MODALITIES, impl=impl, **options)
    assert [x.requires_grad for x in got] == [True, False, False]
    return [*(x.detach() for x in got), *torch.autograd.grad(got[0] * 0.3, inputs[:2])]


def equal_reference(inputs, **options):
    torch.testing.assert_close(run("triton", inputs, **options), run("reference", inputs, **options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("z_loss", "softcap"), [(0.0, None), (1e-3, 2.0)])
def test_error_is_at_most_twice_that_of_torch(monkeypatch, dtype, z_loss, softcap):
    monkeypatch.setattr(reference, "LOGITS_PER_CHUNK", 100 * 128)  # several blocks of the vocabulary, the last ragged
    hidden, weight, targets, row_index, row_weight, _ = draw(100, 500, 48, shape=(1, 120))
    hidden, weight = ((x.detach() / 4).to(dtype) for x in (hidden, weight))

    def torchs(hidden, weight):
        logits = (hidden.flatten(0, 1)[row_index] @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        rows = F.cross_entropy(logits, targets, reduction="none") + z_loss * torch.logsumexp(logits, -1) ** 2
        return (rows * row_weight.to(logits.dtype)).sum()

    def ours(*inputs):
        rows = targets, row_index, row_weight, torch.zeros_like(targets)
        return linear_cross_entropy(*inputs, *rows, z_loss=z_loss, softcap=softcap, impl="triton")[0]

    def differentiate(function, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
        total = function(*leaves)
        return [total.detach().double(), *(x.double() for x in torch.autograd.grad(total, leaves))]

    exact, theirs = (differentiate(torchs, kind) for kind in (torch.float64, dtype))
    for want, their, got in zip(exact, theirs, differentiate(ours, dtype), strict=True):
        assert (got - want).abs().max() <= 2 * (their - want).abs().max() + torch.finfo(dtype).eps * want.abs().max()
        assert (got - want).square().mean().sqrt() / want.square().mean().sqrt() < 0.005


@pytest.mark.parametrize(
    ("count", "vocabulary", "width"),
    [(1, 1, 1), (2, 2, 3), (31, 63, 15), (32, 64, 16), (33, 65, 17), (70, 129, 33), (5, 200, 100), (64, 1, 5)],
)
@pytest.mark.parametrize(("z_loss", "softcap"), [(0.1, None), (0.0, 3.0)])
def test_odd_sizes(count, vocabulary, width, z_loss, softcap):
    equal_reference(draw(count, vocabulary, width, shape=(3, 40)), z_loss=z_loss, softcap=softcap)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_drawn_sizes_and_blocks(monkeypatch, seed):
    torch.manual_seed(seed)
    count, vocabulary, width = (int(torch.randint(1, most, ())) for most in (150, 400, 90))
    monkeypatch.setattr(reference, "LOGITS_PER_CHUNK", int(torch.randint(1, 2 * count * vocabulary, ())))
    softcap = 5.0 if seed % 2 else None
    equal_reference(draw(count, vocabulary, width, shape=(2, 80)), z_loss=1e-3, softcap=softcap)


@pytest.mark.parametrize("logits_per_chunk", [1, 40 * 64, 40 * 128 + 1, 40 * 300])
def test_any_number_of_blocks_gives_the_same_gradients(monkeypatch, logits_per_chunk):
    inputs = draw(40, 300, 20, shape=(1, 50))
    want = run("triton", inputs, z_loss=0.1, softcap=4.0)
    monkeypatch.setattr(reference, "LOGITS_PER_CHUNK", logits_per_chunk)
    got = run("triton", inputs, z_loss=0.1, softcap=4.0)
    torch.testing.assert_close(got, want)
    assert torch.equal(got[4], want[4])  # a row of weight gradients is one sum, whatever the block


def test_tiles_in_groups_of_rows_all_get_their_turn(monkeypatch, interpreter):
    configs = interpreter("linear_cross_entropy_triton").CONFIGS
    for kernel, config in configs.items():
        monkeypatch.setitem(configs, kernel, {4: {**config[4], "GROUP": 2}})
    equal_reference(draw(300, 200, 130, shape=(1, 310)))  # 5 x 4 tiles of logits, in the products 5 x 3 and 4 x 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_blocks_are_added_up_in_fp32(monkeypatch, dtype):
    inputs = draw(20, 1500, 16, dtype, shape=(1, 30))
    want = run("triton", inputs)
    monkeypatch.setattr(reference, "LOGITS_PER_CHUNK", 1)  # 12 blocks
    got = run("triton", inputs)
    assert (got[3] == want[3]).double().mean() > 0.99


class LargestTensor(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.is_floating_point():  # the interpreter copies bytes, all at once
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize(("gradients", "largest"), [(False, 512 * 8), (True, 64 * 128)])
def test_no_logits_without_gradients_and_one_block_of_their_gradients_with(
    monkeypatch, interpreter, gradients, largest
):
    monkeypatch.setattr(reference, "LOGITS_PER_CHUNK", 64 * 128)
    hidden, weight, *rows = draw(64, 512, 8, shape=(1, 80))
    kernels = interpreter("linear_cross_entropy_triton")
    with LargestTensor() as watch:
        kernels.linear_cross_entropy(
            hidden.detach(), weight.detach(), *rows, z_loss=0.1, softcap=2.0, modalities=MODALITIES,
            need_rows_grad=gradients, need_weight_grad=gradients,
        )  # fmt: skip
    assert watch.elements == largest  # without gradients the weight; all logits would be 32,768


def test_no_gradient_work_where_none_is_needed(monkeypatch, interpreter):
    kernels = interpreter("linear_cross_entropy_triton")
    hidden, weight, *rows = draw()
    launched = []

    def counted(name):
        kernel = getattr(kernels, name)

        class Counted:
            def __getitem__(self, grid):
                launched.append(name)
                return kernel[grid]

        return Counted()

    for name in kernels.CONFIGS:
        monkeypatch.setattr(kernels, name, counted(name))
    statistics, gradients, product = kernels.CONFIGS
    with torch.no_grad():
        total, _, _ = linear_cross_entropy(hidden, weight, *rows, impl="triton")
    assert not total.requires_grad
    assert launched == [statistics]
    for one in ((hidden, weight.detach()), (hidden.detach(), weight), (hidden, weight)):
        launched.clear()
        linear_cross_entropy(*one, *rows, impl="triton")
        assert launched == [statistics, gradients, *[product] * sum(x.requires_grad for x in one)]


def test_no_rows_give_exact_zeros_and_whole_gradients():
    inputs = draw(count=0)
    total, sums, lse, hidden_grad, weight_grad = run("triton", inputs, z_loss=0.1)
    assert total.eq(0)
    assert sums.eq(0).all()
    assert lse.shape == (0,)
    assert hidden_grad.shape == inputs[0].shape
    assert hidden_grad.eq(0).all()
    assert weight_grad.shape == inputs[1].shape
    assert weight_grad.eq(0).all()


def test_targets_at_the_edges_of_tiles_and_of_the_vocabulary(interpreter):
    columns = interpreter("linear_cross_entropy_triton").CONFIGS["statistics_kernel"][4]["COLUMNS"]
    hidden, weight, _, row_index, *rest = draw(6, 2 * columns + 5)
    targets = torch.tensor([0, columns - 1, columns, 2 * columns - 1, 2 * columns, 2 * columns + 4])
    equal_reference((hidden, weight, targets, row_index, *rest))


@pytest.mark.parametrize("integer", [torch.int8, torch.int32])
def test_narrow_integers_repeated_rows_and_rows_of_weight_zero(integer):
    hidden, weight, targets, _, row_weight, row_modality = draw()
    row_weight[3] = 0
    row_index = torch.tensor([7, 7, 0, 21, 7, 3, 4, 5, 6, 8, 9, 10, 0])
    inputs = hidden, weight, targets.to(integer), row_index, row_weight, row_modality.to(integer)
    equal_reference(inputs, z_loss=0.1)
    assert run("triton", inputs, z_loss=0.1)[3].flatten(0, 1)[21].eq(0).all()


def test_strided_views_and_what_lies_between_is_not_read():
    wide = torch.full((2, 11, 3, 16), torch.nan)
    wide[:, :, 1] = torch.randn(2, 11, 16)
    table = torch.full((37, 40), torch.nan)
    table[:, 8:24] = torch.randn(37, 16)
    rows = [torch.stack([x, x * 0 - 1], 1)[:, 0] for x in draw()[2:]]
    assert not rows[0].is_contiguous()
    equal_reference((wide[:, :, 1].requires_grad_(), table[:, 8:24].requires_grad_(), *rows), z_loss=0.1)
    hidden, weight, *rest = draw(shape=(1, 22))
    across = hidden.detach().transpose(1, 2).contiguous().transpose(1, 2), weight.detach().T.contiguous().T
    equal_reference((*(x.requires_grad_() for x in across), *rest), z_loss=0.1)


def test_offsets_beyond_two_to_the_31():
    """Row 2 of hidden and of weight begins 2^31 numbers after row 0, in memory never touched."""
    stride = 1 << 30
    far = [torch.empty(stride * 2 + 8, dtype=torch.float16).as_strided((3, 8), (stride, 1)) for _ in range(2)]
    near = [torch.randn(3, 8).half() for _ in far]
    for x, y in zip(far, near, strict=True):
        x.copy_(y)
    targets, row_index, ones = torch.tensor([2, 0]), torch.tensor([2, 1]), torch.ones(2)
    rows = targets, row_index, ones, torch.zeros(2, dtype=torch.int8)
    got, want = (
        run("triton", (*(x.requires_grad_() for x in pair), *rows), z_loss=0.1)
        for pair in ((far[0].unsqueeze(0), far[1]), (near[0].unsqueeze(0), near[1]))
    )
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 1e4])
def test_soft_cap_is_exact_for_small_and_large_logits(scale):
    hidden = torch.ones(2, 11, 1, requires_grad=True)
    weight = torch.linspace(-scale, scale, 37)[:, None].requires_grad_()
    rows = draw()[2:]
    got, want = (
        linear_cross_entropy(*(x.to(dtype) for x in (hidden, weight)), *rows, softcap=1000.0, impl=impl)[2].double()
        for impl, dtype in (("triton", torch.float32), ("reference", torch.float64))
    )
    largest = 1000 * torch.tanh(torch.tensor(scale / 1000)).item()
    assert (got - want).abs().max() <= 3e-7 * max(largest, 4.0)
    gradient = torch.autograd.grad(
        linear_cross_entropy(hidden, weight, *rows, softcap=1000.0, impl="triton")[0], (hidden, weight)
    )
    assert all(x.isfinite().all() for x in gradient)


def test_large_logits_do_not_overflow():
    hidden, weight, *rows = draw()
    equal_reference((hidden.detach().mul(1e3).requires_grad_(), weight, *rows))


def test_a_target_or_row_that_does_not_exist_makes_the_sum_nan_and_is_not_read():
    hidden, weight, targets, row_index, *rest = draw()
    for wrong in (-1, 37, 2**40):
        bad = targets.clone()
        bad[4] = wrong
        total, _, lse = linear_cross_entropy(hidden, weight, bad, row_index, *rest, impl="triton")
        assert total.isnan()
        assert lse.isfinite().all()
    for wrong in (-1, 22, 2**40):
        bad = row_index.clone()
        bad[4] = wrong
        with torch.no_grad():
            total, _, lse = linear_cross_entropy(hidden, weight, targets, bad, *rest, impl="triton")
        assert total.isnan()
        assert lse.isnan().nonzero().tolist() == [[4]]


def test_backward_does_not_touch_the_weight():
    """Under ZeRO-3 the gathered weight is gone when the backward runs."""
    hidden, weight, *rows = draw()
    want = torch.autograd.grad(linear_cross_entropy(hidden, weight, *rows, impl="triton")[0], (hidden, weight))
    total = linear_cross_entropy(hidden, weight, *rows, impl="triton")[0]
    weight.data.fill_(torch.nan)
    hidden.data.fill_(torch.nan)
    assert all(map(torch.equal, want, torch.autograd.grad(total, (hidden, weight))))


def test_narrow_hidden_with_a_wide_weight_sums_the_weight_gradient_in_fp32(monkeypatch):
    monkeypatch.setattr(reference, "LOGITS_PER_CHUNK", 1)
    hidden, weight, *rows = draw(100, 130, 32, shape=(1, 128))
    narrow, rounded = hidden.detach().bfloat16(), weight.detach().bfloat16()
    got = run("triton", (narrow.requires_grad_(), weight.detach().requires_grad_(), *rows))
    assert [x.dtype for x in got] == [torch.float32] * 3 + [torch.bfloat16, torch.float32]
    want = run("reference", (*(x.detach().float().requires_grad_() for x in (narrow, rounded)), *rows))
    torch.testing.assert_close(got[:3], want[:3])
    # only the logit gradients are rounded: were the sum over 100 rows rounded to bf16, it would be 4e-3 apart
    assert (got[4] - want[4]).norm() / want[4].norm() < 2.5e-3


def test_float16_keeps_weight_gradients_beyond_its_range():
    hidden = torch.full((1, 64, 2), 200.0, dtype=torch.float16)
    weight = torch.zeros(3, 2, dtype=torch.float16, requires_grad=True)
    targets, row_index = torch.zeros(64, dtype=torch.long), torch.arange(64)
    hundreds, modality = torch.full((64,), 100.0), torch.zeros(64, dtype=torch.int8)
    total, _, _ = linear_cross_entropy(hidden, weight, targets, row_index, hundreds, modality, impl="triton")
    (total / 6400).backward()
    torch.testing.assert_close(weight.grad[0].float(), torch.full((2,), -200 * 2 / 3), rtol=1e-2, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_every_time_and_under_autocast(dtype):
    inputs = draw(70, 150, 24, dtype, shape=(1, 80))
    first = run("triton", inputs, z_loss=0.1)
    assert all(map(torch.equal, first, run("triton", inputs, z_loss=0.1)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(map(torch.equal, first, run("triton", inputs, z_loss=0.1)))


def test_fp64_is_refused():
    hidden, weight, *rows = draw()
    with pytest.raises(KernelUnavailableError, match=r"impl='triton' cannot serve torch.float64.*use reference"):
        linear_cross_entropy(hidden.double(), weight.double(), *rows, impl="triton")


def test_opcheck_compiled_and_checkpointed():
    inputs = draw(count=5)
    checks = {"test_utils": ("test_schema", "test_autograd_registration", "test_faketensor")}
    operator = torch.ops.triweave.linear_cross_entropy.default
    torch.library.opcheck(operator, (*inputs, 0.1, None, 8, True, True, "triton"), **checks)
    plain = [x.detach() for x in inputs[:2]]
    torch.library.opcheck(operator, (*plain, *inputs[2:], 0.1, 3.0, 8, False, False, "triton"), **checks)

    def function(hidden, weight):
        return linear_cross_entropy(hidden * 2, weight, *inputs[2:], z_loss=0.1, impl="triton")[0] / 7

    want = torch.autograd.grad(function(*inputs[:2]), inputs[:2])
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs[:2])
    assert all(map(torch.equal, torch.autograd.grad(compiled, inputs[:2]), want))
    for reentrant in (False, True):
        for x in inputs[:2]:
            x.grad = None
        checkpoint(function, *inputs[:2], use_reentrant=reentrant).backward()
        assert all(map(torch.equal, (x.grad for x in inputs[:2]), want))
