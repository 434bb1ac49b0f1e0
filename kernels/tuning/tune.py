"""The tuner's search: which config of a kernel is fastest, by any timer; knows neither torch nor Triton nor a device.

Every candidate is timed a few times, then the faster half again and longer, until few are left (successive halving,
Jamieson and Talwalkar 2016). In each round candidates take turns, so that a clock that drifts slows all of them. The
median counts. What was pinned stays unless another is faster by more than `MARGIN`, and among candidates that near the
best the first in the list wins: two runs, or two ranks, that measure a little differently choose the same.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

from triweave.kernels.attention_tiles import CONFIGS, tile_config
from triweave.kernels.tuning.pinned import Config

MARGIN = 0.02
"""Differences up to this share of the best time decide nothing."""
ROUNDS = 3
REPEATS = 5
"""Runs of each candidate in the first round; each round doubles them."""
LEAST_KEPT = 3

Timer = Callable[[Config, int], Sequence[float]]
"""(config, runs) -> ms of each run. Raises CandidateError for a config that does not compile or fit."""


class CandidateError(Exception):
    """A candidate cannot run here; the message says why in one line."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What became of one candidate."""

    config: Config
    ms: float | None
    """Median of the last round it was in, None if it cannot run."""
    rounds: int
    """Rounds it was in; 0 if it cannot run."""
    why_not: str | None = None


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The config to pin, and every candidate's timing, best first."""

    config: Config
    ms: float
    pinned_ms: float | None
    """Time of what was pinned before, None if it cannot run or was not among the candidates."""
    timings: tuple[Timing, ...]


def search(
    candidates: Sequence[Config],
    timer: Timer,
    *,
    pinned: Config | None = None,
    rounds: int = ROUNDS,
    repeats: int = REPEATS,
    progress: Callable[[str], None] = lambda _: None,
) -> Choice:
    """Return the fastest of `candidates` by the rules above. Raises CandidateError if none can run."""
    known = [dict(config) for config in candidates]
    if pinned is not None and dict(pinned) not in known:
        known.insert(0, dict(pinned))
    done: dict[int, Timing] = {}
    left = list(range(len(known)))
    for round_number in range(1, rounds + 1):
        for place, index in enumerate(left, start=1):
            progress(f"round {round_number}: {place} of {len(left)}: {described(known[index])}")
            done[index] = _timed(known[index], timer, repeats << (round_number - 1), round_number)
        left = [index for index in left if done[index].ms is not None]
        left.sort(key=lambda index: (done[index].ms, index))
        if round_number < rounds:
            kept = left[: max(LEAST_KEPT, len(left) // 2)]
            held = [index for index in left if pinned is not None and known[index] == dict(pinned)]
            left = sorted({*kept, *held})
    if not left:
        reasons = {timing.why_not for timing in done.values()}
        raise CandidateError(f"none of {len(known)} candidates can run: {'; '.join(sorted(map(str, reasons)))[:200]}")
    times = {index: done[index].ms or 0.0 for index in left}
    near = [index for index in times if times[index] <= (1 + MARGIN) * min(times.values())]
    stays = [index for index in near if pinned is not None and known[index] == dict(pinned)]
    chosen = (stays or [min(near)])[0]
    before = next((done[index].ms for index in done if pinned is not None and known[index] == dict(pinned)), None)
    ordered = sorted(done.values(), key=lambda timing: (-timing.rounds, timing.ms or 0.0))
    return Choice(config=known[chosen], ms=times[chosen], pinned_ms=before, timings=tuple(ordered))


def _timed(config: Config, timer: Timer, runs: int, round_number: int) -> Timing:
    try:
        return Timing(config=config, ms=statistics.median(timer(config, runs)), rounds=round_number)
    except CandidateError as error:
        return Timing(config=config, ms=None, rounds=0, why_not=str(error))


def described(config: Config) -> str:
    """Return a config in one line."""
    return " ".join(f"{name}={value}" for name, value in config.items())


# What is searched

_TILES: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "forward": ((64, 128), (32, 64, 128)),
    "dq": ((64, 128), (32, 64, 128)),
    "dkv": ((16, 32, 64, 128), (64, 128)),
}
"""Attention kernel -> tiles in query rows and in keys, for 2-byte numbers."""
_STAGES = {"forward": (2, 3, 4), "dq": (1, 2, 3, 5), "dkv": (1, 2, 3, 5)}
MOST_HELD = 224
"""Of the 255 registers of a thread, those that sums and scores may take; more than that spills."""


def attention_candidates(kernel: str, number_bytes: int, width: int) -> list[Config]:
    """Return the tiles, warps and stages that are tried; the pinned ones are added by `search`.

    Wide heads and fp32 halve the tiles. Those whose sums and scores alone would not fit into registers are left out.
    """
    shrink = (2 if width > 128 else 1) * number_bytes // 2
    query_tiles, key_tiles = (sorted({max(16, size // shrink) for size in sizes}) for sizes in _TILES[kernel])
    return [
        {"query_tile": rows, "key_tile": keys, "warps": warps, "stages": stages}
        for rows, keys, warps, stages in itertools.product(query_tiles, key_tiles, (4, 8), _STAGES[kernel])
        if _held_per_thread(kernel, rows, keys, width, warps) <= MOST_HELD
    ]


def _held_per_thread(kernel: str, rows: int, keys: int, width: int, warps: int) -> int:
    """Return the fp32 numbers of sums (out; dq; dk and dv) and scores (s; s and ds) that a thread holds."""
    held = {
        "forward": rows * (width + keys),
        "dq": rows * (width + 2 * keys),
        "dkv": keys * (2 * width + 2 * rows),
    }
    return held[kernel] // (32 * warps)


def attention_cells(number_bytes: Sequence[int], widths: Sequence[int]) -> list[tuple[str, int, int]]:
    """Return (kernel, bytes, widest width) of every row of attention_tiles.CONFIGS that serves one of `widths`."""
    return [
        (kernel, size, widest)
        for kernel, configs in CONFIGS.items()
        for size, widest in configs
        if size in number_bytes and any(_serves(configs, size, widest, width) for width in widths)
    ]


def _serves(configs: Mapping[tuple[int, int], object], size: int, widest: int, width: int) -> bool:
    return widest == min((limit for held, limit in configs if held == size and width <= limit), default=None)


def pinned_attention(kernel: str, number_bytes: int, width: int) -> Config:
    """Return the config that counts now."""
    config = asdict(tile_config(kernel, width, number_bytes))
    return {name: value for name, value in config.items() if value is not None}
