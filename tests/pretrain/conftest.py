"""Fixtures shared by the tests of pretrain."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture(scope="session")
def synthetic() -> ModuleType:
    """The module tests/pretrain/synthetic.py, loaded by path as rank processes do."""
    path = Path(__file__).with_name("synthetic.py")
    specification = importlib.util.spec_from_file_location("triweave_test_synthetic", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # dataclasses look their module up here
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def rank_pool() -> ModuleType:
    """The module tests/pretrain/rank_pool.py: rank processes shared by the whole session."""
    path = Path(__file__).with_name("rank_pool.py")
    specification = importlib.util.spec_from_file_location("triweave_test_rank_pool", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def make_batch(synthetic):
    """The factory of synthetic PackedBatch objects."""
    return synthetic.make_batch


@pytest.fixture(autouse=True)
def _one_thread():
    """Sums on several threads may be taken in another order; and the machine is shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
