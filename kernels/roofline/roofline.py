"""The roofline model: how fast an op can be on a chip, and how fast a compiled kernel of ours is expected to be there.

Three figures, each a model, none measured:
limit     no kernel can beat it: max(FLOPs / matrix peak, least bytes / bandwidth, exponentials / special units)
bound     this compiled kernel cannot beat it: live tiles instead of pairs, and per turn of its inner loop the busiest
          unit of a multiprocessor, as if all units overlapped perfectly and all multiprocessors finished together
expected  the same with what Triton's schedule does: within a block a turn's matrix phase and vector phase follow one
          another (and its loads, unless they are asynchronous), only blocks that share a multiprocessor fill each
          other's gaps, and programs start in launch order

    matrix phase = max(tensor clocks, shared memory clocks of operands and exchanges)
    vector phase = max(issue slots, fp32 lanes, integer and compare lanes, special units)

The tensor clocks are those the machine code really issues, which may be more than the tile's. For sm_100, whose code
does not say, they are the tile's products at 128 rows an instruction, half as fast below that (an assumption: 64 rows
fill half of the datapath). Every tile comes from L2, by a share of its bytes per clock that is even. Left out: other
latencies than that of loads which are waited for, launch, prologue and epilogue, clocks lowered under load.
Sources: Williams et al. 2009 (roofline); Shah et al. 2024 and Zadouri et al. 2026, FlashAttention-3 and -4 (the
phases); the lanes of chips.py.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from triweave.kernels.roofline.chips import ISSUED_PER_CLOCK, SHARED_BYTES_PER_CLOCK, Peaks
from triweave.kernels.roofline.loop_mix import CompiledLoops, LoopMix
from triweave.kernels.roofline.work import Work
from triweave.kernels.tiles import TileTable

_LANES_OF_A_WARP = 32
_FULL_MATRIX_ROWS = 128
"""Rows of an sm_100 matrix instruction that fill the datapath."""
_WARP_MATRIX_SHARE = 0.63
"""What instructions of single warps reach of sm_90's matrix rate, about: Luo et al. 2024, dissecting Hopper."""
_L2_LATENCY_CLOCKS = 300
"""About; what a loop waits for that does not load asynchronously. Microbenchmarks of others give 200 to 300."""


@dataclass(frozen=True, kw_only=True)
class Limit:
    """The least time of some work on a chip and what sets it."""

    ms: float
    kind: str
    """matrix, memory or exponentials."""


def limit(work: Work, chip: Peaks, *, number_bytes: int = 2) -> Limit:
    """Return the time no kernel can beat; products of 4-byte numbers run on the fp32 lanes."""
    matrix_peak = chip.matrix_flops if number_bytes == 2 else chip.fp32_flops
    seconds = {
        "matrix": work.matrix_flops / matrix_peak,
        "memory": work.moved_bytes / chip.bytes_per_s,
        "exponentials": work.exponentials / chip.special_per_s,
    }
    kind = max(seconds, key=lambda name: seconds[name])
    return Limit(ms=seconds[kind] * 1e3, kind=kind)


@dataclass(frozen=True, kw_only=True)
class Product:
    """One matrix product of a tile: [rows, inner] times [inner, columns]."""

    rows: int
    columns: int
    inner: int
    weights: bool = False
    """Whether the first operand is made in the loop (p or ds), which sm_100 keeps in tensor memory."""


def attention_products(kernel: str, query_tile: int, key_tile: int, width: int) -> list[Product]:
    """Return the products of one tile of `forward`, `dq` or `dkv`; width is what a head is padded to."""
    if kernel == "dkv":
        scores = Product(rows=key_tile, columns=query_tile, inner=width)
        return [scores, scores, *[Product(rows=key_tile, columns=width, inner=query_tile, weights=True)] * 2]
    scores = Product(rows=query_tile, columns=key_tile, inner=width)
    last = Product(rows=query_tile, columns=width, inner=key_tile, weights=True)
    return [scores, last] if kernel == "forward" else [scores, scores, last]


def attention_tile_bytes(kernel: str, query_tile: int, key_tile: int, width: int, number_bytes: int) -> int:
    """Return the bytes one turn loads: a tile of k and v, or of q and g with their lse and delta."""
    rows = query_tile if kernel == "dkv" else key_tile
    return rows * (2 * width * number_bytes + (8 if kernel == "dkv" else 0))


UNITS = ("tensor", "shared", "issue", "fp32", "alu", "special", "l2")


@dataclass(frozen=True, kw_only=True)
class TurnClocks:
    """Clocks of one multiprocessor that one block needs for one turn of its inner loop, by unit."""

    tensor: float
    shared: float
    issue: float
    fp32: float
    alu: float
    special: float
    l2: float
    waiting: float
    """Clocks that pass before the loop's loads are there, 0 where they are asynchronous."""

    @property
    def matrix_phase(self) -> float:
        """Clocks of the products and of what feeds them."""
        return max(self.tensor, self.shared)

    @property
    def vector_phase(self) -> float:
        """Clocks of everything else."""
        return max(self.issue, self.fp32, self.alu, self.special)

    @property
    def overlapped(self) -> float:
        """Clocks if all units worked at once."""
        return max(self.matrix_phase, self.vector_phase, self.l2)

    @property
    def in_turn(self) -> float:
        """Clocks of one block that is alone."""
        return max(self.matrix_phase + self.vector_phase + self.waiting, self.l2)

    @property
    def busiest(self) -> str:
        """The unit that would set the pace if all overlapped."""
        return max(UNITS, key=lambda name: float(getattr(self, name)))


def turn_clocks(mix: LoopMix, warps: int, products: Sequence[Product], tile_bytes: float, chip: Peaks) -> TurnClocks:
    """Return the clocks of one turn of a loop of a block of `warps`; one turn does one tile's `products`.

    tile_bytes: what a turn loads.
    """
    tensor = mix.matrix_flops * warps / chip.matrix_flops_per_clock
    shared = (mix.shared_clocks + mix.matrix_clocks_by_operands) * warps
    if chip.arch == "sm_90" and mix.matrix_clocks_by_operands == 0:  # a warp group's always read shared memory
        tensor /= _WARP_MATRIX_SHARE
    if mix.matrix and not mix.matrix_flops:
        for product in products:
            instruction_rows = min(_FULL_MATRIX_ROWS, product.rows)
            flops = 2 * product.rows * product.columns * product.inner
            tensor += flops / chip.matrix_flops_per_clock * _FULL_MATRIX_ROWS / instruction_rows
            from_shared = not (product.weights and mix.weights_in_tensor_memory)
            passes = -(-product.rows // _FULL_MATRIX_ROWS)
            numbers = passes * product.columns * product.inner + from_shared * product.rows * product.inner
            shared += 2 * numbers / SHARED_BYTES_PER_CLOCK
    lanes = _LANES_OF_A_WARP * warps
    l2 = tile_bytes * chip.multiprocessors / chip.l2_bytes_per_clock
    return TurnClocks(
        tensor=tensor,
        shared=shared,
        issue=mix.issued * warps / ISSUED_PER_CLOCK,
        fp32=mix.fma * lanes / chip.fp32_lanes,
        alu=mix.alu * lanes / chip.alu_lanes,
        special=mix.special * lanes / chip.special_lanes,
        l2=l2,
        waiting=0.0 if mix.asynchronous else l2 + _L2_LATENCY_CLOCKS,
    )


@dataclass(frozen=True, kw_only=True)
class KernelBound:
    """What the model says of one compiled kernel on one mask and chip."""

    bound_ms: float
    bound_kind: str
    """One of UNITS, or memory."""
    expected_ms: float
    work_to_area: float
    """Pairs of the live tiles to those of the mask; numbers of whole tiles to those that are wanted."""
    full_share: float | None
    """Share of live tiles that need no mask arithmetic; None without a mask."""
    turn: TurnClocks
    """One turn of the loop, the one without mask arithmetic if there are two."""


def programs_of(table: TileTable, kernel: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return (full, masked) tiles of each program along one head; dkv goes down the key tiles' lists."""
    offsets = table.key_offsets if kernel == "dkv" else table.query_offsets
    full = np.append(0, np.cumsum(table.key_full if kernel == "dkv" else table.query_full, dtype=np.int64))
    counts = full[offsets[1:]] - full[offsets[:-1]]
    return counts, np.diff(offsets).astype(np.int64) - counts


def attention_bound(
    kernel: str,
    compiled: CompiledLoops,
    products: Sequence[Product],
    table: TileTable,
    *,
    tile_bytes: float,
    heads: int,
    key_heads: int,
    work: Work,
    pairs: int,
    chip: Peaks,
) -> KernelBound:
    """Return bound and expectation of `forward`, `dq` or `dkv` on the mask of `table`.

    compiled: its two loops, without and with a mask. pairs: exact mask area of all batch rows. work: for the bytes.
    """
    full, masked = (turn_clocks(mix, compiled.warps, products, tile_bytes, chip) for mix in compiled.loops)
    full_tiles, masked_tiles = programs_of(table, kernel)
    copies, turns = (key_heads, heads // key_heads) if kernel == "dkv" else (heads, 1)
    memory_s = work.moved_bytes / chip.bytes_per_s

    def seconds(of_full: float, of_masked: float) -> float:
        clocks = full_tiles.sum() * of_full + masked_tiles.sum() * of_masked
        return float(clocks) * heads / chip.multiprocessors / chip.clock_hz

    busy_s = seconds(full.overlapped, masked.overlapped)
    blocks = max(compiled.blocks, 1)
    slots = [max(one.in_turn, blocks * one.overlapped) for one in (full, masked)]
    per_program = (full_tiles * slots[0] + masked_tiles * slots[1]) * turns
    batch = (table.query_offsets.size - 1) // table.query_tiles_per_row
    launched = np.tile(per_program.reshape(batch, 1, -1), (1, copies, 1)).reshape(-1)
    expected_s = makespan(launched, chip.multiprocessors * blocks) / chip.clock_hz
    pacing = full if full_tiles.sum() >= masked_tiles.sum() else masked
    return KernelBound(
        bound_ms=max(busy_s, memory_s) * 1e3,
        bound_kind="memory" if memory_s > busy_s else pacing.busiest,
        expected_ms=max(expected_s, memory_s) * 1e3,
        work_to_area=table.live_area / pairs,
        full_share=table.full_tiles / max(table.live_tiles, 1),
        turn=full,
    )


def product_bound(
    compiled: CompiledLoops, tile: Product, shape: Product, *, number_bytes: int, work: Work, chip: Peaks
) -> KernelBound:
    """Return bound and expectation of a plain matrix product of `shape` whose programs make one `tile` of it each.

    tile.inner is what one turn of the loop sums. compiled: its one loop. work: for the bytes. What comes after the loop
    is left out.
    """
    rows, columns = -(-shape.rows // tile.rows), -(-shape.columns // tile.columns)
    turns = -(-shape.inner // tile.inner)
    tile_bytes = (tile.rows + tile.columns) * tile.inner * number_bytes
    turn = turn_clocks(compiled.loops[0], compiled.warps, [tile], tile_bytes, chip)
    programs, blocks = rows * columns, max(compiled.blocks, 1)
    busy_s = programs * turns * turn.overlapped / chip.multiprocessors / chip.clock_hz
    waves = -(-programs // (chip.multiprocessors * blocks))
    expected_s = waves * turns * max(turn.in_turn, blocks * turn.overlapped) / chip.clock_hz
    memory_s = work.moved_bytes / chip.bytes_per_s
    return KernelBound(
        bound_ms=max(busy_s, memory_s) * 1e3,
        bound_kind="memory" if memory_s > busy_s else turn.busiest,
        expected_ms=max(expected_s, memory_s) * 1e3,
        work_to_area=programs * tile.rows * tile.columns / (shape.rows * shape.columns),
        full_share=None,
        turn=turn,
    )


def makespan(clocks: npt.NDArray[np.float64], slots: int) -> float:
    """Return when the last of the programs ends that are started in order, each in the slot that is free first."""
    free = [0.0] * min(slots, max(len(clocks), 1))
    for one in clocks.tolist():
        heapq.heapreplace(free, free[0] + one)
    return max(free)
