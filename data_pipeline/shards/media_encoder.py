"""Turn media files into media parts at build time: probe, re-encode where asked, and do shared pictures only once."""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import xxhash

from triweave.data_pipeline.errors import BlockedMediaError, MediaError
from triweave.data_pipeline.media import audio, images
from triweave.data_pipeline.media.geometry import MediaInfo
from triweave.data_pipeline.media.modalities import MODALITIES, modality_of_extension
from triweave.data_pipeline.shards.schema import MediaPart, media_part
from triweave.data_pipeline.shards.stage_times import StageClock

MAX_MEDIA_BYTES = 1 << 30
"""Largest medium that is read."""
MAX_TEXT_BYTES = 64 << 20
"""Largest text or JSON of one document that is read."""
CACHE_BYTES = 64 << 20
"""Encoded bytes of shared media that one worker keeps in memory."""


@dataclass(frozen=True, kw_only=True)
class MediaOptions:
    """What happens to media on their way into shards; None keeps the original bytes.

    image_max_side_px: pictures are re-encoded with at most this many pixels on the longer side.
    audio_rate_hz: clips become mono FLAC at this rate.
    """

    image_max_side_px: int | None = None
    audio_rate_hz: int | None = None

    def reencodes(self, modality: str) -> bool:
        """Return whether media of this modality are re-encoded."""
        return {"image": self.image_max_side_px, "audio": self.audio_rate_hz}.get(modality) is not None


class MediaEncoder:
    """Make media parts in one process.

    Media that many documents share (one Tux Paint picture is in about 65 documents) are kept in memory and, when they
    are re-encoded, in `cache_folder`, which all workers of a build use. Re-encoding is deterministic, so two workers
    that race for the same entry write the same bytes.

    clock: counts `encode` (decoding, resizing and encoding again) and `decode` (reading headers, checking the rest).
    blocked: sha256 (hex) -> reason of media that are refused, as they come or as they would be stored.
    """

    def __init__(
        self,
        options: MediaOptions,
        cache_folder: Path | None = None,
        clock: StageClock | None = None,
        blocked: Mapping[str, str] | None = None,
    ) -> None:
        self.options = options
        self._blocked = blocked or {}
        self._clock = clock or StageClock()
        self._cache_folder = cache_folder
        self._memory: OrderedDict[tuple[str, Path], MediaPart] = OrderedDict()
        self._memory_bytes = 0

    def encode(self, modality: str, data: bytes) -> MediaPart:
        """Return the part made of encoded media bytes.

        Media that are kept as they are get decoded once, so that a cut file fails here with its row, not in training.

        Raises MediaError for an unknown modality and for bytes that are not what they should be, BlockedMediaError for
        those that are refused.
        """
        self._refuse_blocked(data)
        original = data
        if modality not in MODALITIES:
            raise MediaError(f"unknown modality {modality!r}: known are {', '.join(MODALITIES)}")
        with self._clock.stage("encode"):
            if modality == "image" and self.options.image_max_side_px is not None:
                data = images.reencode(data, self.options.image_max_side_px)[0]
            elif modality == "audio" and self.options.audio_rate_hz is not None:
                data = audio.reencode_flac(data, self.options.audio_rate_hz)
        if data is not original:
            self._refuse_blocked(data)
        with self._clock.stage("decode"):
            info, extension, mime = MODALITIES[modality].probe(data)
            check = MODALITIES[modality].check
            if check is not None and data is original:
                check(data, info)
        return media_part(modality, data, extension, mime, info)

    def encode_file(
        self,
        path: Path,
        modality: str | None = None,
        *,
        shared: bool = False,
        convert: Callable[[bytes], bytes] | None = None,
    ) -> MediaPart:
        """Return the part made of a media file; `shared` when other documents will ask for it again.

        modality: that of the file name's ending unless given.
        convert: turns the file's bytes into a medium (renders an SVG).

        Raises MediaError.
        """
        modality = modality or _modality_of(path)
        if not shared:
            return self._encode_bytes_of(path, modality, convert)
        remembered = self._memory.get((modality, path))
        if remembered is not None:
            self._memory.move_to_end((modality, path))
            return remembered
        part = self._from_folder_or_encode(path, modality, convert)
        self._remember((modality, path), part)
        return part

    def _encode_bytes_of(self, path: Path, modality: str, convert: Callable[[bytes], bytes] | None) -> MediaPart:
        size = path.stat().st_size
        if size > MAX_MEDIA_BYTES:
            raise MediaError(f"{path.name} has {size} bytes, allowed are {MAX_MEDIA_BYTES}: split it or leave it out")
        data = path.read_bytes()
        if convert is not None:
            self._refuse_blocked(data)
            data = convert(data)
        return self.encode(modality, data)

    def _refuse_blocked(self, data: bytes) -> None:
        reason = self._blocked.get(hashlib.sha256(data).hexdigest()) if self._blocked else None
        if reason is not None:
            raise BlockedMediaError(reason)

    def _remember(self, name: tuple[str, Path], part: MediaPart) -> None:
        self._memory[name] = part
        self._memory_bytes += part.size_bytes
        while self._memory_bytes > CACHE_BYTES and len(self._memory) > 1:
            self._memory_bytes -= self._memory.popitem(last=False)[1].size_bytes

    def _from_folder_or_encode(self, path: Path, modality: str, convert: Callable[[bytes], bytes] | None) -> MediaPart:
        if self._cache_folder is None or not (convert or self.options.reencodes(modality)):
            return self._encode_bytes_of(path, modality, convert)
        name = xxhash.xxh3_128_hexdigest(f"{modality}:{path}:{path.stat().st_size}".encode())
        stored = self._cache_folder / name
        try:
            return _unpack(stored.read_bytes())
        except (FileNotFoundError, ValueError):  # a power cut can leave a stored file empty
            part = self._encode_bytes_of(path, modality, convert)
        temporary = stored.with_name(f"{name}.{os.getpid()}.tmp")
        temporary.write_bytes(_pack(part))
        temporary.replace(stored)
        return part


def _modality_of(path: Path) -> str:
    modality = modality_of_extension(path.suffix)
    if modality is None:
        raise MediaError(f"{path.name}: no modality takes {path.suffix or 'a file without an extension'}")
    return modality.name


def _pack(part: MediaPart) -> bytes:
    header = {
        "modality": part.modality,
        "extension": part.extension,
        "mime": part.mime,
        "info": part.info._asdict(),
        "xxh3": part.xxh3,
    }
    return json.dumps(header).encode() + b"\n" + (part.data or b"")


def _unpack(stored: bytes) -> MediaPart:
    """Return a stored part. Raises ValueError when the file is not whole."""
    line, _, data = stored.partition(b"\n")
    header = json.loads(line)
    if xxhash.xxh3_64_intdigest(data) != header["xxh3"]:
        raise ValueError("the stored medium is damaged")
    return media_part(header["modality"], data, header["extension"], header["mime"], MediaInfo(**header["info"]))
