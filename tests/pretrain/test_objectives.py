"""Tables of the objectives, their heads, and the balance between them."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from triweave.data_pipeline.errors import LabelError
from triweave.pretrain.batch import MASKED_INDEX, OBJECTIVE_ROWS, to_device
from triweave.pretrain.errors import CheckpointError, PretrainError
from triweave.pretrain.model.flops import count_flops
from triweave.pretrain.model.heads import HEADS
from triweave.pretrain.objectives.balance import Decision, TaskBalance
from triweave.pretrain.objectives.config import (
    OBJECTIVES,
    ClassificationConfig,
    JointLossConfig,
    MaskedConfig,
    MatchingConfig,
    RegressionConfig,
    TasksConfig,
)
from triweave.pretrain.objectives.losses import MODALITY_SLOTS, HeadSums, combine
from triweave.pretrain.objectives.rows import ObjectiveStage, objective_rows, objective_weight


@pytest.fixture(scope="session")
def tasks(rank_pool):
    return rank_pool.load(Path(__file__).with_name("objective_tasks.py"))


@pytest.fixture(scope="session")
def plain(tasks, synthetic):
    """The 12 rows of a step as they were packed, and the same with tables."""
    packed = synthetic.pack([tasks.documents(0, row) for row in range(tasks.ROWS)], tasks.LENGTH)
    return packed, ObjectiveStage(model=tasks.model_config(tasks.ALL), seed=tasks.SEED).prepare(packed)


def test_registry_and_names_agree():
    assert tuple(HEADS) == OBJECTIVES


def test_tables_do_not_depend_on_the_split(tasks):
    """12 rows in one micro-batch or in six: the same rows of every objective, in the same order."""
    model = tasks.model_config(tasks.ALL)
    whole = tasks.window(model, 0, rank=0, ranks=1, accumulation=1)
    parts = [batch for rank in range(2) for batch in tasks.window(model, 0, rank=rank, ranks=2, accumulation=3)]
    for name, table in whole[0].extra[OBJECTIVE_ROWS].items():
        split = [part.extra[OBJECTIVE_ROWS][name] for part in parts if name in part.extra[OBJECTIVE_ROWS]]
        assert np.array_equal(np.concatenate([rows.targets for rows in split]), table.targets), name
        assert np.array_equal(np.concatenate([rows.lengths for rows in split]), table.lengths), name
        objective = name.split("/")[0]
        assert math.fsum(objective_weight(part, objective) for part in parts) == objective_weight(whole[0], objective)
    exchanged = np.concatenate([batch.row_weight for batch in parts])
    assert np.array_equal(exchanged, whole[0].row_weight)


def test_exchanged_documents_have_another_ones_media_and_no_targets(plain):
    packed, prepared = plain
    (rows,) = objective_rows(prepared, "matching")
    assert 3 <= (rows.targets == 0).sum() < (rows.targets == 1).sum()
    for last, own in zip(rows.index, rows.targets, strict=True):
        row, place = divmod(int(last), packed.tokens.shape[1])
        mine = (
            np.flatnonzero(packed.document_ids[row] == packed.document_ids[row, place]) + row * packed.tokens.shape[1]
        )
        assert mine[-1] == last
        supervised = np.isin(packed.row_index, mine)
        assert prepared.row_weight[supervised].all() == bool(own)
        assert not own or np.array_equal(prepared.row_weight[supervised], packed.row_weight[supervised])
        for name, payload in packed.payloads.items():
            places = np.isin(payload.token_index, mine)
            if places.any():
                same = np.array_equal(payload.values[places], prepared.payloads[name].values[places])
                assert same == bool(own)
        assert not prepared.labels[row][packed.document_ids[row, place]] or own


def test_documents_with_the_same_media_text_or_group_are_never_exchanged(synthetic, tasks):
    """All pairs of a row agree in one of the three, so nothing can be exchanged."""
    generator = np.random.default_rng(0)
    values = generator.integers(0, 256, (2, 2, 12)).astype(np.uint8)
    pictures = [synthetic.Media(modality="image", grid=(1, 1, 2), values=picture) for picture in values]
    one, two = [20, 21], [22, 23]
    rows = [
        [synthetic.Document(parts=[one, pictures[0]]), synthetic.Document(parts=[two, pictures[0]])],
        [synthetic.Document(parts=[one, pictures[0]]), synthetic.Document(parts=[one, pictures[1]])],
        [synthetic.Document(parts=[one, pictures[0]], labels={"group": "a"}),
         synthetic.Document(parts=[two, pictures[1]], labels={"group": "a"})],
    ]  # fmt: skip
    model = replace(
        tasks.model_config({"language_model": 1.0, "matching": 1.0}), matching=MatchingConfig(exchanged=0.99)
    )
    kept = ObjectiveStage(model=model, seed=0).prepare(synthetic.pack(rows, 32))
    assert objective_rows(kept, "matching")[0].targets.tolist() == [1.0] * 6
    rows[2][1] = replace(rows[2][1], labels={"group": "b"})
    changed = ObjectiveStage(model=model, seed=0).prepare(synthetic.pack(rows, 32))
    assert objective_rows(changed, "matching")[0].targets.tolist()[:4] == [1.0] * 4
    assert 0.0 in objective_rows(changed, "matching")[0].targets[4:]


def test_masked_items_leave_the_contrastive_loss_and_hide_between_bos_and_eos(plain):
    packed, prepared = plain
    segments = packed.segments
    hidden = np.zeros(packed.tokens.size, bool)
    hidden[prepared.extra[MASKED_INDEX]] = True
    counts = Counter()
    for number in range(len(segments)):
        span = slice(int(segments.first[number]), int(segments.first[number] + segments.lengths[number]))
        masked = prepared.segments.weights[number] == 0
        assert hidden[span].any() == masked
        assert not hidden[span][[0, -1]].any()
        if masked and segments.modality[number] == 0:
            assert hidden[span].sum() == max(1, round(0.4 * (segments.lengths[number] - 2)))
        counts[bool(masked)] += 1
        hidden[span] = False
    assert counts[True]
    assert counts[False]
    assert not hidden.any()
    (tokens,) = objective_rows(prepared, "masked_tokens")
    assert np.array_equal(tokens.targets, packed.tokens.reshape(-1)[tokens.index])
    items = {(int(row), int(item)): set() for row, item in zip(segments.rows, segments.items, strict=True)}
    for row, item, weight in zip(segments.rows, segments.items, prepared.segments.weights, strict=True):
        items[int(row), int(item)].add(float(weight))
    assert all(len(weights) == 1 for weights in items.values())


def test_hidden_media_rows_are_standardised_payload_rows(plain):
    packed, prepared = plain
    image = prepared.extra[OBJECTIVE_ROWS]["masked_media/image"]
    assert len(image.index)
    np.testing.assert_allclose(image.targets.mean(1), 0, atol=1e-5)
    np.testing.assert_allclose(image.targets.std(1), 1, atol=1e-3)
    values = packed.payloads["image"].values[np.flatnonzero(packed.payloads["image"].token_index == image.index[0])[0]]
    assert np.corrcoef(values, image.targets[0])[0, 1] == pytest.approx(1)


def test_the_model_sees_nothing_of_a_hidden_token(plain, tasks):
    """Other tokens and other media at hidden places: the same states, bit for bit."""
    _, prepared = plain
    model = tasks.build_model(tasks.model_config(tasks.ALL))
    hidden = prepared.extra[MASKED_INDEX]
    tokens = prepared.tokens.copy()
    text = hidden[prepared.modality_ids.reshape(-1)[hidden] == 0]
    tokens.reshape(-1)[text] = 63 - tokens.reshape(-1)[text] % 40
    payloads = {}
    for name, payload in prepared.payloads.items():
        values = payload.values.copy()
        values[np.isin(payload.token_index, hidden)] += 1
        payloads[name] = replace(payload, values=values)
    changed = replace(prepared, tokens=tokens, payloads=payloads)
    with torch.no_grad():
        assert torch.equal(model.hidden(to_device(prepared, "cpu")), model.hidden(to_device(changed, "cpu")))
        unmasked = replace(prepared, extra={**prepared.extra, MASKED_INDEX: hidden[:0]})
        assert not torch.equal(model.hidden(to_device(unmasked, "cpu")), model.hidden(to_device(prepared, "cpu")))


@pytest.mark.parametrize(("over", "modality", "per_span"), [("documents", None, 1), ("segments", "image", 0)])
def test_labels_reach_their_documents_and_segments(plain, tasks, over, modality, per_span):
    packed, _ = plain
    settings = ClassificationConfig(label="category", classes=tasks.CLASSES, over=over, modality=modality)
    model = replace(tasks.model_config({"language_model": 1.0, "classification": 1.0}), classification=settings)
    (rows,) = objective_rows(ObjectiveStage(model=model, seed=0).prepare(packed), "classification")
    starts = np.cumsum(rows.lengths) - rows.lengths
    assert len(starts) > 4
    for start, length, target in zip(starts, rows.lengths, rows.targets, strict=True):
        row, place = divmod(int(rows.index[start]), packed.tokens.shape[1])
        piece = packed.document_ids[row, place]
        assert packed.labels[row][piece]["category"] == tasks.CLASSES[target]
        assert packed.sample_ids[row][piece].endswith(":alone") == (over == "segments")
        size = (packed.document_ids[row] == piece).sum()
        assert length == (per_span or size)
        if per_span:
            assert place == np.flatnonzero(packed.document_ids[row] == piece)[-1]
        else:
            assert 1 in packed.modality_ids[row][packed.document_ids[row] == piece]


def test_labels_that_cannot_be_learnt_name_the_sample(plain, tasks):
    packed, _ = plain
    few = replace(tasks.model_config({"language_model": 1.0, "classification": 1.0}),
                  classification=ClassificationConfig(label="category", classes=["animals", "food"]))  # fmt: skip
    with pytest.raises(
        LabelError, match=r"sample synthetic:\S+ has category='town', which model.classification.classes"
    ):
        ObjectiveStage(model=few, seed=0).prepare(packed)
    words = replace(tasks.model_config({"language_model": 1.0, "regression": 1.0}),
                    regression=RegressionConfig(label="category"))  # fmt: skip
    with pytest.raises(LabelError, match=r"has category='animals', which model.regression cannot learn"):
        ObjectiveStage(model=words, seed=0).prepare(packed)


def test_every_head_gives_gradients_of_zero_when_idle_and_without_rows(plain, tasks, make_batch):
    """Idle heads and heads without rows: sums of 0, and a gradient, of exactly 0, for each of their parameters."""
    model = tasks.build_model(tasks.model_config(tasks.ALL | {"contrastive": 1.0}, "uncertainty"))
    for batch, only in ((plain[1], ("language_model",)), (make_batch([()], length=32), None)):
        model.zero_grad(set_to_none=True)
        sums = model(to_device(batch, "cpu"), only=only)
        extra = 0 if sums.embeddings is None else (sums.embeddings * 0).sum() + (sums.calibration * 0).sum()
        (sums.total + extra).backward()
        for name, parameter in model.heads.named_parameters():
            assert parameter.grad is not None, name
            assert bool(parameter.grad.any()) == name.startswith("language_model"), name
        assert all(not total for name, total in sums.heads.items() if name != "language_model")


def test_flops_of_the_heads_are_torchs(plain, tasks):
    """Against torch's own counter, which does not see into the logits of the masked tokens."""
    from torch.utils.flop_counter import FlopCounterMode

    model = tasks.build_model(tasks.model_config(tasks.ALL))
    batch = plain[1]
    device = to_device(batch, "cpu")
    with torch.no_grad():
        hidden = model.hidden(device)
        with FlopCounterMode(display=False) as counter:
            for name in tasks.ALL:
                if name != "language_model":
                    model.heads[name](hidden, device)
    vocabulary = model.token_embedding.num_embeddings
    logits = 2 * len(objective_rows(batch, "masked_tokens")[0].targets) * vocabulary * model.config.d_model
    assert count_flops(batch, model.config, vocabulary).objectives == counter.get_total_flops() + logits


def test_weights_depend_on_seed_and_name_only(tasks):
    """More objectives leave the weights of the others as they are."""
    few = dict(tasks.build_model(tasks.model_config({"language_model": 1.0, "matching": 1.0})).named_parameters())
    many = dict(tasks.build_model(tasks.model_config(tasks.ALL)).named_parameters())
    assert set(few) < set(many)
    assert all(torch.equal(parameter, many[name]) for name, parameter in few.items())


def balance(weighting: str = "fixed", **tasks: object) -> TaskBalance:
    joint = JointLossConfig(weighting=weighting, window_steps=2, temperature=1.0)
    return TaskBalance({"a": 1.0, "b": 2.0, "c": 1.0}, joint, TasksConfig(window_steps=2, **tasks), seed=0)


def test_loss_rate_gives_more_to_what_falls_slower():
    task = balance("loss_rate")
    for means in ({"a": 8.0, "b": 3.0, "c": 1.0}, {"a": 8.0, "b": 3.0, "c": 1.0}, {"a": 4.0, "b": 3.0, "c": 1.0}):
        assert task.decide(1).weights == {"a": 1.0, "b": 2.0, "c": 1.0}
        task.observe(means)
    task.observe({"a": 2.0, "b": 3.0, "c": 1.5})
    powers = [math.exp(3 / 8), math.exp(1.0), math.exp(1.25)]
    wanted = [3 * power / sum(powers) for power in powers]
    assert task.decide(5).weights == pytest.approx({"a": wanted[0], "b": 2 * wanted[1], "c": wanted[2]})


@pytest.mark.parametrize(
    ("options", "likeliest"),
    [({"schedule": "loss"}, "c"), ({"schedule": "gap", "targets": {"a": 1.0, "b": 4.0, "c": 1.0}}, "a")],
)
def test_draws_follow_the_scores(options, likeliest):
    """a: from 10 to 5, c: from 2 to 2; a is furthest above its target, c has lost least of its loss."""
    task = balance(temperature=0.2, **options)
    assert set(task.decide(1).weights) == {"a", "b", "c"}
    for means in ({"a": 10.0, "b": 5.0, "c": 2.0}, {"a": 10.0, "b": 5.0, "c": 2.0}):
        task.observe(means)
    for _ in range(2):
        task.observe({"a": 5.0, "b": 4.0, "c": 2.0})
    drawn = Counter(name for step in range(1, 401) for name in task.decide(step).weights)
    assert sum(drawn.values()) == 400
    assert drawn.most_common(1)[0][0] == likeliest
    assert drawn[likeliest] > 200


def test_always_and_per_step_are_kept():
    task = balance(schedule="loss", always=["b"], per_step=1)
    for _ in range(2):
        task.observe({"a": 1.0, "b": 1.0, "c": 1.0})
    drawn = {tuple(task.decide(step).weights) for step in range(1, 50)}
    assert drawn == {("a", "b"), ("b", "c")}


def test_a_restored_balance_decides_the_same():
    """Through JSON, bit for bit; and a balance of other objectives refuses the state."""
    first, second = (balance("loss_rate", schedule="loss") for _ in range(2))
    generator = np.random.default_rng(0)
    for _ in range(9):
        first.observe({name: float(value) for name, value in zip("abc", generator.random(3), strict=True)})
    second.restore(json.loads(json.dumps(first.state())))
    assert [first.decide(step) for step in range(50)] == [second.decide(step) for step in range(50)]
    other = TaskBalance({"a": 1.0}, JointLossConfig(), TasksConfig(), seed=0)
    with pytest.raises(CheckpointError, match=r"the checkpoint has trained a, b, c, model\.objectives asks for a;"):
        other.restore(first.state())


def test_the_judge_hears_weighed_losses_or_weighed_shares_of_the_first_ones():
    """Objectives without rows in the step count with what they had last."""
    every_step, drawn = balance(), balance(schedule="loss")
    assert drawn.level({}) == 1 + 2 + 1
    for one in (every_step, drawn):
        one.observe({"a": 2.0, "b": 4.0, "c": 8.0})
    assert every_step.level({"b": 3.0}) == 2 + 2 * 3 + 8
    assert drawn.level({"b": 3.0}) == 1 + 2 * 3 / 4 + 1


def test_what_was_decided_before_is_done_again():
    """Behind the restored state, as long as the settings are the same; later steps are decided anew."""
    names = ("a", "b", "c")
    first = balance(schedule="loss")
    for _ in range(2):
        first.observe(dict.fromkeys(names, 1.0))
    state = json.loads(json.dumps(first.state()))
    own = [first.decide(step) for step in (3, 4, 5)]
    others = [Decision(step=each.step, weights={n: 7.0 for n in names if n not in each.weights}) for each in own[:2]]
    again = balance(schedule="loss")
    again.restore(state, others)
    assert [again.decide(step) for step in (3, 4, 5)] == [*others, own[2]]
    changed = balance(schedule="loss", temperature=0.4)
    changed.restore(state, others)
    assert changed.decide(3) != others[0]


def test_the_level_does_not_jump_where_objectives_change():
    task = balance(schedule="curriculum", from_step={"b": 3})
    before = task.level({"a": 4.0, "c": 1.0})
    task.observe({"a": 4.0, "c": 1.0})
    assert task.level({"a": 4.0, "b": 50.0, "c": 1.0}) == before == 4.0
    assert math.isnan(task.level({"a": math.nan, "b": 50.0, "c": 1.0}))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TasksConfig(per_step=0), "tasks.per_step is 0"),
        (lambda: TasksConfig(targets={"a": 0.0}), "tasks.targets.a is 0.0"),
        (lambda: TasksConfig(schedule="gap").check({"a": 1.0, "b": 1.0}), "set tasks.targets.a"),
        (lambda: TasksConfig(schedule="loss", per_step=2).check({"a": 1.0, "b": 1.0}), "leaves none out"),
        (lambda: TasksConfig(schedule="loss", always=["x"]).check({"a": 1.0}), "tasks.always names 'x'"),
        (lambda: TasksConfig(schedule="curriculum", from_step={"a": 2}).check({"a": 1.0}), "step 1 without"),
        (lambda: MaskedConfig(tokens=0.0), "model.masked.tokens is 0.0"),
        (lambda: MatchingConfig(exchanged=1.0), "model.matching.exchanged is 1.0"),
        (lambda: JointLossConfig(temperature=0.0), "model.joint_loss.temperature is 0.0"),
        (lambda: ClassificationConfig(classes=["a", "a"]), "names 'a' twice"),
        (lambda: ClassificationConfig(modality="image"), "set model.classification.over=segments"),
        (lambda: RegressionConfig(scale=0.0), "model.regression.scale is 0.0"),
    ],
)
def test_settings_that_cannot_work_are_refused(make, message):
    with pytest.raises(PretrainError, match=message):
        make()


def test_a_run_refuses_objectives_that_its_data_cannot_serve(tasks):
    config = tasks.config(tasks.model_config(tasks.ALL), 1)
    with pytest.raises(PretrainError, match=r"set data.labels=\['stars', 'category'\]"):
        replace(config, data=replace(config.data, labels=["stars"]))
    alone = replace(config.data, packing=replace(config.data.packing, contrastive_share=0.0))
    with pytest.raises(PretrainError, match=r"model\.objectives has masked_tokens, which learns from parts"):
        replace(config, data=alone)
    with pytest.raises(PretrainError, match=r"model\.classification\.label is empty"):
        replace(config.model, classification=ClassificationConfig(classes=tasks.CLASSES))


def test_a_pass_without_a_language_model_has_zeros_of_every_source():
    sums = combine({"regression": HeadSums.of(torch.ones(()))}, torch.ones(()), None, sources=3)
    assert sums.by_slot.tolist() == [0.0] * 3 * MODALITY_SLOTS
