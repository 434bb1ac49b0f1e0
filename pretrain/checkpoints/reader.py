"""Reading ranges of parameters and moments from a checkpoint, whatever world and stage wrote it.

Every block that is read is compared with its checksum, on every read: from an object store a wrong one is asked for
again. Reads of several blocks are under way at once.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from triweave.data_pipeline.errors import StorageError
from triweave.data_pipeline.storage.client import ChangedObjectError
from triweave.data_pipeline.storage.files import CHECKED_READS
from triweave.data_pipeline.storage.location import is_remote, shown
from triweave.data_pipeline.storage.settings import StorageSettings
from triweave.pretrain.checkpoints.blocks import BLOCK_BYTES, is_block
from triweave.pretrain.checkpoints.stores import StoredFile
from triweave.pretrain.errors import CheckpointError

ELEMENT_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A range to read: elements [offset, offset + target.numel()) of one kind of one parameter, into 1-D `target`."""

    target: torch.Tensor
    kind: str
    name: str
    offset: int


@dataclass(frozen=True, kw_only=True)
class _Span:
    """Bytes [start, end) of a file, and where their elements go."""

    start: int
    end: int
    target: torch.Tensor


class CheckpointReader:
    """Reads the files of one checkpoint."""

    def __init__(self, folder: Path, files: Mapping[str, Any]) -> None:
        """files: name -> entry, as in the manifest: `bytes`, `blocks`, `fragments`, and `rng` of a rank's first one."""
        self._folder = folder
        self._files = files
        self._stored = {name: StoredFile(folder / name) for name in files}
        self._pieces: dict[str, list[tuple[int, int, dict[str, int], str]]] = defaultdict(list)
        for file, entry in files.items():
            for name, offset, numel, positions in entry["fragments"]:
                self._pieces[name].append((offset, offset + numel, positions, file))

    def read(self, wanted: Iterable[Wanted]) -> None:
        """Fill all targets. Raises CheckpointError naming the parameter or the file that lacks something."""
        spans: dict[str, list[_Span]] = defaultdict(list)
        for item in wanted:
            for file, span in self._locate(item):
                spans[file].append(span)
        by_block: dict[tuple[str, int], list[_Span]] = defaultdict(list)
        for file, found in spans.items():
            for span in found:
                for block in range(span.start // BLOCK_BYTES, (span.end - 1) // BLOCK_BYTES + 1):
                    by_block[file, block].append(span)

        def fill(key: tuple[str, int]) -> None:
            data = self._block(*key)
            for span in by_block[key]:
                _scatter(data, key[1] * BLOCK_BYTES, span)

        self._each(fill, sorted(by_block))

    def rng(self, rank: int) -> dict[str, torch.Tensor]:
        """Return the random-number states of a rank; empty where it wrote none."""
        states = {}
        for file, entry in self._files.items():
            if entry["rank"] == rank and "rng" in entry:
                for name, (position, numel) in entry["rng"].items():
                    blocks = range(position // BLOCK_BYTES, (position + numel - 1) // BLOCK_BYTES + 1)
                    data = b"".join(bytes(self._block(file, block)) for block in blocks)
                    begin = position - blocks[0] * BLOCK_BYTES
                    states[name] = torch.tensor(list(data[begin : begin + numel]), dtype=torch.uint8)
        return states

    def verify(self, files: Iterable[str]) -> None:
        """Read these files whole; raises CheckpointError naming the first damaged one."""
        for file in files:
            path, entry = self._folder / file, self._files[file]
            try:
                size = self._stored[file].size()
            except FileNotFoundError:
                raise CheckpointError(f"{shown(path)} is missing") from None
            except OSError as error:
                raise CheckpointError(f"{shown(path)} cannot be read: {error}") from error
            if size != entry["bytes"]:
                raise CheckpointError(f"{shown(path)} is damaged: {size} of {entry['bytes']} bytes")
            self._each(lambda key: self._block(*key), [(file, block) for block in range(len(entry["blocks"]))])

    def _locate(self, wanted: Wanted) -> Iterator[tuple[str, _Span]]:
        end, filled = wanted.offset + wanted.target.numel(), 0
        for first, last, positions, file in self._pieces.get(wanted.name, ()):
            low, high = max(first, wanted.offset), min(last, end)
            if low >= high or wanted.kind not in positions:
                continue
            start = positions[wanted.kind] + ELEMENT_BYTES * (low - first)
            part = wanted.target[low - wanted.offset : high - wanted.offset]
            yield file, _Span(start=start, end=start + ELEMENT_BYTES * (high - low), target=part)
            filled += high - low
        if filled != wanted.target.numel():
            raise CheckpointError(
                f"{shown(self._folder)} holds {filled} of elements {wanted.offset} to {end} of {wanted.kind} of "
                f"parameter {wanted.name}; resume with the config of the run that wrote it, or start a new run_dir"
            )

    def _block(self, file: str, block: int) -> memoryview:
        """Return a block's bytes, which are those that were written."""
        path, entry, start = self._folder / file, self._files[file], block * BLOCK_BYTES
        for _ in range(CHECKED_READS if is_remote(path) else 1):
            try:
                data = self._stored[file].read(start, min(start + BLOCK_BYTES, entry["bytes"]))
            except FileNotFoundError:
                raise CheckpointError(f"{shown(path)} is missing") from None
            except ChangedObjectError:
                raise CheckpointError(f"{shown(path)} is damaged: it was replaced while it was read") from None
            except OSError as error:
                raise CheckpointError(f"{shown(path)} cannot be read: {error}") from error
            if is_block(data, entry["blocks"][block]):
                return memoryview(data)
        raise CheckpointError(f"{shown(path)} is damaged: the xxh3 of block {block} is not the manifest's")

    def _each(self, action: Any, keys: list[Any]) -> None:
        """Do something for each key in several threads, or as it comes where there is one key."""
        threads = StorageSettings.from_environment().connections if is_remote(self._folder) else (os.cpu_count() or 1)
        if len(keys) <= 1 or threads == 1:
            for key in keys:
                action(key)
            return
        with ThreadPoolExecutor(min(threads, len(keys)), thread_name_prefix="checkpoint-reader") as pool:
            try:
                for _ in pool.map(action, keys):
                    pass
            except (CheckpointError, StorageError):
                pool.shutdown(cancel_futures=True)
                raise


def _scatter(data: memoryview, begin: int, span: _Span) -> None:
    """Copy what of a span lies in a block that begins at byte `begin` of the file."""
    low, high = max(span.start, begin), min(span.end, begin + len(data))
    values = np.frombuffer(data[low - begin : high - begin], dtype=np.float32)
    first = (low - span.start) // ELEMENT_BYTES
    target = span.target[first : first + len(values)]
    if target.device.type == "cpu" and target.dtype == torch.float32:
        np.copyto(target.numpy(), values)
    else:
        target.copy_(torch.from_numpy(values.copy()))
