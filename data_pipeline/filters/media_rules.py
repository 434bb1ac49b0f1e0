"""Figures of pictures and clips that tell the useful from the blurred, the silent and the overdriven."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from triweave.data_pipeline.media import audio, images
from triweave.data_pipeline.media.geometry import MediaInfo

SHARPNESS_SIDE_PX = 256
FRAME_MS = 20
SILENCE_RMS = 10 ** (-50 / 20)
"""-50 dB of full scale."""
FULL_SCALE = 0.999
LEAST_RMS = 1e-6
_GREY = np.array([0.299, 0.587, 0.114], np.float32)
"""Luma weights of ITU-R BT.601."""


def sharpness(data: bytes, info: MediaInfo) -> float:
    """Return the variance of the 4-neighbour Laplacian of the grey picture, its longer side at most 256 px.

    Raises MediaError where the bytes are damaged.
    """
    scale = min(1.0, SHARPNESS_SIDE_PX / max(info.width, info.height))
    height, width = (max(1, round(side * scale)) for side in (info.height, info.width))
    grey: npt.NDArray[np.float32] = images.decode_resized(data, info, height, width).astype(np.float32) @ _GREY
    if min(grey.shape) < 3:
        return 0.0
    centre = grey[1:-1, 1:-1]
    laplacian = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * centre
    return float(laplacian.var())


def aspect(info: MediaInfo) -> float:
    """Return the longer side over the shorter one."""
    return max(info.width, info.height) / max(1, min(info.width, info.height))


def silence_and_clipping(data: bytes, info: MediaInfo) -> tuple[float, float]:
    """Return the share of frames below SILENCE_RMS and the share of samples at full scale.

    Raises MediaError where the bytes are damaged.
    """
    mono = audio.decode_mono(data, info.rate, expected=info)
    frame = max(1, info.rate * FRAME_MS // 1000)
    whole = mono[: max(frame, len(mono) // frame * frame)]
    frames = whole.reshape(-1, frame) if len(whole) >= frame else whole[None]
    loudness = np.sqrt(np.mean(np.square(frames, dtype=np.float64), axis=1))
    return float(np.mean(loudness < SILENCE_RMS)), float(np.mean(np.abs(mono) >= FULL_SCALE))


def level_db(data: bytes, info: MediaInfo) -> float:
    """Return 20 log10 of the clip's root mean square, in dB of full scale; -120 at the least.

    Raises MediaError where the bytes are damaged.
    """
    mono = audio.decode_mono(data, info.rate, expected=info)
    return float(20 * np.log10(max(LEAST_RMS, np.sqrt(np.mean(np.square(mono, dtype=np.float64))))))
