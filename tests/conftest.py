import signal

import pytest


def pytest_configure(config: pytest.Config) -> None:  # noqa: ARG001 - pytest's hook signature
    """Take Ctrl-C as the tests of interrupts need it.

    A shell ignores SIGINT for what it starts in the background and children inherit that; a handler they do not.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
