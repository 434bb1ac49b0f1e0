import gc
import signal
from types import ModuleType

import pytest
from siblings import load_sibling


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
    return load_sibling("rank_pool")
