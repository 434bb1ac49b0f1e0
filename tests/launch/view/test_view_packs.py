"""The packs that the viewer draws are those the loader yields, to the token."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from triweave.data_pipeline.batch import PackedBatch
from triweave.data_pipeline.config import DataConfig, ScheduleEntry, load_data_config
from triweave.data_pipeline.media.modalities import MODALITIES
from triweave.data_pipeline.stream.loader import StepLoader
from triweave.launch.errors import ViewError
from triweave.launch.view.packs import PackBook, stretches
from triweave.launch.view.shard_folder import ShardFolder


@pytest.fixture(scope="module")
def config(view_data: Any) -> DataConfig:
    return load_data_config(view_data.config, ["data.workers=0"])


def batches(config: DataConfig, rows: int) -> list[PackedBatch]:
    loader = StepLoader(config, rank=0, world_size=1, global_batch_rows=1, micro_batch_rows=1)
    stream = iter(loader)
    return [next(stream).micro_batches[0] for _ in range(rows)]


def seen(pack: dict[str, Any]) -> tuple[list[int], list[int], list[str]]:
    """Return the first and past-the-last key, and the modality, of each token that a drawn pack has."""
    lo, hi, names = [], [], []
    for stretch in pack["stretches"]:
        for token in range(stretch["start"], stretch["end"]):
            lo.append(stretch["lo"])
            hi.append(token + 1 if stretch["causal"] else stretch["hi"])
            names.append(stretch["modality"])
    return lo, hi, names


def test_intervals_are_those_of_the_loader(config: DataConfig) -> None:
    book = PackBook(config)
    rows = book.block(0)["rows"]
    ids = {"text": 0} | {name: modality.id for name, modality in MODALITIES.items()}
    kinds = set()
    for batch in batches(config, rows):
        pack = book.pack(0, int(batch.plan_rows[0]))
        used = int((batch.document_ids[0] >= 0).sum())
        assert pack["tokens"] == used
        lo, hi, names = seen(pack)
        assert lo == batch.kv_lo[0, :used].tolist()
        assert hi == batch.kv_hi[0, :used].tolist()
        assert [ids[name] for name in names] == batch.modality_ids[0, :used].tolist()
        drawn = [f"{piece['source']}:{piece['epoch']}:{piece['key']}" for piece in pack["pieces"]]
        assert drawn == [name.rsplit(":alone", 1)[0].rsplit(":", 2)[0] for name in batch.sample_ids[0]]
        assert [piece["alone"] for piece in pack["pieces"]] == [":alone" in name for name in batch.sample_ids[0]]
        for left, right in pairwise(pack["stretches"]):  # none that could be one with its neighbour
            alike = all(left[name] == right[name] for name in ("piece", "modality", "causal"))
            assert not alike
            assert left["end"] == right["start"]
        kinds |= {(stretch["modality"], stretch["causal"]) for stretch in pack["stretches"] if stretch["end"] > 1}
    assert {("text", True), ("text", False), ("image", False), ("audio", False)} <= kinds


SCHEDULE = [ScheduleEntry(after_step=2, sequence_length=64), ScheduleEntry(after_step=5, sequence_length=128)]


def test_packs_of_every_segment_are_those_of_the_loader(config: DataConfig, view_data: Any) -> None:
    """Also the pieces that a segment takes over from the one before, whose packs end within a block."""
    config = replace(config, schedule=SCHEDULE, packing=replace(config.packing, contrastive_share=0.0))
    book = PackBook(config, 3)
    assert [(one["first_step"], one["last_step"], one["sequence_length"]) for one in book.segments()] == [
        (1, 2, 96), (3, 5, 64), (6, None, 128)
    ]  # fmt: skip
    assert book.block(0)["end"] is None, "not walked yet"
    assert book.reach(2, 0) == {"segment": 2, "there": False, "step": 1, "steps": 5}
    stream = iter(StepLoader(config, rank=0, world_size=1, global_batch_rows=3, micro_batch_rows=1))
    carried: list[tuple[int, int, int]] = []
    for segment, steps in enumerate((2, 3, 4)):
        first_row = None
        for batch in (batch for _ in range(steps) for batch in next(stream).micro_batches):
            plan_row = int(batch.plan_rows[0])
            first_row = plan_row if first_row is None else first_row
            pack = book.pack(0, plan_row - first_row, segment=segment)
            used = int((batch.document_ids[0] >= 0).sum())
            assert (pack["tokens"], pack["sequence_length"]) == (used, batch.tokens.shape[1])
            assert seen(pack)[:2] == (batch.kv_lo[0, :used].tolist(), batch.kv_hi[0, :used].tolist())
            drawn = [f"{piece['source']}:{piece['epoch']}:{piece['key']}" for piece in pack["pieces"]]
            assert drawn == [name.rsplit(":", 2)[0] for name in batch.sample_ids[0]]
            carried += [(segment, pack["row"], piece["sample"]) for piece in pack["pieces"] if piece["carried"]]
    assert (book.block(0)["end"], book.block(0, segment=1)["end"]) == ([0, 6], [0, 9])
    assert book.reach(2, 0) == {"segment": 2, "there": True, "step": 5, "steps": 5}
    segment, row, sample = carried[0]
    place = ShardFolder("birds", str(view_data.shards)).place(sample)
    assert row in book.rows_of(0, "birds", *place, segment=segment)


def test_later_segments_need_the_rows_of_a_step(config: DataConfig) -> None:
    book = PackBook(replace(config, schedule=SCHEDULE))
    assert book.block(0)["rows"] > 0
    with pytest.raises(ViewError, match=r"name the rows of a step with train\.global_batch_rows=N"):
        book.block(0, segment=1)
    with pytest.raises(ViewError, match="segment 3: the config has the segments 0 to 2"):
        book.pack(0, 0, segment=3)


def test_pieces_lead_to_their_documents(config: DataConfig, view_data: Any) -> None:
    folder = ShardFolder("birds", str(view_data.shards))
    book = PackBook(config)
    rows_of: dict[int, set[int]] = {}
    for row in range(book.block(0)["rows"]):
        for piece in book.pack(0, row)["pieces"]:
            assert folder.row(piece["sample"])["key"] == piece["key"]
            rows_of.setdefault(piece["sample"], set()).add(row)
    assert len(rows_of) == folder.samples
    for sample, rows in rows_of.items():
        assert book.rows_of(0, "birds", *folder.place(sample)) == sorted(rows)
    assert book.rows_of(0, "hostile", 0, 0) == []


def test_a_row_of_padding_has_no_stretches(config: DataConfig) -> None:
    (batch,) = batches(config, 1)
    empty = np.full_like(batch.document_ids, -1)
    assert stretches(PackedBatch(**{**vars(batch), "document_ids": empty})) == []


def test_what_is_no_pack_is_refused(config: DataConfig) -> None:
    book = PackBook(config)
    block = book.block(0)
    assert len(block["row_tokens"]) == block["rows"]
    assert sum(block["tokens"].values()) == sum(block["row_tokens"])
    with pytest.raises(ViewError, match=f"row {block['rows']}: block 0 has the rows 0 to"):
        book.pack(0, block["rows"])
    with pytest.raises(ViewError, match="must be a whole number"):
        book.pack(-1, 0)
