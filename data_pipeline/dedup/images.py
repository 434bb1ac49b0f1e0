"""Near-duplicate pictures: a 64-bit perceptual hash of the low frequencies.

    hash = [c > median(c)] for the 8 x 8 lowest coefficients c of the DCT-II of the grey picture at 32 x 32 px

The construction and bit order of ImageHash's `phash` (after Zauner 2010, Implementation and Benchmarking of Perceptual
Image Hash Functions); the picture is scaled by our own codec, so a bit or two may differ from ImageHash's.
"""

from __future__ import annotations

import numpy as np

from triweave.data_pipeline.media import images
from triweave.data_pipeline.media.geometry import MediaInfo

BITS = 64
SIDE_PX = 32
KEPT = 8
LEAST_DEVIATION = 2.0
"""Grey values from 0 to 255 that deviate less than this from their mean are a plain area, whose hash is of noise."""
_LUMA = np.array([0.299, 0.587, 0.114], np.float64)
"""Weights of ITU-R BT.601."""
_DCT = np.cos(np.pi * np.outer(np.arange(KEPT), 2 * np.arange(SIDE_PX) + 1) / (2 * SIDE_PX))
"""The first KEPT rows of the unnormalised DCT-II."""


def phash(data: bytes, info: MediaInfo) -> int | None:
    """Return the perceptual hash of a picture, first coefficient in the highest bit; None where it shows nothing.

    Raises MediaError where the bytes are damaged.
    """
    grey = images.decode_resized(data, info, SIDE_PX, SIDE_PX) @ _LUMA
    if grey.std() < LEAST_DEVIATION:
        return None
    low = _DCT @ grey @ _DCT.T
    bits = (low > np.median(low)).reshape(-1)
    return int.from_bytes(np.packbits(bits).tobytes(), "big")
