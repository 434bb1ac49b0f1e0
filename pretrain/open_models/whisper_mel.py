"""Whisper's log-mel spectrogram in torch (Radford et al. 2022), on the device of the samples.

For each window x of 400 samples around every 160th, weighted by a Hann window (beyond the ends the signal is mirrored):

    P = |rfft(x)|^2,    y = log10(max(mel @ P, 1e-10)),    z = (max(y, max(y) - 8) + 4) / 4

with the maximum over all frames of the signal. mel has triangles of area 1 in Hz, evenly spaced from 0 to 8 kHz on the
scale of Slaney's Auditory Toolbox (1998): 200 / 3 Hz a step below 1 kHz, above it 27 steps for a factor of 6.4. The
frame beyond the last sample is left out. Checked against transformers' WhisperFeatureExtractor.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor

from triweave.pretrain.open_models.config import WHISPER_HOP, WHISPER_RATE_HZ, WHISPER_TRANSFORM

POWER_FLOOR = 1e-10
RANGE = 8.0
"""Decades below the loudest band that are kept."""
LINEAR_HZ = 1000.0
STEP_HZ = 200.0 / 3.0
LOG_STEP = math.log(6.4) / 27.0


@torch.no_grad()
def whisper_log_mel(samples: Tensor, bins: int) -> Tensor:
    """Return fp32 [U, bins, F] of U signals, fp32 [U, 160 F], full scale 1; equal ones give equal ones."""
    window = torch.hann_window(WHISPER_TRANSFORM, device=samples.device)
    spectrum = torch.stft(samples, WHISPER_TRANSFORM, WHISPER_HOP, window=window, return_complex=True)[..., :-1]
    power = spectrum.real.square() + spectrum.imag.square()
    energies = _filters(bins, samples.device) @ power
    decades = energies.clamp(min=POWER_FLOOR).log10()
    loudest = decades.amax(dim=(1, 2), keepdim=True)
    return (torch.maximum(decades, loudest - RANGE) + 4.0) / 4.0


@functools.lru_cache(maxsize=8)
def _filters(bins: int, device: torch.device) -> Tensor:
    """Return fp32 [bins, 201]; no buffer of the module, which a run in bf16 would round."""
    highest = LINEAR_HZ / STEP_HZ + math.log(WHISPER_RATE_HZ / 2 / LINEAR_HZ) / LOG_STEP
    steps = np.linspace(0.0, highest, bins + 2)
    bend = LINEAR_HZ / STEP_HZ
    edges = np.where(steps < bend, STEP_HZ * steps, LINEAR_HZ * np.exp(LOG_STEP * (steps - bend)))
    left, centre, right = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    frequencies = np.linspace(0.0, WHISPER_RATE_HZ / 2, WHISPER_TRANSFORM // 2 + 1)
    triangles = np.minimum((frequencies - left) / (centre - left), (right - frequencies) / (right - centre))
    weights = np.maximum(0.0, triangles) * 2.0 / (right - left)
    return torch.from_numpy(weights.astype(np.float32)).to(device)
