"""linear_cross_entropy against torch's own on the full logits, and the promises about memory and the weight."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from triweave.kernels import reference
from triweave.kernels.errors import KernelInputError
from triweave.kernels.linear_cross_entropy import linear_cross_entropy

MODALITIES = 4


def naive(hidden, weight, targets, row_index, row_weight, row_modality, z_loss, softcap):
    logits = (hidden.flatten(0, -2)[row_index] @ weight.T).to(row_weight.dtype)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    cross_entropy = F.cross_entropy(logits, targets, reduction="none") * row_weight
    lse = torch.logsumexp(logits, dim=-1)
    sums = torch.stack([cross_entropy[row_modality == m].sum() for m in range(MODALITIES)])
    return (cross_entropy + z_loss * row_weight * lse**2).sum(), sums, lse


def draw(count=13, vocabulary=37, width=16, dtype=torch.float64, shape=(2, 11)):
    hidden = torch.randn(*shape, width, dtype=dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, dtype=dtype).requires_grad_()
    row_index = torch.randperm(hidden.shape[:-1].numel())[:count].sort().values
    rows = torch.randint(vocabulary, (count,)), row_index, torch.rand(count, dtype=torch.float64).to(dtype)
    return hidden, weight, *rows, torch.randint(MODALITIES, (count,), dtype=torch.int8)


@pytest.mark.parametrize("logits_per_chunk", [1, 37 * 5, 1 << 22])
@pytest.mark.parametrize(("z_loss", "softcap"), [(0.0, None), (0.1, None), (0.0, 3.0), (0.1, 3.0)])
def test_equals_cross_entropy_of_all_logits(monkeypatch, logits_per_chunk, z_loss, softcap):
    monkeypatch.setattr(reference, "LOGITS_PER_CHUNK", logits_per_chunk)
    inputs = draw()
    got = linear_cross_entropy(*inputs, z_loss=z_loss, softcap=softcap, modalities=MODALITIES)
    want = naive(*inputs, z_loss, softcap)
    torch.testing.assert_close(got, want)
    assert not got[1].requires_grad
    assert not got[2].requires_grad
    gradients = torch.autograd.grad(got[0] * 0.3, inputs[:2])
    torch.testing.assert_close(gradients, torch.autograd.grad(want[0] * 0.3, inputs[:2]))


def test_flat_hidden_equals_batched():
    hidden, *rest = draw()
    flat = linear_cross_entropy(hidden.flatten(0, 1), *rest, z_loss=0.1)
    assert all(map(torch.equal, flat, linear_cross_entropy(hidden, *rest, z_loss=0.1)))


def test_rows_of_weight_zero_and_unsupervised_rows_get_no_gradient():
    hidden, weight, targets, row_index, row_weight, row_modality = draw()
    row_weight[3] = 0
    total, _, _ = linear_cross_entropy(hidden, weight, targets, row_index, row_weight, row_modality, z_loss=0.1)
    gradient = torch.autograd.grad(total, hidden)[0].flatten(0, 1)
    supervised = torch.zeros(len(gradient), dtype=torch.bool)
    supervised[row_index] = row_weight > 0
    assert gradient[~supervised].eq(0).all()
    assert gradient[supervised].ne(0).any(dim=1).all()


def test_no_rows_give_exact_zeros_and_whole_gradients():
    hidden, weight, targets, row_index, row_weight, row_modality = draw(count=0)
    total, sums, lse = linear_cross_entropy(hidden, weight, targets, row_index, row_weight, row_modality, z_loss=0.1)
    assert total.eq(0)
    assert sums.eq(0).all()
    assert lse.shape == (0,)
    for x, gradient in zip((hidden, weight), torch.autograd.grad(total, (hidden, weight)), strict=True):
        assert gradient.shape == x.shape
        assert gradient.eq(0).all()


def test_backward_does_not_touch_the_weight():
    """Under ZeRO-3 the gathered weight is gone when the backward runs."""
    hidden, weight, *rest = draw()
    want = torch.autograd.grad(linear_cross_entropy(hidden, weight, *rest, z_loss=0.1)[0], (hidden, weight))
    total = linear_cross_entropy(hidden, weight, *rest, z_loss=0.1)[0]
    weight.data.fill_(torch.nan)
    hidden.data.fill_(torch.nan)
    assert all(map(torch.equal, want, torch.autograd.grad(total, (hidden, weight))))


class MatrixProducts(TorchDispatchMode):
    """Counts products of two matrices."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        return function(*args, **(kwargs or {}))


def matrix_products(hidden, weight, *rest):
    with MatrixProducts() as counter:
        rows = hidden.flatten(0, -2)[rest[1]]
        need = {"need_rows_grad": hidden.requires_grad, "need_weight_grad": weight.requires_grad}
        options = {"z_loss": 0.0, "softcap": None, "modalities": MODALITIES, **need}
        reference.linear_cross_entropy(rows.detach(), weight.detach(), rest[0], *rest[2:], **options)
    return counter.count


def test_no_gradient_work_where_none_is_needed(monkeypatch):
    hidden, weight, *rest = draw()
    counted = [
        matrix_products(hidden.detach().requires_grad_(a), weight.detach().requires_grad_(b), *rest)
        for a, b in [(False, False), (True, False), (False, True), (True, True)]
    ]
    assert counted == [1, 2, 2, 3]
    asked = []
    original = reference.linear_cross_entropy

    def watched(*arguments, **options):
        asked.append((options["need_rows_grad"], options["need_weight_grad"]))
        return original(*arguments, **options)

    monkeypatch.setattr(reference, "linear_cross_entropy", watched)
    with torch.no_grad():
        linear_cross_entropy(hidden, weight, *rest)
    linear_cross_entropy(hidden, weight.detach(), *rest)
    linear_cross_entropy(hidden, weight, *rest)
    assert asked == [(False, False), (True, False), (True, True)]


class LargestTensor(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_the_logits_never_exist_at_once(monkeypatch):
    monkeypatch.setattr(reference, "LOGITS_PER_CHUNK", 4096)
    hidden, weight, targets, row_index, row_weight, row_modality = draw(200, 512, 8, shape=(1, 256))
    with LargestTensor() as watch:
        reference.linear_cross_entropy(
            hidden.detach()[0, row_index],
            weight.detach(),
            targets,
            row_weight,
            row_modality,
            z_loss=0.1,
            softcap=2.0,
            modalities=MODALITIES,
            need_rows_grad=True,
            need_weight_grad=True,
        )
    assert watch.elements == 4096  # 8 rows of logits, as many as the weight has; all logits would be 102,400


def test_autocast_changes_nothing():
    inputs = draw(dtype=torch.float32)
    plain = linear_cross_entropy(*inputs, z_loss=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = linear_cross_entropy(*inputs, z_loss=0.1)
        gradients = torch.autograd.grad(cast[0], inputs[:2])
    assert all(map(torch.equal, plain, cast))
    assert all(map(torch.equal, gradients, torch.autograd.grad(plain[0], inputs[:2])))


def test_narrow_hidden_with_a_wide_weight_keeps_each_gradients_dtype():
    hidden, weight, *rest = draw(dtype=torch.float32)
    narrow = hidden.detach().bfloat16().requires_grad_()
    total, _, _ = linear_cross_entropy(narrow, weight, *rest)
    gradients = torch.autograd.grad(total, (narrow, weight))
    assert [total.dtype, *(x.dtype for x in gradients)] == [torch.float32, torch.bfloat16, torch.float32]
    want = torch.autograd.grad(linear_cross_entropy(hidden, weight, *rest)[0], (hidden, weight))
    for got, x in zip(gradients, want, strict=True):
        torch.testing.assert_close(got.float(), x, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_that_of_torch(monkeypatch, dtype):
    monkeypatch.setattr(reference, "LOGITS_PER_CHUNK", 512 * 16)
    hidden, weight, targets, row_index, row_weight, row_modality = draw(100, 512, 64, shape=(1, 128))
    row_weight = row_weight.float()
    rows = targets, row_index, row_weight, row_modality

    def differentiate(function, dtype):
        inputs = [(x.detach() / 4).to(dtype).requires_grad_() for x in (hidden.bfloat16(), weight.bfloat16())]
        total = function(*inputs)
        return [total.detach().double(), *(x.double() for x in torch.autograd.grad(total, inputs))]

    exact = differentiate(
        lambda *x: naive(*x, *rows[:2], row_weight.double(), row_modality, 1e-3, None)[0], torch.float64
    )
    theirs = differentiate(lambda *x: naive(*x, *rows, 1e-3, None)[0], dtype)
    ours = differentiate(lambda *x: linear_cross_entropy(*x, *rows, z_loss=1e-3)[0], dtype)
    for want, their, got in zip(exact, theirs, ours, strict=True):
        floor = torch.finfo(dtype).eps * want.abs().max()
        assert (got - want).abs().max() <= 2 * (their - want).abs().max() + floor
        assert (got - want).square().mean().sqrt() / want.square().mean().sqrt() < 0.005


def test_float16_keeps_weight_gradients_beyond_its_range():
    hidden = torch.full((1, 64, 2), 200.0, dtype=torch.float16)
    weight = torch.zeros(3, 2, dtype=torch.float16, requires_grad=True)
    targets, row_index = torch.zeros(64, dtype=torch.long), torch.arange(64)
    ones = torch.full((64,), 100.0)
    total, _, _ = linear_cross_entropy(hidden, weight, targets, row_index, ones, torch.zeros(64, dtype=torch.int8))
    (total / 6400).backward()
    torch.testing.assert_close(weight.grad[0].float(), torch.full((2,), -200 * 2 / 3), rtol=1e-2, atol=0)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck(softcap):
    hidden, weight, *rest = draw(count=5, vocabulary=7, width=4, shape=(1, 6))
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, *rest, z_loss=0.1, softcap=softcap)[0], (hidden, weight)
    )


@pytest.mark.parametrize("needed", [(True, True), (False, False)])
def test_opcheck(needed):
    hidden, weight, *rest = draw(count=5)
    inputs = [x.detach().requires_grad_(need) for x, need in zip((hidden, weight), needed, strict=True)]
    torch.library.opcheck(
        torch.ops.triweave.linear_cross_entropy.default, (*inputs, *rest, 0.1, None, 8, *needed, "reference")
    )


def test_compiles_without_a_graph_break_and_survives_checkpointing():
    inputs = draw(dtype=torch.float32)

    def function(hidden, weight):
        return linear_cross_entropy(hidden * 2, weight, *inputs[2:], z_loss=0.1)[0] / 7

    want = torch.autograd.grad(function(*inputs[:2]), inputs[:2])
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs[:2])
    torch.testing.assert_close(torch.autograd.grad(compiled, inputs[:2]), want)
    checkpoint(function, *inputs[:2], use_reentrant=False).backward()
    assert all(map(torch.equal, (x.grad for x in inputs[:2]), want))


def test_wrong_inputs_are_named():
    hidden, weight, targets, *rest = draw()
    with pytest.raises(KernelInputError, match="weight"):
        linear_cross_entropy(hidden, weight[:, 1:], targets, *rest)
    with pytest.raises(KernelInputError, match="targets"):
        linear_cross_entropy(hidden, weight, targets[1:], *rest)
