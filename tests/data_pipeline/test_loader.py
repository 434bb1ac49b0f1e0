"""The stream: the same rows and bytes for any ranks, workers and resumes; damage leaves fillers and shifts nothing."""

from __future__ import annotations

import itertools
import logging
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import webdataset

from triweave.data_pipeline.batch import PackedBatch
from triweave.data_pipeline.config import BatchCaps, DataConfig, PackingConfig, SourceConfig
from triweave.data_pipeline.errors import CorruptionBudgetError, DataError, StateError
from triweave.data_pipeline.media.geometry import MediaGeometry
from triweave.data_pipeline.media.modalities import MODALITIES
from triweave.data_pipeline.shards.manifest import Manifest
from triweave.data_pipeline.stream.loader import MicroBatch, StepLoader, StepWindow
from triweave.data_pipeline.stream.plan import Planner
from triweave.data_pipeline.stream.stalls import STAGES
from triweave.data_pipeline.stream.state import StreamState

S = 64
GEOMETRY = MediaGeometry(image_patch_px=8, image_max_tokens=400)


def config_of(data: Any, names: tuple[str, ...] = ("birds",), **changes: Any) -> DataConfig:
    sources = [
        SourceConfig(name=name, shards=str(getattr(data, name)), weight=weight)
        for name, weight in zip(names, (3.0, 1.0), strict=False)
    ]
    options: dict[str, Any] = {"sequence_length": S, "geometry": GEOMETRY, "block_samples": 30, "workers": 0}
    return DataConfig(sources=sources, tokenizer=str(data.tokenizer), **(options | changes))


def windows(
    config: DataConfig, count: int, *, rank: int = 0, world: int = 1, G: int = 7, B: int = 2, **more: Any
) -> list[StepWindow]:
    loader = StepLoader(config, rank=rank, world_size=world, global_batch_rows=G, micro_batch_rows=B, **more)
    iterator = iter(loader)
    try:
        return list(itertools.islice(iterator, count))
    finally:
        iterator.close()


def leaves(batch: PackedBatch) -> dict[str, Any]:
    """Every field, those of payloads and segments flattened."""
    fields = {name: value for name, value in vars(batch).items() if name not in ("payloads", "segments")}
    fields |= {f"segments.{name}": value for name, value in vars(batch.segments).items()}
    for modality, payload in batch.payloads.items():
        fields |= {f"{modality}.{name}": value for name, value in vars(payload).items()}
    return fields


def assert_equal_windows(these: list[StepWindow], those: list[StepWindow]) -> None:
    assert len(these) == len(those)
    for this, that in zip(these, those, strict=True):
        assert (this.first_row, this.end_row, this.state) == (that.first_row, that.end_row, that.state)
        for one, other in zip(this.micro_batches, that.micro_batches, strict=True):
            left, right = leaves(one), leaves(other)
            assert left.keys() == right.keys()
            for name, value in left.items():
                if isinstance(value, np.ndarray):
                    assert value.dtype == right[name].dtype, name
                    assert value.shape == right[name].shape, name
                    assert value.tobytes() == right[name].tobytes(), name
                else:
                    assert value == right[name], name


def row_contents(batch: PackedBatch) -> Iterator[tuple[int, dict[str, Any]]]:
    """(plan row, everything the batch says about it, free of its place in the batch) for rows with a plan row."""
    for b, plan_row in enumerate(batch.plan_rows.tolist()):
        if plan_row < 0:
            continue
        content: dict[str, Any] = {
            name: getattr(batch, name)[b].tobytes()
            for name in ("tokens", "modality_ids", "document_ids", "span_ids", "positions", "kv_lo", "kv_hi")
        }
        content |= {name: getattr(batch, name)[b].tobytes() for name in ("media_lo", "media_hi", "contrastive_group")}
        real = batch.key_modality[b] >= 0
        content["media"] = (batch.media_index[b][real].tobytes(), batch.key_modality[b][real].tobytes())
        mine = batch.row_index // S == b
        content["supervised"] = (
            (batch.row_index[mine] % S).tolist(),
            batch.targets[mine].tolist(),
            batch.row_weight[mine].tolist(),
            batch.row_modality[mine].tolist(),
            batch.row_source[mine].tolist(),
        )
        for name, payload in batch.payloads.items():
            items = payload.item_rows == b
            owners = np.repeat(payload.item_rows, payload.lengths) == b
            content[name] = (
                payload.values[owners].tobytes(),
                payload.lengths[items].tolist(),
                payload.grids[items].tolist(),
                (payload.token_index[owners] % S).tolist(),
            )
        mine = batch.segments.rows == b
        content["segments"] = [
            (values[mine] - b * S if name == "first" else values[mine]).tolist()
            for name, values in vars(batch.segments).items()
            if name != "rows"
        ]
        content["samples"] = (batch.sample_ids[b], batch.sample_hashes[b])
        yield plan_row, {name: value for name, value in content.items() if value != (b"", [], [], [])}


def all_rows(stream: Iterable[StepWindow]) -> dict[int, dict[str, Any]]:
    rows: dict[int, dict[str, Any]] = {}
    for window in stream:
        for batch in window.micro_batches:
            for plan_row, content in row_contents(batch):
                assert plan_row not in rows, f"row {plan_row} came twice"
                rows[plan_row] = content
    return rows


SEGMENTS = PackingConfig(contrastive_share=0.6)
"""Documents and one-span segments in the same rows."""


@pytest.fixture(scope="module")
def reference(stream_data: Any) -> list[StepWindow]:
    stream = windows(config_of(stream_data, ("birds", "talk"), packing=SEGMENTS), 14)
    assert sum(len(batch.segments) for window in stream for batch in window.micro_batches) > 50
    return stream


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_change_nothing(stream_data: Any, reference: list[StepWindow], workers: int) -> None:
    config = config_of(stream_data, ("birds", "talk"), workers=workers, packing=SEGMENTS)
    assert_equal_windows(windows(config, 14), reference)


@pytest.mark.parametrize(("workers", "step"), [(0, 1), (2, 5), (0, 13)])
def test_resume_is_bit_identical(stream_data: Any, reference: list[StepWindow], workers: int, step: int) -> None:
    text = reference[step - 1].state.to_json()
    assert len(text) < 4000
    state = StreamState.from_json(text)
    assert state == reference[step - 1].state
    config = config_of(stream_data, ("birds", "talk"), workers=workers, packing=SEGMENTS)
    assert_equal_windows(windows(config, 14 - step, state=state), reference[step:])


@pytest.mark.parametrize(("world", "B"), [(1, 3), (2, 2), (3, 1), (3, 2), (7, 1)])
def test_rows_and_their_content_do_not_depend_on_ranks(
    stream_data: Any, reference: list[StepWindow], world: int, B: int
) -> None:
    config = config_of(stream_data, ("birds", "talk"), packing=SEGMENTS)
    expected = all_rows(reference)
    found: dict[int, dict[str, Any]] = {}
    for rank in range(world):
        mine = windows(config, 14, rank=rank, world=world, B=B)
        for window, other in zip(mine, reference, strict=True):
            assert (window.first_row, window.end_row, window.state) == (other.first_row, other.end_row, other.state)
            assert len(window.micro_batches) == -(-7 // (world * B))
            plan_rows = [row for batch in window.micro_batches for row in batch.plan_rows.tolist()]
            real = [row for row in plan_rows if row >= 0]
            assert plan_rows == sorted(real) + [-1] * (len(plan_rows) - len(real)), "zero-loss rows come last"
            assert real
            assert all(window.first_row <= row < window.end_row for row in real)
        rows = all_rows(mine)
        assert not rows.keys() & found.keys()
        found |= rows
    assert found == expected


def test_an_all_padding_micro_batch_has_nothing_to_learn(stream_data: Any) -> None:
    ranks = [windows(config_of(stream_data), 1, G=3, B=1, world=2, rank=rank)[0] for rank in range(2)]
    (last,) = (batch for window in ranks for batch in window.micro_batches if batch.plan_rows.tolist() == [-1])
    assert any(window.micro_batches[-1] is last for window in ranks)
    assert last.supervised_tokens == last.row_index.size == 0
    assert last.payloads == {}
    assert last.sample_ids == [[]]


def spans_by_sample(stream: Iterable[StepWindow]) -> dict[str, list[tuple[int, int]]]:
    spans: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for window in stream:
        for batch in window.micro_batches:
            for ids in batch.sample_ids:
                for sample_id in ids:
                    owner, first, end = sample_id.rsplit(":", 2)
                    spans[owner].append((int(first), int(end)))
    return {owner: sorted(values) for owner, values in spans.items()}


@pytest.mark.parametrize("names", [pytest.param(("birds",), marks=pytest.mark.slow), ("birds", "talk")])
def test_each_token_span_comes_once_through_resumes_on_other_ranks_and_workers(
    stream_data: Any, names: tuple[str, ...]
) -> None:
    """(source, epoch, sample, span) exactly once, over 3 epochs of the smallest source, six layouts and odd steps."""
    layouts = [(1, 0, 5, 3), (2, 0, 4, 7), (3, 0, 9, 2), (1, 2, 8, 3), (2, 1, 6, 5), (3, 0, 11, 60)]
    state: StreamState | None = None
    stream: list[StepWindow] = []
    for world, workers, G, steps in layouts:
        config = config_of(stream_data, names, workers=workers)
        per_rank = [windows(config, steps, rank=rank, world=world, G=G, state=state) for rank in range(world)]
        stream += [window for rank in per_rank for window in rank]
        states = {rank[-1].state.to_json() for rank in per_rank}
        assert len(states) == 1, "ranks disagree about where the stream stands"
        state = StreamState.from_json(states.pop())
    spans = spans_by_sample(stream)
    assert state is not None
    complete = 0
    for owner, found in spans.items():
        source, epoch, _ = owner.split(":")
        flat = [border for span in found for border in span]
        assert flat == sorted(flat), f"{owner}: spans repeat or overlap: {found}"
        if int(epoch) < state.cursors[source].epoch:
            assert found[0][0] == 0
            assert all(a[1] == b[0] for a, b in itertools.pairwise(found)), f"{owner}: lost tokens: {found}"
            complete += 1
    per_epoch = Counter(tuple(owner.split(":")[:2]) for owner in spans)
    for name in names:
        samples = Manifest.load(getattr(stream_data, name)).samples
        for epoch in range(state.cursors[name].epoch):
            assert per_epoch[name, str(epoch)] == samples
    assert complete >= 100


def damaged_copy(data: Any, folder: Path) -> tuple[Path, list[Path]]:
    shards = folder / "birds"
    shutil.copytree(data.birds, shards)
    return shards, sorted(shards.glob("*.tar"))


def flip_byte(tars: list[Path]) -> None:
    content = bytearray(tars[0].read_bytes())
    content[len(content) // 2] ^= 1
    tars[0].write_bytes(content)


def cut_tar(tars: list[Path]) -> None:
    os.truncate(tars[0], tars[0].stat().st_size // 3)


def remove_tar(tars: list[Path]) -> None:
    tars[0].unlink()


def assert_only_fillers_differ(stream: list[StepWindow], whole: dict[int, dict[str, Any]]) -> None:
    """Compare a stream over damaged shards, row by row, with the rows of whole ones."""
    events = [event for window in stream for event in window.fillers]
    rows = all_rows(stream)
    assert rows.keys() == whole.keys()
    hit = {event.plan_row for event in events}
    fillers = 0
    for number, content in rows.items():
        if number not in hit:
            assert content == whole[number]
            continue
        for name in ("modality_ids", "document_ids", "span_ids", "positions", "kv_lo", "kv_hi", "media"):
            assert content[name] == whole[number][name], f"the filler changed {name}"
        for this, that in zip(content["samples"][0], whole[number]["samples"][0], strict=True):
            assert this in (that, f"{that}:filler")
            fillers += this.endswith(":filler")
        assert content["supervised"][0] == whole[number]["supervised"][0]
        assert min(content["supervised"][2], default=0.0) == 0.0
        for modality in ("image", "audio"):
            assert (modality in content) == (modality in whole[number])
            if modality in content:
                assert content[modality][1:] == whole[number][modality][1:]
                assert len(content[modality][0]) == len(whole[number][modality][0])
    assert fillers == len(events)
    planned = sum((Counter(b.planned_tokens) for w in stream for b in w.micro_batches), Counter[str]())
    actual = sum((Counter(b.actual_tokens) for w in stream for b in w.micro_batches), Counter[str]())
    lost = sum(
        int(i.rsplit(":", 3)[2]) - int(i.rsplit(":", 3)[1])
        for w in stream
        for b in w.micro_batches
        for ids in b.sample_ids
        for i in ids
        if i.endswith(":filler")
    )
    assert planned.total() - actual.total() == lost
    assert (lost > 0) == bool(events)


@pytest.mark.parametrize("damage", [flip_byte, cut_tar, remove_tar])
@pytest.mark.parametrize("workers", [0, 2])
def test_damage_leaves_fillers_and_moves_nothing(
    stream_data: Any, tmp_path: Path, damage: Any, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    shards, tars = damaged_copy(stream_data, tmp_path)
    whole = all_rows(windows(config_of(stream_data), 9))
    damage(tars)
    config = config_of(stream_data, workers=workers, corrupt_budget=72)
    config = replace(config, sources=[SourceConfig(name="birds", shards=str(shards), weight=3.0)])
    with caplog.at_level(logging.WARNING):
        stream = windows(config, 9)
    events = [event for window in stream for event in window.fillers]
    assert events
    assert all(event.shard == str(tars[0]) for event in events)
    assert all(event.key in caplog.text for event in events)
    assert (damage is flip_byte) == (len({event.key for event in events}) == 1)
    assert_only_fillers_differ(stream, whole)


def test_bytes_that_verify_but_do_not_decode_become_fillers(stream_data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = itertools.count()

    def decode(data: bytes, info: Any, geometry: Any) -> Any:
        if next(calls) == 3:
            raise RuntimeError("codec is unhappy")
        return real.decode(data, info, geometry)

    real = MODALITIES["image"]
    monkeypatch.setitem(MODALITIES, "image", replace(real, decode=decode, decode_into=None))
    stream = windows(config_of(stream_data, corrupt_budget=5), 4)
    events = [event for window in stream for event in window.fillers]
    assert [event.reason for event in events] == ["RuntimeError: codec is unhappy"]


@pytest.mark.parametrize(
    "stored",
    [
        lambda document: list(document.values()),
        lambda document: {"parts": document["parts"]},
        lambda document: document | {"labels": None},
        lambda document: document | {"parts": [{} for _ in document["parts"]]},
    ],
    ids=["no object", "without labels", "labels are no object", "parts without text"],
)
@pytest.mark.parametrize("contrastive_share", [0.0, 1.0])
def test_json_that_verifies_but_is_no_document_becomes_a_filler(
    stream_data: Any, monkeypatch: pytest.MonkeyPatch, stored: Any, contrastive_share: float
) -> None:
    calls, loads = itertools.count(), orjson.loads

    def read(data: bytes) -> Any:
        return stored(loads(data)) if next(calls) == 3 else loads(data)

    monkeypatch.setattr(orjson, "loads", read)
    config = config_of(stream_data, corrupt_budget=5, labels=["language"])
    config = replace(config, packing=replace(config.packing, contrastive_share=contrastive_share))
    events = [event for window in windows(config, 4) for event in window.fillers]
    assert len(events) == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_the_budget_stops_the_run_and_names_the_sample(stream_data: Any, tmp_path: Path, workers: int) -> None:
    shards, tars = damaged_copy(stream_data, tmp_path)
    remove_tar(tars)
    config = config_of(stream_data, workers=workers, corrupt_budget=0.03)
    config = replace(config, sources=[SourceConfig(name="birds", shards=str(shards))])
    loader = StepLoader(config, rank=0, world_size=1, global_batch_rows=7, micro_batch_rows=2)
    assert loader.allowed_fillers == 3
    with pytest.raises(CorruptionBudgetError) as caught:
        list(loader)
    message = str(caught.value)
    assert "\n" not in message
    assert f"shard {tars[0]}, key birds-" in message
    assert "offset " in message
    assert "4 damaged samples" in message
    assert "triweave verify" in message


def test_damage_within_the_budget_is_counted_once_per_sample(stream_data: Any, tmp_path: Path) -> None:
    shards, tars = damaged_copy(stream_data, tmp_path)
    flip_byte(tars)
    config = replace(config_of(stream_data, corrupt_budget=1), sources=[SourceConfig(name="birds", shards=str(shards))])
    stream = windows(config, 40)
    events = [event for window in stream for event in window.fillers]
    assert len({event.key for event in events}) == 1
    assert len(events) >= 2, "the same sample comes again in the next epoch, and is no second damage"


def test_a_state_of_another_plan_is_refused_with_what_changed(stream_data: Any, reference: list[StepWindow]) -> None:
    config = config_of(stream_data, ("birds", "talk"), seed=5)
    with pytest.raises(StateError, match="seed was 0, is 5"):
        windows(config, 1, state=reference[3].state)
    with pytest.raises(StateError, match="damaged"):
        StreamState.from_json('{"v": 2}')


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"G": 2, "world": 3}, "start fewer ranks"),
        ({"rank": 3, "world": 3}, "rank=3"),
        ({"B": 0}, "micro_batch_rows=0"),
    ],
)
def test_sizes_that_cannot_be_are_refused(stream_data: Any, shape: dict[str, int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        windows(config_of(stream_data), 1, **shape)


def count_documents(batch: PackedBatch) -> dict[str, Any]:
    return {"documents": np.asarray([len(ids) for ids in batch.sample_ids])}


def mark(micro_batches: Iterable[MicroBatch]) -> Iterator[MicroBatch]:
    for micro_batch in micro_batches:
        assert micro_batch.batch is not None
        micro_batch.batch.extra["marked"] = os.getpid()
        yield micro_batch


@pytest.mark.parametrize("workers", [0, 1])
def test_post_pack_and_further_stages_run_where_the_batch_is_made(stream_data: Any, workers: int) -> None:
    config = config_of(stream_data, workers=workers)
    for window in windows(config, 3, post_pack=count_documents, stages=(mark,)):
        for batch, timings in zip(window.micro_batches, window.load.stages_ms, strict=True):
            assert batch.extra["documents"].tolist() == [len(ids) for ids in batch.sample_ids]
            assert (batch.extra["marked"] == os.getpid()) == (workers == 0)
            assert set(timings) == set(STAGES)


def test_the_stream_is_a_webdataset_pipeline_and_webdataset_is_locked_down(stream_data: Any, tmp_path: Path) -> None:
    loader = StepLoader(config_of(stream_data), rank=0, world_size=1, global_batch_rows=2, micro_batch_rows=2)
    assert isinstance(loader.pipeline, webdataset.DataPipeline)
    witness = tmp_path / "ran"
    with pytest.raises(ValueError, match=r"(?i)security|not allowed|cannot open pipe"):
        list(webdataset.WebDataset(f"pipe:touch {witness}", shardshuffle=False))
    assert not witness.exists()
    with pytest.raises(ValueError, match=r"(?i)security|not allowed|cannot open pipe"):
        webdataset.autodecode.unpickle_loads(b"cos\nsystem\n.")


def test_steps_per_epoch_and_features(stream_data: Any) -> None:
    config = config_of(stream_data, block_samples=1000)
    loader = StepLoader(config, rank=0, world_size=1, global_batch_rows=5, micro_batch_rows=5)
    stream = windows(config, loader.steps_per_epoch + 2, G=5, B=5)
    first_of_second = next(
        n for n, w in enumerate(stream) for b in w.micro_batches for ids in b.sample_ids for i in ids if ":1:" in i
    )
    assert abs(loader.steps_per_epoch - first_of_second) <= 1
    assert loader.media_features == {"image": 8 * 8 * 3, "audio": 8 * 80}


def test_a_step_over_a_cap_of_the_batch_has_fewer_rows(stream_data: Any) -> None:
    packing = PackingConfig(images=3, audio_ms=1500)
    config = config_of(stream_data, ("birds", "talk"), packing=packing, batch_caps=BatchCaps(images=9, audio_ms=3000))
    planner = Planner(config)
    whole = windows(config, 12, G=8)
    free = all_rows(windows(replace(config, batch_caps=BatchCaps()), 12, G=8))
    sizes = [window.end_row - window.first_row for window in whole]
    assert min(sizes) < 8 == max(sizes)
    rows = np.concatenate([planner.block(block).row_budgets for block in range(6)])
    for window in whole:
        used = rows[window.first_row : window.end_row].sum(axis=0)
        assert (used <= [10**9, 10**9, 9, 3000, 10**9]).all()
        if window.end_row - window.first_row < 8:
            assert ((used + rows[window.end_row]) > [10**9, 10**9, 9, 3000, 10**9]).any(), "a row too few"
    content = all_rows(whole)
    assert content == {row: value for row, value in free.items() if row in content}, "the cap moved rows"
    state = StreamState.from_json(whole[4].state.to_json())
    ranks = [windows(config, 7, G=8, rank=rank, world=3, B=1, state=state) for rank in range(3)]
    assert [(window.first_row, window.end_row) for window in ranks[0]] == [
        (window.first_row, window.end_row) for window in whole[5:]
    ]
    assert all_rows(itertools.chain(*ranks)) == all_rows(whole[5:])


def test_a_step_over_a_cap_keeps_contrastive_groups_whole(stream_data: Any) -> None:
    """Rows, order and groups are those without caps, over the ends of blocks, on other ranks and behind a resume."""
    packing = PackingConfig(images=3, contrastive_share=0.5, contrastive_group_rows=4)
    config = config_of(stream_data, ("birds", "talk"), packing=packing, batch_caps=BatchCaps(images=14))
    planner = Planner(config)
    whole = windows(config, 14, G=16)
    sizes = [window.end_row - window.first_row for window in whole]
    assert {size % 4 for size in sizes} == {0}
    assert len(set(sizes)) > 2
    images = np.concatenate([planner.block(block).row_budgets for block in range(12)])[:, 2]
    for window in whole:
        assert images[window.first_row : window.end_row].sum() <= 14
        if window.end_row - window.first_row < 16:
            assert images[window.first_row : window.end_row + 4].sum() > 14, "a group too few"
    free = all_rows(windows(replace(config, batch_caps=BatchCaps()), 14, G=16))
    content = all_rows(whole)
    assert content == {row: value for row, value in free.items() if row in content}
    assert sorted(content) == list(range(whole[-1].end_row))
    ranks = [windows(config, 8, G=16, rank=rank, world=3, B=2, state=whole[5].state) for rank in range(3)]
    assert all_rows(itertools.chain(*ranks)) == all_rows(whole[6:])
