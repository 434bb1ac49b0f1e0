"""What a run asks of DeepSpeed: steps, batch, ZeRO stage and precision, and the dict they become."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from triweave.pretrain.engine.loss_scale import LossScaleConfig
from triweave.pretrain.engine.nvme import STATE_BUFFERS
from triweave.pretrain.engine.zeropp import GRADIENTS, check_zeropp, check_zeropp_device
from triweave.pretrain.errors import PretrainError

if TYPE_CHECKING:
    from triweave.pretrain.config import RunConfig

OWNED_KEYS = {
    "train_batch_size": "train.global_batch_rows",
    "train_micro_batch_size_per_gpu": "train.micro_batch_rows",
    "gradient_accumulation_steps": "train.global_batch_rows and train.micro_batch_rows",
    "managed_gradient_accumulation": "train.global_batch_rows and train.micro_batch_rows",
    "gradient_clipping": "optimizer.clip_norm",
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "fp16": "train.precision",
    "bf16": "train.precision",
    "bfloat16": "train.precision",
    "amp": "train.precision",
    "compile": "train.compile",
    "torch_autocast": "train.precision",
    "data_types": "train.precision",
    "communication_data_type": "train.precision",
    "sequence_parallel_size": "train.sequence_parallel",
    "data_parallel_size": "train.sequence_parallel",
    "zero_allow_untested_optimizer": "optimizer",
    "zero_force_ds_cpu_optimizer": "optimizer",
    "gradient_predivide_factor": "nothing: the loss is scaled to the global-token mean",
    "prescale_gradients": "nothing: the loss is scaled to the global-token mean",
    "zero_optimization.stage": "train.zero_stage",
    "zero_optimization.ignore_unused_parameters": "nothing: the participation contract decides",
    "zero_optimization.compute_grad_norm": "nothing: every step's norm is checked and reported",
    "zero_optimization.round_robin_gradients": "nothing: checkpoint fragments need the plain order",
    "zero_optimization.cpu_offload": "zero_optimization.offload_optimizer={device: cpu}, its present name",
    "zero_optimization.cpu_offload_param": "zero_optimization.offload_param={device: cpu}, its present name",
    "zero_optimization.zenflow": "nothing: it steps with an optimizer of its own, past the participation contract",
    "zero_optimization.mics_shard_size": "nothing: checkpoint fragments need one partition over all ranks",
}
"""Key of the DeepSpeed dict -> the setting of ours that decides it."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OFFLOADS = ("offload_optimizer", "offload_param")
LARGEST_BUCKET = 500_000_000
"""Elements of the communication buckets of a model that is at least that large, DeepSpeed's own default."""

AbsentModality = Literal["skip", "guard", "align"]
"""What a step does about a modality that some or all ranks lack; see `participation`."""
Precision = Literal["fp32", "bf16", "fp16"]
"""What a run computes in; see `TrainConfig.precision`."""
LossNorm = Literal["global_tokens", "global_square_root", "global_documents", "micro_batch_tokens"]
"""What one step's loss is a mean over; see `loss_norm`."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How many steps of what size, and how the state is sharded."""

    steps: int = 1000
    """Optimizer steps of the whole run."""
    global_batch_rows: int = 8
    """Packed rows of one optimizer step over all ranks."""
    micro_batch_rows: int = 1
    """Packed rows of one forward pass of one rank."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """0 replicates everything; 1 shards the optimizer, 2 also gradients, 3 also parameters over the ranks."""
    sequence_parallel: int = 1
    """Ranks that hold slices of the same packs (Ulysses), a divisor of their number; 1: each has packs of its own."""
    absent_modality: AbsentModality = "skip"
    """skip: a tower nobody has data for stays as it is; guard: it takes a step of zeros; align: refuse uneven steps."""
    loss_norm: LossNorm = "global_tokens"
    """A mean over all tokens, documents, or in between of the step; micro_batch_tokens: a mean of means, as others."""
    precision: Precision = "fp32"
    """bf16, fp16: low-precision compute over fp32 master weights and moments (ZeRO 1, 2, 3)."""
    loss_scale: LossScaleConfig = field(default_factory=LossScaleConfig)
    """What fp16 multiplies the loss by."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA when there is a device; cpu talks gloo, cuda talks NCCL."""
    norms_every_steps: int = 10
    """Steps between two that also tell how large each tower's gradient and update are; 0: none."""
    log_every_steps: int = 1
    """Steps between two progress lines; metrics.jsonl has every step."""
    wandb_project: str = ""
    """Project of Weights & Biases that gets the same figures (extra `wandb`); empty: none."""
    torch_threads: int = 0
    """Threads of torch in each rank on CPU; 0 leaves the launcher's choice."""
    compile: bool = False
    """Have torch.compile make one program of each block of the trunk; wants a C++ compiler on CPU."""
    deterministic: bool = False
    """Use only operations that give the same bits in every run on the same layout; an error names one that cannot."""

    @property
    def dtype(self) -> torch.dtype:
        """What the model's weights and activations are while it computes."""
        return DTYPES[self.precision]

    def __post_init__(self) -> None:
        for name in ("steps", "global_batch_rows", "micro_batch_rows", "log_every_steps", "sequence_parallel"):
            if getattr(self, name) < 1:
                raise PretrainError(f"train.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("torch_threads", "norms_every_steps"):
            if getattr(self, name) < 0:
                raise PretrainError(f"train.{name} is {getattr(self, name)}; it must be 0 or above")
        if self.precision != "fp32" and self.zero_stage == 0:
            raise PretrainError(
                f"train.precision={self.precision} needs fp32 master weights, which train.zero_stage=0 does not keep; "
                "set train.zero_stage=1 (on one rank it shards nothing)"
            )


def deepspeed_config(config: RunConfig, *, accumulation: int, parameters: int) -> dict[str, Any]:
    """Return the dict for `deepspeed.initialize`: the run's `deepspeed` section plus what our settings decide.

    parameters: elements of the model, the size of buckets is bounded by it. Raises PretrainError naming any key of the
    section that is ours, and for a `zero_optimization` that is no mapping.
    """
    given = config.deepspeed
    zero = given.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise PretrainError(f"deepspeed.zero_optimization is {zero!r}; it must be a mapping of keys to values")
    for key, owner in OWNED_KEYS.items():
        section, _, name = key.rpartition(".")
        if name in (zero if section else given):
            raise PretrainError(f"deepspeed.{key} is decided by {owner}; remove it from the deepspeed section")
    check_zeropp(zero, config.train)
    stage, precision = config.train.zero_stage, config.train.precision
    _check_offload(zero, stage)
    if stage <= 1 and zero.get("overlap_comm"):
        raise PretrainError(
            f"deepspeed.zero_optimization.overlap_comm=true at train.zero_stage={stage} leaves towers unreduced that "
            "the last micro-batch does not hold; remove it, or set train.zero_stage=2"
        )
    bucket = min(LARGEST_BUCKET, 2 * math.ceil(parameters / 2))
    buckets = {"reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    if stage <= 1:
        buckets["overlap_comm"] = False
    return {
        "steps_per_print": None,
        **given,
        "train_micro_batch_size_per_gpu": config.train.micro_batch_rows,
        "gradient_accumulation_steps": accumulation,
        # ZeRO 0 clips in `update.JudgedUpdate`: DeepSpeed's clip there does not report the norm
        "gradient_clipping": config.optimizer.clip_norm if stage else 0.0,
        "zero_optimization": {**(buckets if stage else {}), **_with_own_folder(zero, config.run_dir), "stage": stage},
        "bf16": {"enabled": precision == "bf16"},
        # A scale that is not 0 stays as it is: `loss_scale.LossScale` moves it
        "fp16": {"enabled": precision == "fp16", "loss_scale": config.train.loss_scale.initial},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp16" if zero.get(GRADIENTS) else "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def check_device(config: RunConfig, device: torch.device) -> None:
    """Raise PretrainError for a precision or a quantisation that DeepSpeed does not have on this rank's device."""
    from deepspeed.accelerator import get_accelerator

    if config.train.precision == "fp16" and not get_accelerator().is_fp16_supported():
        raise PretrainError(
            f"train.precision is fp16, which DeepSpeed does not have on this {device.type}; set train.precision=bf16, "
            "or train.device=cuda where there is a device"
        )
    check_zeropp_device(config.deepspeed.get("zero_optimization", {}), device)


def offloads(settings: dict[str, Any]) -> bool:
    """Return whether a DeepSpeed dict keeps gradients or state in host memory."""
    return any(offload_device(settings, key) != "none" for key in OFFLOADS)


def offload_device(settings: dict[str, Any], key: str) -> str:
    """Return where a DeepSpeed dict keeps what `key` of OFFLOADS names: none, cpu or nvme."""
    return str((settings["zero_optimization"].get(key) or {}).get("device", "none"))


def _check_offload(zero: dict[str, Any], stage: int) -> None:
    """Raise PretrainError for an offload that would not start, or would step past the participation contract."""
    section = "deepspeed.zero_optimization"
    allowed = {"offload_optimizer": ("cpu", "nvme", "none"), "offload_param": ("cpu", "none")}
    for key in OFFLOADS:
        device = (zero.get(key) or {}).get("device", "none")
        if device not in allowed[key]:
            raise PretrainError(f"{section}.{key}.device is {device!r}; use {', '.join(allowed[key][:-1])} or none")
    optimizer = zero.get("offload_optimizer") or {}
    for name, value in (("ratio", 1.0), ("super_offload", False)):
        if optimizer.get(name, value) != value:
            raise PretrainError(
                f"{section}.offload_optimizer.{name} steps with an optimizer of its own, past the participation "
                "contract; remove it"
            )
    if optimizer.get("device") != "nvme":
        return
    if stage != 3:
        raise PretrainError(
            f"{section}.offload_optimizer.device is 'nvme', which wants train.zero_stage=3, not {stage}"
        )
    if not optimizer.get("nvme_path"):
        raise PretrainError(f"{section}.offload_optimizer.nvme_path is missing; name a folder on the drive")
    if optimizer.get("pipeline_read") or optimizer.get("pipeline_write"):
        raise PretrainError(
            f"{section}.offload_optimizer.pipeline_read and pipeline_write are not supported; remove them"
        )
    if optimizer.get("buffer_count", STATE_BUFFERS) < STATE_BUFFERS:
        raise PretrainError(
            f"{section}.offload_optimizer.buffer_count is {optimizer['buffer_count']}; AdamW wants at least "
            f"{STATE_BUFFERS}"
        )


def _with_own_folder(zero: dict[str, Any], run_dir: str) -> dict[str, Any]:
    """Return the section with a folder of this run's below `nvme_path`; DeepSpeed names files by rank alone."""
    optimizer = zero.get("offload_optimizer") or {}
    if optimizer.get("device") != "nvme":
        return zero
    own = hashlib.sha256(str(Path(run_dir).absolute()).encode()).hexdigest()[:16]
    path = Path(optimizer["nvme_path"]).absolute() / f"triweave-{own}"
    return {**zero, "offload_optimizer": {**optimizer, "nvme_path": str(path)}}
