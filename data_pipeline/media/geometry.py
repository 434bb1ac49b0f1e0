"""MediaInfo and MediaGeometry: how many tokens a picture or a clip takes, from its header alone.

    image: scale = min(1, sqrt(image_max_tokens * patch^2 / (width * height)))
           grid  = (1, max(1, round(height * scale / patch)), max(1, round(width * scale / patch)))
           and where rounding passes image_max_tokens, the longer side is cut back
    audio: resampled = round(samples * audio_rate_hz / rate)
           frames    = 1 + max(0, resampled - window) // hop          (a clip shorter than a window is one frame)
           grid      = (ceil(frames / audio_frames_per_token), 1, 1)
           of samples instead of log-mel frames: frames = ceil(resampled / hop)

`round` is floor(x + 1/2). Planning, packing and decoding all use these functions, so a plan can never disagree with a
decoded payload.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from triweave.data_pipeline.errors import DataError

Int = npt.NDArray[np.int64]
Grid = tuple[int, int, int]
"""(t, h, w) token grid of a media item; their product is its number of tokens."""


class MediaInfo(NamedTuple):
    """What a header says about a media item; the fields that do not apply are 0. Made by the thousand when planning."""

    width: int = 0
    """Pixels, after the EXIF orientation."""
    height: int = 0
    """Pixels, after the EXIF orientation."""
    samples: int = 0
    """Audio samples of one channel, at `rate`."""
    rate: int = 0
    """Audio samples a second, Hz."""

    @property
    def ms(self) -> int:
        """Duration in milliseconds, rounded down; 0 for pictures. For people: token counts use samples and rate."""
        return self.samples * 1000 // self.rate if self.rate else 0


@dataclass(frozen=True, kw_only=True)
class MediaGeometry:
    """How media become tokens. Part of every plan's identity through `hash`."""

    image_patch_px: int = 32
    """Side of the square of pixels that is one image token."""
    image_max_tokens: int = 256
    """Most tokens an image may take; larger pictures are scaled down to it, smaller ones are never scaled up."""
    audio_rate_hz: int = 16_000
    """Rate audio is resampled to before the log-mel spectrogram."""
    audio_mel_bins: int = 80
    """Mel bands of one frame."""
    audio_window_ms: int = 25
    """Length of one analysis window."""
    audio_hop_ms: int = 10
    """Distance between the starts of two windows."""
    audio_features: Literal["log_mel", "samples"] = "log_mel"
    """What a frame of an audio token holds: one log-mel spectrum, or the samples of one hop for encoders that make a
    spectrogram of their own (Whisper)."""
    audio_frames_per_token: int = 8
    """Consecutive frames that make one audio token; 8 at a 10 ms hop are 12.5 tokens a second."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Options of modalities registered outside this package, JSON values only."""

    def __post_init__(self) -> None:
        """Refuse sizes below 1."""
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if isinstance(value, int) and value < 1:
                raise DataError(f"geometry.{item.name}={value}: must be at least 1")
        if self.audio_window_samples < 2 or self.audio_hop_samples < 1:
            raise DataError(
                f"geometry.audio_window_ms={self.audio_window_ms}, audio_hop_ms={self.audio_hop_ms}: too short at "
                f"audio_rate_hz={self.audio_rate_hz}; a window needs 2 samples and a hop 1"
            )

    @property
    def hash(self) -> str:
        """xxh3_128 over the canonical JSON of all fields."""
        canonical = json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"))
        return xxhash.xxh3_128_hexdigest(canonical.encode())

    @property
    def audio_window_samples(self) -> int:
        """Samples of one analysis window at `audio_rate_hz`."""
        return self.audio_rate_hz * self.audio_window_ms // 1000

    @property
    def audio_hop_samples(self) -> int:
        """Samples from one window to the next at `audio_rate_hz`."""
        return self.audio_rate_hz * self.audio_hop_ms // 1000


def image_grid(info: MediaInfo, geometry: MediaGeometry) -> Grid:
    """Return (1, h, w) of a picture: the module's formula."""
    patch, most = geometry.image_patch_px, geometry.image_max_tokens
    scale = min(1.0, math.sqrt(most * patch * patch / (info.width * info.height)))
    rows = max(1, math.floor(info.height * scale / patch + 0.5))
    columns = max(1, math.floor(info.width * scale / patch + 0.5))
    if rows * columns > most:
        if rows > columns:
            columns = min(columns, most)
            rows = most // columns
        else:
            rows = min(rows, most)
            columns = most // rows
    return 1, rows, columns


def resampled_length(samples: int, rate: int, target_rate: int) -> int:
    """Return round(samples * target_rate / rate), at least 1, in exact integer arithmetic."""
    return max(1, (2 * samples * target_rate + rate) // (2 * rate))


def audio_frames(info: MediaInfo, geometry: MediaGeometry) -> int:
    """Return the frames of a clip: the module's formula, always at least 1."""
    resampled = resampled_length(info.samples, info.rate, geometry.audio_rate_hz)
    if geometry.audio_features == "samples":
        return -(-resampled // geometry.audio_hop_samples)
    return 1 + max(0, resampled - geometry.audio_window_samples) // geometry.audio_hop_samples


def audio_grid(info: MediaInfo, geometry: MediaGeometry) -> Grid:
    """Return (t, 1, 1) of a clip: the module's formula."""
    return -(-audio_frames(info, geometry) // geometry.audio_frames_per_token), 1, 1


def image_grids(infos: Int, geometry: MediaGeometry) -> Int:
    """Return `image_grid` of many pictures, int64 [N, 3]; infos [N, 4] has the fields of MediaInfo."""
    width, height = infos[:, 0], infos[:, 1]
    patch, most = geometry.image_patch_px, geometry.image_max_tokens
    scale = np.minimum(1.0, np.sqrt(most * patch * patch / (width * height)))
    rows = np.maximum(1, np.floor(height * scale / patch + 0.5).astype(np.int64))
    columns = np.maximum(1, np.floor(width * scale / patch + 0.5).astype(np.int64))
    over, tall = rows * columns > most, rows > columns
    shorter = np.minimum(np.minimum(rows, columns), most)
    longer = most // shorter
    cut_rows, cut_columns = np.where(tall, longer, shorter), np.where(tall, shorter, longer)
    return np.stack([np.ones_like(rows), np.where(over, cut_rows, rows), np.where(over, cut_columns, columns)], axis=1)


def audio_grids(infos: Int, geometry: MediaGeometry) -> Int:
    """Return `audio_grid` of many clips, int64 [N, 3]; infos [N, 4] has the fields of MediaInfo."""
    samples, rate = infos[:, 2], infos[:, 3]
    resampled = np.maximum(1, (2 * samples * geometry.audio_rate_hz + rate) // (2 * rate))
    hop = geometry.audio_hop_samples
    if geometry.audio_features == "samples":
        frames = -(-resampled // hop)
    else:
        frames = 1 + np.maximum(0, resampled - geometry.audio_window_samples) // hop
    tokens = -(-frames // geometry.audio_frames_per_token)
    return np.stack([tokens, np.ones_like(tokens), np.ones_like(tokens)], axis=1)
