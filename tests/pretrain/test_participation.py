"""The participation contract: who calls which tower is known before, kept, and its breach an error on that step."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from triweave.pretrain.participation import gradient_parameters, name_samples, tie_zero

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


def test_a_modality_without_tower_is_refused_on_all_ranks(rank_pool):
    errors = rank_pool.pool(2).run(TASKS, "unknown_modality")
    assert errors[0] == errors[1]
    assert errors[0].startswith("ParticipationError: rank 1 holds audio, the model has towers for image")


FAULTS = {
    "forgets a guard": "rank 1: module towers.image entered 0 times, announced 1",
    "calls a tower twice": "rank 1: module towers.image entered 2 times, announced 1",
    "calls an absent tower": "rank 1: module towers.audio entered 1 times, announced 0",
    "uses a weight past its tower": "rank 1: module towers.audio.project.bias gets a gradient but was not announced",
    "drops a tower's output": "rank 1: module towers.image.project.weight gets no gradient",
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("stage", [1, 2])
def test_a_breach_is_an_error_on_that_step_on_all_ranks(rank_pool, stage, fault):
    """Both ranks raise within the step, naming rank, module, step and samples; without the checks they would hang."""
    answers = rank_pool.pool(2).run(TASKS, "disobey", stage=stage, fault=fault)
    for steps, error, seconds in answers:
        assert steps == 2
        assert error.startswith(f"ParticipationError: {FAULTS[fault]}"), error
        assert "at step 3, samples synthetic:0-0:" in error
        assert seconds < 30


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["calls an absent tower", "calls a tower twice", "forgets a guard"])
def test_a_breach_under_stage_3_ends_both_ranks(rank_pool, tmp_path, fault):
    """Peers wait for gathers there: the rank at fault raises on that step, its end lets the other one go at once."""
    note, ranks, started = tmp_path / "error", rank_pool.RankPool(2), time.monotonic()
    with pytest.raises(rank_pool.RankError) as ended:
        ranks.run(TASKS, "disobey_and_leave", stage=3, fault=fault, note=str(note))
    ranks.close()
    assert time.monotonic() - started < 60
    assert "rank 1:\ndied in" in str(ended.value)
    assert note.read_text().startswith(f"ParticipationError: {FAULTS[fault]}")
    assert "at step 3, samples synthetic:" in note.read_text()


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
