"""Fragments on disk: one safetensors file per rank, read by ranges.

A tensor is called `kind:name:offset`, is fp32 and 1-D, and holds elements [offset, offset + numel) of the flattened
parameter. The table of fragments stands in the checkpoint's manifest, so a reader opens only the files it needs.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from triweave.pretrain.errors import CheckpointError
from triweave.pretrain.fragments import Fragment

HASH_CHUNK_BYTES = 1 << 24
RNG_PREFIX = "rng:"
"""Prefix of the random-number states (uint8) in a rank's file; they are no fragments."""

FragmentTable = list[tuple[str, int, int]]
"""(parameter name, offset, numel) of each fragment in a file."""


def write_fragments(path: Path, fragments: Iterable[Fragment], rng: Mapping[str, torch.Tensor]) -> FragmentTable:
    """Write what this rank owns of its fragments to a new file, flushed to disk, and return its table.

    The tensors are copied to host memory first (12 bytes per owned element).
    """
    tensors: dict[str, torch.Tensor] = {RNG_PREFIX + name: state for name, state in rng.items()}
    table: FragmentTable = []
    for fragment in fragments:
        start, end = fragment.owned
        if start == end:
            continue
        table.append((fragment.name, fragment.offset + start, end - start))
        for kind, values in fragment.tensors.items():
            key = _key(kind, fragment.name, fragment.offset + start)
            tensors[key] = values[start:end].to("cpu", torch.float32, copy=True)
    save_file(tensors, path)
    flush(path)
    return table


class FragmentReader:
    """Reads ranges of parameters and moments from a checkpoint folder, whatever world wrote it."""

    def __init__(self, folder: Path, tables: Mapping[str, Sequence[Sequence[Any]]]) -> None:
        """tables: file name -> fragment table, as in the manifest."""
        self._folder = folder
        self._open_files: dict[str, Any] = {}
        self._pieces: dict[str, list[tuple[int, int, str]]] = {}
        for file, table in tables.items():
            for name, offset, numel in table:
                self._pieces.setdefault(name, []).append((offset, offset + numel, file))

    def read_into(self, target: torch.Tensor, kind: str, name: str, offset: int) -> None:
        """Fill 1-D `target` with elements [offset, offset + target.numel()) of one kind of one parameter.

        Raises CheckpointError naming the parameter or the file where elements are missing or unreadable.
        """
        end, filled = offset + target.numel(), 0
        for first, last, file in self._pieces.get(name, ()):
            low, high = max(first, offset), min(last, end)
            if low >= high:
                continue
            try:
                values = self._file(file).get_slice(_key(kind, name, first))[low - first : high - first]
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{self._folder / file} cannot give {kind} of {name}: {error}") from error
            target[low - offset : high - offset].copy_(values)
            filled += high - low
        if filled != target.numel():
            raise CheckpointError(
                f"{self._folder} holds {filled} of elements {offset} to {end} of {kind} of parameter {name}; "
                "resume with the config of the run that wrote it, or start a new run_dir"
            )

    def rng(self, file: str) -> dict[str, torch.Tensor]:
        """Return the random-number states in a rank's file."""
        handle = self._file(file)
        keys = [key for key in handle.keys() if key.startswith(RNG_PREFIX)]  # noqa: SIM118 - no iteration without it
        return {key.removeprefix(RNG_PREFIX): handle.get_tensor(key) for key in keys}

    def _file(self, name: str) -> Any:
        if name not in self._open_files:
            self._open_files[name] = safe_open(self._folder / name, framework="pt")
        return self._open_files[name]


def hash_file(path: Path) -> str:
    """Return the xxh3-128 of a file's bytes, hex."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def flush(path: Path) -> None:
    """Force a file or a folder's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _key(kind: str, name: str, offset: int) -> str:
    return f"{kind}:{name}:{offset}"
