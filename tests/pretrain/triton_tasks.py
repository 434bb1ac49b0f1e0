"""What tests/pretrain/test_triton_model.py runs inside a rank process: the training program with chosen kernels."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from siblings import load_path

from triweave.pretrain.config import load_config
from triweave.pretrain.train import train

INTERPRETER = Path(__file__).parents[1] / "kernels" / "interpreter.py"


def run_with(world: Any, *, config: str, overrides: Sequence[str], kernels: str) -> None:  # noqa: ARG001
    """Train on this rank with TRIWEAVE_KERNELS=kernels, Triton interpreted."""
    os.environ["TRIWEAVE_KERNELS"] = kernels
    with interpreted_triton():
        train(load_config(config, list(overrides)))


def interpreted_triton() -> contextlib.AbstractContextManager[Callable[[str], Any]]:
    """Return the context of tests/kernels/interpreter.py in which the `*_triton` modules are interpreted."""
    context: contextlib.AbstractContextManager[Callable[[str], Any]] = load_path(INTERPRETER).interpreted_triton()
    return context
