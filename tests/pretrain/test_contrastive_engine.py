"""Training with the contrastive objective equals one plain torch process that loops over single pairs.

Tolerances are those of test_parity.py: loss, figures and weights |a - b| <= 1e-6 max(1, |b|), moments within 1e-6 of
the tensor's maximum. All cells train on the same 12 rows a step.
"""

from __future__ import annotations

import itertools
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from siblings import load_sibling

TASKS = Path(__file__).with_name("contrastive_tasks.py")
THIS = Path(__file__)
TOLERANCE = 1e-6
SLOW = pytest.mark.slow
QUICK = {
    ("all", "sigmoid", 0, 2, 2),
    ("all", "sigmoid", 1, 2, 1),
    ("all", "infonce", 2, 2, 2),
    ("all", "sigmoid", 3, 2, 2),
    ("image_against_audio", "sigmoid", 2, 2, 2),
    ("image_against_audio", "infonce", 3, 2, 1),
    ("few", "sigmoid", 3, 2, 2),
    ("few", "infonce", 2, 3, 2),
    ("all", "sigmoid", 2, 1, 2),
}
"""(case, loss, stage, ranks, accumulation) that run always; the rest of the matrix is slow."""
CASES = ("all", "image_against_audio", "few")
MATRIX = [
    (case, loss, stage, ranks, accumulation)
    for number, (ranks, case, stage) in enumerate(itertools.product((1, 2, 3), CASES, (0, 1, 2, 3)))
    for at, (loss, accumulation) in enumerate(itertools.product(("sigmoid", "infonce"), (1, 2)))
    if (case, loss, stage, ranks, accumulation) in QUICK or (at in (0, 3)) == (sum(divmod(number, 4)) % 2 == 0)
]
"""Half of all cells, in which any three settings still meet in all their values; and those of QUICK."""


@pytest.fixture(scope="session")
def tasks(rank_pool):
    return rank_pool.load(TASKS)


@pytest.fixture(scope="session")
def reference(tasks):
    """The plain torch trainer, each split of the rows once."""
    return cache(lambda case, loss, ranks, accumulation: tasks.reference_case(
        case=case, loss=loss, ranks=ranks, accumulation=accumulation))  # fmt: skip


@pytest.fixture(scope="session")
def trained(rank_pool):
    """Answers of all ranks for a cell of the matrix, each cell trained once."""
    return cache(lambda case, loss, stage, ranks, accumulation: rank_pool.pool(ranks).run(
        TASKS, "train_case", case=case, loss=loss, zero_stage=stage, accumulation=accumulation))  # fmt: skip


def assemble(tasks: Any, snapshots: list[dict[str, Any]]) -> Any:
    return load_sibling("engine_tasks").assemble(snapshots, model=tasks.build_model("sigmoid"))


def close(found: Any, wanted: Any) -> None:
    np.testing.assert_allclose(found, wanted, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("case", "loss", "stage", "ranks", "accumulation"),
    [pytest.param(*cell, marks=() if cell in QUICK else SLOW) for cell in MATRIX],
)
def test_engine_equals_plain_torch(tasks, trained, reference, case, loss, stage, ranks, accumulation):
    answers, expected = trained(case, loss, stage, ranks, accumulation), reference(case, loss, ranks, accumulation)
    for answer in answers:
        close(answer["losses"], expected["losses"])
        close(answer["norms"], expected["norms"])
        close(answer["figures"], expected["figures"])
        assert [figures[1] for figures in answer["figures"]] == [figures[1] for figures in expected["figures"]]
        own = [figures[0] for figures in expected["figures"]]
        together = [lm + tasks.WEIGHT * value for lm, value in zip(expected["losses"], own, strict=True)]
        close(answer["objectives"], together)
    for step, state in enumerate(expected["states"]):
        whole, steps = assemble(tasks, [answer["snapshots"][step] for answer in answers])
        assert steps == state["steps"], step
        for kind, parameters in state["whole"].items():
            for name, wanted in parameters.items():
                scale = max(1.0, np.abs(wanted).max()) if kind == "weight" else np.abs(wanted).max()
                worst = np.abs(whole[kind][name] - wanted).max()
                assert worst <= TOLERANCE * scale, f"step {step}: {kind} of {name} differs by {worst / (scale or 1)}"


@pytest.mark.parametrize("case", ["all", "image_against_audio", "few"])
def test_the_first_loss_does_not_depend_on_the_split(reference, trained, case):
    """12 rows on 1, 2, 3 ranks in 1 or 2 micro-batches: one contrastive loss, the same pairs."""
    cells = [cell for cell in QUICK if cell[0] == case]
    for _, loss, stage, ranks, accumulation in cells:
        figures = np.array([answer["figures"][0] for answer in trained(case, loss, stage, ranks, accumulation)])
        close(figures, np.tile(reference(case, loss, 1, 1)["figures"][0], (ranks, 1)))


def test_pairs_vanish_and_come_back(tasks, trained):
    """In one step of `few` nobody holds segments: no pairs, no loss, and the head takes its step with gradient 0."""
    answers = trained("few", "sigmoid", 3, 2, 2)
    pairs = [figures[1] for figures in answers[0]["figures"]]
    assert [count > 0 for count in pairs] == [step != tasks.EMPTY_STEP for step in range(tasks.STEPS)]
    assert answers[0]["figures"][tasks.EMPTY_STEP] == (0.0, 0, 0.0)
    before, _ = assemble(tasks, [answer["snapshots"][tasks.EMPTY_STEP - 1] for answer in answers])
    after, steps = assemble(tasks, [answer["snapshots"][tasks.EMPTY_STEP] for answer in answers])
    name = "heads.contrastive.offset"
    np.testing.assert_allclose(after["exp_avg"][name], 0.9 * before["exp_avg"][name], rtol=1e-6)
    assert steps[name] == tasks.EMPTY_STEP + 1


def test_every_parameter_of_the_head_learns(tasks, trained):
    first = {name: p.detach().flatten().numpy() for name, p in tasks.build_model("sigmoid").named_parameters()}
    last, _ = assemble(tasks, [answer["snapshots"][-1] for answer in trained("all", "sigmoid", 3, 2, 2)])
    for name in ("weight", "log_scale", "offset"):
        name = f"heads.contrastive.{name}"
        assert (last["weight"][name] != first[name]).mean() > 0.99


def learn(world, *, loss: str) -> list[Any]:
    """Run inside one rank: 54 steps on one step's rows."""
    tasks = load_sibling("contrastive_tasks")
    from triweave.pretrain.engine.zero import Engine

    engine = Engine(tasks.build_model(loss), tasks.config(1, loss, lr=3e-2), world, accumulation=2)
    window = tasks.window("all", 0, rank=0, ranks=1, accumulation=2)
    return [engine.train_window(window).contrastive for _ in range(54)]


@pytest.mark.parametrize(("loss", "accuracy"), [("sigmoid", 0.6), pytest.param("infonce", 0.85, marks=SLOW)])
def test_partners_find_each_other_after_some_steps(rank_pool, loss, accuracy):
    """Learnt by heart: most queries of 26 pairs find their own partner, 15 % of them before; seen 75 and 94 %."""
    figures = rank_pool.pool(1).run(THIS, "learn", loss=loss)[0]
    assert figures[0].accuracy < 0.3
    assert figures[-1].accuracy > accuracy
    assert figures[-1].loss < figures[0].loss / 4


def bf16_case(world, *, stage: int) -> list[Any]:
    """Run inside ranks: mixed precision over the case `all`."""
    tasks = load_sibling("contrastive_tasks")
    return tasks.train_case(
        world, case="all", loss="sigmoid", zero_stage=stage, accumulation=2, precision="bf16"
    )["figures"]  # fmt: skip


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=SLOW)])
def test_bf16_is_near_fp32(rank_pool, reference, stage):
    """Embeddings are normalised and compared in fp32; only the hidden states are rounded."""
    figures = rank_pool.pool(2).run(THIS, "bf16_case", stage=stage)[0]
    assert figures[0][1] == reference("all", "sigmoid", 2, 2)["figures"][0][1]
    assert figures[0][0] == pytest.approx(reference("all", "sigmoid", 2, 2)["figures"][0][0], rel=0.03)


def poisoned(world, *, accumulation: int) -> tuple[int, str]:
    """Run inside ranks: rank 1's third step has a segment that is not finite; no token of it is supervised."""
    tasks = load_sibling("contrastive_tasks")
    from triweave.pretrain.engine.zero import Engine

    engine = Engine(tasks.build_model("sigmoid"), tasks.config(2, "sigmoid"), world, accumulation=accumulation)
    for step in range(4):
        batches = tasks.window("all", step, rank=world.rank, ranks=world.size, accumulation=accumulation)
        if step == 2 and world.rank == 1:
            audio = batches[-1].payloads["audio"]
            segment = batches[-1].segments
            owner = int(segment.first[np.flatnonzero(segment.modality == 2)[-1]])
            audio.values[audio.token_index >= owner] = np.nan
            batches[-1].row_weight[:] = 0
            batches[-1].row_weight[0] = 1
        try:
            engine.train_window(batches)
        except Exception as error:
            return engine.step, f"{type(error).__name__}: {error}"
    return engine.step, ""


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_segment_that_is_not_finite_ends_all_ranks(rank_pool, accumulation):
    for steps, error in rank_pool.pool(2).run(THIS, "poisoned", accumulation=accumulation):
        assert steps == 2
        assert error.startswith("NonFiniteError: the loss of step 3 is not finite; rank 1 held samples synthetic:"), (
            error
        )


def cut_and_resume(world, *, run_dir: str, stage: int) -> Any:
    """Run inside ranks: two steps, a checkpoint, two more; then the two more again from the checkpoint."""
    from triweave.pretrain.checkpoints.checkpoint import CheckpointConfig, newest_whole_checkpoint, save_checkpoint
    from triweave.pretrain.engine.zero import Engine

    tasks = load_sibling("contrastive_tasks")
    answers = []
    for resumed in (False, True):
        engine = Engine(tasks.build_model("sigmoid"), tasks.config(stage, "sigmoid"), world, accumulation=2)
        if resumed:
            checkpoint = newest_whole_checkpoint(run_dir, world, tell=print)
            assert checkpoint is not None
            checkpoint.load_into(engine)
        figures = []
        for step in range(engine.step, 4):
            if step == 2 and not resumed:
                save_checkpoint(run_dir, engine, CheckpointConfig(), state={}, config_yaml="seed: 0\n")
            window = tasks.window("all", step, rank=world.rank, ranks=world.size, accumulation=2)
            figures.append(engine.train_window(window).contrastive)
        answers.append((figures[-2:], load_sibling("engine_tasks").snapshot(engine)))
        engine.close()
    return answers


@pytest.mark.parametrize("stage", [1, pytest.param(2, marks=SLOW), 3])
def test_a_resume_is_bit_identical(rank_pool, tmp_path, stage):
    for straight, resumed in rank_pool.pool(2).run(THIS, "cut_and_resume", run_dir=str(tmp_path), stage=stage):
        assert straight[0] == resumed[0]
        for key, values in straight[1]["pieces"].items():
            assert values.tobytes() == resumed[1]["pieces"][key].tobytes(), key
