"""Find the first kept document that a new one nearly repeats.

Candidates come from one modality alone (text before clips before pictures, and the clip or picture with the fewest),
then the whole sketches are compared, so a logo on every page costs nothing where texts differ.
"""

from __future__ import annotations

import os
import tempfile
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from triweave.data_pipeline.dedup import audio, images, text
from triweave.data_pipeline.dedup.hamming_index import HammingIndex
from triweave.data_pipeline.dedup.key_index import KeyIndex
from triweave.data_pipeline.dedup.options import DedupOptions, dedup_options
from triweave.data_pipeline.dedup.sketch import PhashStep, Sketch, sketch
from triweave.data_pipeline.shards.schema import Document
from triweave.data_pipeline.shards.steps import Twin

MOST_CANDIDATES = 1024
"""Texts that are compared, those with the most bands in common first."""
_TEXT_BUCKET = 64


@dataclass(frozen=True, kw_only=True)
class NearDuplicateFinder:
    """Near duplicates by thresholds; implements `shards.steps.NearDuplicates`."""

    thresholds: DedupOptions

    @property
    def options(self) -> dict[str, Any]:
        """Return the thresholds that are on."""
        return self.thresholds.asked()

    def signature(self, document: Document) -> bytes:
        """Return the packed sketch of a document, empty where it cannot be compared. Raises MediaError."""
        found = sketch(document, self.thresholds)
        return b"" if found is None else found.pack()

    def index(self, folder: Path) -> NearDuplicateIndex:
        """Return an empty index with its files in `folder`."""
        return NearDuplicateIndex(self.thresholds, folder)


def near_duplicate_finder(asked: str | None) -> NearDuplicateFinder | None:
    """Return the finder of a `--dedup` text, None without one. Raises ConfigError."""
    return None if asked is None else NearDuplicateFinder(thresholds=dedup_options(asked))


def phash_step(finder: NearDuplicateFinder | None) -> PhashStep | None:
    """Return the step that writes the hashes of pictures, where they are compared."""
    return PhashStep() if finder is not None and finder.thresholds.image is not None else None


class NearDuplicateIndex:
    """The sketches of the kept documents; implements `shards.steps.SignatureIndex`.

    The same documents in the same order give the same twins. Memory: buffers of about 15 MB for each modality, and 8
    bytes for a document, 12 for a picture, 40 for a clip; on disk, until the process ends, about 860 bytes for the text
    of a document, 56 for a picture, 230 for a clip.
    """

    def __init__(self, thresholds: DedupOptions, folder: Path) -> None:
        self._thresholds = thresholds
        self._band_rows = text.band_rows(thresholds.text) if thresholds.text is not None else 0
        self._text = KeyIndex(folder, _TEXT_BUCKET)
        self._images = _image_index(folder, thresholds.image or 0)
        self._clips = _clip_index(folder, thresholds.audio or 0.0)
        self._records = _Records(folder)

    def twin(self, signature: bytes) -> Twin | None:
        """Return the first kept document that is near, None if there is none."""
        new = Sketch.unpack(signature)
        for number in self._candidates(new):
            document_id, data = self._records.read(number)
            if self._is_near(Sketch.unpack(data), new):
                kinds = [name for name, held in _held(new).items() if held]
                return Twin(id=document_id, reason=f"near duplicate by {' and '.join(kinds)}")
        return None

    def add(self, document_id: str, signature: bytes) -> None:
        """Remember a kept document."""
        new = Sketch.unpack(signature)
        number = self._records.append(document_id, signature)
        if new.text is not None:
            keys = text.band_keys(new.text, self._band_rows)
            self._text.add(keys, self._text.find(keys)[1], number)
        for clip in new.clips:
            self._clips.add(clip.bits, number)
        for found in new.images.astype(">u8"):
            self._images.add(found.tobytes(), number)

    def _candidates(self, new: Sketch) -> list[int]:
        """Return the numbers of documents that may be near, first kept first."""
        if new.text is not None:
            found = self._text.find(text.band_keys(new.text, self._band_rows))[0]
            numbers, shared = np.unique(found, return_counts=True)
            if len(numbers) > MOST_CANDIDATES:
                numbers = np.sort(numbers[np.lexsort((numbers, -shared))[:MOST_CANDIDATES]])
        elif new.clips:
            numbers = min((self._clips.near(clip.bits) for clip in new.clips), key=len)
        else:
            numbers = min((self._images.near(item.tobytes()) for item in new.images.astype(">u8")), key=len)
        return [int(number) for number in numbers]

    def _is_near(self, kept: Sketch, new: Sketch) -> bool:
        """Return whether two documents hold as many of each kind, and each has a near one in the other."""
        if _held(kept) != _held(new):
            return False
        limit = self._thresholds
        if kept.text is not None and new.text is not None:
            assert limit.text is not None
            if text.similarity(kept.text, new.text) < limit.text:
                return False
        if len(new.clips):
            assert limit.audio is not None
            pairs = [[audio.near(one, other, limit.audio) for other in new.clips] for one in kept.clips]
            if not _matched(np.array(pairs)):
                return False
        if len(new.images):
            differing = np.bitwise_count(kept.images[:, None] ^ new.images[None])
            return _matched(differing <= limit.image)
        return True


def _held(found: Sketch) -> dict[str, int]:
    return {"text": int(found.text is not None), "audio": len(found.clips), "image": len(found.images)}


def _matched(near: npt.NDArray[np.bool_]) -> bool:
    """Return whether every row and every column holds a pair."""
    return bool(near.any(axis=0).all() and near.any(axis=1).all())


def _image_index(folder: Path, threshold: int) -> HammingIndex:
    """Return the index of pictures. Of d bits in 4 blocks one block has at most d // 4, so none is missed."""
    return HammingIndex(folder, item_bytes=images.BITS // 8, most_bits=threshold, radius=threshold // 4)


def _clip_index(folder: Path, threshold: float) -> HammingIndex:
    """Return the index of clips.

    Where a share p of 256 bits is flipped at random, some block of 16 has at most `radius` of them with a probability
    above 0.999 up to p = 0.1 (radius 1) and 0.2 (radius 2), and 0.98 at p = 0.25; real errors gather, which finds more.
    """
    most_bits = int(threshold * audio.BITS)
    return HammingIndex(folder, item_bytes=audio.BYTES, most_bits=most_bits, radius=1 if threshold <= 0.1 else 2)


class _Records:
    """Ids and sketches by number, in a file without a name; 8 bytes of memory each."""

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed, and so removed, with this object
        self._ends = array("Q", [0])

    def append(self, document_id: str, signature: bytes) -> int:
        """Store a record and return its number, counted from 0."""
        name = document_id.encode()
        data = len(name).to_bytes(4, "little") + name + signature
        view, at = memoryview(data), self._ends[-1]
        while view:
            written = os.pwrite(self._file.fileno(), view, at)
            view, at = view[written:], at + written
        self._ends.append(at)
        return len(self._ends) - 2

    def read(self, number: int) -> tuple[str, bytes]:
        """Return (document id, signature) of a record."""
        start, end = self._ends[number], self._ends[number + 1]
        data = os.pread(self._file.fileno(), end - start, start)
        length = int.from_bytes(data[:4], "little")
        return data[4 : 4 + length].decode(), data[4 + length :]
