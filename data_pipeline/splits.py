"""Splits by concept: rows that share a text or a file form one group, and a group lies in one split, for everybody.

A random split of documents leaks: in Tux Paint one picture comes in 65 languages and 7,390 clips are 6,434 distinct
files. So a source collects keys for every row of the whole corpus, whatever part of it is built; rows that share a key,
directly or through others, are one group, and the split follows from the group's name alone.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

import xxhash

SPLITS = ("train", "validation", "test")
VALIDATION_SHARE = 0.05
TEST_SHARE = 0.15
_HASHES = 1 << 64
_NO_LETTER_OR_DIGIT = re.compile(r"[\W_]")


def normalise_text(text: str) -> str:
    """Return `text` in NFKC and case folded, with every run of non-alphanumerics as one space, stripped.

    Combining marks count as alphanumeric: without its vowel signs a Hindi word is another word.

    >>> normalise_text("  A small, grey CAT. ")
    'a small grey cat'
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(_NO_LETTER_OR_DIGIT.sub(_mark_or_space, folded).split())


def _mark_or_space(match: re.Match[str]) -> str:
    return match[0] if unicodedata.category(match[0]).startswith("M") else " "


def group_rows(keys: Sequence[Sequence[str]]) -> list[str]:
    """Return the group of every row: connected components over shared keys, named xxh3_64 (hex) of their smallest key.

    keys: for every row at least one. Names depend on the keys alone, not on the order of rows or keys.

    Raises ValueError for a row without keys.
    """
    parents: dict[str, str] = {}
    for row in keys:
        if not row:
            raise ValueError("a row without keys belongs to no group: give it one of its own")
        roots = {_root(parents, key) for key in row}
        smallest = min(roots)
        for root in roots:
            parents[root] = smallest
    return [xxhash.xxh3_64_hexdigest(_root(parents, row[0]).encode("utf-8", "surrogatepass")) for row in keys]


def _root(parents: dict[str, str], key: str) -> str:
    """Return the smallest key of `key`'s component so far, entering it if it is new; halves the path it walks."""
    parent = parents.setdefault(key, key)
    while parent != key:
        parents[key] = parents[parent]
        key, parent = parents[key], parents[parents[key]]
    return key


def split_of(group: str) -> str:
    """Return the split of a group, by its hash: 5 % validation, 15 % test, the rest train."""
    place = _hash("split", group) / _HASHES
    if place < VALIDATION_SHARE:
        return "validation"
    return "test" if place < VALIDATION_SHARE + TEST_SHARE else "train"


def fold_of(group: str, folds: int) -> int:
    """Return which of `folds` folds a group is in, 0 to folds - 1, by a hash of its own. Raises ValueError below 1."""
    if folds < 1:
        raise ValueError(f"folds {folds}: must be at least 1")
    return _hash("fold", group) * folds // _HASHES


def _hash(purpose: str, group: str) -> int:
    return xxhash.xxh3_64_intdigest(f"{purpose}:{group}".encode())
