"""Optimizer state that lies in files between updates, by DeepSpeed's swapper at ZeRO 3.

    update       for each sub-group: files -> buffers, gradient beside them, AdamW, buffers -> files
    else         weights, exp_avg, exp_avg_sq are one file each of raw fp32; `step` and small sub-groups stay in memory

DeepSpeed moves sub-groups of at least a mebibyte (ZeRO-Infinity, Rajbhandari et al. 2021). Between updates nothing
writes to their files, so that a checkpoint reads and writes them through shared memory maps, whose pages the system may
drop again. Gradients stay in host memory, where ZeRO 3 holds them anyway: DeepSpeed 0.19.8 would write them to files
too, read them to addresses that direct I/O may refuse, and for a tower that a step leaves out read those of an earlier
step, or fail for want of any.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from triweave.pretrain.errors import PretrainError

STATE_BUFFERS = 4
"""Buffers of one sub-group in an update: weights, gradient, two moments."""


def refuse_without_libaio() -> None:
    """Compile DeepSpeed's asynchronous I/O, at first use; raises PretrainError where it cannot be."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    try:
        AsyncIOBuilder().load(verbose=False)
    except RuntimeError as error:
        raise PretrainError(
            "deepspeed.zero_optimization.offload_optimizer.device is 'nvme', which wants libaio's headers; install "
            "them (Debian, Ubuntu: apt-get install libaio-dev), or use device: cpu"
        ) from error


def in_files(optimizer: Any, sub_group: int) -> bool:
    """Return whether a stage-3 sub-group lies in files between updates."""
    return bool(optimizer._swappable_optimizer_subgroup(sub_group))


def file_groups(optimizer: Any) -> list[int]:
    """Return the sub-groups that lie in files, of an optimizer of any stage."""
    if not getattr(optimizer, "swap_optimizer", False):
        return []
    return [number for number in range(len(optimizer.fp16_groups)) if in_files(optimizer, number)]


@contextmanager
def in_memory(optimizer: Any, sub_group: int, *, write: bool) -> Iterator[None]:
    """Have a file group's tensors in memory within the block; `write` them to their files behind it."""
    optimizer._optimizer_states_and_gradient_swap_in(sub_group)
    yield
    if write:
        optimizer._optimizer_states_and_gradient_swap_out(sub_group)
    else:
        optimizer._release_swap_buffers(sub_group)


def keep_gradients(optimizer: Any) -> None:
    """Leave the gradients of file groups in host memory."""
    if not file_groups(optimizer):
        return
    swapper = optimizer.optimizer_swapper

    def keep(parameter: torch.Tensor, gradient_offsets: list[int], gradient_tensors: list[torch.Tensor]) -> None:
        kept = swapper.swap_params_info[swapper.parameter_id(parameter)].unswapped_gradients
        for offset, gradient in zip(gradient_offsets, gradient_tensors, strict=True):
            kept[offset] = gradient.cpu()

    swapper.swap_out_gradients = keep


def fill_gradients(optimizer: Any) -> None:
    """Give a gradient of 0 to the file groups that no backward has reached; DeepSpeed scales one in every update."""
    for sub_group in file_groups(optimizer):
        info = _info(optimizer, sub_group)
        if not info.has_gradients():
            info.unswapped_gradients[0] = torch.zeros(1).expand(info.numel())


def map_state(optimizer: Any, sub_group: int, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return kind -> [numel] shared maps of a file group's weights and of the moments in its AdamW `state`.

    What is written to them counts from `flush_state` on.
    """
    info = _info(optimizer, sub_group)
    paths = {id(context.compute_tensor): context.swap_path for context in info.tensors}
    tensors = {"weight": optimizer.fp32_partitioned_groups_flat[sub_group]} | {
        kind: state[kind] for kind in ("exp_avg", "exp_avg_sq")
    }
    return {
        kind: torch.from_file(paths[id(tensor)], shared=True, size=info.numel(), dtype=torch.float32)
        for kind, tensor in tensors.items()
    }


def flush_state(optimizer: Any, sub_group: int) -> None:
    """Force what was written to the maps of a file group to its files, which DeepSpeed reads past the page cache."""
    for path in _info(optimizer, sub_group).get_swap_paths():
        descriptor = os.open(path, os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_files(optimizer: Any) -> None:
    """Remove this rank's files."""
    if getattr(optimizer, "swap_optimizer", False):
        shutil.rmtree(optimizer.optimizer_swapper.swap_folder, ignore_errors=True)


def _info(optimizer: Any, sub_group: int) -> Any:
    swapper = optimizer.optimizer_swapper
    return swapper.swap_params_info[swapper.parameter_id(optimizer.fp32_partitioned_groups_flat[sub_group])]
