"""What tests/pretrain/test_triton_model.py runs inside a rank process: the training program with chosen kernels."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from triweave.pretrain.config import load_config
from triweave.pretrain.train import train

INTERPRETER = Path(__file__).parents[1] / "kernels" / "interpreter.py"


def run_with(world: Any, *, config: str, overrides: Sequence[str], kernels: str) -> None:  # noqa: ARG001
    """Train on this rank with TRIWEAVE_KERNELS=kernels, Triton interpreted."""
    os.environ["TRIWEAVE_KERNELS"] = kernels
    try:
        with interpreted_triton():
            train(load_config(config, list(overrides)))
    finally:
        del os.environ["TRIWEAVE_KERNELS"]


def interpreted_triton() -> contextlib.AbstractContextManager[Callable[[str], Any]]:
    """Return the context of tests/kernels/interpreter.py in which the `*_triton` modules are interpreted."""
    key = "triweave_test_interpreter"
    if key not in sys.modules:
        specification = importlib.util.spec_from_file_location(key, INTERPRETER)
        assert specification is not None
        assert specification.loader is not None
        sys.modules[key] = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(sys.modules[key])
    context: contextlib.AbstractContextManager[Callable[[str], Any]] = sys.modules[key].interpreted_triton()
    return context
