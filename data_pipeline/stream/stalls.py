"""Where a rank's wait for data comes from: figures of every step, and the stage to blame with the setting that helps.

    wait share = waited / (waited + worked)        over the latest STEPS_KEPT steps, those of the start left out
    bound by   = the stage that took most of the workers' time, where the wait share is above WAIT_SHARE

A loader worker does its stages one after the other, so the largest one is what to make faster, or to spread over more
workers. Times are wall-clock: on a machine with more busy processes than cores, all stages grow.
"""

from __future__ import annotations

import json
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from triweave.data_pipeline.config import DataConfig
from triweave.data_pipeline.storage.counters import StorageCounts
from triweave.data_pipeline.storage.location import is_remote

STEPS_KEPT = 32
"""Steps that figures are made of."""
START_STEPS = 2
"""First steps of a stream that are not counted: their wait is for the first plan and the start of the workers."""
WAIT_SHARE = 0.05
"""Share of the time spent waiting from which something is said."""
STAGES = {"plan": "planning", "fetch": "storage", "tokenise": "tokenise", "decode": "decode", "pack": "packing"}
"""Stage in `timings_ms` -> what a rank is bound by where it takes most of the time."""
COUNTS = ("samples", "read_bytes", "requests", "retries", "cache_hits", "cache_misses", "failed_checks")
"""What is counted beside the times, all sums."""


@dataclass(frozen=True, kw_only=True)
class StepLoad:
    """What loading one step took on one rank.

    wait_s: time the rank stood still for its micro-batches.
    queue_depth: micro-batches that lay ready when the rank asked for the first one; 0 without workers.
    stages_ms: of each micro-batch, stage -> milliseconds in the worker.
    counts: sums over the micro-batches, by the names in COUNTS; those that are 0 may be absent.
    """

    wait_s: float
    queue_depth: int
    stages_ms: Sequence[dict[str, float]]
    counts: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Stall:
    """A rank waits for its data.

    bound: what for, a value of STAGES. wait_share: of the time. stage_share: of that stage in the workers' time.
    advice: the setting that helps. rank, ranks: which of how many waits.
    """

    bound: str
    wait_share: float
    stage_share: float
    advice: str
    rank: int = 0
    ranks: int = 1

    def __str__(self) -> str:
        """Return the line for the user."""
        where = f" on rank {self.rank} of {self.ranks}, which waits most" if self.ranks > 1 else ""
        return (
            f"data: you are {self.bound} bound{where}: {self.wait_share:.0%} of the time went into waiting for data, "
            f"and {self.stage_share:.0%} of the loader's time into {self.bound}; {self.advice}"
        )


def counts_of(rows: Iterable[Sequence[object]], stored: StorageCounts) -> dict[str, float]:
    """Return the counts of a micro-batch: of its samples that were read, and what object stores did meanwhile.

    Bytes that are asked for ahead count to the micro-batch at hand, so sums over many are right.
    """
    samples = [sample for row in rows for sample in row if isinstance(sample, dict)]
    counts: dict[str, float] = {
        "samples": len(samples),
        "read_bytes": sum(len(view) for sample in samples for view in sample.values()),
        **{name: getattr(stored, name) for name in COUNTS if hasattr(stored, name) and name != "read_bytes"},
    }
    return {name: value for name, value in counts.items() if value}


def summed(counts: Iterable[dict[str, float]]) -> dict[str, float]:
    """Return the sums of counts, name by name."""
    total: Counter[str] = Counter()
    for item in counts:
        total.update(item)
    return dict(total)


Exchange = Callable[[str], list[str]]
"""A rank's text to the texts of all ranks, by rank; collective."""


def alone(text: str) -> list[str]:
    """Exchange texts in a world of one rank."""
    return [text]


class StallMeter:
    """Sums up the latest steps of one rank. workers: loader processes of the rank; remote: shards in object stores.

    worst: the stall of the rank that waited most when the ranks last compared theirs, None where none of them had one.
    """

    def __init__(self, *, workers: int, remote: bool) -> None:
        self._workers = workers
        self._remote = remote
        self._loads: deque[tuple[StepLoad, float]] = deque(maxlen=STEPS_KEPT)
        self._seen = 0
        self._told = ""
        self.worst: Stall | None = None

    @classmethod
    def of(cls, config: DataConfig) -> StallMeter:
        """Return the meter of a rank that reads as `config` says."""
        return cls(workers=config.workers, remote=any(is_remote(source.shards) for source in config.sources))

    def add(self, load: StepLoad, work_s: float) -> None:
        """Count a step that took `work_s` beside the wait."""
        self._seen += 1
        if self._seen > START_STEPS:
            self._loads.append((load, work_s))

    def figures(self) -> dict[str, float]:
        """Return means over the latest steps, counts as sums, and p50 and p99 of each stage; {} before there are any.

        wait_s, queue_depth: means of a step. read_mb_per_s: of the samples' bytes, over the whole time. STAGE_ms_p50,
        STAGE_ms_p99: milliseconds of a micro-batch.
        """
        if not self._loads:
            return {}
        loads = [load for load, _ in self._loads]
        counts = self._counts()
        seconds = sum(load.wait_s + work_s for load, work_s in self._loads)
        figures = {
            "wait_s": float(np.mean([load.wait_s for load in loads])),
            "queue_depth": float(np.mean([load.queue_depth for load in loads])),
            "read_mb_per_s": counts["read_bytes"] / 1e6 / seconds if seconds else 0.0,
            **{name: counts[name] for name in COUNTS},
        }
        for stage in STAGES:
            times = [timings[stage] for load in loads for timings in load.stages_ms if stage in timings]
            if times:
                figures[f"{stage}_ms_p50"], figures[f"{stage}_ms_p99"] = np.percentile(times, (50, 99)).tolist()
        return figures

    def stall(self) -> Stall | None:
        """Return what the rank waits for; None where it hardly waits, or while nothing is known."""
        waited = sum(load.wait_s for load, _ in self._loads)
        worked = sum(work_s for _, work_s in self._loads)
        if not self._loads or waited < WAIT_SHARE * (waited + worked):
            return None
        spent: Counter[str] = Counter()
        for load, _ in self._loads:
            for timings in load.stages_ms:
                spent.update({stage: timings.get(stage, 0.0) for stage in STAGES})
        stage, milliseconds = spent.most_common(1)[0]
        return Stall(
            bound=STAGES[stage],
            wait_share=waited / (waited + worked),
            stage_share=milliseconds / max(spent.total(), 1e-9),
            advice=self._advice(stage),
        )

    def news(self, exchange: Exchange = alone) -> str | None:
        """Return the line on the worst rank's stall where it has another cause than the last that was told.

        To be called by all ranks after every step: once in STEPS_KEPT steps, the steps that figures are made of, they
        tell each other what they wait for (collective); in between nothing is new.
        """
        counted = self._seen - START_STEPS
        if counted < STEPS_KEPT or counted % STEPS_KEPT:
            return None
        stall = self.stall()
        told = exchange(json.dumps(asdict(stall)) if stall else "")
        stalls = [
            Stall(**(json.loads(text) | {"rank": rank, "ranks": len(told)})) for rank, text in enumerate(told) if text
        ]
        self.worst = max(stalls, key=lambda one: one.wait_share, default=None)
        if self.worst is None or self.worst.bound == self._told:
            return None
        self._told = self.worst.bound
        return str(self.worst)

    def _counts(self) -> Counter[str]:
        return Counter(summed(load.counts for load, _ in self._loads))

    def _advice(self, stage: str) -> str:
        """Return the setting that makes a stage less of a burden."""
        counts = self._counts()
        if stage == "fetch" and self._remote:
            if counts["retries"] > 0.05 * counts["requests"]:
                return "the store refuses or drops requests: lower TRIWEAVE_S3_CONNECTIONS, or ask for a higher rate"
            return "raise TRIWEAVE_S3_READ_AHEAD and TRIWEAVE_S3_CONNECTIONS, or TRIWEAVE_CACHE_GB where epochs repeat"
        if stage == "fetch":
            return "put the shards on a faster disk, or raise data.workers so that more reads are under way"
        if stage == "plan":
            return "lower data.block_samples: a block is planned as a whole"
        cheaper = {
            "decode": "build with --image-max-side and --audio-rate near what the geometry uses, so less is decoded",
            "tokenise": "documents longer than a pack are tokenised once per piece: raise data.sequence_length",
            "pack": "raise train.micro_batch_rows: packing costs a fixed time per micro-batch",
        }[stage]
        cores = len(os.sched_getaffinity(0))
        if self._workers < cores:
            return f"raise data.workers from {self._workers} (this machine has {cores} cores), or {cheaper}"
        return f"all {cores} cores have workers: {cheaper}"
