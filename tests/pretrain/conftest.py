"""Fixtures shared by the tests of pretrain."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from spine_runs import HALF, STEPS

HERE = Path(__file__).parent


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
def object_store(tmp_path: Path) -> Iterator[dict[str, str]]:
    """An empty object store in this process: the variables that name it."""
    import object_server

    with object_server.object_server() as server:
        yield server.environment | {"TRIWEAVE_CACHE_DIR": str(tmp_path / "cache")}


@pytest.fixture(scope="session")
def run_config(rank_pool, tmp_path_factory) -> Path:
    """A run YAML over tiny shards with pictures, sounds and text; run_dir is to be overridden."""
    folder = tmp_path_factory.mktemp("spine")
    corpus = rank_pool.load(HERE.parent / "data_pipeline" / "conftest.py")
    records = corpus.write_records(folder / "birds.jsonl", 36)
    manifest = corpus.build(
        corpus.ManifestSource(root=records), folder / "birds", corpus.BuildOptions(shard_size_bytes=100_000)
    )
    corpus.train_tokenizer([manifest], 400, folder / "tokenizer.model")
    corpus.write_token_counts(manifest, folder / "tokenizer.model")
    config = {
        "run_dir": str(folder / "unused"),
        "data": {
            "sources": [{"name": "birds", "shards": str(folder / "birds")}],
            "tokenizer": str(folder / "tokenizer.model"),
            "sequence_length": 96,
            "geometry": {"image_patch_px": 8, "image_max_tokens": 12},
            "workers": 0,
        },
        "model": {"d_model": 32, "layers": 1, "heads": 2, "kv_heads": 1, "head_width": 16},
        "optimizer": {"lr": 1e-3, "eps": 1e-5},
        "schedule": {"warmup_steps": 2},
        "train": {"steps": STEPS, "global_batch_rows": 4, "micro_batch_rows": 1, "zero_stage": 2, "device": "cpu",
                  "torch_threads": 1},
        "checkpoint": {"every_steps": HALF, "keep": 5},
    }  # fmt: skip
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


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
    """Sums on several threads may be taken in another order; and the machine is shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
