"""Attention throughput that others published, to stand beside the roofline model. Measured elsewhere, none by us.

TFLOP/s count 4 pairs H K FLOPs forward and 10 backward on the live pairs, as `work.attention` does. A figure that its
source gives as a time was turned into TFLOP/s by that formula.
"""

from __future__ import annotations

from dataclasses import dataclass

STATUS = "measured elsewhere"


@dataclass(frozen=True, kw_only=True)
class PublicFigure:
    """One published figure of one implementation."""

    impl: str
    chip: str
    """A name of chips.PEAKS."""
    direction: str
    mask: str
    shape: str
    dtype: str
    tflops: float
    source: str


_FA3 = "Shah et al. 2024, FlashAttention-3, figure 5 (H100 80GB SXM5)"
_TUTORIAL = "pytorch/benchmark pull request 2391"
_TLX = "facebookexperimental/triton pull request 3582, from its microseconds"
_MAGI = "MagiAttention's long-context attention benchmark, kernel level, as the design of this project quotes it"
_FLEX = "pytorch/pytorch pull request 137036 (comment of 2024-10-29)"
_TLX_B200 = "meta-pytorch/tritonbench pull request 589 (S 8191)"
_FA2_B200 = "Dao-AILab/flash-attention issue 1589"
_FLEX_B200 = "pytorch/pytorch pull request 188644, column Triton"
_FA4 = "Zadouri et al. 2026, FlashAttention-4 (B200): the best of its shapes"

_PAPER_SHAPE = "B2 S8192 H16 K128"
_TLX_SHAPE = "B4 S8192 H48 K128"
_PACKED_SHAPE = "S32768 H64 G8 K128"


def _figure(
    impl: str,
    direction: str,
    mask: str,
    shape: str,
    tflops: float,
    source: str,
    *,
    chip: str = "h100",
    dtype: str = "bf16",
) -> PublicFigure:
    return PublicFigure(
        impl=impl, chip=chip, direction=direction, mask=mask, shape=shape, dtype=dtype, tflops=tflops, source=source
    )


FIGURES: tuple[PublicFigure, ...] = (
    _figure("FlashAttention-2", "fwd", "full", _PAPER_SHAPE, 370, _FA3, dtype="fp16"),
    _figure("FlashAttention-3", "fwd", "full", _PAPER_SHAPE, 646, _FA3, dtype="fp16"),
    _figure("Triton of 2024", "fwd", "full", _PAPER_SHAPE, 392, _FA3, dtype="fp16"),
    _figure("FlashAttention-2", "fwd", "causal", _PAPER_SHAPE, 333, _FA3, dtype="fp16"),
    _figure("FlashAttention-3", "fwd", "causal", _PAPER_SHAPE, 602, _FA3, dtype="fp16"),
    _figure("Triton of 2024", "fwd", "causal", _PAPER_SHAPE, 369, _FA3, dtype="fp16"),
    _figure("FlashAttention-3", "fwd", "full", _PAPER_SHAPE, 614.2, _TUTORIAL),
    _figure("Triton tutorial", "fwd", "full", _PAPER_SHAPE, 470.7, _TUTORIAL),
    _figure("TLX", "fwd", "causal", _TLX_SHAPE, 660.7, _TLX),
    _figure("FlashAttention-3", "fwd", "causal", _TLX_SHAPE, 684.7, _TLX),
    _figure("TLX", "bwd", "causal", _TLX_SHAPE, 539.1, _TLX),
    _figure("FlashAttention-3", "bwd", "causal", _TLX_SHAPE, 538.7, _TLX),
    _figure("FlashAttention-3", "fwd", "documents", _PACKED_SHAPE, 585, _MAGI),
    _figure("MagiAttention", "fwd", "documents", _PACKED_SHAPE, 547, _MAGI),
    _figure("FlexAttention", "fwd", "documents", _PACKED_SHAPE, 270, _MAGI),
    _figure("MagiAttention", "fwd", "irregular", _PACKED_SHAPE, 548, _MAGI),
    _figure("FlexAttention", "fwd", "full", "B4 S16384 H16 K64", 348.5, _FLEX),
    _figure("FlexAttention", "fwd", "causal", "B4 S16384 H16 K64", 345.7, _FLEX),
    _figure("FlashAttention-4", "fwd", "full", "K128", 1613, _FA4, chip="b200"),
    _figure("TLX", "fwd", "full", _TLX_SHAPE, 949.6, _TLX_B200, chip="b200"),
    _figure("FlashAttention-2", "fwd", "full", "B2 S8192 H32 K64", 343.1, _FA2_B200, chip="b200", dtype="fp16"),
    _figure("FlexAttention", "fwd", "full", "B8 S1024 H16 K128", 380.6, _FLEX_B200, chip="b200"),
)
"""Best known figures of those whose masks or shapes come near ours."""
