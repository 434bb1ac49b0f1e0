"""StepLoader: the stream of packs of one rank, a webdataset.DataPipeline run by worker processes.

    planned_rows -> fetch_rows -> decode_rows -> collate_rows -> [your stages] -> StepWindow

Every worker makes the same plan for itself and takes every W-th micro-batch of its rank; they are handed over in order,
so nothing that comes out depends on the number of workers.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, repeat
from typing import Any

# webdataset reads this when it is imported: no unpickling of members, no `pipe:` URLs.
os.environ["WDS_SECURE"] = "1"

import webdataset
import webdataset.utils
from torch.utils.data import DataLoader, get_worker_info

from triweave.data_pipeline.batch import PackedBatch
from triweave.data_pipeline.config import DataConfig
from triweave.data_pipeline.errors import CorruptionBudgetError, DataError
from triweave.data_pipeline.storage.counters import storage_counts
from triweave.data_pipeline.storage.location import is_remote
from triweave.data_pipeline.storage.read_ahead import read_ahead
from triweave.data_pipeline.storage.settings import StorageSettings
from triweave.data_pipeline.stream.catalog import usable_modalities
from triweave.data_pipeline.stream.collate import Row, collate
from triweave.data_pipeline.stream.content import FillerEvent, PieceMaker, SampleBytes
from triweave.data_pipeline.stream.plan import Planner
from triweave.data_pipeline.stream.reader import CorruptSampleError
from triweave.data_pipeline.stream.stalls import StepLoad, counts_of, summed
from triweave.data_pipeline.stream.state import StreamState
from triweave.data_pipeline.stream.transport import (
    Parcel,
    interrupts_held,
    queue_depth,
    start_method,
    start_worker,
    unwrap,
    wrap,
)
from triweave.data_pipeline.stream.windows import MicroBatchTask, WindowShape, micro_batch_tasks
from triweave.data_pipeline.text.tokenizer import Tokenizer

# It may have been imported before us, with the variable unset.
webdataset.utils.enforce_security = True

logger = logging.getLogger(__name__)

PostPack = Callable[[PackedBatch], dict[str, Any]]


@dataclass(kw_only=True)
class MicroBatch:
    """One micro-batch on its way through the pipeline; `batch` is there after `collate_rows`.

    timings_ms: stage of `stalls.STAGES` -> milliseconds. counts: see `stalls.COUNTS`.
    """

    task: MicroBatchTask
    samples: list[list[SampleBytes | CorruptSampleError]] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    media: dict[int, Any] = field(default_factory=dict)
    fillers: list[FillerEvent] = field(default_factory=list)
    timings_ms: dict[str, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    batch: PackedBatch | None = None


Stage = Callable[[Iterable[MicroBatch]], Iterable[MicroBatch]]


@dataclass(frozen=True, kw_only=True)
class StepWindow:
    """What one rank runs in one global step.

    micro_batches: `accumulation` PackedBatches; zero-loss rows are the last of the last ones.
    first_row, end_row: the plan rows of the whole global step.
    state: the stream after this step, the same on every rank.
    fillers: damaged samples of this rank's rows.
    load: what loading it took.
    """

    micro_batches: list[PackedBatch]
    first_row: int
    end_row: int
    state: StreamState
    fillers: list[FillerEvent]
    load: StepLoad


class StepLoader:
    """Endless iterable of StepWindow for one rank. Iterating again starts at the same state again."""

    def __init__(
        self,
        config: DataConfig,
        *,
        rank: int,
        world_size: int,
        global_batch_rows: int,
        micro_batch_rows: int,
        state: StreamState | None = None,
        post_pack: PostPack | None = None,
        stages: tuple[Stage, ...] = (),
    ) -> None:
        """Plan the first block.

        rank, world_size: which share of each step's rows to load; the rows themselves do not depend on them.
        global_batch_rows: G, plan rows of one global step. micro_batch_rows: B, rows of one PackedBatch.
        state: where to continue; None starts at row 0. post_pack: picklable, its result becomes `PackedBatch.extra`.
        stages: further webdataset stages over MicroBatch, run in the worker after `collate_rows`; they must yield one
            micro-batch for each they take, in order.

        Raises DataError where shards, index, token counts or tokenizer are missing or do not fit together, StateError
        where `state` belongs to another plan, WindowError where the sizes do not fit the ranks.
        """
        self.config = config
        self.shape = WindowShape(
            rank=rank,
            world_size=world_size,
            global_batch_rows=global_batch_rows,
            micro_batch_rows=micro_batch_rows,
        )
        first = Planner(config)
        self.planner = first.resumed(state) if state else first
        self.start = state or first.start()
        self.planner.block(self.start.block)
        self.pipeline = stream_pipeline(self.planner, self.shape, self.start, post_pack, *stages)
        self._damaged: set[tuple[str, str]] = set()

    @property
    def accumulation(self) -> int:
        """Micro-batches of this rank per step."""
        return self.shape.accumulation

    @property
    def steps_per_epoch(self) -> int:
        """Estimated steps of one epoch, at least 1."""
        return max(1, round(self.planner.rows_per_epoch() / self.shape.global_batch_rows))

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the stream."""
        return self.planner.tokenizer

    @property
    def media_features(self) -> dict[str, int]:
        """Modality name -> values of one payload row, of the modalities that the tokenizer has markers for."""
        usable = usable_modalities(self.tokenizer)
        return {name: modality.features(self.config.geometry) for name, modality in usable.items()}

    @property
    def allowed_fillers(self) -> int:
        """Distinct damaged samples this rank may meet before it stops."""
        budget = self.config.corrupt_budget
        return math.ceil(budget * self.planner.mixture.epoch_samples) if budget < 1 else int(budget)

    def __iter__(self) -> Generator[StepWindow, None, None]:
        """Yield windows without end. Raises CorruptionBudgetError; closing the iterator ends the workers."""
        micro_batches = self._micro_batches()
        try:
            while True:
                began = time.perf_counter()
                depths, window = zip(*(next(micro_batches) for _ in range(self.accumulation)), strict=True)
                waited_s = time.perf_counter() - began
                fillers = [event for micro_batch in window for event in micro_batch.fillers]
                self._charge(fillers)
                task = window[-1].task
                assert task.state is not None
                yield StepWindow(
                    micro_batches=[_batch_of(micro_batch) for micro_batch in window],
                    first_row=task.first_row,
                    end_row=task.end_row,
                    state=task.state,
                    fillers=fillers,
                    load=StepLoad(
                        wait_s=waited_s,
                        queue_depth=depths[0],
                        stages_ms=[micro_batch.timings_ms for micro_batch in window],
                        counts=summed(micro_batch.counts for micro_batch in window),
                    ),
                )
        finally:
            micro_batches.close()

    def _micro_batches(self) -> Generator[tuple[int, MicroBatch], None, None]:
        """Yield each micro-batch behind the number of those that lay ready when it was asked for."""
        if self.config.workers == 0:
            yield from zip(repeat(0), self.pipeline)
            return
        loader: DataLoader[Parcel] = DataLoader(
            self.pipeline.compose(_wrapped),
            batch_size=None,
            collate_fn=_as_is,
            num_workers=self.config.workers,
            prefetch_factor=max(self.config.prefetch, -(-self.accumulation // self.config.workers)),  # a step at once
            multiprocessing_context=start_method(),
            worker_init_fn=start_worker,
        )
        with interrupts_held():
            workers = iter(loader)
        try:
            while True:
                ready = queue_depth(workers)
                content = unwrap(next(workers))
                if isinstance(content, DataError):
                    raise content
                yield ready, content
        finally:
            # The iterator's own __del__ waits for the garbage collector; a training loop must not.
            workers._shutdown_workers()  # type: ignore[attr-defined]

    def _charge(self, fillers: list[FillerEvent]) -> None:
        for event in fillers:
            self._damaged.add((event.shard, event.key))
            logger.warning(
                "row %d: sample %s of %s at byte %d is replaced by a filler: %s",
                event.plan_row,
                event.key,
                event.shard,
                event.offset,
                event.reason,
            )
            if len(self._damaged) > self.allowed_fillers:
                raise CorruptionBudgetError(
                    f"{len(self._damaged)} damaged samples on rank {self.shape.rank}, "
                    f"data.corrupt_budget={self.config.corrupt_budget} allows {self.allowed_fillers}; the last one: "
                    f"shard {event.shard}, key {event.key}, offset {event.offset}: {event.reason}; "
                    f"run `triweave verify {os.path.dirname(event.shard)}`, rebuild, or raise the budget"
                )


def stream_pipeline(
    planner: Planner, shape: WindowShape, start: StreamState, post_pack: PostPack | None, *stages: Stage
) -> webdataset.DataPipeline:
    """Return the stages of one rank's stream; iterated, it yields MicroBatch without end."""
    return webdataset.DataPipeline(
        partial(planned_rows, planner, shape, start),
        partial(fetch_rows, planner),
        partial(decode_rows, planner),
        partial(collate_rows, planner, post_pack),
        *stages,
    )


def planned_rows(planner: Planner, shape: WindowShape, start: StreamState) -> Iterator[MicroBatch]:
    """Yield this worker's share of the rank's micro-batches: plans only, no bytes."""
    info = get_worker_info()
    worker, workers = (info.id, info.num_workers) if info else (0, 1)
    tasks = micro_batch_tasks(planner, shape, start, worker=worker, workers=workers)
    while True:
        began = time.perf_counter()
        task = next(tasks)
        yield MicroBatch(task=task, timings_ms={"plan": (time.perf_counter() - began) * 1000})


def fetch_rows(planner: Planner, micro_batches: Iterable[MicroBatch]) -> Iterator[MicroBatch]:
    """Read and verify the bytes of every sample; a damaged one is handed on as its error."""
    maker = PieceMaker(planner)
    before = storage_counts()
    for micro_batch in _asked_ahead(maker, micro_batches):
        began = time.perf_counter()
        maker.planner = _planner_of(micro_batch)
        for pieces in micro_batch.task.pieces:
            samples: list[SampleBytes | CorruptSampleError] = []
            for piece in pieces:
                try:
                    samples.append(maker.fetch(piece))
                except CorruptSampleError as error:
                    samples.append(error)
            micro_batch.samples.append(samples)
        micro_batch.timings_ms["fetch"] = (time.perf_counter() - began) * 1000
        stored, before = before, storage_counts()
        micro_batch.counts = counts_of(micro_batch.samples, before - stored)
        yield micro_batch


def decode_rows(planner: Planner, micro_batches: Iterable[MicroBatch]) -> Iterator[MicroBatch]:
    """Tokenise and decode every piece; a damaged one becomes a filler and an event."""
    maker = PieceMaker(planner)
    for micro_batch in micro_batches:
        began, tokenised_s = time.perf_counter(), maker.tokenise_s
        task = micro_batch.task
        maker.planner = _planner_of(micro_batch)
        rows, micro_batch.media = maker.decode(list(zip(task.pieces, micro_batch.samples, strict=True)))
        for plan_row, pieces, row in zip(task.plan_rows, task.pieces, rows, strict=True):
            micro_batch.rows.append(Row(plan_row, list(chain.from_iterable(made.pieces for made in row))))
            for piece, made in zip(pieces, row, strict=True):
                if made.error is not None:
                    micro_batch.fillers.append(maker.event(piece, plan_row, made.error))
        micro_batch.samples = []
        tokenise_ms = (maker.tokenise_s - tokenised_s) * 1000
        micro_batch.timings_ms["tokenise"] = tokenise_ms
        micro_batch.timings_ms["decode"] = (time.perf_counter() - began) * 1000 - tokenise_ms
        yield micro_batch


def collate_rows(
    planner: Planner, post_pack: PostPack | None, micro_batches: Iterable[MicroBatch]
) -> Iterator[MicroBatch]:
    """Pack the rows into a PackedBatch and add what `post_pack` makes of it."""
    for micro_batch in micro_batches:
        began = time.perf_counter()
        config = _planner_of(micro_batch).config
        batch = collate(
            micro_batch.rows,
            micro_batch.media,
            sequence_length=config.sequence_length,
            pad_id=planner.tokenizer.pad_id,
            contrastive_group_rows=config.packing.contrastive_group_rows,
        )
        extra = post_pack(batch) if post_pack else {}
        micro_batch.timings_ms["pack"] = (time.perf_counter() - began) * 1000
        micro_batch.batch = replace(batch, extra=extra)
        micro_batch.rows, micro_batch.media = [], {}
        yield micro_batch


def _asked_ahead(maker: PieceMaker, micro_batches: Iterable[MicroBatch]) -> Iterable[MicroBatch]:
    """Yield the micro-batches; where shards are in an object store, the bytes of the next ones are under way."""
    if not any(is_remote(source.shards) for source in maker.planner.config.sources):
        return micro_batches

    def ask(micro_batch: MicroBatch) -> None:
        maker.planner = _planner_of(micro_batch)
        maker.ask(chain.from_iterable(micro_batch.task.pieces))

    return read_ahead(micro_batches, ask, StorageSettings.from_environment().read_ahead)


def _wrapped(micro_batches: Iterable[MicroBatch]) -> Iterator[Parcel]:
    """Yield what goes to the rank; an error for the user goes as it is, without the worker's traceback."""
    try:
        for micro_batch in micro_batches:
            # The plan of the window stays behind: it is large, and the rank needs its rows and its state only.
            micro_batch.task = replace(micro_batch.task, pieces=[], planner=None)
            yield wrap(micro_batch)
    except DataError as error:
        yield wrap(error)


def _planner_of(micro_batch: MicroBatch) -> Planner:
    assert micro_batch.task.planner is not None
    return micro_batch.task.planner


def _batch_of(micro_batch: MicroBatch) -> PackedBatch:
    assert micro_batch.batch is not None
    return micro_batch.batch


def _as_is(parcel: Any) -> Any:
    return parcel
