"""The registry of media modalities: how each is probed, counted in tokens and decoded.

Everything else in Triweave asks this table and never names a modality, so a new one is one entry:

    MODALITIES["sensor"] = Modality(name="sensor", id=5, extensions=("npy",), probe=..., grid=..., ...)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from triweave.data_pipeline.media import audio, images
from triweave.data_pipeline.media.geometry import (
    Grid,
    MediaGeometry,
    MediaInfo,
    audio_grid,
    audio_grids,
    image_grid,
    image_grids,
)
from triweave.data_pipeline.media.mel import log_mel_tokens


@dataclass(frozen=True, kw_only=True)
class Modality:
    """One kind of media.

    name: key in the registry, in documents (`"modality": name`) and in payloads.
    id: small positive integer in `modality_ids`; 0 is text. Never reuse one: shards and checkpoints outlive code.
    extensions: lower-case file name endings, no dot, that a source may take for this modality.
    probe: bytes -> (info, extension, mime) from the header alone; raises MediaError.
    grid: (info, geometry) -> (t, h, w), a pure function; t * h * w tokens, at least 1.
    decode: (bytes, info, geometry) -> [t * h * w, features(geometry)] of `dtype`; raises MediaError where the bytes are
        damaged or are not what `info` says.
    features: values of one token.
    dtype: of the decoded array.
    check: (bytes, info); reads all that `decode` would and raises MediaError where it is damaged; for media that go
        into shards as they are. None: the header is all there is to check.
    decode_into: what `decode` returns, written to an array of that shape, which saves copying it; None: it is copied.
    grids: `grid` of many items at once, infos [N, 4] -> [N, 3], ten times faster; None: they are asked one by one.
    """

    name: str
    id: int
    extensions: tuple[str, ...]
    probe: Callable[[bytes], tuple[MediaInfo, str, str]]
    grid: Callable[[MediaInfo, MediaGeometry], Grid]
    decode: Callable[[bytes, MediaInfo, MediaGeometry], npt.NDArray[Any]]
    features: Callable[[MediaGeometry], int]
    dtype: np.dtype[Any]
    check: Callable[[bytes, MediaInfo], object] | None = None
    decode_into: Callable[[bytes, MediaInfo, MediaGeometry, npt.NDArray[Any]], None] | None = None
    grids: Callable[[npt.NDArray[np.int64], MediaGeometry], npt.NDArray[np.int64]] | None = None


def decode_image(data: bytes, info: MediaInfo, geometry: MediaGeometry) -> npt.NDArray[np.uint8]:
    """Return the patches of a picture, uint8 [h * w, patch * patch * 3].

    The picture is resized to exactly (h * patch, w * patch) pixels; a row is one patch in (y, x, channel) order, rows
    are in raster order.

    Raises MediaError where the bytes are damaged or have another size than `info`.
    """
    _, rows, columns = image_grid(info, geometry)
    out = np.empty((rows * columns, geometry.image_patch_px**2 * 3), np.uint8)
    decode_image_into(data, info, geometry, out)
    return out


def decode_image_into(data: bytes, info: MediaInfo, geometry: MediaGeometry, out: npt.NDArray[Any]) -> None:
    """Write what `decode_image` returns to `out`. Raises as it does, and ValueError where `out` has another shape."""
    _, rows, columns = image_grid(info, geometry)
    patch = geometry.image_patch_px
    target = out.reshape(rows, columns, patch, patch, 3)
    pixels = images.decode_resized(data, info, rows * patch, columns * patch)
    target[...] = pixels.reshape(rows, patch, columns, patch, 3).transpose(0, 2, 1, 3, 4)


def decode_audio(data: bytes, info: MediaInfo, geometry: MediaGeometry) -> npt.NDArray[np.float32]:
    """Return the tokens of a clip: float32 [t, frames_per_token * mel_bins] of log-mel frames, frame-major.

    With `audio_features` samples: float32 [t, frames_per_token * hop], full scale 1; zeros fill up the last token.

    Raises MediaError where the bytes are damaged or have another length or rate than `info`.
    """
    out = np.empty((audio_grid(info, geometry)[0], audio_token_features(geometry)), np.float32)
    decode_audio_into(data, info, geometry, out)
    return out


def decode_audio_into(data: bytes, info: MediaInfo, geometry: MediaGeometry, out: npt.NDArray[Any]) -> None:
    """Write what `decode_audio` returns to `out`. Raises as it does, and ValueError where `out` has another shape."""
    waveform = audio.decode_mono(data, geometry.audio_rate_hz, expected=info)
    if geometry.audio_features == "log_mel":
        log_mel_tokens(waveform, geometry, out)
        return
    values = out.reshape(audio_grid(info, geometry)[0] * audio_token_features(geometry))
    values[: len(waveform)] = waveform
    values[len(waveform) :] = 0


def audio_token_features(geometry: MediaGeometry) -> int:
    """Return the numbers of one audio token."""
    frame = geometry.audio_mel_bins if geometry.audio_features == "log_mel" else geometry.audio_hop_samples
    return geometry.audio_frames_per_token * frame


MODALITIES: dict[str, Modality] = {
    "image": Modality(
        name="image",
        id=1,
        extensions=images.EXTENSIONS,
        probe=images.probe,
        grid=image_grid,
        decode=decode_image,
        features=lambda geometry: geometry.image_patch_px**2 * 3,
        dtype=np.dtype(np.uint8),
        check=lambda data, _: images.decode_rgb(data),
        decode_into=decode_image_into,
        grids=image_grids,
    ),
    "audio": Modality(
        name="audio",
        id=2,
        extensions=audio.EXTENSIONS,
        probe=audio.probe,
        grid=audio_grid,
        decode=decode_audio,
        features=audio_token_features,
        dtype=np.dtype(np.float32),
        check=lambda data, info: audio.decode_mono(data, info.rate, expected=info),
        decode_into=decode_audio_into,
        grids=audio_grids,
    ),
}


def modality_of_extension(extension: str) -> Modality | None:
    """Return the modality that takes files ending in `extension` (any case, with or without the dot), or None."""
    ending = extension.lower().removeprefix(".")
    return next((modality for modality in MODALITIES.values() if ending in modality.extensions), None)


def grids(modality: Modality, geometry: MediaGeometry, infos: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
    """Return int32 [N, 3] token grids of items of one modality, asked one by one; infos [N, 4]: fields of MediaInfo."""
    found = [modality.grid(MediaInfo(*info), geometry) for info in infos.tolist()]
    return np.asarray(found, np.int32).reshape(-1, 3)
