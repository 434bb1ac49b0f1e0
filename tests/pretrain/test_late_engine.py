"""Objectives over items in the model, its config and the engine; tolerances are those of test_parity.py."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from siblings import load_sibling
from torch.nn import functional

from triweave.pretrain.batch import OBJECTIVE_ROWS, to_device
from triweave.pretrain.config import load_config
from triweave.pretrain.errors import PretrainError
from triweave.pretrain.fusion.config import FusionConfig
from triweave.pretrain.late.config import OPERATORS, LateConfig
from triweave.pretrain.model.config import ModelConfig
from triweave.pretrain.objectives.config import ClassificationConfig

TASKS = Path(__file__).with_name("late_tasks.py")
TOLERANCE = 1e-6
MATRIX = [
    ("lmf", 3, 2, 2),
    ("graph", 2, 2, 1),
    ("hybrid", 1, 3, 1),
    ("attention", 0, 2, 2),
    ("vote/lstm", 3, 2, 1),
    ("mutan/transformer", 2, 3, 1),
]
"""(operator, stage, ranks, accumulation)."""
CLASSES = ClassificationConfig(label="category", classes=["a", "b"], over="items")
WANTED = {"language_model": 1.0, "classification": 1.0}


@pytest.fixture(scope="session")
def tasks(rank_pool):
    return rank_pool.load(TASKS)


@pytest.fixture(scope="session")
def batch(tasks):
    (only,) = load_sibling("objective_tasks").window(tasks.model_config("vote"), 0, rank=0, ranks=1, accumulation=1)
    return only


def test_items_with_the_label_have_one_row_each_and_name_their_parts(batch):
    rows, segments = batch.extra[OBJECTIVE_ROWS]["classification"], batch.segments
    pieces = batch.document_ids.reshape(-1)[segments.first]
    labels = [batch.labels[row][piece] for row, piece in zip(segments.rows, pieces, strict=True)]
    kept = [number for number, label in enumerate(labels) if "category" in label]
    owners = [(int(segments.rows[number]), int(segments.items[number])) for number in kept]
    items = sorted(set(owners))
    assert len(kept) < len(labels)
    assert len(rows.targets) == len(rows.weights) == len(items)
    assert [items[row] for row in rows.parts[:, 0]] == owners
    assert rows.parts[:, 1].tolist() == segments.modality[kept].tolist()
    assert rows.lengths.tolist() == segments.lengths[kept].tolist()


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_class_is_read_from_the_fused_parts(tasks, batch, operator):
    model = load_sibling("objective_tasks").build_model(tasks.model_config(operator))
    device, head = to_device(batch, "cpu"), model.heads["classification"]
    hidden = model.hidden(device)
    rows = batch.extra[OBJECTIVE_ROWS]["classification"]
    places = torch.from_numpy(rows.index).split(rows.lengths.tolist())
    means = torch.stack([hidden.flatten(0, 1)[place].mean(0) for place in places])
    items, modalities = torch.from_numpy(rows.parts).unbind(1)
    fused = head.late(means, modalities, items, len(rows.targets))
    logits = fused @ head.weight.t() + head.bias
    expected = functional.cross_entropy(logits, torch.from_numpy(rows.targets), reduction="sum")
    torch.testing.assert_close(head(hidden, device).total, expected)
    assert logits.std(0).max() > 1e-4  # the items are told apart


@pytest.mark.parametrize("kind", ["transformer", "lstm", "gru"])
def test_a_text_encoder_takes_the_place_of_the_trunk_for_texts_that_stand_alone(tasks, batch, kind):
    plain = load_sibling("objective_tasks").build_model(tasks.model_config("vote"))
    model = load_sibling("objective_tasks").build_model(tasks.model_config(f"vote/{kind}"))
    device = to_device(batch, "cpu")
    before, after = plain.hidden(device), model.hidden(device)
    text = torch.zeros(before.shape[:2], dtype=torch.bool)
    for first, length, modality in zip(
        batch.segments.first, batch.segments.lengths, batch.segments.modality, strict=True
    ):
        text.view(-1)[first : first + length] = bool(modality == 0)
        if modality == 0:
            embedded = model.token_embedding(device.tokens.flatten()[first : first + length])
            expected = model.late_text.project(model.late_text.encoder(embedded, torch.tensor([int(length)])))
            torch.testing.assert_close(after.flatten(0, 1)[first : first + length], expected, rtol=1e-5, atol=1e-5)
    assert text.any()
    assert torch.equal(after[~text], before[~text])
    nothing = replace(
        device, segment_index=device.segment_index[:0], segment_lengths=device.segment_lengths[:0],
        segment_modality=device.segment_modality[:0],
    )  # fmt: skip
    model.hidden(nothing).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.late_text.parameters())


def test_a_text_encoder_that_cannot_be_is_refused_in_the_config():
    with pytest.raises(PretrainError, match="heads is 3; width 16"):
        LateConfig(text_encoder="transformer", text_width=16, text_heads=3)


@pytest.mark.parametrize("operator", ["hybrid", "lmf"])
def test_an_idle_head_gives_every_parameter_a_gradient_of_exactly_zero(tasks, batch, operator):
    head = load_sibling("objective_tasks").build_model(tasks.model_config(operator)).heads["classification"]
    device = to_device(batch, "cpu")
    hidden = torch.randn(*batch.tokens.shape, 32)
    found = head(hidden, device, idle=True).total
    found.backward()
    assert float(found.detach()) == 0
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in head.parameters())


def test_late_fusion_and_objectives_over_items_go_together():
    late = FusionConfig(kind="late", late=LateConfig(operator="lmf"))
    assert ModelConfig(objectives=WANTED, classification=CLASSES, fusion=late).fusion.late.operator == "lmf"
    with pytest.raises(PretrainError, match=r"fusion\.kind is sequence; set model\.fusion\.kind=late"):
        ModelConfig(objectives=WANTED, classification=CLASSES)
    with pytest.raises(PretrainError, match=r"objectives has none; add classification"):
        ModelConfig(fusion=late)
    with pytest.raises(PretrainError, match=r"late is set but model\.fusion\.kind is sequence"):
        FusionConfig(late=LateConfig(operator="lmf"))


def test_the_settings_of_the_readme_load(tmp_path):
    readme = Path(__file__).parents[2] / "pretrain" / "README.md"
    (shown,) = re.findall(r"```yaml\n(model:\n  fusion: {kind: late.*?)```", readme.read_text(), re.DOTALL)
    data = """
data:
  sources: [{name: stamps, shards: /shards}]
  tokenizer: tokenizer.model
  labels: [category]
  packing: {contrastive_share: 1.0}
run_dir: runs/x
"""
    (tmp_path / "run.yaml").write_text(data + shown)
    config = load_config(tmp_path / "run.yaml", ["model.fusion.late.text_encoder=gru"])
    assert (config.model.fusion.late.operator, config.model.fusion.late.text_encoder) == ("lmf", "gru")
    with pytest.raises(PretrainError, match=r"contrastive_share is 0; set data\.packing\.contrastive_share=1\.0"):
        load_config(tmp_path / "run.yaml", ["data.packing.contrastive_share=0"])


@pytest.mark.slow
@pytest.mark.parametrize(("operator", "stage", "ranks", "accumulation"), MATRIX)
def test_engine_equals_plain_torch(rank_pool, tasks, operator, stage, ranks, accumulation):
    answers = rank_pool.pool(ranks).run(
        TASKS, "train_case", operator=operator, zero_stage=stage, accumulation=accumulation
    )
    expected = tasks.reference_case(operator=operator, ranks=ranks, accumulation=accumulation)
    for answer in answers:
        np.testing.assert_allclose(answer["objectives"], expected["objectives"], rtol=TOLERANCE, atol=TOLERANCE)
        np.testing.assert_allclose(answer["norms"], expected["norms"], rtol=TOLERANCE, atol=TOLERANCE)
    made = load_sibling("objective_tasks")
    model = made.build_model(tasks.model_config(operator))
    for step, state in enumerate(expected["states"]):
        whole, _ = load_sibling("engine_tasks").assemble([answer["snapshots"][step] for answer in answers], model=model)
        for kind, parameters in state["whole"].items():
            for name, wanted in parameters.items():
                scale = max(1.0, np.abs(wanted).max()) if kind == "weight" else np.abs(wanted).max()
                worst = np.abs(whole[kind][name] - wanted).max()
                assert worst <= TOLERANCE * scale, f"step {step}: {kind} of {name} differs by {worst / (scale or 1)}"


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_an_operator_waits_for_its_step_in_the_curriculum(rank_pool, stage):
    answers = rank_pool.pool(2).run(
        TASKS, "train_case", operator="graph", zero_stage=stage, accumulation=1, from_step=3
    )
    moments = [
        [
            float(np.abs(values).max())
            for answer in answers
            for (name, kind, _), values in answer["snapshots"][step]["pieces"].items()
            if kind == "exp_avg" and name.startswith("heads.classification.late")
        ]
        for step in range(3)
    ]
    assert moments[0]
    assert max(moments[0]) == max(moments[1]) == 0
    assert max(moments[2]) > 0
