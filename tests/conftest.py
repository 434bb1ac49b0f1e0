import gc
import importlib.util
import signal
import sys
from pathlib import Path
from types import ModuleType

import pytest


def pytest_configure(config: pytest.Config) -> None:  # noqa: ARG001 - pytest's hook signature
    """Take Ctrl-C as the tests of interrupts need it.

    A shell ignores SIGINT for what it starts in the background and children inherit that; a handler they do not.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish(session: pytest.Session) -> None:  # noqa: ARG001 - pytest's hook signature
    """Keep the garbage collector off what stays anyway: modules and thousands of tests, half a second each collection.

    The benchmark of kernels collects before it measures memory, once for each of its rows.
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure(config: pytest.Config) -> None:  # noqa: ARG001 - pytest's hook signature
    """Give the interpreter its objects back, for nanobind takes those that it finds at the end for leaks."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def rank_pool() -> ModuleType:
    """The module tests/pretrain/rank_pool.py: rank processes shared by the whole session."""
    path = Path(__file__).with_name("pretrain") / "rank_pool.py"
    specification = importlib.util.spec_from_file_location("triweave_test_rank_pool", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    return module
