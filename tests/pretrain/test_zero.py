"""The DeepSpeed dict, and the engine's corners beside parity: frozen and tied parameters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from siblings import load_sibling

from triweave.pretrain.batch import to_device
from triweave.pretrain.engine.config import OWNED_KEYS, TrainConfig, deepspeed_config
from triweave.pretrain.engine.optimizer import tower_of
from triweave.pretrain.errors import PretrainError

THIS = Path(__file__)
TASKS = THIS.with_name("engine_tasks.py")


@pytest.fixture(scope="session")
def tasks(rank_pool):
    return rank_pool.load(TASKS)


def test_settings_become_the_deepspeed_dict(tasks):
    config = tasks.config(2, precision="bf16", clip_norm=0.5, deepspeed={
        "zero_optimization": {"overlap_comm": True, "reduce_bucket_size": 64}, "wall_clock_breakdown": True,
    })  # fmt: skip
    made = deepspeed_config(config, accumulation=3, parameters=1001)
    assert made["train_micro_batch_size_per_gpu"] == 2
    assert made["gradient_accumulation_steps"] == 3
    assert made["gradient_clipping"] == 0.5
    assert made["bf16"] == {"enabled": True}
    assert made["data_types"] == {"grad_accum_dtype": "fp32"}
    assert made["wall_clock_breakdown"] is True
    assert made["zero_optimization"] == {
        "stage": 2, "overlap_comm": True, "reduce_bucket_size": 64, "allgather_bucket_size": 1002,
    }  # fmt: skip


@pytest.mark.parametrize("key", OWNED_KEYS)
def test_owned_keys_are_refused_by_name(tasks, key):
    section, _, name = key.rpartition(".")
    given = {section: {name: 1}} if section else {name: 1}
    with pytest.raises(PretrainError, match=rf"deepspeed\.{key} is decided by "):
        deepspeed_config(tasks.config(2, deepspeed=given), accumulation=1, parameters=10)


def test_overlap_is_refused_where_it_loses_towers(tasks):
    given = {"zero_optimization": {"overlap_comm": True}}
    with pytest.raises(PretrainError, match=r"overlap_comm=true at train\.zero_stage=1"):
        deepspeed_config(tasks.config(1, deepspeed=given), accumulation=1, parameters=10)


def refused_by_deepspeed(world) -> str:
    """Run inside ranks: a key of the pass-through that DeepSpeed does not take."""
    from triweave.pretrain.engine.zero import Engine

    tasks = load_sibling("engine_tasks")
    given = {"zero_optimization": {"reduce_bucket_size": "many"}}
    with pytest.raises(PretrainError) as caught:
        Engine(tasks.build_model(), tasks.config(2, deepspeed=given), world, accumulation=1)
    return str(caught.value)


def test_values_deepspeed_does_not_take_are_one_line(rank_pool):
    (said,) = rank_pool.pool(1).run(THIS, "refused_by_deepspeed")
    assert said.startswith("DeepSpeed refuses the deepspeed section: ")
    assert "reduce_bucket_size" in said
    assert "\n" not in said


def test_bf16_needs_master_weights():
    with pytest.raises(PretrainError, match=r"train\.zero_stage=1"):
        TrainConfig(zero_stage=0, precision="bf16")


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"micro_batch_rows": 0}, {"torch_threads": -1}, {"norms_every_steps": -1}]
)
def test_impossible_settings_are_refused_by_name(wrong):
    with pytest.raises(PretrainError, match=rf"train\.{next(iter(wrong))} is "):
        TrainConfig(**wrong)


def train_tied_and_frozen(world, *, stage: int) -> dict[str, object]:
    """Run inside ranks: one matrix for lookup and head, and a frozen audio tower."""
    import dataclasses

    from triweave.pretrain.engine.zero import Engine
    from triweave.pretrain.model.model import MultimodalTransformer

    tasks = load_sibling("engine_tasks")
    model = MultimodalTransformer(
        dataclasses.replace(tasks.MODEL, tie_embeddings=True), vocab_size=64, media_features=tasks.FEATURES, seed=3
    )
    model.towers["audio"].requires_grad_(False)
    engine = Engine(model, tasks.config(stage), world, accumulation=1)
    losses = [engine.train_window([tasks.micro_batch("all", step, world.rank, 0)]).loss for step in range(3)]
    owned = [
        (fragment.name, fragment.offset + start, fragment.tensors["weight"][start:end].float().numpy().copy())
        for fragment in engine.fragments()
        for start, end in [fragment.owned]
    ]
    engine.close()
    return {"losses": losses, "owned": owned}


def test_tied_and_frozen_parameters_agree_at_every_stage(rank_pool, tasks):
    """Fragments cover every element once; frozen weights stand; all stages give the same losses and weights."""
    initial = {name: p.detach().flatten().numpy() for name, p in tasks.build_model().named_parameters()}
    reference: tuple[list[float], dict[str, np.ndarray]] | None = None
    for stage in (0, 1, 2, 3):
        answers = rank_pool.pool(2).run(THIS, "train_tied_and_frozen", stage=stage)
        pieces: dict[str, list[tuple[int, np.ndarray]]] = {}
        for answer in answers:
            for name, offset, values in answer["owned"]:
                pieces.setdefault(name, []).append((offset, values))
        assert "heads.language_model.weight" not in pieces
        whole = {}
        for name, parts in pieces.items():
            parts.sort(key=lambda part: part[0])
            assert [offset for offset, _ in parts] == [sum(len(v) for _, v in parts[:i]) for i in range(len(parts))]
            whole[name] = np.concatenate([values for _, values in parts])
        assert {name: len(values) for name, values in whole.items()} == {
            name: len(values) for name, values in initial.items() if name != "heads.language_model.weight"
        }
        assert np.array_equal(whole["towers.audio.project.weight"], initial["towers.audio.project.weight"])
        assert not np.array_equal(whole["towers.image.project.weight"], initial["towers.image.project.weight"])
        if reference is None:
            reference = answers[0]["losses"], whole
        np.testing.assert_allclose(answers[0]["losses"], reference[0], rtol=1e-6)
        for name, values in whole.items():
            np.testing.assert_allclose(values, reference[1][name], atol=1e-6, rtol=0)


def _two_sources(batch):
    """Return the batch with its supervised positions dealt out to two sources in turns."""
    import dataclasses

    return dataclasses.replace(batch, row_source=(np.arange(len(batch.row_index)) % 2).astype(np.int16))


def train_one_told(world, *, stage: int) -> dict[str, object]:
    """Run inside ranks: one step that clips, of two sources, and what it tells."""
    import dataclasses

    from triweave.data_pipeline.config import SourceConfig
    from triweave.pretrain.engine.zero import Engine

    tasks = load_sibling("engine_tasks")
    config = tasks.config(stage, clip_norm=0.01, norms_every_steps=1)
    sources = [SourceConfig(name=name, shards="none") for name in ("web", "speech")]
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, sources=sources))
    engine = Engine(tasks.build_model(), config, world, accumulation=1)
    result = engine.train_window([_two_sources(tasks.micro_batch("nobody_has_audio", 3, world.rank, 0))])
    after = tasks.snapshot(engine)
    engine.close()
    return {
        "after": after,
        "norms": {name: (norms.gradient, norms.update) for name, norms in result.tower_norms.items()},
        "grad_norm": result.grad_norm,
        "by_source": result.by_source,
        "weights": result.window.source_weights.tolist(),
    }


@pytest.mark.parametrize(
    "stage", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow), 3]
)
def test_towers_and_sources_are_told_apart(rank_pool, tasks, stage):
    """Against one plain torch process: gradients by tower, how far a clipped step moved each, losses by source."""
    answers = rank_pool.pool(2).run(THIS, "train_one_told", stage=stage)
    model, batches = tasks.build_model(), [_two_sources(tasks.micro_batch("nobody_has_audio", 3, r, 0)) for r in (0, 1)]
    weight = sum(float(batch.row_weight.sum()) for batch in batches)
    by_source = np.zeros(2)
    for batch in batches:
        sums = model(to_device(batch, "cpu", sources=2))
        (sums.total / weight).backward()
        by_source += sums.by_slot.view(2, -1).sum(1).double().numpy()
    squares = {"trunk": 0.0, "image": 0.0}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            squares[tower_of(name)] += float(parameter.grad.double().square().sum())
    after, _ = tasks.assemble([answer["after"] for answer in answers])
    moved = {"trunk": 0.0, "image": 0.0, "audio": 0.0}
    for name, parameter in tasks.build_model().named_parameters():
        change = after["weight"][name].astype(np.float64) - parameter.detach().flatten().double().numpy()
        moved[tower_of(name)] += float(np.square(change).sum())
    assert moved.pop("audio") == 0
    for answer in answers:
        assert set(answer["norms"]) == {"trunk", "image"}
        for name, (gradient, update) in answer["norms"].items():
            assert gradient == pytest.approx(squares[name] ** 0.5, rel=1e-5)
            assert update == pytest.approx(moved[name] ** 0.5, rel=1e-5)
        assert answer["grad_norm"] == pytest.approx(sum(squares.values()) ** 0.5, rel=1e-5)
        assert answer["by_source"] == {
            "web": pytest.approx(by_source[0], rel=1e-6), "speech": pytest.approx(by_source[1], rel=1e-6),
        }  # fmt: skip
        assert sum(answer["weights"]) == weight
        assert answer["weights"][0] == sum(float(batch.row_weight[::2].sum()) for batch in batches)
