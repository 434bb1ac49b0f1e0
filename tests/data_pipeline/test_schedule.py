"""Schedules: changes of the plan at step boundaries lose and repeat nothing, on any ranks, workers and resumes."""

from __future__ import annotations

import itertools
import pickle
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from triweave.data_pipeline.config import DataConfig, PackingConfig, ScheduleEntry, SourceConfig
from triweave.data_pipeline.errors import StateError
from triweave.data_pipeline.media.geometry import MediaGeometry
from triweave.data_pipeline.stream.loader import StepLoader, StepWindow
from triweave.data_pipeline.stream.pieces import UNFIT_LATER
from triweave.data_pipeline.stream.plan import Planner
from triweave.data_pipeline.stream.state import StreamState
from triweave.data_pipeline.stream.windows import MicroBatchTask, WindowShape, micro_batch_tasks

GEOMETRY = MediaGeometry(image_patch_px=8, image_max_tokens=400)
SCHEDULE = [
    ScheduleEntry(after_step=3, weights={"talk": 4.0}, sequence_length=40, images=2),
    ScheduleEntry(after_step=5, sequence_length=150, image_tokens=60),
    ScheduleEntry(after_step=9, weights={"birds": 0.0}),
    ScheduleEntry(after_step=12, weights={"birds": 1.0, "talk": 0.5}, sequence_length=64),
]
"""Cuts within a block right after a cut, shorter and longer packs, a source that pauses."""
STEPS, G = 24, 8
Span = tuple[int, int]
Named = tuple[str, int, int, int, int, int]
"""Source, epoch, shard, sample, first token, end token."""


def config_of(data: Any, schedule: list[ScheduleEntry] = SCHEDULE, **changes: Any) -> DataConfig:
    sources = [
        SourceConfig(name=name, shards=str(getattr(data, name)), weight=weight)
        for name, weight in (("birds", 3.0), ("talk", 1.0))
    ]
    options: dict[str, Any] = {"sequence_length": 64, "geometry": GEOMETRY, "block_samples": 30, "workers": 0}
    return DataConfig(sources=sources, tokenizer=str(data.tokenizer), **({"schedule": schedule} | options | changes))


def tasks(
    config: DataConfig, *, steps: int, ranks: int, workers: int, state: StreamState | None
) -> list[MicroBatchTask]:
    """The micro-batches of all ranks and workers for some steps, plans only; each rank and worker has its own plans."""
    found: list[MicroBatchTask] = []
    end_row = G * (steps + (state.step if state else 0))
    for rank, worker in itertools.product(range(ranks), range(workers)):
        planner = Planner(config)
        planner = planner.resumed(state) if state else planner
        shape = WindowShape(rank=rank, world_size=ranks, global_batch_rows=G, micro_batch_rows=1)
        mine = micro_batch_tasks(planner, shape, state or planner.start(), worker=worker, workers=workers)
        found += itertools.takewhile(lambda task: task.first_row < end_row, mine)
    return found


def rows_of(found: Iterable[MicroBatchTask]) -> dict[int, list[Named]]:
    """Plan row -> its pieces, by the names of their sources."""
    rows: dict[int, list[Named]] = {}
    for task in found:
        assert task.planner is not None
        for plan_row, pieces in zip(task.plan_rows, task.pieces, strict=True):
            if plan_row >= 0:
                assert plan_row not in rows, "a row came twice"
                rows[plan_row] = [
                    (task.planner.source_name(p.source), p.epoch, p.shard, p.sample, p.first, p.end) for p in pieces
                ]
    return rows


@pytest.fixture(scope="module")
def straight(stream_data: Any) -> list[MicroBatchTask]:
    return tasks(config_of(stream_data), steps=STEPS, ranks=1, workers=1, state=None)


def test_every_span_comes_once_through_all_segments(straight: list[MicroBatchTask]) -> None:
    last = straight[-1].state
    assert last is not None
    assert [(s.first_step, s.first_row, s.end_row) for s in last.segments] == [
        (0, 0, 3 * G), (3, 3 * G, 5 * G), (5, 5 * G, 9 * G), (9, 9 * G, 12 * G), (12, 12 * G, STEPS * G)
    ]  # fmt: skip
    spans: dict[tuple[str, int, int, int], list[Span]] = defaultdict(list)
    planners = {id(task.planner): task.planner for task in straight}
    for pieces in rows_of(straight).values():
        for *owner, first, end in pieces:
            spans[tuple(owner)].append((first, end))  # type: ignore[index]
    unfit = sum(planner.block(0).left_out.get(UNFIT_LATER, 0) for planner in planners.values() if planner)
    gaps = complete = 0
    for owner, found in spans.items():
        found.sort()
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(found)), f"{owner}: {found}"
        if owner[1] < last.cursors[owner[0]].epoch:
            gaps += (found[0][0] != 0) + sum(a[1] != b[0] for a, b in itertools.pairwise(found))
            complete += 1
    assert complete >= 100
    assert gaps <= unfit, "tokens were lost beyond what is left out with a reason"
    per_epoch = Counter((name, epoch) for name, epoch, *_ in spans)
    for name, samples in (("birds", 72), ("talk", 18)):
        assert last.cursors[name].epoch >= 1
        assert all(per_epoch[name, epoch] == samples for epoch in range(last.cursors[name].epoch))


def test_each_segment_packs_as_it_says(straight: list[MicroBatchTask]) -> None:
    lengths = [64, 40, 150, 150, 64]
    seen: dict[int, Counter[str]] = defaultdict(Counter)
    for task in straight:
        planner = task.planner
        assert planner is not None
        assert planner.config.sequence_length == lengths[planner.segment]
        plan = planner.block(0)
        assert (plan.row_budgets <= list(planner.caps.values())).all()
        assert sum(plan.modality_tokens.values()) == plan.row_tokens.sum()
        for pieces in task.pieces:
            assert sum(piece.end - piece.first for piece in pieces) <= lengths[planner.segment]
            seen[planner.segment].update(planner.source_name(piece.source) for piece in pieces if piece.source < 2)
    assert set(seen[3]) == {"talk"}
    assert seen[1]["talk"] > seen[1]["birds"], "four to three"


@pytest.mark.parametrize(
    ("ranks", "workers"), [(1, 2), (2, 1), (3, 2), (5, 1), pytest.param(8, 2, marks=pytest.mark.slow)]
)
def test_ranks_and_workers_change_nothing(
    stream_data: Any, straight: list[MicroBatchTask], ranks: int, workers: int
) -> None:
    found = tasks(config_of(stream_data), steps=STEPS, ranks=ranks, workers=workers, state=None)
    assert rows_of(found) == rows_of(straight)
    states = {task.state.step: task.state for task in straight if task.state}
    assert all(task.state == states[task.state.step] for task in found if task.state)


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5, 7, 9, 11, 12, 20])
def test_a_resume_at_any_step_is_exact(stream_data: Any, straight: list[MicroBatchTask], step: int) -> None:
    """In the middle of a segment, where one ends, and where the first block of one is cut; on other ranks."""
    saved = next(task.state for task in straight if task.state and task.state.step == step)
    assert len(saved.to_json()) < 1200 * len(saved.segments)
    state = StreamState.from_json(saved.to_json())
    assert state == saved
    found = tasks(config_of(stream_data), steps=STEPS - step, ranks=step % 3 + 1, workers=1, state=state)
    wanted = {row: pieces for row, pieces in rows_of(straight).items() if row >= step * G}
    assert rows_of(found) == wanted
    assert max((task.state for task in found if task.state), key=lambda s: s.step) == straight[-1].state


def test_a_planner_behind_a_cut_survives_pickling(straight: list[MicroBatchTask]) -> None:
    planner = next(task.planner for task in straight if task.planner and task.planner.segment == 2)
    again = pickle.loads(pickle.dumps(planner))
    assert again.plan_hash == planner.plan_hash
    assert (again.block(0).row_tokens == planner.block(0).row_tokens).all()


def windows(config: DataConfig, count: int, state: StreamState | None = None, **shape: int) -> list[StepWindow]:
    shape = {"rank": 0, "world_size": 1, "global_batch_rows": G, "micro_batch_rows": 2} | shape
    stream = iter(StepLoader(config, state=state, **shape))  # type: ignore[arg-type]
    try:
        return list(itertools.islice(stream, count))
    finally:
        stream.close()


def consumed(stream: Iterable[StepWindow]) -> dict[int, tuple[list[str], list[int]]]:
    """Plan row -> ids and hashes of its pieces."""
    return {
        row: (ids, hashes)
        for window in stream
        for batch in window.micro_batches
        for row, ids, hashes in zip(batch.plan_rows.tolist(), batch.sample_ids, batch.sample_hashes, strict=True)
        if row >= 0
    }


def test_the_loader_changes_length_at_the_step_and_reads_what_was_left_over(stream_data: Any) -> None:
    alone = PackingConfig(contrastive_share=0.5, contrastive_group_rows=4)
    stream = windows(config_of(stream_data, packing=alone), 14)
    lengths = [batch.tokens.shape[1] for window in stream for batch in window.micro_batches[:1]]
    assert lengths == [64] * 3 + [40] * 2 + [150] * 7 + [64] * 2
    assert not any(window.fillers for window in stream)
    ids = [name for row_ids, _ in consumed(stream).values() for name in row_ids]
    assert len(ids) == len(set(ids))
    assert any(name.endswith(":alone") for name in ids)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_loader_gives_the_same_order_on_any_ranks_and_workers(stream_data: Any) -> None:
    """(source, epoch, sample, token span) and token hashes: 1, 2, 3, 5, 8 ranks x workers 0, 2, resumed in between."""
    wanted = consumed(windows(config_of(stream_data), 14))
    for ranks, workers in itertools.product((1, 2, 3, 5, 8), (0, 2)):
        config = config_of(stream_data, workers=workers)
        found: dict[int, Any] = {}
        for rank in range(ranks):
            first = windows(config, 4 + ranks, rank=rank, world_size=ranks, micro_batch_rows=1)
            state = StreamState.from_json(first[-1].state.to_json())
            rest = windows(config, 10 - ranks, state, rank=rank, world_size=ranks, micro_batch_rows=1)
            found |= consumed(first) | consumed(rest)
        assert found == wanted, f"{ranks} ranks, {workers} workers"


def test_a_change_may_be_added_when_a_run_is_resumed(stream_data: Any, straight: list[MicroBatchTask]) -> None:
    plain = tasks(config_of(stream_data, []), steps=3, ranks=1, workers=1, state=None)
    state = plain[-1].state
    assert state is not None
    found = tasks(config_of(stream_data), steps=9, ranks=2, workers=1, state=state)
    wanted = {row: pieces for row, pieces in rows_of(straight).items() if 3 * G <= row < 12 * G}
    assert rows_of(found) == wanted


def test_a_source_may_join_when_a_run_is_resumed(stream_data: Any) -> None:
    both = config_of(stream_data, [ScheduleEntry(after_step=2, weights={"talk": 2.0})])
    both = replace(both, sources=[both.sources[0], replace(both.sources[1], weight=0.0)])
    alone = replace(both, sources=both.sources[:1], schedule=[])
    state = tasks(alone, steps=2, ranks=1, workers=1, state=None)[-1].state
    found = rows_of(tasks(both, steps=4, ranks=1, workers=1, state=state))
    assert {name for pieces in found.values() for name, *_ in pieces} == {"birds", "talk"}
    whole = rows_of(tasks(both, steps=6, ranks=1, workers=1, state=None))
    assert {row: pieces for row, pieces in whole.items() if row >= 2 * G} == found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": []}, "put back the entry with after_step=3"),
        ({"schedule": [replace(SCHEDULE[0], after_step=2), *SCHEDULE[1:]]}, "schedule was after_step=3, is 2"),
        ({"schedule": [replace(SCHEDULE[0], images=3), *SCHEDULE[1:]]}, r"packing was .*images': 2.*after_step=6"),
        ({"schedule": SCHEDULE[:1]}, "put back .* after_step=5"),
        ({"schedule": [*SCHEDULE[:2], ScheduleEntry(after_step=6, images=1)]}, None),
        ({"seed": 3}, "seed was 0, is 3"),
    ],
)
def test_the_past_cannot_be_changed(
    stream_data: Any, straight: list[MicroBatchTask], changes: dict[str, Any], message: str | None
) -> None:
    state = next(task.state for task in straight if task.state and task.state.step == 6)
    planner = Planner(config_of(stream_data, **changes))
    if message is None:
        assert planner.resumed(state).last_step == 6
        return
    with pytest.raises(StateError, match=message):
        planner.resumed(state)


def test_a_change_before_the_saved_step_is_refused(stream_data: Any) -> None:
    state = tasks(config_of(stream_data, []), steps=6, ranks=1, workers=1, state=None)[-1].state
    assert state is not None
    late = config_of(stream_data, [ScheduleEntry(after_step=4, images=1)])
    with pytest.raises(StateError, match=r"after step 4.*has taken 6 steps.*after_step=6 or later"):
        Planner(late).resumed(state)
