"""A run's model from its checkpoints, in one process without DeepSpeed: equal to the trained one to the bit."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from spine_runs import write_run_config

from triweave.data_pipeline.errors import TokenizerError
from triweave.data_pipeline.stream.prompt import prompt_batch
from triweave.pretrain.batch import to_device
from triweave.pretrain.checkpoints import load
from triweave.pretrain.checkpoints.checkpoint import list_checkpoints
from triweave.pretrain.checkpoints.load import load_run, locate
from triweave.pretrain.config import load_config
from triweave.pretrain.errors import CheckpointError, PretrainError

TASKS = Path(__file__).with_name("load_tasks.py")
CORPUS = Path(__file__).parents[1] / "data_pipeline" / "conftest.py"
TEXT = "A small bird sits on a branch"


@pytest.fixture(scope="module")
def run_config(rank_pool, tmp_path_factory) -> Path:
    """A run YAML of 4 steps with checkpoints at 2 and 4; run_dir is to be overridden."""
    return write_run_config(
        rank_pool.load(CORPUS),
        tmp_path_factory.mktemp("load"),
        documents=18,
        model={"tie_embeddings": True},
        schedule={"warmup_steps": 1},
        train={"steps": 4, "micro_batch_rows": 2},
        checkpoint={"every_steps": 2},
    )


@pytest.fixture(scope="module")
def trained(rank_pool, run_config, tmp_path_factory):
    """A run of one rank and what it kept of itself: (run_dir, answer)."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    (answer,) = rank_pool.pool(1).run(
        TASKS, "train_and_keep", config=str(run_config), overrides=[f"run_dir={run_dir}"], text=TEXT
    )
    return run_dir, answer


@pytest.fixture
def run_dir(trained, tmp_path) -> Path:
    """A copy of the run, to damage."""
    shutil.copytree(trained[0], tmp_path / "run")
    return tmp_path / "run"


def logits(run) -> np.ndarray:
    batch = prompt_batch([[TEXT]], tokenizer=run.tokenizer, geometry=run.config.data.geometry)
    return run.model.logits(to_device(batch, "cpu")).numpy()


def weights_of(answers) -> dict[tuple[str, int], np.ndarray]:
    return {
        (name, offset): values
        for answer in answers
        for (name, kind, offset), values in answer["snapshot"]["pieces"].items()
        if kind == "weight"
    }


def check_weights(run, answers) -> None:
    covered = 0
    parameters = dict(run.model.named_parameters())
    for (name, offset), values in weights_of(answers).items():
        found = parameters[name].detach().flatten()[offset : offset + len(values)].numpy()
        assert np.array_equal(found, values), name
        covered += len(values)
    assert covered >= sum(parameter.numel() for parameter in parameters.values())


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def test_the_loaded_model_is_the_trained_one(trained):
    run_dir, answer = trained
    run = load_run(run_dir)
    assert run.step == 4
    assert run.config.model.d_model == 32
    assert not run.model.training
    assert not any(parameter.requires_grad for parameter in run.model.parameters())
    assert {parameter.dtype for parameter in run.model.parameters()} == {torch.float32}
    assert run.model.heads["language_model"].weight is run.model.token_embedding.weight
    check_weights(run, [answer])
    assert np.array_equal(logits(run), answer["logits"])


def test_an_earlier_step_is_another_model(trained):
    earlier = load_run(trained[0], step=2)
    assert earlier.step == 2
    assert not np.array_equal(logits(earlier), trained[1]["logits"])
    with pytest.raises(CheckpointError, match="no checkpoint of step 3; it has 2, 4"):
        load_run(trained[0], step=3)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "precision"), [(3, "fp32"), (3, "bf16"), (1, "bf16")])
def test_shards_of_two_ranks_are_put_together(rank_pool, run_config, tmp_path, stage, precision):
    settings = [f"run_dir={tmp_path}", f"train.zero_stage={stage}", f"train.precision={precision}"]
    answers = rank_pool.pool(2).run(TASKS, "train_and_keep", config=str(run_config), overrides=settings, text=TEXT)
    check_weights(load_run(tmp_path), answers)


def test_a_damaged_checkpoint_is_told_about_and_passed_over(run_dir):
    flip(run_dir / "checkpoints" / "step-0000004" / "rank-00000-000.safetensors")
    told: list[str] = []
    assert load_run(run_dir, tell=told.append).step == 2
    assert "rank-00000-000.safetensors is damaged" in told[0]
    with pytest.raises(CheckpointError, match=r"step-0000004.*rank-00000-000\.safetensors is damaged"):
        load_run(run_dir, step=4)
    flip(run_dir / "checkpoints" / "step-0000002" / "manifest.json")
    with pytest.raises(CheckpointError, match="no whole checkpoint in"):
        load_run(run_dir, tell=told.append)


def test_what_is_no_run_is_said_in_one_line(run_dir, tmp_path):
    with pytest.raises(CheckpointError, match="nowhere: no such run; pass the run_dir of a training"):
        load_run(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=rf"has no checkpoint; did you mean {run_dir}\?"):
        load_run(tmp_path)
    for folder in list_checkpoints(run_dir):
        shutil.rmtree(folder)
    with pytest.raises(CheckpointError, match=r"has no checkpoint; train it until checkpoint\.every_steps"):
        load_run(run_dir / "consumed")
    for device in ("toaster", "meta", torch.device("meta")):
        with pytest.raises(PretrainError, match=r"device '\w+' is not known; use cpu or cuda"):
            load_run(run_dir, device=device)
    with pytest.raises(PretrainError, match=r"device 'cuda:99': there are \d+ CUDA devices here"):
        load_run(run_dir, device="cuda:99")


def test_the_tokenizer_must_be_there_and_the_same(trained, run_config, rank_pool, tmp_path, monkeypatch):
    corpus = rank_pool.load(CORPUS)
    manifest = corpus.Manifest.load(run_config.parent / "birds")
    corpus.train_tokenizer([manifest], 410, tmp_path / "other.model")
    monkeypatch.setattr(load, "locate", lambda *_: tmp_path / "other.model")
    with pytest.raises(TokenizerError, match=r"other\.model is not the one .* was trained with"):
        load_run(trained[0])
    monkeypatch.setattr(load, "locate", lambda *_: tmp_path / "none.model")
    with pytest.raises(TokenizerError, match=r"none\.model of the run .* is not there; run this in the folder"):
        load_run(trained[0])


def test_relative_paths_are_found_from_where_the_run_was_started(run_config, tmp_path, monkeypatch):
    config = load_config(run_config, ["run_dir=runs/x"])
    (tmp_path / "runs" / "x").mkdir(parents=True)
    (tmp_path / "shards").mkdir()
    assert locate("shards", config, tmp_path / "runs" / "x") == tmp_path / "shards"
    assert locate("none", config, tmp_path / "runs" / "x") == Path("none")
    assert locate("shards", config, tmp_path / "moved") == Path("shards")
    assert locate("/shards", config, tmp_path / "runs" / "x") == Path("/shards")
    monkeypatch.chdir(tmp_path)
    assert locate("shards", config, Path("runs/x")) == Path("shards")


def test_loading_needs_neither_deepspeed_nor_a_process_group(trained):
    program = (
        "import sys; from triweave.pretrain.checkpoints.load import load_run; run = load_run(sys.argv[1]); "
        "import torch.distributed as dist; print(run.step, 'deepspeed' in sys.modules, dist.is_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", program, trained[0]], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["4", "False", "False"]
