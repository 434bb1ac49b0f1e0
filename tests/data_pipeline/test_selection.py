"""Splits, held-out folds and the control with exchanged media: exactly the asked samples, exactly the asked bytes."""

from __future__ import annotations

import itertools
import json
import shutil
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from triweave.data_pipeline.config import DataConfig, PackingConfig, SourceConfig
from triweave.data_pipeline.errors import DataError
from triweave.data_pipeline.media.geometry import MediaGeometry, MediaInfo
from triweave.data_pipeline.media.modalities import MODALITIES
from triweave.data_pipeline.shards.index import read_index
from triweave.data_pipeline.splits import SPLITS, fold_of
from triweave.data_pipeline.stream import metadata
from triweave.data_pipeline.stream.layout import row_pieces
from triweave.data_pipeline.stream.loader import StepLoader, StepWindow
from triweave.data_pipeline.stream.plan import Planner
from triweave.data_pipeline.stream.selection import exchanged_media

S = 96
SEGMENTS = PackingConfig(contrastive_share=1.0)


def config_of(data: Any, *, shards: Path | None = None, workers: int = 0, **source: Any) -> DataConfig:
    return DataConfig(
        sources=[SourceConfig(name="concepts", shards=str(shards or data.shards), **source)],
        tokenizer=str(data.tokenizer),
        sequence_length=S,
        geometry=MediaGeometry(image_patch_px=8),
        packing=SEGMENTS,
        workers=workers,
        corrupt_budget=100,
    )


def epoch_of(config: DataConfig) -> list[StepWindow]:
    loader = StepLoader(config, rank=0, world_size=1, global_batch_rows=1, micro_batch_rows=1)
    iterator = iter(loader)
    try:
        return list(itertools.islice(iterator, loader.planner.block(0).rows))
    finally:
        iterator.close()


def index_of(data: Any) -> list[dict[str, Any]]:
    """Rows of the shard's index with the labels read."""
    rows = read_index(Planner(config_of(data)).manifests[0], 0).to_pylist()
    return [row | {"labels": json.loads(row["labels"])} for row in rows]


def planned_keys(config: DataConfig) -> set[str]:
    planner = Planner(config)
    plan = planner.block(0)
    keys = planner.catalog(0, 0).key_list
    return {keys[piece.sample] for row in range(plan.rows) for piece in row_pieces(plan, row)}


@pytest.mark.parametrize("split", SPLITS)
def test_a_split_leaves_exactly_its_samples(concept_data: Any, split: str) -> None:
    rows = index_of(concept_data)
    wanted = {row["key"] for row in rows if row["labels"]["split"] == split}
    config = config_of(concept_data, split=split)
    assert planned_keys(config) == wanted
    plan = Planner(config).block(0)
    assert plan.left_out[f"sample outside of split {split}"] == len(rows) - len(wanted)
    assert plan.drawn_samples == len(rows)
    assert sum(plan.modality_tokens.values()) == plan.row_tokens.sum()


def test_held_out_folds_partition_the_samples_by_concept(concept_data: Any) -> None:
    rows = index_of(concept_data)
    left_out = []
    for fold in range(3):
        kept = planned_keys(config_of(concept_data, hold_out=f"{fold}/3"))
        left_out.append({row["key"] for row in rows} - kept)
        assert left_out[-1] == {row["key"] for row in rows if fold_of(row["labels"]["group"], 3) == fold}
    assert all(left_out)
    assert sum(map(len, left_out)) == len(set().union(*left_out)) == len(rows)


def test_shards_without_the_label_say_how_to_get_it(stream_data: Any) -> None:
    for selection, label in (({"split": "train"}, "split"), ({"hold_out": "0/5"}, "group")):
        config = DataConfig(
            sources=[SourceConfig(name="birds", shards=str(stream_data.birds), **selection)],
            tokenizer=str(stream_data.tokenizer),
        )
        with pytest.raises(DataError, match=f"needs a `{label}` label on every sample.*triweave build") as caught:
            Planner(config).block(0)
        assert str(stream_data.birds) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_selections_change_the_plan_hash(concept_data: Any) -> None:
    configs = [
        config_of(concept_data, **source)
        for source in ({}, {"split": "train"}, {"split": "test"}, {"hold_out": "0/3"}, {"hold_out": "1/3"})
    ]
    configs += [config_of(concept_data, shuffle_pairs=seed) for seed in (1, 2)]
    configs.append(replace(configs[0], packing=PackingConfig()))
    assert len({Planner(config).plan_hash for config in configs}) == len(configs)


def payload_items(stream: list[StepWindow]) -> Counter[tuple[str, bytes]]:
    """(modality, payload) of every medium of the stream."""
    items: Counter[tuple[str, bytes]] = Counter()
    for window in stream:
        for batch in window.micro_batches:
            for name, payload in batch.payloads.items():
                borders = np.cumsum(payload.lengths)[:-1]
                items.update((name, values.tobytes()) for values in np.split(payload.values, borders))
    return items


@pytest.mark.parametrize(
    "source", [{}, {"split": "train"}, {"hold_out": "1/3"}, {"shuffle_pairs": 3, "split": "train"}]
)
def test_catalogs_made_together_are_those_made_one_by_one(
    concepts_in_shards: Any, monkeypatch: pytest.MonkeyPatch, source: dict[str, Any]
) -> None:
    def catalogs() -> list[dict[str, Any]]:
        planner = Planner(config_of(concepts_in_shards, **source))
        planner.load_catalogs(0)
        shards = len(planner.manifests[0].shards)
        assert shards > 3
        found = [planner.catalog(0, shard) for shard in range(shards)]
        return [{item.name: getattr(own, item.name) for item in fields(own)} for own in found]

    together = catalogs()
    monkeypatch.setattr(metadata, "BATCH_SAMPLES", 1)
    for shared, alone in zip(together, catalogs(), strict=True):
        for name, value in alone.items():
            if isinstance(value, np.ndarray):
                np.testing.assert_array_equal(shared[name], value, name)
            elif name == "left_out":  # made together, a shard also has the reasons of the others, which count nothing
                assert {reason for reason, counts in value.items() if counts.any()} == {
                    reason for reason, counts in shared[name].items() if counts.any()
                }
                for reason, counts in value.items():
                    np.testing.assert_array_equal(shared[name][reason], counts)
            else:
                assert shared[name] == value


def test_exchanged_media_keep_texts_and_lose_nothing(concept_data: Any) -> None:
    true, wrong = (Planner(config_of(concept_data, shuffle_pairs=seed)) for seed in (None, 1))
    before, after = true.catalog(0, 0), wrong.catalog(0, 0)
    assert before.part_owners is None
    assert after.part_owners is not None
    assert np.array_equal(before.part_kinds, after.part_kinds)
    text = before.part_kinds == 0
    assert np.array_equal(before.part_tokens[text], after.part_tokens[text])
    own = np.repeat(np.arange(len(before.sizes)), np.diff(before.part_starts))
    concepts = np.asarray([row["labels"]["group"] for row in index_of(concept_data)])
    assert (concepts[after.part_owners[~text]] != concepts[own[~text]]).all(), "a medium stayed with its concept"
    for kind in (modality.id for modality in MODALITIES.values()):
        chosen = before.part_kinds == kind
        moved = [
            sorted(zip(c.part_offsets[chosen].tolist(), c.part_sizes[chosen].tolist(), strict=True))
            for c in (before, after)
        ]
        assert moved[0] == moved[1]
        for column in ("part_tokens", "part_infos", "part_grids"):
            of_medium = [
                dict(zip(c.part_offsets[chosen].tolist(), getattr(c, column)[chosen].tolist(), strict=True))
                for c in (before, after)
            ]
            assert of_medium[0] == of_medium[1]
    assert sum(true.block(0).modality_tokens[name] for name in ("image", "audio")) > 0


def test_the_stream_reads_the_exchanged_bytes(concept_data: Any) -> None:
    config = config_of(concept_data, shuffle_pairs=5)
    catalog = Planner(config).catalog(0, 0)
    tar = Path(catalog.tar).read_bytes()
    names = {modality.id: name for name, modality in MODALITIES.items()}
    stream = epoch_of(config)
    assert not [event for window in stream for event in window.fillers]
    expected: Counter[tuple[str, bytes]] = Counter()
    first_of = {int(place) for place in catalog.alone_parts.reshape(-1) if place >= 0}
    unfit = next(row["key"] for row in index_of(concept_data) if row["labels"]["number"] == 18)
    owners = np.repeat(np.arange(len(catalog.sizes)), np.diff(catalog.part_starts))
    for place in np.flatnonzero(catalog.part_kinds > 0).tolist():
        start = int(catalog.part_offsets[place])
        width, height, samples, rate = catalog.part_infos[place].tolist()
        modality = MODALITIES[names[int(catalog.part_kinds[place])]]
        info = MediaInfo(width=width, height=height, samples=samples, rate=rate)
        content = tar[start : start + int(catalog.part_sizes[place])]
        values = modality.decode(content, info, config.geometry)
        alone = place in first_of and catalog.key_list[int(owners[place])] != unfit
        expected[modality.name, values.tobytes()] += 1 + alone
    assert payload_items(stream) == expected
    plain = epoch_of(config_of(concept_data))
    assert payload_items(plain).keys() == expected.keys()
    texts = [
        Counter(
            int(key)
            for window in epoch
            for batch in window.micro_batches
            for key, kind in zip(batch.segments.content_keys, batch.segments.modality, strict=True)
            if kind == 0
        )
        for epoch in (stream, plain)
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_partner_is_named_and_only_its_readers_are_fillers(
    concept_data: Any, tmp_path: Path, workers: int
) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(concept_data.shards, shards)
    config = config_of(concept_data, shards=shards, workers=workers, shuffle_pairs=1)
    catalog = Planner(config).catalog(0, 0)
    assert catalog.part_owners is not None
    # Damage a sample with media that other samples read: its key, and who reads it.
    place = int(np.flatnonzero(catalog.part_kinds == 1)[0])
    partner = int(catalog.part_owners[place])
    own = np.repeat(np.arange(len(catalog.sizes)), np.diff(catalog.part_starts))
    readers = set(own[(catalog.part_owners == partner) & (catalog.part_kinds > 0)].tolist()) | {partner}
    tar = Path(catalog.tar)
    content = bytearray(tar.read_bytes())
    content[int(catalog.part_offsets[place])] ^= 1
    tar.write_bytes(content)
    stream = epoch_of(config)
    events = [event for window in stream for event in window.fillers]
    assert {event.key for event in events} == {catalog.key_list[partner]}
    assert {event.offset for event in events} == {int(catalog.offsets[partner])}
    fillers = {
        sample_id.split(":")[2]
        for window in stream
        for batch in window.micro_batches
        for ids in batch.sample_ids
        for sample_id in ids
        if sample_id.endswith(":filler")
    }
    assert fillers == {catalog.key_list[reader] for reader in readers}
    assert len(fillers) >= 2


def test_bytes_of_a_partner_that_do_not_decode_name_the_partner(
    concept_data: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(concept_data, shuffle_pairs=1)
    catalog = Planner(config).catalog(0, 0)
    assert catalog.part_owners is not None
    place = int(np.flatnonzero(catalog.part_kinds == 2)[0])
    start, size = int(catalog.part_offsets[place]), int(catalog.part_sizes[place])
    bad = Path(catalog.tar).read_bytes()[start : start + size]
    real = MODALITIES["audio"]

    def decode(data: bytes, info: Any, geometry: Any) -> Any:
        if data == bad:
            raise RuntimeError("codec is unhappy")
        return real.decode(data, info, geometry)

    monkeypatch.setitem(MODALITIES, "audio", replace(real, decode=decode, decode_into=None))
    events = [event for window in epoch_of(config) for event in window.fillers]
    assert events
    assert {event.key for event in events} == {catalog.key_list[int(catalog.part_owners[place])]}
    assert {event.reason for event in events} == {"RuntimeError: codec is unhappy"}


def test_exchanged_media_stay_inside_the_split(concept_data: Any) -> None:
    catalog = Planner(config_of(concept_data, shuffle_pairs=1, split="train")).catalog(0, 0)
    assert catalog.part_owners is not None
    splits = np.asarray([row["labels"]["split"] for row in index_of(concept_data)])
    own = np.repeat(np.arange(len(splits)), np.diff(catalog.part_starts))
    inside = (splits[own] == "train") & (catalog.part_kinds > 0)
    assert inside.any()
    assert (splits[catalog.part_owners[inside]] == "train").all()
    assert (catalog.part_owners[inside] != own[inside]).all()


@pytest.mark.parametrize(("sizes", "stay"), [([1, 1], 0), ([3, 3], 0), ([5, 2, 2], 1), ([1, 2, 3, 2], 0), ([4], 4)])
@pytest.mark.parametrize("seed", range(5))
def test_as_few_media_as_can_be_stay_with_their_concept(sizes: list[int], stay: int, seed: int) -> None:
    """One medium per document; concepts of the given sizes: of 9 items in a class of 5, one must stay."""
    concepts = np.repeat(np.arange(len(sizes)), sizes)
    count = len(concepts)
    taken = exchanged_media(
        SourceConfig(name="x", shards="s", shuffle_pairs=seed),
        0,
        kinds=np.ones(count, np.int8),
        owners=np.arange(count),
        hashes=np.arange(count, dtype=np.uint64),
        labels=[{"group": f"g{concept}"} for concept in concepts],
        outside=np.zeros(count, bool),
    )
    assert sorted(taken.tolist()) == list(range(count))
    assert (concepts[taken] == concepts).sum() == stay
    assert (taken != np.arange(count)).all(), "a medium stayed in its own document"


def test_equal_bytes_are_one_concept_without_labels() -> None:
    hashes = np.asarray([7, 7, 8, 8, 9, 9], np.uint64)
    taken = exchanged_media(
        SourceConfig(name="x", shards="s", shuffle_pairs=3),
        0,
        kinds=np.ones(6, np.int8),
        owners=np.arange(6),
        hashes=hashes,
        labels=[{}] * 6,
        outside=np.zeros(6, bool),
    )
    assert (hashes[taken] != hashes).all()
