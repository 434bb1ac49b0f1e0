"""Near-duplicate clips: 256 bits that survive another codec, rate, loudness and silence at the ends.

    E[n, m]: log energy of band m (17, from 300 to 3400 Hz, equal steps of log frequency) in cell n (17, which part the
             clip between its first and its last sound evenly), smoothed over cells by (1, 2, 1) / 4
    bit[n, m] = [(E[n+1, m] - E[n+1, m+1]) - (E[n, m] - E[n, m+1]) > 0]

After Haitsma and Kalker 2002, A Highly Robust Audio Fingerprinting System, whose frames have a fixed length: theirs
finds a piece inside a recording, ours compares whole clips, so that every clip has the same number of bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from triweave.data_pipeline.media import audio
from triweave.data_pipeline.media.geometry import MediaInfo

CELLS = 17
BANDS = 17
BITS = (CELLS - 1) * (BANDS - 1)
BYTES = BITS // 8
RATE_HZ = 8000
LEAST_MS = 150
"""Clips with less sound than this are not compared."""
LENGTH_TOLERANCE = 0.1
"""Clips whose sound differs in length by more than this share of the longer are different ones."""
QUIET = 10 ** (-30 / 20)
"""Ends of a clip that are softer than this share of its loudest frame are silence."""
SILENT = 1e-4
"""A clip whose loudest frame is softer than this (full scale is 1) holds nothing."""
_FLOOR = 0.03
"""Added to the energies, as a share of their mean, so that an empty band is not noise."""
_LEVEL_FRAME = 160
_WINDOW = 512
_HOP = 128
_BLOCK_FRAMES = 4096
_EDGES_HZ = np.geomspace(300, 3400, BANDS + 1)


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """ms: from the first to the last sound. bits: BYTES bytes, cell by cell."""

    ms: int
    bits: bytes


def fingerprint(data: bytes, info: MediaInfo) -> Fingerprint | None:
    """Return the fingerprint of a clip, None where it is silent or too short.

    Raises MediaError where the bytes are damaged.
    """
    sound = _without_silent_ends(audio.decode_mono(data, RATE_HZ, expected=info))
    if len(sound) < RATE_HZ * LEAST_MS // 1000:
        return None
    energy = _cell_energies(sound)
    level = np.pad(np.log(energy + _FLOOR * energy.mean()), ((1, 1), (0, 0)), mode="edge")
    smooth = (level[:-2] + 2 * level[1:-1] + level[2:]) / 4
    bits = np.diff(np.diff(smooth, axis=1), axis=0) < 0
    return Fingerprint(ms=len(sound) * 1000 // RATE_HZ, bits=np.packbits(bits).tobytes())


def near(first: Fingerprint, second: Fingerprint, threshold: float) -> bool:
    """Return whether two clips have about one length and at most `threshold` of their bits differ."""
    longer = max(first.ms, second.ms)
    if abs(first.ms - second.ms) > LENGTH_TOLERANCE * longer:
        return False
    return bit_errors(first.bits, second.bits) <= threshold * BITS


def bit_errors(first: bytes, second: bytes) -> int:
    """Return how many bits differ."""
    return (int.from_bytes(first, "big") ^ int.from_bytes(second, "big")).bit_count()


def _without_silent_ends(mono: audio.Waveform) -> audio.Waveform:
    """Return the clip from its first to its last loud frame; nothing of a silent one."""
    frames = -(-len(mono) // _LEVEL_FRAME)
    padded = np.pad(mono, (0, frames * _LEVEL_FRAME - len(mono))).reshape(frames, _LEVEL_FRAME)
    loudness = np.sqrt(np.mean(np.square(padded, dtype=np.float64), axis=1))
    if loudness.max() < SILENT:
        return mono[:0]
    loud = np.flatnonzero(loudness >= QUIET * loudness.max())
    return mono[loud[0] * _LEVEL_FRAME : (loud[-1] + 1) * _LEVEL_FRAME]


def _cell_energies(sound: audio.Waveform) -> npt.NDArray[np.float64]:
    """Return the energy of every band in every cell, float64 [CELLS, BANDS]; memory does not grow with the clip."""
    sound = np.pad(sound, (_WINDOW // 2, _WINDOW // 2))
    hop = max(1, min(_HOP, (len(sound) - _WINDOW) // (4 * CELLS)))
    frames = (len(sound) - _WINDOW) // hop + 1
    windows = np.lib.stride_tricks.sliding_window_view(sound, _WINDOW)[::hop]
    taper = np.hanning(_WINDOW).astype(np.float32)
    edges = np.round(_EDGES_HZ * _WINDOW / RATE_HZ).astype(np.int64)
    energy = np.zeros((CELLS, BANDS))
    for start in range(0, frames, _BLOCK_FRAMES):
        spectrum = np.fft.rfft(windows[start : start + _BLOCK_FRAMES] * taper, axis=1)
        power = np.square(np.abs(spectrum[:, : edges[-1]]), dtype=np.float64)
        bands = np.add.reduceat(power, edges[:-1], axis=1)
        cell = (np.arange(start, start + len(bands)) * CELLS) // frames
        np.add.at(energy, cell, bands)
    return energy
