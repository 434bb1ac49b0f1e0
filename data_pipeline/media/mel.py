"""Log-mel spectrogram in numpy, Kaldi's `fbank` without dither and without edge padding.

For each window x of `audio_window_ms` every `audio_hop_ms`, of the signal at `audio_rate_hz`, full scale 1 (so that the
floor lies at the noise of 16-bit samples):

    x <- x - mean(x)                                     remove the offset
    x <- x[n] - 0.97 x[n-1], with x[-1] = x[0]           pre-emphasis
    x <- x * (0.5 - 0.5 cos(2 pi n / (N - 1)))^0.85      Povey window
    P  = |rfft(x, next power of two)|^2                  power spectrum
    y  = ln(max(mel @ P, 2^-23))                         natural logarithm, floor at float32's epsilon

mel(f) = 1127 ln(1 + f / 700); `audio_mel_bins` triangles spaced evenly in mel from 20 Hz to half the rate, their
weights linear in mel. Source: Kaldi feature-window.cc and mel-computations.cc; checked against kaldi-native-fbank.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import numpy.typing as npt

from triweave.data_pipeline.media.geometry import MediaGeometry

LOG_MEL_FLOOR = math.log(2.0**-23)
"""Value of silence, and of the frames that fill up the last token: -15.94. Speech lies between it and about 9."""
_PREEMPHASIS = np.float32(0.97)
_LOWEST_HZ = 20.0
_BLOCK_FRAMES = 128  # 200 KB a block: the passes over it stay in the cache

Frames = npt.NDArray[np.float32]
"""float32 [frames, mel_bins]."""


def log_mel(waveform: npt.NDArray[np.float32], geometry: MediaGeometry, out: Frames | None = None) -> Frames:
    """Return the log-mel frames of float32 [samples] at `audio_rate_hz`: float32 [frames, mel_bins].

    frames = 1 + max(0, samples - window) // hop; a signal shorter than a window is padded with zeros to one.
    out: rows to write them to, of which the first `frames` are returned; None: new ones.
    """
    window, hop = geometry.audio_window_samples, geometry.audio_hop_samples
    if len(waveform) < window:
        waveform = np.pad(waveform, (0, window - len(waveform)))
    views = np.lib.stride_tricks.sliding_window_view(waveform, window)[::hop]
    window_weights = _povey_window(window)
    transform_length = 1 << (window - 1).bit_length()
    filterbank = _mel_filterbank(geometry.audio_rate_hz, transform_length, geometry.audio_mel_bins)
    result = np.empty((len(views), geometry.audio_mel_bins), np.float32) if out is None else out[: len(views)]
    for first in range(0, len(views), _BLOCK_FRAMES):
        block = views[first : first + _BLOCK_FRAMES]
        block = block - block.mean(axis=1, keepdims=True)
        # x[n] - 0.97 x[n-1] for n >= 1; the first sample only loses 0.97 of itself.
        emphasised = block * (1 - _PREEMPHASIS)
        emphasised[:, 1:] = block[:, 1:] - _PREEMPHASIS * block[:, :-1]
        emphasised *= window_weights
        spectrum = np.fft.rfft(emphasised, transform_length, axis=1)
        power = spectrum.real**2 + spectrum.imag**2
        energies = power @ filterbank
        np.log(np.maximum(energies, np.float32(2.0**-23), out=energies), out=result[first : first + len(block)])
    return result


def log_mel_tokens(
    waveform: npt.NDArray[np.float32], geometry: MediaGeometry, out: npt.NDArray[np.float32] | None = None
) -> npt.NDArray[np.float32]:
    """Return float32 [tokens, frames_per_token * mel_bins], frame-major; LOG_MEL_FLOOR fills up the last token.

    out: where to write them. Raises ValueError where it has another shape.
    """
    per_token, bins = geometry.audio_frames_per_token, geometry.audio_mel_bins
    frames = 1 + max(0, len(waveform) - geometry.audio_window_samples) // geometry.audio_hop_samples
    tokens = -(-frames // per_token)
    if out is None:
        out = np.empty((tokens, per_token * bins), np.float32)
    rows = out.reshape(tokens * per_token, bins)
    log_mel(waveform, geometry, rows)
    rows[frames:] = LOG_MEL_FLOOR
    return out


@functools.lru_cache(maxsize=8)
def _povey_window(length: int) -> npt.NDArray[np.float32]:
    phase = 2.0 * math.pi * np.arange(length) / (length - 1)
    return ((0.5 - 0.5 * np.cos(phase)) ** 0.85).astype(np.float32)


@functools.lru_cache(maxsize=8)
def _mel_filterbank(rate_hz: int, transform_length: int, bins: int) -> npt.NDArray[np.float32]:
    """Return float32 [transform_length / 2 + 1, bins]; the bin at half the rate has no weight, as in Kaldi."""
    lowest, highest = _mel(_LOWEST_HZ), _mel(rate_hz / 2.0)
    edges = lowest + (highest - lowest) / (bins + 1) * np.arange(bins + 2)
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    frequencies = np.arange(transform_length // 2) * (rate_hz / transform_length)
    mels = 1127.0 * np.log1p(frequencies / 700.0)[:, None]
    weights = np.maximum(0.0, np.minimum((mels - left) / (centre - left), (right - mels) / (right - centre)))
    return np.concatenate([weights, np.zeros((1, bins))]).astype(np.float32)


def _mel(frequency_hz: float) -> float:
    return 1127.0 * math.log1p(frequency_hz / 700.0)
