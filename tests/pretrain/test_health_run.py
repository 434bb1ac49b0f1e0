"""Health in the training program: bad steps in ledger, metrics and audit, roll-backs, all to the bit at a resume."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import spine_runs as spine

from triweave.pretrain.checkpoints.checkpoint import list_checkpoints
from triweave.pretrain.health.events import read_events
from triweave.pretrain.health.heartbeat import read_beats
from triweave.pretrain.health.signals import REQUEUE
from triweave.pretrain.ledger.audit import audit
from triweave.pretrain.ledger.consumed import read_consumed

TASKS = Path(__file__).with_name("health_tasks.py")
Train = Callable[..., list[str]]


@pytest.fixture(scope="module")
def train(rank_pool, run_config: Path) -> Train:
    """Run the program on 2 ranks in a run folder; `bad_steps` as TRIWEAVE_NAN_AT_STEP has it."""

    def train(run_dir: Path, *settings: str, resume: bool = False, bad_steps: str = "") -> list[str]:
        overrides = [f"run_dir={run_dir}", "schedule.total_steps=12", *settings]
        return rank_pool.pool(2).run(
            TASKS, "run_spine", config=str(run_config), overrides=overrides, resume=resume, bad_steps=bad_steps
        )

    return train


def skipped_steps(run_dir: Path) -> dict[int, str]:
    """Return step -> why its data was left out, by the ledger; every row of such a step has to say so."""
    rows = read_consumed(run_dir)
    steps = {row.step: row.skipped for row in rows if row.skipped}
    assert {row.step for row in rows if not row.skipped}.isdisjoint(steps)
    return steps


def test_a_bad_step_is_left_out_and_recorded_also_across_a_resume(train: Train, tmp_path: Path) -> None:
    bad = {"bad_steps": "3:1"}
    assert train(tmp_path / "straight", "train.steps=6", **bad) == ["finished"] * 2
    assert train(tmp_path / "halves", "train.steps=4", **bad) == ["finished"] * 2
    assert train(tmp_path / "halves", "train.steps=6", resume=True, **bad) == ["finished"] * 2
    assert spine.files_of(tmp_path / "halves") == spine.files_of(tmp_path / "straight")
    run_dir = tmp_path / "halves"
    assert skipped_steps(run_dir) == {3: "the loss of step 3 is not finite"}
    proof = audit(run_dir, same_as=tmp_path / "straight")
    assert proof.exact, proof.problems
    assert (proof.rows, proof.skipped, proof.lost) == (24, 4, 0)
    assert proof.consumed == sum(len(row.ids) for row in read_consumed(run_dir) if row.step != 3)
    lines = spine.metrics(run_dir)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line.get("skipped", "") for line in lines] == ["", "", "the loss of step 3 is not finite", "", "", ""]
    assert [line["loss"] is None for line in lines] == [False, False, True, False, False, False]
    assert "NaN" not in (run_dir / "metrics.jsonl").read_text()
    (event,) = read_events(run_dir)
    assert (event["event"], event["step"]) == ("skip", 3)
    assert "rank 1 held samples birds:" in event["text"]
    assert "rank 0 held" not in event["text"]
    beats = read_beats(run_dir)
    assert {rank: (beat.ranks, beat.phase, beat.waiting) for rank, beat in beats.items()} == {
        0: (2, "done", False), 1: (2, "done", False),
    }  # fmt: skip


@pytest.mark.slow
def test_bad_steps_in_a_row_roll_back_past_their_data(train: Train, tmp_path: Path) -> None:
    """Steps 7, 8, 9 are bad; the weights of step 6 are to blame, so those of step 4 come back, and 5 to 9 are gone."""
    settings = ("checkpoint.every_steps=2", "checkpoint.keep=9")
    bad = {"bad_steps": "7,8,9"}
    assert train(tmp_path / "straight", "train.steps=12", *settings, **bad) == ["finished"] * 2
    run_dir = tmp_path / "halves"
    assert train(run_dir, "train.steps=9", *settings, **bad) == ["finished"] * 2
    assert list_checkpoints(run_dir)[-1].name == "step-0000009"
    assert train(run_dir, "train.steps=12", *settings, resume=True, **bad) == ["finished"] * 2
    assert spine.files_of(run_dir) == spine.files_of(tmp_path / "straight")
    left_out = skipped_steps(run_dir)
    assert sorted(left_out) == [5, 6, 7, 8, 9]
    assert (left_out[5], left_out[9]) == ("rolled back", "the loss of step 9 is not finite")
    proof = audit(run_dir, same_as=tmp_path / "straight")
    assert proof.exact, proof.problems
    assert (proof.rows, proof.skipped) == (48, 20)
    events = read_events(run_dir)
    assert [(event["event"], event["step"]) for event in events] == [("skip", 7), ("skip", 8), ("roll_back", 9)]
    assert events[-1]["to"] == 4
    assert "the weights of step 4 are back, the data of steps 5 to 9 is left out" in events[-1]["text"]
    moved = json.loads((list_checkpoints(run_dir)[-1] / "manifest.json").read_text())["parameters"]
    assert {entry["steps"] for name, entry in moved.items() if name.startswith("decoder")} == {4.0 + 3.0}


@pytest.mark.slow
def test_a_deterministic_run_gives_the_same_bits_twice(train: Train, tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert train(tmp_path / name, "train.steps=4", "train.deterministic=true") == ["finished"] * 2
    assert spine.files_of(tmp_path / "one") == spine.files_of(tmp_path / "two")
    ours, theirs = (spine.metrics(tmp_path / name) for name in ("one", "two"))
    assert [line["loss"] for line in ours] == [line["loss"] for line in theirs]


@pytest.mark.slow
def test_a_run_that_stays_bad_ends_in_one_line(train: Train, tmp_path: Path) -> None:
    bad = {"bad_steps": ",".join(map(str, range(3, 13)))}
    for said in train(tmp_path / "a", "train.steps=12", "checkpoint.every_steps=0", **bad):
        assert said.startswith("HealthError: the loss of step 5 is not finite, and no checkpoint is from before step 2")
    settings = ("checkpoint.every_steps=1", "checkpoint.keep=9", "health.rollbacks=1")
    for said in train(tmp_path / "b", "train.steps=12", *settings, **bad):
        assert said.startswith("NonFiniteError: the loss of step 8 is not finite; rank 0 held samples birds:")
        assert said.endswith(
            "3 bad steps in a row, and health.rollbacks=1 are spent; look at these samples, lower optimizer.lr, or "
            "raise that limit and resume"
        )
    for said in train(tmp_path / "c", "train.steps=12", "health.skips=1", **bad):
        assert "health.skips=1 steps have been skipped" in said
    assert [event["event"] for event in read_events(tmp_path / "b")] == [
        "skip", "skip", "roll_back", "skip", "skip", "stop",
    ]  # fmt: skip


@pytest.mark.slow
def test_sigusr1_ends_a_run_with_a_checkpoint_and_the_code_for_requeue(run_config: Path, tmp_path: Path) -> None:
    process = spine.run_program(run_config, tmp_path, "train.steps=100000", "checkpoint.every_steps=0")
    deadline = time.monotonic() + 120
    while not (tmp_path / "metrics.jsonl").exists() or not spine.metrics(tmp_path):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (beat,) = read_beats(tmp_path).values()
    assert (beat.rank, beat.pid) == (0, process.pid)
    process.send_signal(signal.SIGUSR2)  # stacks are written, the run goes on
    process.send_signal(signal.SIGUSR1)
    _, said = process.communicate(timeout=120)
    assert process.returncode == REQUEUE == 75, said
    step = spine.metrics(tmp_path)[-1]["step"]
    assert f"stopped by SIGUSR1 after step {step}; continue with --resume" in said
    assert list_checkpoints(tmp_path)[-1].name == f"step-{step:07d}"
    assert [event["event"] for event in read_events(tmp_path)] == ["preempted"]
    assert "train.py" in (tmp_path / "health" / "rank-00000.stacks").read_text()
