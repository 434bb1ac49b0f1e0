"""A multimap of 64-bit keys to 32-bit numbers for hundreds of millions of entries: sorted runs on disk.

New entries gather in a dictionary; when it is full it becomes a sorted run in a file, and runs of equal size are
merged, as in a log-structured merge tree (O'Neil et al. 1996), up to a largest size that bounds the memory of a merge.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

BUFFER_ENTRIES = 1 << 16
RUN_ENTRIES = 1 << 22
"""Largest run; a merge to it holds about 170 MB for a moment."""

_Value = TypeVar("_Value", np.uint64, np.uint32)
Keys = npt.NDArray[np.uint64]
Numbers = npt.NDArray[np.uint32]


class KeyIndex:
    """Remember numbers under keys.

    folder: where the runs lie, in files without a name, which vanish with the process. 12 bytes an entry.
    bucket: numbers under one key beyond these are not remembered; bounds a lookup where many share a key.
    Memory: the buffer, about 15 MB; the runs are mapped, so theirs is the page cache.
    """

    def __init__(self, folder: Path, bucket: int, *, buffer_entries: int = BUFFER_ENTRIES) -> None:
        self._folder = folder
        self._bucket = bucket
        self._buffer_entries = buffer_entries
        self._buffer: dict[int, list[int]] = {}
        self._buffered = 0
        self._runs: list[tuple[Keys, Numbers]] = []

    def find(self, keys: Keys) -> tuple[Numbers, npt.NDArray[np.int64]]:
        """Return the numbers under the keys, in no order that means anything, and how many each key has."""
        counts = np.zeros(len(keys), np.int64)
        found: list[Numbers] = []
        for run_keys, numbers in self._runs:
            start = np.searchsorted(run_keys, keys, "left")
            lengths = np.searchsorted(run_keys, keys, "right") - start
            counts += lengths
            if total := int(lengths.sum()):
                first = start - np.cumsum(lengths) + lengths
                found.append(numbers[np.repeat(first, lengths) + np.arange(total)])
        recent: list[int] = []
        for at, key in enumerate(keys.tolist()):
            held = self._buffer.get(key)
            if held is not None:
                counts[at] += len(held)
                recent += held
        return np.concatenate([*found, np.array(recent, np.uint32)]), counts

    def add(self, keys: Keys, counts: npt.NDArray[np.int64], number: int) -> None:
        """Remember `number` under the keys that are not crowded; counts: what `find` returned for them."""
        for key in np.unique(keys[counts < self._bucket]).tolist():
            self._buffer.setdefault(key, []).append(number)
            self._buffered += 1
        if self._buffered >= self._buffer_entries:
            self._flush()

    def _flush(self) -> None:
        keys = np.repeat(
            np.fromiter(self._buffer, np.uint64, len(self._buffer)),
            np.fromiter(map(len, self._buffer.values()), np.int64, len(self._buffer)),
        )
        numbers = np.concatenate([np.array(held, np.uint32) for held in self._buffer.values()])
        self._buffer, self._buffered = {}, 0
        while self._runs and len(self._runs[-1][0]) <= len(keys) and len(self._runs[-1][0]) + len(keys) <= RUN_ENTRIES:
            older_keys, older_numbers = self._runs.pop()
            keys, numbers = np.concatenate([older_keys, keys]), np.concatenate([older_numbers, numbers])
        order = np.argsort(keys, kind="stable")
        self._runs.append((self._mapped(keys[order]), self._mapped(numbers[order])))

    def _mapped(self, values: npt.NDArray[_Value]) -> npt.NDArray[_Value]:
        """Return the values from a file without a name."""
        with tempfile.TemporaryFile(dir=self._folder) as file:
            file.write(values.tobytes())
            file.flush()
            return np.asarray(np.memmap(file, values.dtype, "r", shape=values.shape))
