"""Configs of the Triton kernels that were chosen for one architecture, above those of the `CONFIGS` in the source.

`configs/<architecture>.json` is what `triweave kernels tune` wrote after measuring on such a chip: a row per op,
kernel, bytes of a number and widest width. Where it has no row, `CONFIGS` counts. A launcher names its device with
`use_device` before it reads a config; a loader worker, which has none, is told the architecture with `use`, so that its
tile lists are for the same tiles. Nothing is searched at run time. Imports neither torch nor Triton.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from triweave.kernels.errors import KernelInputError

if TYPE_CHECKING:
    import torch

FOLDER = Path(__file__).parents[1] / "configs"

Config = Mapping[str, int]
"""What the kernel's `CONFIGS` name: query_tile, key_tile, warps, stages and perhaps registers for attention."""
Cell = tuple[str, str, int, int]
"""Op, kernel, bytes of a number, widest width it is for."""

_in_use: str | None = None
_tried: dict[Cell, Config] = {}


def use(architecture: str | None) -> None:
    """Read the table of `architecture`, sm_90 for one, from now on in this process; None means only `CONFIGS`."""
    global _in_use
    _in_use = architecture


def use_device(device: torch.device) -> None:
    """Read the table of the device's architecture from now on; a CPU, where kernels are interpreted, has none."""
    use(architecture_of(device))


@contextlib.contextmanager
def reading(architecture: str | None) -> Iterator[None]:
    """Read the table of `architecture` while the context lasts."""
    before = in_use()
    use(architecture)
    try:
        yield
    finally:
        use(before)


def in_use() -> str | None:
    """Return the architecture whose table this process reads."""
    return _in_use


@functools.cache
def architecture_of(device: torch.device) -> str | None:
    """Return sm_90 for an H100, None for anything that is not CUDA by NVIDIA."""
    import torch

    if device.type != "cuda" or torch.version.hip is not None:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def pinned(op: str, kernel: str, number_bytes: int, widest: int) -> Config | None:
    """Return the config pinned for a cell of `CONFIGS`, None where `CONFIGS` itself counts."""
    cell = (op, kernel, number_bytes, widest)
    return _tried.get(cell) or (load(_in_use).get(cell) if _in_use else None)


@contextlib.contextmanager
def trying(cell: Cell, config: Config) -> Iterator[None]:
    """Pin `config` for a cell while the context lasts, on any device; for the tuner and tests."""
    before = dict(_tried)
    _tried[cell] = config
    try:
        yield
    finally:
        _tried.clear()
        _tried.update(before)


@functools.cache
def load(architecture: str) -> Mapping[Cell, Config]:
    """Return the table of an architecture, empty without a file. Raises KernelInputError if it cannot be read."""
    path = FOLDER / f"{architecture}.json"
    if not path.exists():
        return {}
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        return {
            (row["op"], row["kernel"], row["number_bytes"], row["width"]): {
                name: int(value) for name, value in row["config"].items()
            }
            for row in rows
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise KernelInputError(
            f"{path}: cannot be read as pinned configs ({error!r}); write it anew with `triweave kernels tune`"
        ) from error


def write(architecture: str, rows: Iterable[Mapping[str, Any]], made_with: Mapping[str, str], folder: Path) -> Path:
    """Put `rows` into the table of an architecture and return its path; rows of other cells stay.

    rows: op, kernel, number_bytes, width, config, and the figures they were chosen by. made_with: device and versions.
    """
    path = folder / f"{architecture}.json"
    kept = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    merged = {_cell(row): row for row in (*kept, *rows)}
    lines = ",\n".join(f"  {json.dumps(dict(merged[cell]))}" for cell in sorted(merged))
    folder.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".tmp")
    fresh.write_text(
        f'{{\n "made_with": {json.dumps(dict(made_with))},\n "rows": [\n{lines}\n ]\n}}\n', encoding="utf-8"
    )
    fresh.replace(path)
    load.cache_clear()
    return path


def _cell(row: Mapping[str, Any]) -> Cell:
    return row["op"], row["kernel"], row["number_bytes"], row["width"]
