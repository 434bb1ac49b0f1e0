"""The participation contract: who calls which tower is known before, kept, and its breach an error on that step."""

from __future__ import annotations

import json
import multiprocessing
import runpy
import time
from pathlib import Path

import pytest
import torch
from rank_pool import PRELOADED

from triweave.launch.machine import free_port
from triweave.pretrain.engine.participation import gradient_parameters, name_samples, tie_zero

TASKS = Path(__file__).with_name("participation_tasks.py")


@pytest.mark.parametrize("poison", [1.0, float("inf"), float("nan")])
def test_tie_zero_gives_exact_zeros(poison):
    """hidden passes both ways unchanged; the tower gets zeros even from gradients that zero times would make NaN."""
    hidden = torch.tensor([[1.0, poison]], requires_grad=True)
    weight = torch.tensor([3.0, 4.0], requires_grad=True)
    tied = tie_zero(hidden, weight * 2)
    assert torch.equal(tied.nan_to_num(7), hidden.nan_to_num(7))
    (tied * torch.tensor([[5.0, poison]])).sum().backward()
    assert torch.equal(hidden.grad.nan_to_num(7), torch.tensor([[5.0, poison]]).nan_to_num(7))
    assert weight.grad.tolist() == [0.0, 0.0]


def test_gradient_parameters_are_those_backward_reaches():
    reached, tied, unused = (torch.nn.Linear(2, 2) for _ in range(3))
    unused(torch.ones(1, 2))
    with torch.no_grad():
        shut_off = unused(torch.ones(1, 2))
    loss = (tie_zero(reached(torch.ones(1, 2)), tied(torch.ones(1, 2))) + shut_off).sum()
    expected = {id(parameter) for module in (reached, tied) for parameter in module.parameters()}
    assert gradient_parameters(loss) == expected
    loss.backward()
    assert all(parameter.grad is None for parameter in unused.parameters())


def test_announcement_tells_every_rank_the_same(rank_pool):
    one, other = rank_pool.pool(2).run(TASKS, "announced")
    assert (one["held"], one["guards"]) == ([["image"], []], [[], ["image"]])
    assert (other["held"], other["guards"]) == ([[], ["image"]], [["image"], []])
    for answer in (one, other):
        assert answer["segments"] == [[0, 0], [0, 3]]
        assert answer["absent"] == ["audio"]
        assert answer["data_wait_s"] == 1.5
        assert sum(answer["weights"]) == one["mine"][0] + other["mine"][0]
        assert answer["tokens"] == one["mine"][1] + other["mine"][1]
        assert answer["rank_imbalance"] == 2 / 1.5


def test_a_modality_without_tower_is_refused_on_all_ranks(rank_pool):
    errors = rank_pool.pool(2).run(TASKS, "unknown_modality")
    assert errors[0] == errors[1]
    assert errors[0].startswith("ParticipationError: rank 1 holds audio at step 7, samples synthetic:0-0:")
    assert "the model has towers for image;" in errors[0]


FAULTS = {
    "forgets a tower": "rank {rank}: module towers.{tower} entered 0 times, announced 1",
    "calls a tower twice": "rank {rank}: module towers.{tower} entered 2 times, announced 1",
    "calls a tower early": ("rank {rank}: module towers.{tower} entered before the token embedding, out of its turn"),
    "calls an absent tower": "rank {rank}: module towers.{tower} entered 1 times, announced 0",
    "uses a weight past its tower": (
        "rank {rank}: module towers.{tower}.project.bias gets a gradient but was not announced"
    ),
    "drops a tower's output": "rank {rank}: module towers.{tower}.project.weight gets no gradient",
}
LONE_GATHER = "rank {rank}: module towers.{tower}.project.bias is used outside of its tower, so this rank gathers alone"
"""What using a weight past its tower is at stage 3, where the weight is sharded."""
AT_ENTRY = (
    "forgets a tower",
    "calls a tower early",
    "calls a tower twice",
    "calls an absent tower",
    "uses a weight past its tower",
)
"""Faults that are refused in the middle of the forward pass, where peers wait for gathers at stage 3."""
BREACHES = [
    ("all", "forgets a tower", "audio"),
    ("all", "drops a tower's output", "image"),
    ("text_only_ranks", "forgets a tower", "image"),
    ("text_only_ranks", "calls a tower twice", "image"),
    ("image_against_audio", "forgets a tower", "image"),
    ("image_against_audio", "calls a tower twice", "image"),
    ("image_against_audio", "calls a tower early", "image"),
    ("image_against_audio", "drops a tower's output", "image"),
    ("text_only", "calls an absent tower", "image"),
    ("text_only", "uses a weight past its tower", "audio"),
    ("nobody_has_audio", "forgets a tower", "image"),
    ("nobody_has_audio", "calls an absent tower", "audio"),
    ("nobody_has_audio", "uses a weight past its tower", "audio"),
]
"""(what ranks hold, fault, tower): every fault, and at least one in each of the five patterns, rank 1 being guilty."""
QUICK = [("image_against_audio", "forgets a tower"), ("nobody_has_audio", "uses a weight past its tower")]


@pytest.mark.parametrize(
    ("case", "fault", "tower", "stage"),
    [
        pytest.param(*breach, stage, marks=() if breach[:2] in QUICK and stage == 2 else pytest.mark.slow)
        for stage in (0, 1, 2, 3)
        for breach in BREACHES
        if stage < 3 or breach[1] not in AT_ENTRY
    ],
)
def test_a_breach_is_an_error_on_that_step_on_all_ranks(rank_pool, case, fault, tower, stage):
    """Both ranks raise within the step, naming rank, module, step and samples; without the checks they would hang."""
    answers = rank_pool.pool(2).run(TASKS, "disobey", stage=stage, fault=fault, tower=tower, case=case)
    for steps, error, seconds in answers:
        assert steps == 2
        assert error.startswith(f"ParticipationError: {FAULTS[fault].format(rank=1, tower=tower)}"), error
        assert "at step 3, samples synthetic:0-0:" in error
        assert error.endswith("(all ranks)")
        assert seconds < 60


@pytest.fixture(scope="module")
def start_rank():
    """Start a process that has imported everything already; start_rank(**job) -> process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)

    def start(**job):
        arguments = {"init_globals": {"JOB": job}, "run_name": "__main__"}
        process = context.Process(target=runpy.run_path, args=(str(TASKS),), kwargs=arguments)
        process.start()
        return process

    return start


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "fault", "tower", "guilty", "ranks"),
    [
        ("all", "forgets a tower", "audio", 1, 2),
        ("text_only_ranks", "calls a tower twice", "image", 1, 3),
        ("image_against_audio", "calls a tower early", "image", 1, 3),
        ("image_against_audio", "forgets a tower", "image", 1, 2),
        ("text_only", "calls an absent tower", "image", 1, 2),
        ("text_only", "uses a weight past its tower", "audio", 1, 2),
        ("nobody_has_audio", "forgets a tower", "image", 1, 2),
        ("nobody_has_audio", "calls an absent tower", "audio", 0, 2),
        ("nobody_has_audio", "calls an absent tower", "audio", 0, 3),
    ],
)
def test_a_breach_at_entry_under_stage_3_ends_all_ranks(start_rank, tmp_path, case, fault, tower, guilty, ranks):
    """Peers wait for gathers there. The guilty rank raises on that step and ends; all others find its message."""
    _ends_all_ranks(start_rank, tmp_path, case, fault, tower, guilty, ranks, stage=3)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2])
def test_a_breach_at_entry_beside_a_slice_of_the_same_rows_ends_all_ranks(start_rank, tmp_path, stage):
    """Peers wait for an exchange of heads there, at every stage."""
    settings = {"stage": stage, "sequence_parallel": 2}
    _ends_all_ranks(start_rank, tmp_path, "all", "forgets a tower", "image", 1, 2, **settings)


def _ends_all_ranks(start_rank, tmp_path, case, fault, tower, guilty, ranks, **settings):
    job = {"ranks": ranks, "port": free_port(), "folder": str(tmp_path), "fault": fault, "tower": tower}
    processes = [start_rank(rank=rank, case=case, guilty=guilty, **job, **settings) for rank in range(ranks)]
    started = time.monotonic()
    for rank, process in enumerate(processes):
        process.join(200)
        assert process.exitcode == 2, rank
    message = LONE_GATHER if fault == "uses a weight past its tower" else FAULTS[fault]
    expected = f"ParticipationError: {message.format(rank=guilty, tower=tower)}, at step 3, samples synthetic:"
    for rank in range(ranks):
        steps, error, seconds = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        assert steps == 2
        assert seconds < 60
        assert error.startswith(expected)
        assert error.endswith("(all ranks)") == (rank != guilty)
    assert time.monotonic() - started < 200


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_align_refuses_a_step_that_only_some_ranks_hold(rank_pool, stage):
    """Alike on all ranks is trained, also where nobody has audio; the uneven step is an error before its forward."""
    for said in rank_pool.pool(2).run(TASKS, "misaligned", stage=stage):
        assert said[:2] == ["", ""]
        assert said[2].startswith(
            "ParticipationError: rank 1: module towers.image has nothing to do in micro-batch 0 at step 3, samples "
            "synthetic:0-0:"
        )
        assert "train.absent_modality=skip" in said[2]


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_ends_all_ranks(rank_pool, stage, where):
    answers = rank_pool.pool(2).run(TASKS, "not_finite", stage=stage, where=where)
    for steps, error in answers:
        assert steps == 2
        assert error.startswith(f"NonFiniteError: the {where} of step 3 is not finite; rank "), error
        assert "synthetic:" in error


def test_samples_in_errors_are_bounded(make_batch):
    batch = make_batch([(), ()], length=512)
    count = sum(len(row) for row in batch.sample_ids)
    assert count > 8
    assert name_samples(batch).endswith(f" and {count - 8} more")
    assert name_samples(make_batch([None])) == "none (padding)"
