"""Near-duplicate text: MinHash over word 5-grams, and the bands by which similar signatures are found.

    J(A, B) = |A & B| / |A | B| of the sets of 5-grams;  share of equal hashes of two signatures: its estimate, with the
    standard deviation sqrt(J (1 - J) / 128), 0.035 at J = 0.8

Sources: Broder 1997 (MinHash); Lee et al. 2022, Deduplicating Training Data Makes Language Models Better (5-grams).
"""

from __future__ import annotations

import string
import unicodedata
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import xxhash

from triweave.data_pipeline.filters.text_rules import words_of

HASHES = 128
SHINGLE_WORDS = 5
LOOKUP_RECALL = 0.999
"""Least probability that two documents exactly at the threshold share a band."""
_SEED = 20_221_122
_BATCH = 4096
_PUNCTUATION = string.punctuation + "“”„‘’‚«»‹›…—–·•¡¿。、，．！？；：「」『』（）《》〈〉【】،؛؟।"

Signature = npt.NDArray[np.uint32]
"""uint32 [HASHES]: for each hash function the least value over the 5-grams."""


def signature(text: str) -> Signature | None:
    """Return the MinHash signature of a text, None where it holds no word.

    Letter case, punctuation, white space and Unicode's compatibility forms make no difference. A text of fewer than
    five words is one shingle.
    """
    from rensa import RMinHash

    words = normalised_words(text)
    if not words:
        return None
    minhash = RMinHash(num_perm=HASHES, seed=_SEED)
    for batch in _batches(words):
        minhash.update(batch)
    return np.array(minhash.digest(), np.uint32)


def normalised_words(text: str) -> list[str]:
    """Return the words in NFKC and without case, punctuation taken off their ends."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return [bare for word in words_of(plain) if (bare := word.strip(_PUNCTUATION))]


def _batches(words: list[str]) -> Iterator[list[str]]:
    """Yield the 5-grams, at most _BATCH at a time: a book must not be held five times over."""
    count = max(1, len(words) - SHINGLE_WORDS + 1)
    for start in range(0, count, _BATCH):
        stop = min(start + _BATCH, count)
        yield [" ".join(words[at : at + SHINGLE_WORDS]) for at in range(start, stop)]


def similarity(first: Signature, second: Signature) -> float:
    """Return the estimated Jaccard similarity."""
    return float(np.count_nonzero(first == second)) / HASHES


def band_rows(threshold: float) -> int:
    """Return the hashes per band: the most with 1 - (1 - threshold^rows)^(HASHES // rows) >= LOOKUP_RECALL.

    More rows find fewer pairs that then turn out to be below the threshold.
    """
    fitting = [rows for rows in range(1, HASHES + 1) if 1 - (1 - threshold**rows) ** (HASHES // rows) >= LOOKUP_RECALL]
    return max(fitting)


def band_keys(found: Signature, rows: int) -> npt.NDArray[np.uint64]:
    """Return one key per band, uint64 [HASHES // rows]; equal bands of two signatures have equal keys."""
    data = np.ascontiguousarray(found).tobytes()
    size_bytes = rows * found.itemsize
    return np.array(
        [
            xxhash.xxh3_64_intdigest(data[band * size_bytes : (band + 1) * size_bytes], band)
            for band in range(HASHES // rows)
        ],
        np.uint64,
    )
