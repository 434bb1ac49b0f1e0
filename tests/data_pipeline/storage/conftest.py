"""Object stores for the storage tests: a small one in this process, and Ceph's gateway where it is installed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from triweave.data_pipeline.storage.client import forget_clients

HERE = str(Path(__file__).parent)


def beside(name: str) -> ModuleType:
    """Return a module of this folder; with pytest's importlib mode it is on no path."""
    sys.path.insert(0, HERE)
    try:
        return __import__(name)
    finally:
        sys.path.remove(HERE)


@pytest.fixture
def use_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Point this process and its children at a store, with a cache of the test's own and short waits.

    Afterwards loaders fork their workers again, as the tests of local shards expect.
    """

    def use(environment: dict[str, str], **settings: object) -> None:
        names = {"CACHE_DIR": tmp_path / "cache", "S3_TIMEOUT_S": 2, "S3_DEADLINE_S": 20, "S3_PAGE_KB": 16} | settings
        for name, value in (environment | {f"TRIWEAVE_{name}": str(value) for name, value in names.items()}).items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("AWS_PROFILE", raising=False)

    yield use
    forget_clients()


@pytest.fixture
def store(use_store: Callable[..., None]) -> Iterator[Any]:
    """An empty ObjectServer that the environment names."""
    with beside("object_server").object_server() as server:
        use_store(server.environment)
        yield server


@pytest.fixture
def fault_proxy() -> Callable[[str], AbstractContextManager[Any]]:
    """`fault_proxy.fault_proxy`: (endpoint) -> context manager of a FaultProxy."""
    proxy: Callable[[str], AbstractContextManager[Any]] = beside("fault_proxy").fault_proxy
    return proxy


@pytest.fixture(scope="session")
def ceph_programs() -> None:
    """Skip where Ceph is not installed."""
    if missing := beside("radosgw").missing_programs():
        pytest.skip(f"not installed: {', '.join(missing)}; tests/launch/install_system_packages.sh installs them")


@pytest.fixture(scope="session")
def ceph(ceph_programs: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:  # noqa: ARG001
    """Ceph's radosgw with a bucket `corpora`, once per session."""
    radosgw = beside("radosgw")
    with radosgw.radosgw(tmp_path_factory.mktemp("ceph")) as server:
        server.make_bucket("corpora")
        yield server
