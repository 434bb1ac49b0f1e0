"""What tiles of a size cost on the masks of packed documents: live-tile work against the exact mask area.

examples:
  triweave kernels tiles
  triweave kernels tiles --tile 128x128,64x64 --json
  triweave kernels tiles --lengths lengths.txt

reference: lognormal(6.7, 1.0) tokens, median 812, 64-token spans in a quarter of them. short: median 400. tiny: median
23, like the demo's Tux Paint documents. All from seed 0. These are exact counts; nothing is executed.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--tile", default="128x128", help="query rows x keys, separated by commas (default 128x128)")
    parser.add_argument("--sequence-length", type=int, default=8192, help="tokens of a pack (default 8192)")
    parser.add_argument("--packs", type=int, default=64, help="packs that are counted over (default 64)")
    parser.add_argument("--lengths", type=Path, help="further document lengths, one a line, as causal documents")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Count and print."""
    import dataclasses

    from triweave.kernels.roofline.tile_figures import DISTRIBUTIONS, packs, tile_figures

    length, count = arguments.sequence_length, arguments.packs
    rows: list[dict[str, Any]] = []
    for query_tile, key_tile in _tiles(arguments.tile):
        for name in [*DISTRIBUTIONS, *(["lengths"] if arguments.lengths else [])]:
            masks = (
                _given(arguments.lengths, count, length)
                if name == "lengths"
                else packs(DISTRIBUTIONS[name], count, length)
            )
            figures = tile_figures(masks, query_tile=query_tile, key_tile=key_tile)
            rows.append({"distribution": name, "tile": f"{query_tile}x{key_tile}", **dataclasses.asdict(figures)})
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return 0
    for row in rows:
        print(
            f"{row['distribution']:10} {row['tile']:8} tiles: {row['work_to_area']:.2f} x the exact mask area, "
            f"{row['full_share']:.0%} of {row['live_tiles']:,} live tiles full"
        )
    return 0


def _given(path: Path, count: int, length: int) -> Iterator[Any]:
    import numpy as np

    from triweave.kernels.roofline.tile_figures import mask_intervals, read_lengths

    yield np.stack(mask_intervals("documents", count, length, lengths=read_lengths(path)))


def _tiles(text: str) -> list[tuple[int, int]]:
    from triweave.kernels.errors import KernelInputError

    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*(,[1-9]\d*x[1-9]\d*)*", text):
        raise KernelInputError(f"kernels tiles: --tile {text!r} is not like 128x128 or 128x64,64x64")
    pairs = (part.split("x") for part in text.split(","))
    return [(int(rows), int(keys)) for rows, keys in pairs]
