"""One-span segments from plan to batch: what they hold, who gets them, what damage does, what may not touch them."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from triweave.data_pipeline.batch import PackedBatch
from triweave.data_pipeline.config import DataConfig, PackingConfig, SourceConfig
from triweave.data_pipeline.media.geometry import MediaGeometry
from triweave.data_pipeline.shards.index import read_index
from triweave.data_pipeline.splits import normalise_text
from triweave.data_pipeline.stream.collate import Row, collate
from triweave.data_pipeline.stream.content import AloneSpan, Piece
from triweave.data_pipeline.stream.layout import piece_layouts, row_pieces
from triweave.data_pipeline.stream.loader import StepLoader, StepWindow
from triweave.data_pipeline.stream.pieces import UNFIT_SEGMENTS, drawn_share
from triweave.data_pipeline.stream.plan import ALONE, DOCUMENT, Planner
from triweave.data_pipeline.stream.plan_report import PlanOptions, report_plan

S = 96
ALL = PackingConfig(contrastive_share=1.0)
DOCUMENTS = {number: number % 4 for number in range(42)}


def config_of(data: Any, **changes: Any) -> DataConfig:
    options: dict[str, Any] = {
        "sequence_length": S,
        "geometry": MediaGeometry(image_patch_px=8),
        "packing": ALL,
        "workers": 0,
        "corrupt_budget": 100,
    }
    sources = [SourceConfig(name="concepts", shards=str(data.shards))]
    return DataConfig(sources=sources, tokenizer=str(data.tokenizer), **(options | changes))


def epoch_of(config: DataConfig) -> list[StepWindow]:
    """One epoch, a row a step."""
    loader = StepLoader(config, rank=0, world_size=1, global_batch_rows=1, micro_batch_rows=1)
    iterator = iter(loader)
    try:
        return list(itertools.islice(iterator, loader.planner.block(0).rows))
    finally:
        iterator.close()


def numbers_of(data: Any) -> dict[str, int]:
    """Key -> number of the document."""
    planner = Planner(config_of(data))
    index = read_index(planner.manifests[0], 0, ["key", "labels"]).to_pydict()
    return {key: json.loads(labels)["number"] for key, labels in zip(index["key"], index["labels"], strict=True)}


def document_json(planner: Planner, sample: int) -> dict[str, Any]:
    catalog = planner.catalog(0, 0)
    content = Path(catalog.tar).read_bytes()
    start = int(catalog.json_offsets[sample])
    document: dict[str, Any] = json.loads(content[start : start + int(catalog.json_sizes[sample])])
    return document


def test_each_segment_is_bos_part_eos_laid_out_by_hand(concept_data: Any) -> None:
    config = config_of(concept_data)
    planner = Planner(config)
    tokenizer, catalog = planner.tokenizer, planner.catalog(0, 0)
    numbers = numbers_of(concept_data)
    seen: Counter[int] = Counter()
    for window in epoch_of(config):
        (batch,) = window.micro_batches
        table = batch.segments
        ids = [sample_id for sample_id in batch.sample_ids[0] if sample_id.endswith(":alone")]
        assert len(ids) == len(table)
        for c, sample_id in enumerate(ids):
            source, epoch, key, first_token, end_token, _ = sample_id.split(":")
            assert (source, epoch) == ("concepts", "0")
            sample = catalog.key_list.index(key)
            document = document_json(planner, sample)
            kind = int(table.modality[c])
            part = next(p for p in document["parts"] if p["modality"] == ("text", "image", "audio")[kind])
            place = int(catalog.part_starts[sample]) + document["parts"].index(part)
            # [first, end) counts tokens of the document: bos, then the parts before this one.
            before = 1 + sum(catalog.part_lengths[int(catalog.part_starts[sample]) : place].tolist())
            assert (int(first_token), int(end_token)) == (before, before + int(catalog.part_lengths[place]))
            if kind == 0:
                body = tokenizer.encode(part["text"])
                assert table.content_keys[c] == xxhash.xxh3_64_intdigest(normalise_text(part["text"]).encode())
            else:
                markers = tokenizer.media[part["modality"]]
                body = [markers.start_id] + [markers.placeholder_id] * int(catalog.part_grids[place].prod())
                assert int(table.content_keys[c]) == int(part["xxh3"], 16)
            first, length = int(table.first[c]), int(table.lengths[c])
            assert batch.tokens[0, first : first + length].tolist() == [tokenizer.bos_id, *body, tokenizer.eos_id]
            group = f"concept {numbers[key] // 3}"
            assert table.group_keys[c] == xxhash.xxh3_64_intdigest(group.encode())
            assert table.rows[c] == 0
            assert table.weights[c] == 1
            seen[numbers[key]] += 1
        assert np.lexsort((table.modality, table.items, table.rows)).tolist() == list(range(len(table)))
    # 0 text and the first of two pictures, 1 picture, clip and text, 2 clip and text (18 is too long), 3 text alone.
    expected = {number: (2, 3, 2, 0)[form] for number, form in DOCUMENTS.items() if form != 3 and number != 18}
    assert seen == expected
    assert planner.block(0).left_out[UNFIT_SEGMENTS] == 1


def test_a_segment_sees_itself_and_nothing_in_it_is_supervised(concept_data: Any) -> None:
    for window in epoch_of(config_of(concept_data)):
        (batch,) = window.micro_batches
        supervised = set(batch.row_index.tolist())
        for first, length, kind in zip(
            batch.segments.first.tolist(), batch.segments.lengths, batch.segments.modality, strict=True
        ):
            inside = slice(first, first + int(length))
            assert set(batch.kv_lo[0, inside].tolist()) == {first}
            assert set(batch.kv_hi[0, inside].tolist()) == {first + length}
            assert batch.positions[0, first].tolist() == [0, 0, 0]
            assert len(set(batch.document_ids[0, inside].tolist())) == 1
            assert (batch.document_ids[0] == batch.document_ids[0, first]).sum() == length
            assert not supervised & set(range(first, first + int(length)))
            lo, hi = batch.media_lo[0, inside], batch.media_hi[0, inside]
            media = batch.media_index[0, lo[0] : hi[0]].tolist()
            assert len(set(lo.tolist())) == len(set(hi.tolist())) == 1
            assert media == [first + 2 + o for o in range(length - 3)] if kind else media == []


def collated(pieces: list[tuple[np.ndarray, int, AloneSpan | None, float]], media: dict[int, Any]) -> PackedBatch:
    made = []
    for tokens, kind, alone, weight in pieces:
        runs = [(0, 2, 2, 1, 1), (kind, 4, 1, 2, 2), (0, 1, 1, 1, 1)] if kind else [(0, len(tokens), len(tokens), 1, 1)]
        made.append(Piece(tokens=tokens, runs=runs, weight=weight, sample_id="", sample_hash=0, alone=alone))
    return collate([Row(0, made)], media, sequence_length=32, pad_id=0)


def test_other_content_in_one_segment_changes_nothing_of_another() -> None:
    text, picture, more = np.arange(10, 15), np.asarray([1, 8, 9, 9, 9, 9, 2]), np.arange(20, 24)
    spans = [AloneSpan(0, 0, 5, 1), AloneSpan(0, 1, 6, 1), AloneSpan(1, 0, 7, 2)]
    pixels = np.arange(16, dtype=np.uint8).reshape(4, 4)
    plain = collated([(text, 0, spans[0], 1), (picture, 1, spans[1], 1), (more, 0, spans[2], 1)], {1: pixels})
    other = collated([(text + 30, 0, spans[0], 1), (picture, 1, spans[1], 1), (more, 0, spans[2], 1)], {1: pixels + 1})
    assert plain.segments.first.tolist() == [0, 5, 12]
    assert plain.segments.items.tolist() == [0, 0, 1]
    assert plain.kv_lo[0, :16].tolist() == [0] * 5 + [5] * 7 + [12] * 4
    assert plain.kv_hi[0, :16].tolist() == [5] * 5 + [12] * 7 + [16] * 4
    assert plain.media_lo[0, :16].tolist() == [0] * 12 + [4] * 4
    assert plain.media_hi[0, :16].tolist() == [0] * 5 + [4] * 11
    assert plain.row_index.size == 0
    assert not np.array_equal(plain.tokens[0, :5], other.tokens[0, :5])
    changed = {"tokens"}
    for name, value in vars(plain).items():
        if isinstance(value, np.ndarray) and name not in changed:
            assert np.array_equal(value, getattr(other, name)), name
    assert np.array_equal(plain.tokens[0, 5:], other.tokens[0, 5:])
    for name, value in vars(plain.segments).items():
        assert np.array_equal(value, getattr(other.segments, name)), name
    for name in ("lengths", "grids", "token_index", "item_rows"):
        assert np.array_equal(getattr(plain.payloads["image"], name), getattr(other.payloads["image"], name))


def test_a_filler_takes_the_weight_of_its_whole_item() -> None:
    text = np.arange(10, 14)
    spans = [AloneSpan(0, 0, 1, 0), AloneSpan(0, 2, 0, 0), AloneSpan(3, 0, 1, 0), AloneSpan(3, 2, 1, 0)]
    batch = collated([(text, 0, span, weight) for span, weight in zip(spans, (1, 0, 1, 1), strict=True)], {})
    assert batch.segments.weights.tolist() == [0, 0, 1, 1]


def test_documents_are_planned_as_without_segments(concept_data: Any) -> None:
    """Every span of every document still comes once; the share decides only who comes alone as well."""
    plans = [
        Planner(config_of(concept_data, packing=PackingConfig(contrastive_share=s))).block(0) for s in (0.0, 0.4, 1.0)
    ]
    documents, alone = [], []
    for plan in plans:
        pieces = [piece for row in range(plan.rows) for piece in row_pieces(plan, row)]
        documents.append(sorted((p.sample, p.first, p.end) for p in pieces if p.kind == DOCUMENT))
        alone.append({(p.sample, p.end) for p in pieces if p.kind == ALONE})
        assert len(alone[-1]) == sum(p.kind == ALONE for p in pieces)
        for row in range(plan.rows):
            assert sum(p.end - p.first for p in row_pieces(plan, row)) == plan.row_tokens[row] <= S
        assert sum(plan.modality_tokens.values()) == plan.row_tokens.sum()
    assert documents[0] == documents[1] == documents[2]
    assert not alone[0]
    assert alone[1] < alone[2]
    assert 5 <= len(alone[1]) <= 20
    assert len(alone[2]) == sum(form != 3 for form in DOCUMENTS.values()) - 1


def test_the_draw_is_keyed_by_seed_epoch_and_sample_alone(concept_data: Any) -> None:
    half = PackingConfig(contrastive_share=0.5)

    def drawn(block: int = 0, **changes: Any) -> set[int]:
        plan = Planner(config_of(concept_data, packing=half, **changes)).block(block)
        return set(plan.samples[plan.kinds == ALONE].tolist())

    assert drawn() == drawn(sequence_length=90) == drawn(workers=3)
    assert drawn() != drawn(block=1)
    assert drawn() != drawn(seed=1)
    assert drawn_share(1000, 0.3, 1, "x").mean() == pytest.approx(0.3, abs=0.05)
    assert drawn_share(1000, 1.0, 1).all()
    assert not drawn_share(1000, 0.0, 1).any()


def test_segments_keep_the_budgets_and_cost_what_they_attend_to(concept_data: Any) -> None:
    planner = Planner(config_of(concept_data, packing=PackingConfig(contrastive_share=1.0, images=1, audio_ms=400)))
    plan = planner.block(0)
    catalog = planner.catalog(0, 0)
    checked = 0
    for row in range(plan.rows):
        images = audio_ms = 0
        cost, whole = 0.0, True
        for piece in row_pieces(plan, row):
            for layout in piece_layouts(catalog, piece):
                assert sum(run[1] for run in layout.runs) == layout.tokens
                budgets = catalog.part_budgets[[part.place for part in layout.parts if part.kind]].sum(axis=0)
                images, audio_ms = images + budgets[2], audio_ms + budgets[3]
                media = sum(run[1] for run in layout.runs if run[0])
                cost += layout.tokens + media + layout.tokens**2 / 2048
                whole &= layout.has_bos and layout.has_eos
        assert images <= 1
        assert audio_ms <= 400
        if whole and any(piece.kind == ALONE for piece in row_pieces(plan, row)):
            assert cost == pytest.approx(plan.row_costs[row])
            checked += 1
    assert checked >= 5


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_damage_makes_fillers_of_all_segments_of_the_item(concept_data: Any, tmp_path: Path, damage: str) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(concept_data.shards, shards)
    (tar,) = shards.glob("*.tar")
    whole = epoch_of(config_of(concept_data))
    content = bytearray(tar.read_bytes())
    content[len(content) // 2] ^= 1
    tar.write_bytes(content)
    if damage == "cut":
        os.truncate(tar, len(content) // 2)
    config = replace(config_of(concept_data), sources=[SourceConfig(name="concepts", shards=str(shards))])
    stream = epoch_of(config)
    lost = {event.key for window in stream for event in window.fillers}
    assert len(lost) == 1 if damage == "flip" else len(lost) > 5
    filled = 0
    for this, that in zip(stream, whole, strict=True):
        batch, before = this.micro_batches[0], that.micro_batches[0]
        for name in ("first", "lengths", "modality", "rows", "items"):
            assert np.array_equal(getattr(batch.segments, name), getattr(before.segments, name))
        ids = [sample_id for sample_id in batch.sample_ids[0] if ":alone" in sample_id]
        damaged = np.asarray([sample_id.split(":")[2] in lost for sample_id in ids], bool)
        assert [sample_id.endswith(":alone:filler") for sample_id in ids] == damaged.tolist()
        assert batch.segments.weights.tolist() == (1.0 - damaged).tolist()
        assert batch.segments.content_keys[~damaged].tolist() == before.segments.content_keys[~damaged].tolist()
        assert not batch.segments.content_keys[damaged].any()
        assert not batch.segments.group_keys[damaged].any()
        filled += int(damaged.sum())
    assert filled >= 2


def test_the_report_counts_segments_per_group(concept_data: Any) -> None:
    config = config_of(concept_data, packing=PackingConfig(contrastive_share=1.0, contrastive_group_rows=4))
    report = report_plan(config, S, PlanOptions())
    plan = Planner(config).block(0)
    items = int((plan.kinds == ALONE).sum())
    assert report.items_per_group == pytest.approx(items * 4 / plan.rows)
    assert report.segments_per_group == pytest.approx(int(plan.segments.sum()) * 4 / plan.rows)
    without = report_plan(replace(config, packing=PackingConfig()), S, PlanOptions())
    assert (
        report.alone_tokens == sum(report.tokens_per_modality.values()) - sum(without.tokens_per_modality.values()) > 0
    )
    assert (without.alone_tokens, without.segments_per_group, without.items_per_group) == (0, 0.0, 0.0)
