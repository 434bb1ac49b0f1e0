"""What an epoch reads, from metadata: bytes, requests to an object store, and the cache that spares a second request.

A model of one machine that reads every row once, a step after the other, by the rules of `storage/objects.py`: an
object is read in pages of TRIWEAVE_S3_PAGE_KB, neighbouring pages that a step lacks are one request of at most
TRIWEAVE_S3_REQUEST_MB, and a page stays cached until the last row of its block that needs it. What a later block reads
of the same page is asked for again. Local shards are mapped and need no request.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from triweave.data_pipeline.storage.settings import StorageSettings
from triweave.data_pipeline.stream.plan import BlockPlan, Planner

Int = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Reads:
    """What reading some rows takes.

    samples, sample_bytes: of their pieces; those of a split document count once per piece.
    requests, request_bytes: to an object store whose pages are cached from their first use to their last.
    cache_bytes: most bytes of pages between their first and their last use at once.
    """

    samples: int
    sample_bytes: int
    requests: int
    request_bytes: int
    cache_bytes: int


def rows_read(planner: Planner, plan: BlockPlan, rows: range, step_rows: int, settings: StorageSettings) -> Reads:
    """Return what reading some neighbouring rows of a block takes, `step_rows` of them asked for together."""
    span = slice(int(plan.row_starts[rows.start]), int(plan.row_starts[rows.stop]))
    offsets, sizes, owners = _sample_ranges(planner, plan, span)
    if not len(sizes):
        return Reads(samples=0, sample_bytes=0, requests=0, request_bytes=0, cache_bytes=0)
    pieces = np.diff(plan.row_starts[rows.start : rows.stop + 1])
    step = np.repeat(np.arange(len(rows)), pieces) // step_rows
    page_bytes = settings.page_bytes
    first, last = offsets // page_bytes, (offsets + np.maximum(sizes, 1) - 1) // page_bytes
    counts = last - first + 1
    piece = np.repeat(np.arange(len(sizes)), counts)
    number = first[piece] + np.arange(len(piece)) - np.repeat(np.cumsum(counts) - counts, counts)
    stride = int(last.max()) + 2  # leaves a gap between shards, so that no run of pages spans two
    page = owners[piece] * stride + number
    when = step[piece]
    order = np.lexsort((when, page))
    page, when = page[order], when[order]
    starts = np.flatnonzero(np.r_[True, page[1:] != page[:-1]])
    pages, first_use, last_use = page[starts], when[starts], when[np.r_[starts[1:], len(page)] - 1]
    return Reads(
        samples=len(sizes),
        sample_bytes=int(sizes.sum()),
        requests=_requests(pages, first_use, max(1, settings.request_bytes // page_bytes)),
        request_bytes=len(pages) * page_bytes,
        cache_bytes=_most_held(first_use, last_use) * page_bytes,
    )


def _sample_ranges(planner: Planner, plan: BlockPlan, span: slice) -> tuple[Int, Int, Int]:
    """Return offset, size and a number for the shard of the sample of each piece in a span, int64."""
    samples = plan.samples[span]
    offsets, sizes = np.zeros(len(samples), np.int64), np.zeros(len(samples), np.int64)
    pairs = np.stack([plan.sources[span], plan.shards[span]], axis=1)
    distinct, owners = np.unique(pairs, axis=0, return_inverse=True)
    owners = owners.reshape(-1).astype(np.int64)
    by_owner = np.argsort(owners, kind="stable")
    groups = np.split(by_owner, np.flatnonzero(np.diff(owners[by_owner])) + 1) if len(owners) else []
    for chosen in groups:
        catalog = planner.catalog(*distinct[owners[chosen[0]]].tolist())
        offsets[chosen], sizes[chosen] = catalog.offsets[samples[chosen]], catalog.sizes[samples[chosen]]
    return offsets, sizes, owners


def _requests(pages: Int, first_use: Int, most_pages: int) -> int:
    """Return how many runs of neighbouring pages, of at most `most_pages`, are first used in the same step."""
    order = np.lexsort((pages, first_use))
    pages, first_use = pages[order], first_use[order]
    breaks = np.flatnonzero((np.diff(pages) != 1) | (np.diff(first_use) != 0)) + 1
    runs = np.diff(np.r_[0, breaks, len(pages)])
    return int((-(-runs // most_pages)).sum())


def _most_held(first_use: Int, last_use: Int) -> int:
    """Return the most intervals [first, last] that hold the same step."""
    steps = int(last_use.max()) + 2
    change = np.bincount(first_use, minlength=steps) - np.bincount(last_use + 1, minlength=steps)
    return int(np.cumsum(change).max())
