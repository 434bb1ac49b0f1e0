"""The training program over real shards: 20 steps = 10 + resume + 10, any layout goes on, the same samples."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
import yaml
from spine_runs import HALF, STEPS, consumed, files_of, metrics, run_program

from triweave.pretrain.checkpoints.checkpoint import list_checkpoints
from triweave.pretrain.ledger.audit import audit
from triweave.pretrain.ledger.consumed import read_consumed
from triweave.pretrain.train import main

HERE = Path(__file__).parent


def test_a_run_is_recorded(straight):
    lines = metrics(straight)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line in lines:
        assert sum(line["supervised_by_modality"].values()) == line["supervised_tokens"]
        weighted = sum(
            loss * line["supervised_by_modality"][name] for name, loss in line["loss_by_modality"].items()
        ) / line["supervised_tokens"]  # fmt: skip
        assert weighted < line["loss"] < weighted + 0.02  # the z-loss is the rest
        assert 0 <= line["data_wait_s"] <= line["step_s"]
        assert line["tokens_per_s"] == pytest.approx(line["tokens"] / line["step_s"])
    assert {name for line in lines for name in line["loss_by_modality"]} == {"text", "image", "audio"}
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.05
    assert lines[0]["lr"] == pytest.approx(5e-4)
    assert list((straight / "tensorboard").glob("events.*"))
    rows = consumed(straight)
    assert [(step, row) for step, row, _, _ in rows] == [(1 + row // 4, row) for row in range(4 * STEPS)]
    assert yaml.safe_load((straight / "config.yaml").read_text())["train"]["zero_stage"] == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_ten_and_ten_are_twenty(train, straight, tmp_path, workers):
    """Stopped after 10 steps and resumed: losses, weights, moments, RNG and samples equal to the bit."""
    settings = (f"data.workers={workers}", f"schedule.total_steps={STEPS}")
    assert train(tmp_path, 2, f"train.steps={HALF}", *settings) == ["", ""]
    assert train(tmp_path, 2, *settings, resume=True) == ["", ""]
    assert [line["loss"] for line in metrics(tmp_path)] == [line["loss"] for line in metrics(straight)]
    assert files_of(tmp_path) == files_of(straight)
    assert consumed(tmp_path) == consumed(straight)
    assert {row.attempt for row in read_consumed(tmp_path)} == {1, 2}
    proof = audit(tmp_path, same_as=straight)
    assert proof.exact, proof.problems
    assert (proof.rows, proof.world_sizes) == (4 * STEPS, (2, 2))


@pytest.mark.parametrize("asked", [STEPS, HALF])
def test_a_finished_run_says_so_and_stays_as_it_is(rank_pool, run_config, straight, asked):
    """No attempt begins, and neither ledger, metrics, config.yaml nor checkpoints change; the heartbeats may."""

    def kept() -> dict[Path, tuple[int, bytes]]:
        files = (path for path in straight.rglob("*") if path.is_file() and "health" not in path.parts)
        return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}

    before = kept()
    overrides = [f"run_dir={straight}", f"train.steps={asked}"]
    arguments = {"config": str(run_config), "overrides": overrides, "resume": True}
    (error, said), (_, silence) = rank_pool.pool(2).run(HERE / "checkpoint_tasks.py", "hear_spine", **arguments)
    assert error == silence == ""
    assert said == (
        f"triweave train: nothing to do: {list_checkpoints(straight)[-1]} has step {STEPS}, and train.steps={asked}; "
        f"set that above {STEPS} to go on\n"
    )
    assert kept() == before


@pytest.mark.slow
@pytest.mark.parametrize("location", ["", "s3://corpora/elastic"])
def test_any_layout_goes_on(train, straight, tmp_path, object_store, location):
    """2 -> 3 -> 1 -> 2 ranks and ZeRO 3 -> 1 -> 2 on the way: losses within the parity tolerance, the same samples."""
    for ranks, stage, steps in ((2, 3, 5), (3, 1, 10), (1, 2, 15), (2, 2, STEPS)):
        settings = (f"train.zero_stage={stage}", f"train.steps={steps}", f"schedule.total_steps={STEPS}",
                    f"checkpoint.location={location}")  # fmt: skip
        assert train(tmp_path, ranks, *settings, resume=steps > 5, environment=object_store) == [""] * ranks
    assert (tmp_path / "checkpoints").exists() == (not location)
    for line, wanted in zip(metrics(tmp_path), metrics(straight), strict=True):
        assert abs(line["loss"] - wanted["loss"]) <= 1e-6 * max(1, wanted["loss"]), line["step"]
    assert consumed(tmp_path) == consumed(straight)


@pytest.mark.slow
def test_a_schedule_added_at_a_resume_is_the_schedule_from_the_start(train, tmp_path):
    """Packs of 96, 64 and 128 tokens: on 2 ranks in one go, and on 2 and 1 ranks with the changes added later."""
    entries = ['{"after_step": 4, "sequence_length": 64, "images": 2}', '{"after_step": 7, "sequence_length": 128}']
    planned, added = (f"data.schedule=[{', '.join(chosen)}]" for chosen in (entries, entries[:1]))
    settings = ("schedule.total_steps=10", "checkpoint.every_steps=1")
    assert train(tmp_path / "planned", 2, "train.steps=10", *settings, planned) == ["", ""]
    assert train(tmp_path / "added", 2, "train.steps=4", *settings) == ["", ""]
    assert train(tmp_path / "added", 1, "train.steps=6", *settings, added, resume=True) == [""]
    assert train(tmp_path / "added", 2, "train.steps=10", *settings, planned, resume=True) == ["", ""]
    assert consumed(tmp_path / "added") == consumed(tmp_path / "planned")
    proof = audit(tmp_path / "added", same_as=tmp_path / "planned")
    assert proof.exact, proof.problems
    assert proof.world_sizes == (2, 1, 2)
    for line, wanted in zip(metrics(tmp_path / "added"), metrics(tmp_path / "planned"), strict=True):
        assert abs(line["loss"] - wanted["loss"]) <= 1e-6 * max(1, wanted["loss"]), line["step"]
    (said,) = set(train(tmp_path / "added", 1, "train.steps=12", *settings, resume=True))
    assert "put back the entry with after_step=4" in said


CONTRASTIVE = (
    "model.objectives={language_model: 1.0, contrastive: 0.5}",
    "model.contrastive.width=16",
    "data.packing.contrastive_share=1.0",
    "data.packing.contrastive_group_rows=4",
)


def test_a_contrastive_run_goes_on_to_the_bit_and_refuses_to_cut_a_group(train, tmp_path):
    """Real shards, 2 ranks with accumulation: figures of every step; 4 + resume + 4 steps are 8."""
    common = (*CONTRASTIVE, "schedule.total_steps=8")
    assert train(tmp_path / "straight", 2, *common, "train.steps=8") == ["", ""]
    assert train(tmp_path / "halves", 2, *common, "train.steps=4") == ["", ""]
    wider = ("data.packing.contrastive_group_rows=32", "train.global_batch_rows=32")
    for said in train(tmp_path / "halves", 2, *common, *wider, "train.steps=8", resume=True):
        assert "goes on at plan row 16, no multiple of data.packing.contrastive_group_rows=32" in said
    assert train(tmp_path / "halves", 2, *common, "train.steps=8", resume=True) == ["", ""]
    straight, halves = metrics(tmp_path / "straight"), metrics(tmp_path / "halves")
    kept = ("loss", "objective", "contrastive_loss", "contrastive_pairs", "contrastive_accuracy")
    found, wanted = ([[line.get(name) for name in kept] for line in lines] for lines in (halves, straight))
    assert found == wanted
    assert files_of(tmp_path / "halves") == files_of(tmp_path / "straight")
    assert sum(line["contrastive_pairs"] > 0 for line in straight) >= 6
    for line in straight:  # a step may hold text-only documents alone
        assert ("contrastive_loss" in line) == (line["contrastive_pairs"] > 0)
        assert line["objective"] == pytest.approx(line["loss"] + 0.5 * line.get("contrastive_loss", 0))
    assert straight[-1]["contrastive_loss"] < straight[0]["contrastive_loss"]


def test_the_contrastive_loss_of_a_run_does_not_depend_on_the_ranks(train, tmp_path):
    """The first step on 1 rank with 4 micro-batches and on 2 ranks with 2: one loss, the same pairs."""
    first = []
    for ranks in (1, 2):
        assert train(tmp_path / str(ranks), ranks, *CONTRASTIVE, "train.steps=1") == [""] * ranks
        first.append(metrics(tmp_path / str(ranks))[0])
    assert first[0]["contrastive_pairs"] == first[1]["contrastive_pairs"]
    assert first[0]["contrastive_loss"] == pytest.approx(first[1]["contrastive_loss"], rel=1e-6)


def test_an_existing_run_is_not_overwritten(train, straight):
    errors = train(straight, 2)
    assert errors[0] == errors[1]
    assert errors[0].endswith("already has checkpoints; add --resume, or choose another run_dir")


def test_an_error_of_one_rank_ends_all(train, tmp_path):
    """More ranks than rows, and a tokenizer that is not there: every rank gets the line."""
    few = train(tmp_path, 2, "train.global_batch_rows=1")
    assert few[0] == few[1]
    assert "2 ranks but train.global_batch_rows is 1" in few[0]
    assert all("/nowhere/tokenizer" in text for text in train(tmp_path, 2, "data.tokenizer=/nowhere/tokenizer"))


@pytest.mark.slow
def test_killed_then_stopped_then_resumed(run_config, train, tmp_path):
    """SIGKILL after step 5 falls back to step 4; SIGTERM checkpoints; the samples of the lineage have no gap."""
    at_once = ("checkpoint.every_steps=4", "checkpoint.background=false")  # or the kill may come before the commit
    killed = run_program(run_config, tmp_path, *at_once, TRIWEAVE_KILL_AT_STEP="5")
    killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3, 4, 5]
    stopped = run_program(run_config, tmp_path, "--resume", "train.steps=100000", "checkpoint.every_steps=0")
    deadline = time.monotonic() + 120
    while metrics(tmp_path)[-1]["step"] < 7:
        assert time.monotonic() < deadline
        assert stopped.poll() is None
        time.sleep(0.05)
    (tmp_path / "config.yaml").unlink()  # a checkpoint's config is the run's own, not what lies here by then
    stopped.terminate()
    _, said = stopped.communicate(timeout=120)
    assert stopped.returncode == 75, said
    step = metrics(tmp_path)[-1]["step"]
    assert f"stopped by SIGTERM after step {step}" in said
    assert list_checkpoints(tmp_path)[-1].name == f"step-{step:07d}"
    assert train(tmp_path, 1, f"train.steps={step + 1}", resume=True) == [""]
    rows = read_consumed(tmp_path)
    assert [(row.step, row.row) for row in rows] == [(1 + number // 4, number) for number in range(4 * (step + 1))]
    assert [row.attempt for row in rows if row.step in (4, 5, step + 1)] == [1] * 4 + [2] * 4 + [3] * 4


def test_users_errors_are_one_line_and_exit_code_2(run_config, monkeypatch, capsys):
    """Only rank 0 prints what every rank finds."""
    assert main([str(run_config), "--resume", "train.stpes=3"]) == 2
    assert capsys.readouterr().err == "triweave train: train.stpes: unknown key; did you mean train.steps?\n"
    monkeypatch.setenv("RANK", "1")
    assert main([str(run_config), "train.steps=0"]) == 2
    assert capsys.readouterr().err == ""


def test_a_rank_without_a_device_says_so_itself(run_config, monkeypatch, capsys):
    """Other ranks have their devices and wait for it: rank 0 cannot speak for them."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    place = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    assert main([str(run_config), "train.device=cuda"]) == 2
    assert "local rank 1 has no CUDA device, there are 1; start fewer ranks" in capsys.readouterr().err


def test_a_rank_of_half_a_launcher_says_so_itself(run_config, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert main([str(run_config)]) == 2
    assert "RANK is set but WORLD_SIZE is not; start ranks with" in capsys.readouterr().err


def test_a_run_dir_that_cannot_be_written_ends_all(train, tmp_path):
    (tmp_path / "file").write_text("")
    for rank, said in enumerate(train(tmp_path / "file" / "run", 2)):
        assert said.startswith(f"PretrainError: cannot write to run_dir on rank {rank}: ")
        assert said.endswith("choose another one")


def test_deepspeed_section_is_refused_by_key(train, tmp_path):
    assert all(
        "deepspeed.bf16 is decided by train.precision" in text
        for text in train(tmp_path, 2, "deepspeed.bf16.enabled=true")
    )
