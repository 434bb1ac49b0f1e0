"""Fixtures shared by the tests of pretrain."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from siblings import load_sibling
from spine_runs import write_run_config

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def synthetic() -> ModuleType:
    """The module tests/pretrain/synthetic.py, loaded by path as rank processes do."""
    return load_sibling("synthetic")


@pytest.fixture
def object_store(tmp_path: Path) -> Iterator[dict[str, str]]:
    """An empty object store in this process: the variables that name it."""
    import object_server

    with object_server.object_server() as server:
        yield server.environment | {"TRIWEAVE_CACHE_DIR": str(tmp_path / "cache")}


@pytest.fixture(scope="session")
def run_config(rank_pool, tmp_path_factory) -> Path:
    """A run YAML over tiny shards with pictures, sounds and text; run_dir is to be overridden."""
    corpus = rank_pool.load(HERE.parent / "data_pipeline" / "conftest.py")
    return write_run_config(corpus, tmp_path_factory.mktemp("spine"))


@pytest.fixture(scope="session")
def train(rank_pool, run_config):
    """Run the program on the ranks of a pool in a run folder; extra settings as key=value."""

    def train(
        run_dir: Path, ranks: int, *settings: str, resume: bool = False, environment: dict[str, str] | None = None
    ) -> list[str]:
        return rank_pool.pool(ranks).run(
            HERE / "checkpoint_tasks.py",
            "run_spine",
            config=str(run_config),
            overrides=[f"run_dir={run_dir}", *settings],
            resume=resume,
            environment=environment,
        )

    return train


@pytest.fixture(scope="session")
def straight(train, tmp_path_factory) -> Path:
    """A run of 2 ranks that is never interrupted."""
    run_dir = tmp_path_factory.mktemp("straight")
    assert train(run_dir, 2) == ["", ""]
    return run_dir


@pytest.fixture
def make_batch(synthetic):
    """The factory of synthetic PackedBatch objects."""
    return synthetic.make_batch


@pytest.fixture(autouse=True)
def _one_thread():
    """Sums on several threads may be taken in another order, and the machine is shared.

    Draws without a seed of their own are the same whichever tests ran before.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
