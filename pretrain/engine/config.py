"""What a run asks of DeepSpeed: steps, batch, ZeRO stage and precision, and the dict they become."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

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
    "torch_autocast": "train.precision",
    "data_types": "train.precision",
    "communication_data_type": "train.precision",
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
    "zero_optimization.mics_shard_size": "nothing: checkpoint fragments need one partition over all ranks",
}
"""Key of the DeepSpeed dict -> the setting of ours that decides it."""

OFFLOADS = ("offload_optimizer", "offload_param")
LARGEST_BUCKET = 500_000_000
"""Elements of the communication buckets of a model that is at least that large, DeepSpeed's own default."""

AbsentModality = Literal["skip", "guard", "align"]
"""What a step does about a modality that some or all ranks lack; see `participation`."""
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
    absent_modality: AbsentModality = "skip"
    """skip: a tower nobody has data for stays as it is; guard: it takes a step of zeros; align: refuse uneven steps."""
    loss_norm: LossNorm = "global_tokens"
    """A mean over all tokens, documents, or in between of the step; micro_batch_tokens: a mean of means, as others."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: low-precision compute over fp32 master weights and moments (ZeRO 1, 2, 3)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA when there is a device; cpu talks gloo, cuda talks NCCL."""
    log_every_steps: int = 1
    """Steps between two progress lines; metrics.jsonl has every step."""
    torch_threads: int = 0
    """Threads of torch in each rank on CPU; 0 leaves the launcher's choice."""
    deterministic: bool = False
    """Use only operations that give the same bits in every run on the same layout; an error names one that cannot."""

    @property
    def dtype(self) -> torch.dtype:
        """What the model's weights and activations are while it computes."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def __post_init__(self) -> None:
        for name in ("steps", "global_batch_rows", "micro_batch_rows", "log_every_steps"):
            if getattr(self, name) < 1:
                raise PretrainError(f"train.{name} is {getattr(self, name)}; it must be at least 1")
        if self.torch_threads < 0:
            raise PretrainError(f"train.torch_threads is {self.torch_threads}; it must be 0 or above")
        if self.precision == "bf16" and self.zero_stage == 0:
            raise PretrainError(
                "train.precision=bf16 needs fp32 master weights, which train.zero_stage=0 does not keep; "
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
    _check_offload(zero)
    stage, bf16 = config.train.zero_stage, config.train.precision == "bf16"
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
        # ZeRO 0 clips in this file: DeepSpeed's clip there does not report the norm
        "gradient_clipping": config.optimizer.clip_norm if stage else 0.0,
        "zero_optimization": {**(buckets if stage else {}), **zero, "stage": stage},
        "bf16": {"enabled": bf16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def offloads(settings: dict[str, Any]) -> bool:
    """Return whether a DeepSpeed dict keeps gradients or state in host memory."""
    zero = settings["zero_optimization"]
    return any((zero.get(key) or {}).get("device", "none") != "none" for key in OFFLOADS)


def _check_offload(zero: dict[str, Any]) -> None:
    """Raise PretrainError for state that is kept where its fragments cannot be read: between steps it is in files."""
    for key in OFFLOADS:
        device = (zero.get(key) or {}).get("device", "none")
        if device not in ("cpu", "none"):
            raise PretrainError(
                f"deepspeed.zero_optimization.{key}.device is {device!r}, whose state no checkpoint could hold; "
                "use cpu, or none"
            )
