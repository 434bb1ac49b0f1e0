"""The numeric self-check of the Triton kernels: small inputs, forward and backward, against the reference in fp64.

One table, CASES of self_check_cases.py: op -> its cases at one width. The same inputs, rounded to the dtype, go through
`impl="triton"` on the device, through the reference in fp64 and through the reference in the dtype itself, the last two
on the host. A result passes if its error against fp64 is at most twice that of the reference in its dtype, plus one
rounding of its largest value, and if the root mean square of the error is below a share of its own. Sums and
exponentials of fp32 get a floor of their own: another order of additions and the hardware's exp2.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from triweave.kernels.admission.admission import Figure
from triweave.kernels.errors import KernelUnavailableError

ROWS = {"cuda": 261, "cpu": 37}
"""Device type -> rows of a case: twice the longest pinned tile and a bit, so that tiles are full, masked, dead and cut
off; fewer in the interpreter."""
RMS_RATIO = 0.005
FP32_FLOOR = 1e-5
"""Share of its largest value by which an fp32 result may be off beside twice the reference's own error."""
SEED = 0


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call of an op.

    call(impl, **leaves, **fixed): the op's results, a tensor or several, named by `results`. leaves: fp64 inputs with a
    gradient, rounded to the dtype that is checked (`wide` ones to fp32). fixed: other inputs; tensors go to the device.
    """

    name: str
    call: Callable[..., Tensor | tuple[Tensor, ...]]
    results: tuple[str, ...]
    leaves: dict[str, Tensor]
    fixed: dict[str, Any] = field(default_factory=dict)
    wide: frozenset[str] = frozenset()


def figures_of(op: str, dtype: torch.dtype, shape_class: int, device: torch.device) -> tuple[Figure, ...]:
    """Check `op` in one dtype and shape class on a device and return how far each result and gradient is off."""
    from triweave.kernels.admission.self_check_cases import CASES

    if op not in CASES:
        raise KernelUnavailableError(f"{op}: the self-check has no cases for it")
    with _apart_from_the_caller():
        generator = torch.Generator().manual_seed(SEED)
        cases = CASES[op](shape_class, ROWS[device.type], generator)
        return tuple(figure for case in cases for figure in _figures(case, dtype, device))


@contextlib.contextmanager
def _apart_from_the_caller() -> Iterator[None]:
    """Keep the caller's modes out, and the check out of the bookkeeping of a checkpoint that it happens to run in."""
    with (
        _disable_current_modes(),
        torch.inference_mode(mode=False),
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x),
    ):
        yield


def _figures(case: Case, dtype: torch.dtype, device: torch.device) -> Iterator[Figure]:
    host = torch.device("cpu")
    rounded = {name: x.to(torch.float32 if name in case.wide else dtype) for name, x in case.leaves.items()}
    exact = _run(case, "reference", {name: x.double() for name, x in rounded.items()}, dtype, host)
    peer = _run(case, "reference", rounded, dtype, host)
    got = _run(case, "triton", rounded, dtype, device)
    for name, want in exact.items():
        yield _figure(case.name, name, want, peer[name], got[name])


def _run(
    case: Case, impl: str, leaves: dict[str, Tensor], dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """Return the op's results, and the leaves' gradients as `grad <leaf>`, on the host.

    The incoming gradients are the same numbers in every run: rounded to `dtype`, then cast to a result's own.
    """
    inputs = {name: x.to(device).requires_grad_() for name, x in leaves.items()}
    fixed = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in case.fixed.items()}
    returned = case.call(impl, **inputs, **fixed)
    results = dict(zip(case.results, returned if isinstance(returned, tuple) else (returned,), strict=True))
    differentiable = [x for x in results.values() if x.requires_grad]
    generator = torch.Generator().manual_seed(SEED + 1)
    grads = [torch.randn(x.shape, generator=generator).to(dtype).to(x) for x in differentiable]
    gradients = torch.autograd.grad(differentiable, list(inputs.values()), grads)
    results |= {f"grad {name}": x for name, x in zip(inputs, gradients, strict=True)}
    return {name: x.detach().cpu() for name, x in results.items()}


def _figure(case: str, tensor: str, want: Tensor, peer: Tensor, got: Tensor) -> Figure:
    """Compare a result of the kernel with fp64; empty rows' minus infinities must be in the same places."""
    if got.shape != want.shape or got.dtype != peer.dtype or not torch.equal(got.double().isinf(), want.isinf()):
        error = ratio = math.inf
        return Figure(case=case, tensor=tensor, error=error, allowed_error=0.0, rms_ratio=ratio, allowed_rms_ratio=0.0)
    finite = want.isfinite()
    exact, theirs, ours = (x.double()[finite] for x in (want, peer, got))
    largest, size = _largest(exact), _root_mean_square(exact)
    floor = FP32_FLOOR if got.dtype == torch.float32 else torch.finfo(got.dtype).eps
    return Figure(
        case=case,
        tensor=tensor,
        error=_largest(ours - exact),
        allowed_error=2 * _largest(theirs - exact) + floor * largest,
        rms_ratio=_root_mean_square(ours - exact) / (size or 1.0),
        allowed_rms_ratio=RMS_RATIO,
    )


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def _root_mean_square(x: Tensor) -> float:
    return float(x.square().mean().sqrt()) if x.numel() else 0.0
