"""What every op bears at once: compiled without a graph break, recomputed, with weights that ZeRO-3 takes away."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from triweave.kernels.attention import attention
from triweave.kernels.backends import IMPLEMENTATIONS
from triweave.kernels.cross_attention import cross_attention
from triweave.kernels.linear_cross_entropy import linear_cross_entropy
from triweave.kernels.low_rank_fusion import low_rank_fusion
from triweave.kernels.mmca import mmca
from triweave.kernels.qk_norm_rope import qk_norm_rope
from triweave.kernels.rms_norm import rms_norm
from triweave.kernels.swiglu import swiglu

pytestmark = pytest.mark.usefixtures("interpreter")
B, S, H, G, K, D, V = 1, 12, 2, 1, 16, 8, 20
LO = torch.tensor([[0] * 7 + [7] * 4 + [0]], dtype=torch.int32)
HI = torch.tensor([[1, 2, 5, 5, 5, 6, 7, 8, 9, 10, 11, 0]], dtype=torch.int32)
MEDIA = ((HI - LO) % 2).int()
Call = Callable[..., Tensor]
"""call(inputs, weights, impl) -> one number for each of some rows."""


def _heads() -> list[Tensor]:
    return [torch.randn(B, S, heads, K) for heads in (H, G, G)]


def _fused(inputs: Sequence[Tensor], weights: Sequence[Tensor], impl: str) -> Tensor:
    return low_rank_fusion(inputs, weights, epilogue="mfb", impl=impl)


def _turned(inputs: Sequence[Tensor], weights: Sequence[Tensor], impl: str) -> Tensor:
    positions = torch.arange(3 * S).view(B, S, 3)
    q, k = qk_norm_rope(
        *inputs, positions, q_weight=weights[0], k_weight=weights[1], sections=(4, 2, 2), eps=1e-6, impl=impl
    )
    return torch.cat([q, k], 2)


def _cross_entropy(inputs: Sequence[Tensor], weights: Sequence[Tensor], impl: str) -> Tensor:
    rows = torch.arange(0, S, 2)
    return linear_cross_entropy(*inputs, *weights, rows, rows, rows / 3, rows % 3, z_loss=0.01, impl=impl)[0]


OPS: dict[str, tuple[Call, Callable[[], list[Tensor]], Callable[[], list[Tensor]]]] = {
    "attention": (lambda x, _, impl: attention(*x, LO, HI, impl=impl)[0], _heads, list),
    "cross_attention": (
        lambda x, w, impl: cross_attention(*x, LO, HI, *w, impl=impl),
        _heads,
        lambda: [torch.randn(H)],
    ),
    "mmca": (lambda x, _, impl: mmca(*x, LO, HI, MEDIA, MEDIA, impl=impl), _heads, list),
    "qk_norm_rope": (_turned, lambda: _heads()[:2], lambda: [torch.randn(K), torch.randn(K)]),
    "rms_norm": (
        lambda x, w, impl: rms_norm(x[0], *w, eps=1e-6, impl=impl),
        lambda: [torch.randn(S, D)],
        lambda: [torch.randn(D)],
    ),
    "swiglu": (lambda x, _, impl: swiglu(*x, impl=impl), lambda: [torch.randn(S, D), torch.randn(S, D)], list),
    "linear_cross_entropy": (_cross_entropy, lambda: [torch.randn(S, D)], lambda: [torch.randn(V, D)]),
    "low_rank_fusion": (
        _fused,
        lambda: [torch.randn(S, D), torch.randn(S, 3)],
        lambda: [torch.randn(2, D + 1, 5), torch.randn(2, 4, 5)],
    ),
}
"""Op -> how it is called, its inputs and its weights."""


class Sharded(nn.Module):
    """Has its weights only while it computes, forward or backward, as a module under ZeRO-3."""

    def __init__(self, call: Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor], weights: Sequence[Tensor]) -> None:
        super().__init__()
        self.call, self.whole = call, list(weights)
        self.shards = nn.ParameterList(nn.Parameter(torch.empty_like(weight)) for weight in weights)
        self.gone()
        self.register_forward_pre_hook(lambda *_: self.gather())
        self.register_forward_hook(lambda *_: self.gone())
        self.register_full_backward_pre_hook(lambda *_: self.gather())

    def gather(self) -> None:
        for shard, weight in zip(self.shards, self.whole, strict=True):
            shard.data = weight.clone()

    def gone(self) -> None:
        """What is left of a weight is no number; what was there is overwritten, whoever still looks at it."""
        for shard in self.shards:
            shard.data.fill_(torch.nan)
            shard.data = torch.empty(0)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.call(inputs, list(self.shards))


def test_every_op_is_here() -> None:
    assert set(OPS) == set(IMPLEMENTATIONS)


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved", "reentrant"])
@pytest.mark.parametrize("impl", ["auto", pytest.param("triton", marks=pytest.mark.slow)])
@pytest.mark.parametrize("op", OPS)
def test_compiled_recomputed_and_sharded_at_once_gives_the_same_bits(op: str, impl: str, reentrant: bool) -> None:
    call, make_inputs, make_weights = OPS[op]
    inputs, weights = ([x.requires_grad_() for x in make()] for make in (make_inputs, make_weights))
    plain = call(inputs, weights, impl)
    grad = torch.randn_like(plain)
    want = torch.autograd.grad(plain, [*inputs, *weights], grad)

    torch.compiler.reset()
    compiled: Any = torch.compile(lambda x, w: call(x, w, impl), fullgraph=True, backend="aot_eager")
    module = Sharded(compiled, [weight.detach() for weight in weights])
    out = checkpoint(module, *inputs, use_reentrant=reentrant)
    assert torch.equal(out, plain)
    assert all(shard.numel() == 0 for shard in module.shards)
    out.backward(grad)
    found = [x.grad for x in (*inputs, *module.shards)]
    assert all(map(torch.equal, found, want))
