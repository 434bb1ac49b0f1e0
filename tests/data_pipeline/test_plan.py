"""The plan: every token span once per epoch, within every budget, a pure function of metadata."""

from __future__ import annotations

import shutil
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from triweave.data_pipeline.config import DataConfig, PackingConfig, SourceConfig
from triweave.data_pipeline.errors import ConfigError, DataError
from triweave.data_pipeline.media.geometry import MediaGeometry
from triweave.data_pipeline.stream.catalog import EMPTY_DOCUMENT
from triweave.data_pipeline.stream.layout import piece_layout, row_pieces
from triweave.data_pipeline.stream.plan import Planner

GEOMETRY = MediaGeometry(image_patch_px=8, image_max_tokens=400)


def config_of(data: Any, names: tuple[str, ...] = ("birds",), **changes: Any) -> DataConfig:
    sources = [
        SourceConfig(name=name, shards=str(getattr(data, name)), weight=weight)
        for name, weight in zip(names, (3.0, 1.0), strict=False)
    ]
    options: dict[str, Any] = {"sequence_length": 64, "geometry": GEOMETRY, "block_samples": 40, "workers": 0}
    return DataConfig(sources=sources, tokenizer=str(data.tokenizer), **(options | changes))


def spans_of(planner: Planner, blocks: range) -> dict[tuple[int, int, int, int], list[tuple[int, int]]]:
    """(source, epoch, shard, sample) -> its token spans, in ascending order."""
    spans: dict[tuple[int, int, int, int], list[tuple[int, int]]] = defaultdict(list)
    for block in blocks:
        plan = planner.block(block)
        for row in range(plan.rows):
            for piece in row_pieces(plan, row):
                owner = (piece.source, piece.epoch, piece.shard, piece.sample)
                spans[owner].append((piece.first, piece.end))
    return {owner: sorted(values) for owner, values in spans.items()}


@pytest.mark.parametrize("names", [("birds",), ("birds", "talk")])
@pytest.mark.parametrize("sequence_length", [32, 64, 300])
def test_every_token_of_every_sample_comes_once_per_epoch(
    stream_data: Any, names: tuple[str, ...], sequence_length: int
) -> None:
    planner = Planner(config_of(stream_data, names, sequence_length=sequence_length))
    blocks = 3 * planner.mixture.group_count(0) if len(names) == 1 else 8
    spans = spans_of(planner, range(blocks))
    drawn = [
        (draw.source, draw.epoch, int(shard), int(sample))
        for block in range(blocks)
        for draw in planner.mixture.draws(block)
        for shard, sample in zip(*planner.mixture.order(draw), strict=True)
    ]
    assert len(drawn) == len(set(drawn))
    for owner in drawn:
        source, _, shard, sample = owner
        total = int(planner.catalog(source, shard).sample_budgets[sample, 0])
        found = spans.pop(owner, [])
        borders = [0, *(end for _, end in found)]
        assert [first for first, _ in found] == borders[:-1], f"{owner} has gaps or repeats: {found}"
        assert borders[-1] == total
    assert not spans, "rows hold samples that were not drawn"


def test_rows_keep_every_budget_and_media_are_never_cut(stream_data: Any) -> None:
    packing = PackingConfig(image_tokens=40, images=2, audio_ms=500)
    planner = Planner(config_of(stream_data, packing=packing))
    caps = planner.caps
    assert caps == {"tokens": 64, "image_tokens": 40, "images": 2, "audio_ms": 500, "encoder_cost": 64}
    for block in range(planner.mixture.group_count(0)):
        plan = planner.block(block)
        for row in range(plan.rows):
            use = Counter[str]()
            for piece in row_pieces(plan, row):
                catalog = planner.catalog(piece.source, piece.shard)
                layout = piece_layout(catalog, piece)
                assert sum(run[1] for run in layout.runs) == piece.end - piece.first
                use["tokens"] += piece.end - piece.first
                for _, place, kind, _, end, _ in layout.parts:
                    assert kind == catalog.part_kinds[place]
                    if kind:
                        assert end == catalog.part_grids[place].prod(), "a media span was cut"
                        budgets = dict(zip(caps, catalog.part_budgets[place].tolist(), strict=True))
                        use.update({name: budgets[name] for name in ("image_tokens", "images", "audio_ms")})
            assert all(use[name] <= cap for name, cap in caps.items()), use
            assert use["tokens"] == plan.row_tokens[row]


def test_a_part_that_fits_into_a_pack_is_never_cut(stream_data: Any) -> None:
    planner = Planner(config_of(stream_data, sequence_length=16))
    cut_parts: Counter[tuple[int, int, int]] = Counter()
    lengths: dict[tuple[int, int, int], int] = {}
    for block in range(planner.mixture.group_count(0)):
        plan = planner.block(block)
        for row in range(plan.rows):
            for piece in row_pieces(plan, row):
                catalog = planner.catalog(piece.source, piece.shard)
                for part, *_ in piece_layout(catalog, piece).parts:
                    owner = (piece.shard, piece.sample, part)
                    cut_parts[owner] += 1
                    lengths[owner] = int(catalog.part_lengths[catalog.part_starts[piece.sample] + part])
    cut = [owner for owner, pieces in cut_parts.items() if pieces > 1]
    assert cut, "the data set should hold texts longer than a pack"
    assert all(lengths[owner] + 2 > 16 for owner in cut)


def test_what_no_pack_holds_is_left_out_with_a_reason(stream_data: Any) -> None:
    planner = Planner(config_of(stream_data))
    blocks = [planner.block(block) for block in range(planner.mixture.group_count(0))]
    left_out = sum((Counter(plan.left_out) for plan in blocks), Counter[str]())
    assert left_out == {"image longer than sequence_length=64 holds": 12}
    # The picture goes, its caption stays.
    assert sum(plan.drawn_samples for plan in blocks) == 72
    capped = Planner(config_of(stream_data, sequence_length=512, packing=PackingConfig(image_tokens=30, audio_ms=250)))
    plan = capped.block(0)
    assert {"image over packing.image_tokens=30", "audio over packing.audio_ms=250"} == set(plan.left_out)
    assert EMPTY_DOCUMENT not in plan.left_out


def test_a_plan_is_a_function_of_content_not_of_place(stream_data: Any, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(stream_data.birds, moved)
    config = config_of(stream_data)
    here = Planner(config)
    there = Planner(replace(config, sources=[SourceConfig(name="birds", shards=str(moved), weight=3.0)], workers=7))
    assert here.plan_hash == there.plan_hash
    there.block(1)
    for name, value in vars(here.block(0)).items():
        other = getattr(there.block(0), name)
        assert np.array_equal(value, other) if isinstance(value, np.ndarray) else value == other, name


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"sequence_length": 65},
        {"block_samples": 41},
        {"geometry": replace(GEOMETRY, image_max_tokens=399)},
        {"packing": PackingConfig(images=3)},
        {"packing": PackingConfig(contrastive_share=0.5)},
        {"names": ("talk",)},
        {"names": ("birds", "talk")},
    ],
)
def test_whatever_changes_the_rows_changes_the_plan_hash(stream_data: Any, change: dict[str, Any]) -> None:
    assert Planner(config_of(stream_data)).plan_hash != Planner(config_of(stream_data, **change)).plan_hash


def test_packs_are_shuffled_after_packing(stream_data: Any) -> None:
    planner = Planner(config_of(stream_data, sequence_length=300, block_samples=100))
    plan = planner.block(0)
    # Best-fit-decreasing opens packs in order of falling size; a stream in that order would train large to small.
    largest = [
        int((plan.end_tokens - plan.first_tokens)[plan.row_starts[row] : plan.row_starts[row + 1]].max())
        for row in range(plan.rows)
    ]
    assert largest != sorted(largest, reverse=True)
    assert largest != sorted(largest)
    again = planner.block(planner.mixture.group_count(0))
    assert plan.samples.tolist() != again.samples.tolist()


def test_missing_counts_and_shards_are_named(stream_data: Any, tmp_path: Path) -> None:
    shards = tmp_path / "birds"
    shutil.copytree(stream_data.birds, shards)
    for sidecar in shards.glob("*.tokens-*"):
        sidecar.unlink()
    config = config_of(stream_data)
    moved = replace(config, sources=[SourceConfig(name="birds", shards=str(shards))])
    with pytest.raises(DataError, match="triweave tokenize"):
        Planner(moved).block(0)
    gone = replace(config, sources=[SourceConfig(name="birds", shards=str(tmp_path / "gone"))])
    with pytest.raises(DataError, match="gone"):
        Planner(gone)


@pytest.mark.parametrize("unit", ["tokens", "epochs"])
def test_weights_may_be_shares_of_tokens_or_epochs(stream_data: Any, unit: str) -> None:
    names = ("birds", "talk")
    config = config_of(stream_data, names, weight_unit=unit, sequence_length=128, block_samples=500)
    config = replace(
        config, sources=[replace(source, weight=w) for source, w in zip(config.sources, (1.0, 2.5), strict=True)]
    )
    planner = Planner(config)
    tokens, drawn = Counter[str](), Counter[str]()
    for block in range(12 if unit == "tokens" else 1):
        plan = planner.block(block)
        for source, first, end in zip(plan.sources, plan.first_tokens, plan.end_tokens, strict=True):
            tokens[names[source]] += int(end - first)
        for draw in planner.mixture.draws(block):
            drawn[names[draw.source]] += draw.end - draw.first
    if unit == "tokens":
        assert tokens["talk"] / tokens["birds"] == pytest.approx(2.5, rel=0.03)
        assert drawn["talk"] / drawn["birds"] != pytest.approx(2.5, rel=0.05), "samples differ in length"
    else:
        assert drawn == {"birds": 72, "talk": 45}
        assert planner.mixture.epoch_samples == 72 + 45
    assert planner.plan_hash != Planner(replace(config, weight_unit="samples")).plan_hash


def test_a_source_that_cannot_be_packed_has_no_share_of_the_tokens(concept_data: Any) -> None:
    sources = [
        SourceConfig(name="all", shards=str(concept_data.shards)),
        SourceConfig(name="none", shards=str(concept_data.shards), split="validation"),
    ]
    config = DataConfig(sources=sources, tokenizer=str(concept_data.tokenizer), weight_unit="tokens")
    with pytest.raises(ConfigError, match=r"data.sources.none: none of its samples can be packed.*set its weight to 0"):
        Planner(config)


def test_attention_costs_as_much_as_the_rest_at_the_length_that_is_set(stream_data: Any) -> None:
    plan = Planner(
        config_of(
            stream_data,
            sequence_length=300,
            packing=PackingConfig(attention_cost_tokens=100, encoder_weights={"image": 0, "audio": 0}),
        )
    ).block(0)
    lengths = (plan.end_tokens - plan.first_tokens).astype(float)
    row = np.repeat(np.arange(plan.rows), np.diff(plan.row_starts))
    np.testing.assert_allclose(plan.row_costs, np.bincount(row, lengths + lengths**2 / 100, plan.rows))


def test_an_encoder_cost_is_a_budget_and_part_of_the_cost(stream_data: Any) -> None:
    weights = {"image": 3.0, "audio": 0.5}
    plain, heavy = (
        Planner(config_of(stream_data, sequence_length=128, packing=PackingConfig(encoder_weights=w)))
        for w in ({}, weights)
    )
    plan, other = plain.block(0), heavy.block(0)
    assert plan.row_costs.sum() < other.row_costs.sum()
    tokens = other.modality_tokens
    work = int(other.row_budgets[:, 4].sum())
    assert 3 * tokens["image"] + tokens["audio"] / 2 <= work <= 3 * tokens["image"] + tokens["audio"] / 2 + 40
    assert plan.row_budgets[:, 4].sum() == tokens["image"] + tokens["audio"]
    capped = Planner(
        config_of(stream_data, sequence_length=128, packing=PackingConfig(encoder_weights=weights, encoder_cost=40))
    ).block(0)
    assert capped.row_budgets[:, 4].max() <= 40 < other.row_budgets[:, 4].max()
    assert any("packing.encoder_cost=40" in reason for reason in capped.left_out)
