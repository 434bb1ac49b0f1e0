"""Optimizer state in files between updates: no bit of the training changes, and checkpoints hold it as any other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from triweave.launch.cli import main

TASKS = Path(__file__).with_name("nvme_tasks.py")
NVME = {"device": "nvme", "nvme_path": "x"}
needs_libaio = pytest.mark.skipif(
    not any(Path(folder, "libaio.h").exists() for folder in ("/usr/include", "/usr/local/include")),
    reason="DeepSpeed's asynchronous I/O wants libaio's headers (libaio-dev)",
)


@pytest.fixture(scope="module")
def asynchronous_io() -> None:
    """DeepSpeed's extension, compiled where it is not yet: minutes, in which rank processes would be given up."""
    subprocess.run(
        [sys.executable, "-c", "from deepspeed.ops.op_builder import AsyncIOBuilder; AsyncIOBuilder().load()"],
        check=True,
    )


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["steps"] == other["steps"]
    assert one["pieces"].keys() == other["pieces"].keys()
    for name, values in one["pieces"].items():
        np.testing.assert_array_equal(other["pieces"][name], values, err_msg=str(name))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("asynchronous_io")
@needs_libaio
@pytest.mark.parametrize(
    ("case", "accumulation", "poisoned", "precision"),
    [("nobody_has_audio", 2, -1, "fp32"), ("text_only_ranks", 1, -1, "bf16"), ("all", 1, 2, "fp32")],
)
def test_files_change_nothing(rank_pool, tmp_path: Path, case, accumulation, poisoned, precision) -> None:
    """With towers that a step leaves out, with a step that is left out, in both precisions."""
    pool = rank_pool.pool(2)
    options = {"case": case, "accumulation": accumulation, "poisoned": poisoned, "precision": precision}
    plain = pool.run(TASKS, "train_case", folder="", **options)
    moved = pool.run(TASKS, "train_case", folder=str(tmp_path), **options)
    for wanted, found in zip(plain, moved, strict=True):
        assert wanted["files"] == []
        assert len(found["files"]) == 3, "the matrices of the trunk and of both towers"
        for one, other in zip(wanted["steps"], found["steps"], strict=True):
            assert other["loss"] == one["loss"] or np.isnan([other["loss"], one["loss"]]).all()
            assert other["norm"] == pytest.approx(one["norm"], rel=1e-6, nan_ok=True)
            same(one, other)
    assert not list(tmp_path.rglob("*.swp")), "files are left behind"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("asynchronous_io")
@needs_libaio
def test_checkpoints_of_files(rank_pool, tmp_path: Path) -> None:
    """Resumed and rolled back to the bit; the same state at ZeRO 1 in memory, and from there in files again."""
    tasks = rank_pool.load(TASKS)
    answers = rank_pool.pool(2).run(TASKS, "history", folder=str(tmp_path / "drive"), run_dir=str(tmp_path / "run"))
    for found in answers:
        for name in ("again", "rolled_back", "back"):
            same(found["saved"], found[name])
        for name in ("resumed", "after"):
            for one, other in zip(found["straight"], found[name], strict=True):
                same(one, other)
    engine_tasks = rank_pool.load(TASKS.with_name("engine_tasks.py"))
    saved, other = (
        engine_tasks.assemble([found[name] for found in answers], tasks.build_model()) for name in ("saved", "other")
    )
    assert saved[1] == other[1]
    for kind, parameters in saved[0].items():
        for name, values in parameters.items():
            np.testing.assert_array_equal(other[0][kind][name], values, err_msg=f"{kind} {name}")


@pytest.mark.parametrize(
    ("stage", "section", "said"),
    [
        (2, {"offload_optimizer": NVME}, "offload_optimizer.device is 'nvme', which wants train.zero_stage=3, not 2"),
        (3, {"offload_optimizer": {"device": "nvme"}}, "offload_optimizer.nvme_path is missing"),
        (3, {"offload_optimizer": NVME | {"pipeline_read": True}}, "pipeline_read and pipeline_write"),
        (3, {"offload_optimizer": NVME | {"buffer_count": 3}}, "buffer_count is 3; AdamW wants at least 4"),
        (3, {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}, "offload_optimizer.ratio steps with an optimizer"),
        (3, {"offload_optimizer": {"device": "disk"}}, "offload_optimizer.device is 'disk'; use cpu, nvme or none"),
        (3, {"offload_param": NVME}, "offload_param.device is 'nvme'; use cpu or none"),
    ],
)
def test_what_cannot_work_is_refused(stage, section, said, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "run.yaml"
    data = {"sources": [{"name": "a", "shards": "a"}], "tokenizer": "t"}
    text = {"run_dir": "run", "data": data, "train": {"zero_stage": stage}, "deepspeed": {"zero_optimization": section}}
    config.write_text(yaml.safe_dump(text))
    assert main(["train", str(config)]) == 2
    assert said in capsys.readouterr().err
