"""What a document is compared by: a MinHash signature of its text, a hash per picture, a fingerprint per clip."""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from triweave.data_pipeline.dedup import audio, images, text
from triweave.data_pipeline.dedup.options import DedupOptions
from triweave.data_pipeline.shards.schema import Document, MediaPart, TextPart

_HEADER = struct.Struct("<BII")
_CLIP = struct.Struct(f"<I{audio.BYTES}s")
_TEXT_BYTES = text.HASHES * 4


@dataclass(frozen=True, kw_only=True)
class Sketch:
    """text: None where text is not compared, or there is none. images: uint64 [pictures]. clips: in their order."""

    text: text.Signature | None
    images: npt.NDArray[np.uint64]
    clips: tuple[audio.Fingerprint, ...]

    def pack(self) -> bytes:
        """Return the sketch as bytes: 9, 512 for text, 8 for a picture, 36 for a clip."""
        header = _HEADER.pack(self.text is not None, len(self.images), len(self.clips))
        words = b"" if self.text is None else self.text.astype("<u4").tobytes()
        clips = b"".join(_CLIP.pack(clip.ms, clip.bits) for clip in self.clips)
        return header + words + self.images.astype("<u8").tobytes() + clips

    @classmethod
    def unpack(cls, data: bytes) -> Sketch:
        """Return the sketch that `pack` wrote."""
        has_text, pictures, clips = _HEADER.unpack_from(data)
        at = _HEADER.size + _TEXT_BYTES * has_text
        words = np.frombuffer(data, "<u4", text.HASHES, _HEADER.size) if has_text else None
        hashes = np.frombuffer(data, "<u8", pictures, at)
        found = (_CLIP.unpack_from(data, at + 8 * pictures + _CLIP.size * number) for number in range(clips))
        fingerprints = tuple(audio.Fingerprint(ms=ms, bits=bits) for ms, bits in found)
        return cls(text=words, images=hashes, clips=fingerprints)


def sketch(document: Document, options: DedupOptions) -> Sketch | None:
    """Return what `document` is compared by.

    None where it has nothing of what is compared, or a part without features (a plain picture, a silent clip), about
    which nothing can be said: such documents are never near duplicates. Pictures that carry a phash are not decoded.

    Raises MediaError where a medium is damaged.
    """
    pieces = [part.text for part in document.parts if isinstance(part, TextPart)]
    words = text.signature("\n".join(pieces)) if options.text is not None else None
    media = [part for part in document.parts if isinstance(part, MediaPart)]
    hashes = [image_hash(part) for part in media if part.modality == "image" and options.image is not None]
    clips = [clip_fingerprint(part) for part in media if part.modality == "audio" and options.audio is not None]
    if (words is None and not hashes and not clips) or None in hashes or None in clips:
        return None
    return Sketch(
        text=words,
        images=np.array([found for found in hashes if found is not None], np.uint64),
        clips=tuple(found for found in clips if found is not None),
    )


def image_hash(part: MediaPart) -> int | None:
    """Return the perceptual hash of a picture, the one it carries if it does."""
    assert part.data is not None
    return part.phash if part.phash is not None else images.phash(part.data, part.info)


def clip_fingerprint(part: MediaPart) -> audio.Fingerprint | None:
    """Return the fingerprint of a clip."""
    assert part.data is not None
    return audio.fingerprint(part.data, part.info)


@dataclass(frozen=True, kw_only=True)
class PhashStep:
    """A document step that writes `phash` into the pictures of a document."""

    name: str = "phash"
    before_filters: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Return what decides the hashes."""
        return {"side_px": images.SIDE_PX, "bits": images.BITS}

    def apply(self, document: Document) -> Document:
        """Return the document with the hash of every picture that shows something."""
        parts = tuple(
            replace(part, phash=image_hash(part)) if isinstance(part, MediaPart) and part.modality == "image" else part
            for part in document.parts
        )
        return replace(document, parts=parts)
