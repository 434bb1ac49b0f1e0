"""`train.compile`: torch.compile over one block of the trunk at a time.

A region is the forward of one `Block` or `CrossBlock`, without its hooks: those of DeepSpeed and of the participation
contract stand around it and run as ever. Blocks share one compiled program, so the time to compile does not grow with
depth. Our kernels are custom ops that the compiler calls and does not look into; it fuses what stands between them.

A region is compiled whole or not at all: what the compiler cannot take, and a program that it would have to make anew
more often than its limit, end the run instead of going on uncompiled.

Under ZeRO-3 a compiled block is a leaf of DeepSpeed: its parameters are gathered together when it is entered, since
within the region no module has hooks by which each could gather its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from triweave.pretrain.errors import PretrainError
from triweave.pretrain.fusion.cross import CrossBlock
from triweave.pretrain.model.decoder import Block

if TYPE_CHECKING:
    from torch import nn

REGIONS = (Block, CrossBlock)


def compile_blocks(model: nn.Module, *, zero_stage: int, device: torch.device) -> None:
    """Have every block of `model.decoder` compiled when it first runs; before DeepSpeed takes the model.

    The first shape that a process meets has a program of its own, a second one makes a program for any; so processes of
    one layout have the same programs where their shapes come in the same order, or are all one.
    Raises PretrainError where there is no compiler for the device's code.
    """
    from deepspeed.utils import set_z3_leaf_module

    _check_compiler(device)
    _read_no_pickles()
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    for module in model.get_submodule("decoder").modules():
        if isinstance(module, REGIONS):
            if zero_stage == 3:
                set_z3_leaf_module(module, True)
            module.forward = torch.compile(module.forward, fullgraph=True)  # type: ignore[method-assign]


def _check_compiler(device: torch.device) -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise PretrainError(
            f"train.compile=true makes C++ for {device.type}, and no compiler is found; install g++, name one in the "
            "environment variable CXX, or set train.compile=false"
        ) from None


def _read_no_pickles() -> None:
    """Leave the compiler's caches of graphs alone: they are pickles, and a run reads none.

    What the C++ or Triton compiler makes of a program is kept by the hash of its source, so a second start has only the
    graphs to trace again.
    """
    import torch._functorch.config as functorch
    import torch._inductor.config as inductor

    functorch.enable_autograd_cache = False
    inductor.fx_graph_cache = False
