"""What the benchmark runs: for every op its inputs, its least work, our implementations and its peers' calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from triweave.kernels.bench.masks import BenchMask
from triweave.kernels.errors import KernelInputError
from triweave.kernels.roofline.work import Work

SEED = 0
EPS = 1e-6

Call = Callable[..., Tensor | tuple[Tensor, ...]]
"""The op on the case's inputs, in their order; what is differentiated."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of one benchmark call, as far as an op has them. D = H K."""

    mask: BenchMask
    heads: int = 8
    key_heads: int = 8
    width: int = 64
    """Head width K."""
    vocabulary: int = 8192
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def tokens(self) -> int:
        """Packed tokens S."""
        return self.mask.tokens

    @property
    def model_width(self) -> int:
        """Model width D."""
        return self.heads * self.width

    @property
    def number_bytes(self) -> int:
        """Bytes of a number of the inputs."""
        return self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class Case:
    """One op on one set of inputs."""

    op: str
    shape: str
    """Sizes by their letters, and of a mask how many documents."""
    dtype: torch.dtype
    inputs: Sequence[Tensor]
    """Leaves that are differentiated."""
    ours: Callable[[str], Call]
    """Implementation's name -> call."""
    peers: Mapping[str, Call]
    """Peer's name -> call; a peer that is missing has nothing comparable."""
    work: Callable[[str], Work]
    """`fwd` or `bwd` -> the least work of the formula."""
    of_whole: Callable[[Tensor], Tensor] = lambda x: x
    """The part of inputs, result and gradients that is compared with fp64: all, or a few of independent heads."""
    mask: str | None = None
    """Kind of mask, of an op that has one."""
    gradients_in_forward: bool = False
    """Whether the forward makes the gradients, so that the backward has no work of its own."""


def draw(sizes: Sizes, *shapes: Sequence[int], scale: float = 1.0) -> list[Tensor]:
    """Return normal numbers of each shape, the same on every device, leaves of autograd."""
    generator = torch.Generator().manual_seed(SEED)
    drawn = (torch.randn(tuple(shape), generator=generator) * scale for shape in shapes)
    return [x.to(sizes.device, sizes.dtype).requires_grad_() for x in drawn]


def build(op: str, sizes: Sizes) -> Case:
    """Return the case of an op. Raises KernelInputError for an op without one."""
    from triweave.kernels.bench import masked_cases, row_cases

    builders: dict[str, Callable[[Sizes], Case]] = {**masked_cases.CASES, **row_cases.CASES}
    if op not in builders:
        raise KernelInputError(f"bench kernels: there is no op {op!r}; known are {', '.join(builders)}")
    return builders[op](sizes)
