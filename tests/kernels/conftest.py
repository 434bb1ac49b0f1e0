"""One torch thread for every kernel test, for the suite shares two cores; and Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from siblings import load_path


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def interpreter_module() -> ModuleType:
    """The module tests/kernels/interpreter.py."""
    return load_path(Path(__file__).with_name("interpreter.py"))


@pytest.fixture(scope="module")
def interpreter(interpreter_module: ModuleType) -> Iterator[Callable[[str], Any]]:
    """Triton kernels of one test file run interpreted; `interpreter("swiglu_triton")` returns that module."""
    pytest.importorskip("triton")
    with interpreter_module.interpreted_triton() as load:
        yield load
