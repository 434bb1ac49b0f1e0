"""The tiles of the Triton attention kernels, and which of them each program visits. numpy only, for loader workers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from triweave.kernels.tiles import Intervals, TileTable, tile_table
from triweave.kernels.tuning.pinned import pinned

WIDEST_HEAD = 256
NARROWEST_PART = 16
"""Fewest columns that a matrix product takes."""


@dataclass(frozen=True, kw_only=True)
class TileConfig:
    """Tile of a kernel in query rows and keys, and how it is compiled."""

    query_tile: int
    key_tile: int
    warps: int
    stages: int
    registers: int | None = None
    """The most that the assembler may give a thread; 255 keeps it from spilling a few to fit one more block."""


def _config(query_tile: int, key_tile: int, warps: int, stages: int, registers: int | None = None) -> TileConfig:
    return TileConfig(query_tile=query_tile, key_tile=key_tile, warps=warps, stages=stages, registers=registers)


CONFIGS: dict[str, dict[tuple[int, int], TileConfig]] = {
    "forward": {
        (2, 32): _config(128, 64, 4, 2),
        (2, 64): _config(64, 64, 4, 3),
        (2, 128): _config(64, 64, 4, 2),
        (2, 256): _config(64, 32, 8, 2),
        (4, 64): _config(64, 32, 8, 2),
        (4, 128): _config(32, 32, 8, 1),
        (4, 256): _config(16, 16, 8, 1),
    },
    "dq": {
        (2, 32): _config(64, 64, 4, 2, 255),
        (2, 64): _config(64, 64, 4, 2),
        (2, 72): _config(64, 16, 4, 2, 255),
        (2, 96): _config(64, 16, 4, 2),
        (2, 128): _config(64, 32, 4, 2),
        (2, 256): _config(64, 16, 8, 2),
        (4, 64): _config(32, 32, 8, 1),
        (4, 128): _config(16, 16, 8, 1),
        (4, 256): _config(16, 16, 8, 1),
    },
    "dkv": {
        (2, 32): _config(32, 64, 4, 2, 255),
        (2, 64): _config(32, 64, 4, 2),
        (2, 72): _config(16, 64, 8, 2),
        (2, 80): _config(32, 64, 8, 2, 255),
        (2, 96): _config(16, 64, 8, 3, 255),
        (2, 128): _config(32, 64, 8, 2),
        (2, 256): _config(32, 32, 8, 2),
        (4, 64): _config(16, 32, 4, 1),
        (4, 128): _config(16, 16, 4, 1),
        (4, 256): _config(16, 16, 8, 1),
    },
}
"""Kernel -> (bytes of a number, widest head it is for) -> pinned tile."""

SECTIONS = ("forward", "dq", "dkv")
"""Order of the kernels' lists in `tile_lists`."""
TILE_SIZES = slice(len(SECTIONS), 3 * len(SECTIONS))
"""Where `tile_lists` says which tiles it was made for."""
_HEADER = 4 * len(SECTIONS)


def tile_config(kernel: str, width: int, number_bytes: int) -> TileConfig:
    """Return the pinned tile of a kernel for heads of `width` numbers of 2 or 4 bytes: the tuned one if there is."""
    widest = next(key[1] for key in CONFIGS[kernel] if key[0] == number_bytes and width <= key[1])
    tuned = pinned("attention", kernel, number_bytes, widest)
    return CONFIGS[kernel][number_bytes, widest] if tuned is None else TileConfig(**tuned)


def tile_sizes(width: int, number_bytes: int) -> list[int]:
    """Return query and key tile of the kernels of SECTIONS, in order."""
    configs = [tile_config(kernel, width, number_bytes) for kernel in SECTIONS]
    return [size for config in configs for size in (config.query_tile, config.key_tile)]


def head_parts(width: int) -> tuple[int, int]:
    """Return (K0, K1), the powers of two that a head is cut into; K1 is 0 where one part is as good."""
    first = max(NARROWEST_PART, 1 << (width.bit_length() - 1))
    if width <= first:
        return first, 0
    second = max(NARROWEST_PART, 1 << (width - first - 1).bit_length())
    return (first, second) if second < first else (2 * first, 0)


def tile_lists(
    kv_lo: Intervals, kv_hi: Intervals, *, keys: int, width: int, number_bytes: int, parts: int = 1
) -> npt.NDArray[np.int32]:
    """Return what the three kernels read: which tiles each of their programs visits, in one int32 [N].

    The first three numbers say where each kernel's bounds begin, the next six are the kernels' tiles (query, key), the
    last three of the header where each kernel's order begins.
    Program n's bounds are (first, middle, end): positions here of the tiles it visits, [first, middle) without a mask.
    The latter are one run of neighbours; intervals never leave a gap between a query tile's full tiles, and what lies
    beyond one between a key tile's is visited with a mask.
    An order has the programs of a batch row, those that visit most tiles first: what is begun last ends soon
    (Graham 1969, longest processing time). parts: the intervals are of parts x B batch rows, and a program visits the
    tiles of all parts.
    """
    configs = [tile_config(kernel, width, number_bytes) for kernel in SECTIONS]
    kv_hi = np.minimum(kv_hi, keys)
    tables: dict[tuple[int, int], TileTable] = {}
    for config in configs:
        size = (config.query_tile, config.key_tile)
        if size not in tables:
            tables[size] = tile_table(kv_lo, kv_hi, keys=keys, query_tile=size[0], key_tile=size[1])
    batch, pieces, starts, orders, end = kv_lo.shape[0] // parts, [], [], [], _HEADER
    for kernel, config in zip(SECTIONS, configs, strict=True):
        table = tables[config.query_tile, config.key_tile]
        if kernel == "dkv":
            offsets, visited = table.key_offsets, table.query_tiles_of_key
            full = table.key_full * (visited < kv_lo.shape[1] // config.query_tile)  # a part of a tile needs a mask
        else:
            offsets, visited, full = table.query_offsets, table.key_tiles, table.query_full
        section = _section(offsets, visited, full, end)
        visits = np.diff(offsets).reshape(parts, batch, (offsets.size - 1) // max(1, parts * batch)).sum(0)
        order = np.argsort(-visits, axis=1, kind="stable").reshape(-1)
        pieces += [section, order]
        starts.append(end)
        orders.append(end + section.size)
        end += section.size + order.size
    header = [*starts, *tile_sizes(width, number_bytes), *orders]
    return np.concatenate([header, *pieces]).astype(np.int32)


def attention_tables(
    kv_lo: Intervals, kv_hi: Intervals, *, keys: int, width: int, number_bytes: int
) -> dict[str, npt.NDArray[np.int32]]:
    """Return the per-pack table that `attention(tiles=..., impl="triton")` takes; for `post_pack` in a worker."""
    return {"tile_lists": tile_lists(kv_lo, kv_hi, keys=keys, width=width, number_bytes=number_bytes)}


def _section(
    offsets: npt.NDArray[np.int32], visited: npt.NDArray[np.int32], full: npt.NDArray[np.int8], position: int
) -> npt.NDArray[np.int32]:
    """Return a kernel's bounds [3 * programs] and then the tiles, each program's first run of full ones first."""
    programs = offsets.size - 1
    program = np.repeat(np.arange(programs), np.diff(offsets))
    full_before = np.concatenate([[0], np.cumsum(full)])
    rank = full_before[:-1] - full_before[offsets[program]]
    first_full = np.full(programs, -1, dtype=np.int64)
    opens = (full > 0) & (rank == 0)
    first_full[program[opens]] = visited[opens]
    in_run = (full > 0) & (visited == first_full[program] + rank)
    order = np.lexsort((visited, ~in_run, program))
    full_counts = np.bincount(program, weights=in_run, minlength=programs).astype(np.int64)
    first = position + 3 * programs + offsets[:-1].astype(np.int64)
    bounds = np.stack([first, first + full_counts, first + np.diff(offsets)], axis=1)
    return np.concatenate([bounds.reshape(-1), visited[order]]).astype(np.int32)
