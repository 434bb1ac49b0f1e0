"""Figures of a step, and their files across a resume."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from triweave.data_pipeline.stream.stalls import START_STEPS, STEPS_KEPT, StallMeter, StepLoad
from triweave.kernels import backends
from triweave.pretrain.engine.participation import Window
from triweave.pretrain.engine.work import Work
from triweave.pretrain.engine.zero import StepResult
from triweave.pretrain.objectives.balance import Decision
from triweave.pretrain.objectives.contrastive_window import ContrastiveFigures
from triweave.pretrain.objectives.window import TaskFigures
from triweave.pretrain.telemetry import Telemetry, modality_slots, step_metrics

LOAD = StepLoad(wait_s=0.25, queue_depth=0, stages_ms=[{"fetch": 200.0, "decode": 40.0}], counts={"samples": 8})


LEARNT = {"language_model": TaskFigures(loss=2.3, count=8.0, weight=1.0)}


def meter() -> StallMeter:
    return StallMeter(workers=0, remote=False)


def result(
    step: int,
    contrastive: ContrastiveFigures | None = None,
    tasks: dict[str, TaskFigures] | None = None,
    by_source: dict[str, float] | None = None,
) -> StepResult:
    """A step of 0.5 s after a wait of 0.25 s: 6 text targets at 2 nats, 2 that follow a picture at 3; no audio."""
    weights, sums = np.zeros(8), [0.0] * 8
    weights[modality_slots()["text"]], weights[modality_slots()["image"]] = 6, 2
    sums[modality_slots()["text"]], sums[modality_slots()["image"]] = 12.0, 6.0
    window = Window(
        towers=("image", "audio"),
        calls=np.array([[[True, False]]]),
        weights=weights,
        segments=np.array([[4]]),
        data_wait_s=0.25,
        work=Work(flops=6e9, tokens=np.array([20.0, 10, 0, 0, 0, 0, 0, 0]), items=np.array([0.0, 3, 0, 0, 0, 0, 0, 0])),
        rank_flops=np.array([4e9, 2e9]),
        source_weights=np.array([2.0, 6, 0]),
    )
    return StepResult(
        step=step, loss=2.3, cross_entropy=sums, grad_norm=1.5, lr=1e-3, step_s=0.5, window=window, objective=2.5,
        contrastive=contrastive, tasks=tasks or LEARNT, by_source=by_source or {},
        several_tasks=tasks is not None,
        decision=Decision(step=step, weights=dict.fromkeys(tasks or LEARNT, 1.0)),
    )  # fmt: skip


def test_figures_of_a_step():
    metrics = step_metrics(result(4))
    assert metrics["loss_by_modality"] == {"text": 2.0, "image": 3.0}
    assert metrics["supervised_by_modality"] == {"text": 6.0, "image": 2.0}
    assert metrics["supervised_tokens"] == 8.0
    assert metrics["step_s"] == 0.75
    assert metrics["tokens_per_s"] == pytest.approx(40)
    assert metrics["flops"] == 6e9
    assert metrics["flops_per_s"] == pytest.approx(8e9)
    assert "mfu" not in metrics  # no maker's figure for this processor
    assert metrics["data_wait_fraction"] == pytest.approx(1 / 3)
    assert metrics["absent_towers"] == ["audio"]
    assert metrics["memory_bytes"] > 10_000_000
    assert metrics["tokens_by_modality"] == {"text": 20, "image": 10}
    assert metrics["media_per_s"] == {"image": pytest.approx(4)}
    assert metrics["rank_imbalance"] == pytest.approx(4 / 3)


def test_sources_are_told_apart_where_there_are_several():
    assert "loss_by_source" not in step_metrics(result(4, by_source={"web": 18.0}))
    metrics = step_metrics(result(4, by_source={"web": 6.0, "speech": 12.0, "later": 0.0}))
    assert metrics["loss_by_source"] == {"web": 3.0, "speech": 2.0}
    assert metrics["supervised_by_source"] == {"web": 2.0, "speech": 6.0}


def test_contrastive_figures_stand_only_where_there_are_any():
    plain = step_metrics(result(4))
    assert not {name for name in plain if name.startswith(("contrastive", "objective"))}
    learnt = step_metrics(result(4, ContrastiveFigures(loss=0.8, pairs=3, accuracy=0.5)))
    assert learnt["loss"] == 2.3
    assert {name: learnt[name] for name in learnt if name not in plain} == {
        "objective": 2.5, "contrastive_loss": 0.8, "contrastive_pairs": 3, "contrastive_accuracy": 0.5,
    }  # fmt: skip
    empty = step_metrics(result(4, ContrastiveFigures(loss=0.0, pairs=0, accuracy=0.0)))
    assert {name for name in empty if name not in plain} == {"objective", "contrastive_pairs"}


def test_several_objectives_are_told_one_by_one(tmp_path):
    """In metrics.jsonl without what they do not have, in TensorBoard by name; loss by modality where it was learnt."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    labels = TaskFigures(loss=1.5, count=4.0, weight=0.5, accuracy=0.25, log_variance=0.7)
    metrics = step_metrics(result(4, tasks=LEARNT | {"classification": labels}))
    assert metrics["objective"] == 2.5
    assert metrics["tasks"] == {
        "language_model": {"loss": 2.3, "count": 8.0, "weight": 1.0},
        "classification": {"loss": 1.5, "count": 4.0, "weight": 0.5, "accuracy": 0.25, "log_variance": 0.7},
    }
    assert step_metrics(result(4, tasks={"classification": labels}))["loss_by_modality"] == {}
    with Telemetry(tmp_path, rank=0, first_step=1, total_steps=9, every_steps=1, stalls=meter()) as telemetry:
        telemetry.step(result(1, tasks=LEARNT | {"classification": labels}), LOAD)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Scalars("tasks/classification/accuracy")[0].value == 0.25


def test_the_progress_line_and_tensorboard_have_the_contrastive_figures(tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Telemetry(tmp_path, rank=0, first_step=1, total_steps=9, every_steps=1, stalls=meter()) as telemetry:
        telemetry.step(result(1, ContrastiveFigures(loss=0.8, pairs=3, accuracy=0.5)), LOAD)
    assert "loss 2.3000  contrastive 0.8000 (50%)  " in capsys.readouterr().err
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Scalars("contrastive_accuracy")[0].value == 0.5


def write(folder, first_step: int, steps: range, *, rank: int = 0) -> None:
    with Telemetry(folder, rank=rank, first_step=first_step, total_steps=9, every_steps=2, stalls=meter()) as telemetry:
        for step in steps:
            telemetry.step(result(step), LOAD)


def test_memory_of_a_run_on_cpu_is_the_hosts_even_beside_a_device(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert step_metrics(result(4))["memory_bytes"] > 10_000_000


def test_each_step_stands_once_after_a_resume(tmp_path, capsys):
    """Steps 3 and 4 were done by an attempt that a resume from step 2 overtakes; its last line was cut by the kill."""
    write(tmp_path, 1, range(1, 5))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 5, "lo')
    write(tmp_path, 3, range(3, 7))
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4, 5, 6]
    printed = capsys.readouterr()
    assert printed.out == ""
    steps = [line.split()[1] for line in printed.err.splitlines() if line.startswith("step ")]
    assert steps == ["2/9", "4/9", "4/9", "6/9"]


def test_each_choice_of_kernels_is_told_once(tmp_path, capsys, monkeypatch):
    made = {"swiglu: auto chose reference: it must": None}
    monkeypatch.setattr(backends, "_choices", made)
    with Telemetry(tmp_path, rank=0, first_step=1, total_steps=9, every_steps=1, stalls=meter()) as telemetry:
        telemetry.step(result(1), LOAD)
        telemetry.step(result(2), LOAD)
        made["rms_norm: auto chose triton: it may"] = None
        telemetry.step(result(3), LOAD)
    lines = [line.split("  ")[0] for line in capsys.readouterr().err.splitlines()]
    assert lines == [
        "kernels: swiglu: auto chose reference: it must", "step 1/9", "step 2/9",
        "kernels: rms_norm: auto chose triton: it may", "step 3/9",
    ]  # fmt: skip


def test_tensorboard_holds_the_nested_figures(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path, 1, range(1, 4))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss_by_modality/image")] == [
        (1, 3.0), (2, 3.0), (3, 3.0),
    ]  # fmt: skip


def test_what_the_loader_does_stands_in_the_metrics_and_a_stall_is_told_once(tmp_path, capsys):
    steps = START_STEPS + 2 * STEPS_KEPT
    with Telemetry(tmp_path, rank=0, first_step=1, total_steps=99, every_steps=50, stalls=meter()) as telemetry:
        for step in range(1, steps + 1):
            telemetry.step(result(step), LOAD)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["loader"] == {}, "the first steps wait for the start"
    assert lines[-1]["loader"]["fetch_ms_p50"] == 200
    assert lines[-1]["loader"]["samples"] == 8 * STEPS_KEPT
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("data: ")]
    assert len(told) == 1
    # A wait of 0.25 s beside work of 0.5 s.
    assert "you are storage bound: 33% of the time" in told[0]
    verdict = {"rank": 0, "bound": "storage", "wait_share": pytest.approx(1 / 3), "stage_share": pytest.approx(5 / 6)}
    assert ["stall" in line for line in lines] == [step >= START_STEPS + STEPS_KEPT for step in range(1, steps + 1)]
    assert lines[-1]["stall"] == verdict


def test_rank_0_names_the_rank_that_waits_most(rank_pool):
    """Rank 0 itself does not wait at all; every rank comes to the same line, once."""
    answers = rank_pool.pool(2).run(Path(__file__).with_name("stall_tasks.py"), "compared")
    for told in answers:
        (line,) = filter(None, told)
        assert line.startswith("data: you are decode bound on rank 1 of 2, which waits most: 50% of the time")
        assert told.index(line) == START_STEPS + STEPS_KEPT - 1


def test_other_ranks_write_nothing(tmp_path, capsys):
    write(tmp_path, 1, range(1, 4), rank=1)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == ""
