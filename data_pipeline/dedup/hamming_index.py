"""Bit strings within a Hamming distance, by the blocks of 16 bits that they nearly share (Norouzi et al. 2012)."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import numpy.typing as npt

from triweave.data_pipeline.dedup.key_index import KeyIndex, Keys

BLOCK_BITS = 16
_BUCKET = 4096
_FIRST_ROOM = 1024


def _flips(radius: int) -> Keys:
    """Return the 16-bit patterns of at most `radius` ones."""
    patterns = [
        sum(1 << bit for bit in bits) for ones in range(radius + 1) for bits in combinations(range(BLOCK_BITS), ones)
    ]
    return np.array(patterns, np.uint64)


class HammingIndex:
    """Remember which document holds which bit string, and find those that differ in at most `most_bits`.

    item_bytes: length of every bit string, a multiple of 8.
    radius: bits by which some block must agree; all pairs are found where most_bits // blocks <= radius.
    Memory: item_bytes + 4 for each, beside the key index.
    """

    def __init__(self, folder: Path, *, item_bytes: int, most_bits: int, radius: int) -> None:
        self._keys = KeyIndex(folder, _BUCKET)
        self._most_bits = most_bits
        self._flips = _flips(radius)
        self._items = np.zeros((_FIRST_ROOM, item_bytes // 8), np.uint64)
        self._documents = np.zeros(_FIRST_ROOM, np.uint32)
        self._count = 0

    def add(self, item: bytes, document: int) -> None:
        """Remember a bit string of a document; documents come in ascending order."""
        if self._count == len(self._items):
            self._items = np.concatenate([self._items, np.zeros_like(self._items)])
            self._documents = np.concatenate([self._documents, np.zeros_like(self._documents)])
        self._items[self._count] = np.frombuffer(item, np.uint64)
        self._documents[self._count] = document
        keys = _block_keys(item, self._flips[:1])
        self._keys.add(keys, self._keys.find(keys)[1], self._count)
        self._count += 1

    def near(self, item: bytes) -> npt.NDArray[np.uint32]:
        """Return the documents that hold a bit string within the distance, ascending."""
        numbers = np.unique(self._keys.find(_block_keys(item, self._flips))[0])
        differing = np.bitwise_count(self._items[numbers] ^ np.frombuffer(item, np.uint64)).sum(axis=1)
        return np.unique(self._documents[numbers[differing <= self._most_bits]])


def _block_keys(item: bytes, flips: Keys) -> Keys:
    """Return (block number, block with each pattern flipped) as sorted keys, uint64 [blocks * patterns]."""
    blocks = np.frombuffer(item, ">u2").astype(np.uint64)
    place = np.arange(len(blocks), dtype=np.uint64) << np.uint64(BLOCK_BITS)
    return np.sort(((place | blocks)[:, None] ^ flips[None]).reshape(-1))
