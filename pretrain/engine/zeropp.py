"""ZeRO++ (Wang et al. 2023): hpZ, qwZ and qgZ of DeepSpeed, and where they may run.

    hpZ   zero_hpz_partition_size: N      the backward pass gathers weights from the N ranks of a node; exact
    qwZ   zero_quantized_weights: true    weights are gathered as int8 blocks, through fp16
    qgZ   zero_quantized_gradients: true  gradients are reduced between nodes as int4 blocks, of fp16

All three are ZeRO-3's alone; at other stages DeepSpeed ignores them without a word. Its quantisers are CUDA kernels
that read fp16 whatever they are given (0.19.8, csrc/quantization/pt_binding.cpp): qwZ converts for them, qgZ does not,
so that its gradients must be fp16 as they are reduced.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from triweave.pretrain.errors import PretrainError

if TYPE_CHECKING:
    import torch

    from triweave.pretrain.engine.config import TrainConfig

SECTION = "deepspeed.zero_optimization"
WEIGHTS, GRADIENTS = "zero_quantized_weights", "zero_quantized_gradients"
HPZ = "zero_hpz_partition_size"


def check_zeropp(zero: dict[str, Any], train: TrainConfig) -> None:
    """Raise PretrainError for a combination that DeepSpeed would ignore, or that would not train what it says."""
    if zero.get("zero_quantized_nontrainable_weights"):
        raise PretrainError(
            f"{SECTION}.zero_quantized_nontrainable_weights keeps frozen weights as int8, which no checkpoint could "
            "hold; remove it"
        )
    if zero.get("zeropp_loco_param"):
        raise PretrainError(
            f"{SECTION}.zeropp_loco_param keeps errors between steps that no checkpoint holds; remove it"
        )
    for key in [*quantises(zero), *([HPZ] if zero.get(HPZ, 1) != 1 else [])]:
        if train.zero_stage != 3:
            raise PretrainError(
                f"{SECTION}.{key} does nothing at train.zero_stage={train.zero_stage}; remove it, or set "
                "train.zero_stage=3"
            )
    if zero.get(WEIGHTS) and train.precision == "fp32":
        raise PretrainError(
            f"{SECTION}.{WEIGHTS} passes weights through fp16, which train.precision=fp32 is not; set "
            "train.precision=bf16, or remove it"
        )
    if zero.get(GRADIENTS) and train.precision != "fp16":
        raise PretrainError(
            f"{SECTION}.{GRADIENTS} reads gradients as fp16 whatever they are, and train.precision is "
            f"{train.precision}; set train.precision=fp16, or remove it"
        )


def quantises(zero: dict[str, Any]) -> list[str]:
    """Return the keys of the section that quantise what ranks send each other."""
    return [key for key in (WEIGHTS, GRADIENTS) if zero.get(key)]


def check_zeropp_device(zero: dict[str, Any], device: torch.device) -> None:
    """Raise PretrainError for quantisation on a device that has no kernels for it."""
    for key in quantises(zero):
        if device.type != "cuda":
            raise PretrainError(
                f"{SECTION}.{key} has kernels for CUDA only, and this run is on {device.type}; remove it, or set "
                "train.device=cuda"
            )
