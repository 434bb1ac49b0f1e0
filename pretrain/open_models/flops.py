"""Exact matrix FLOPs of the towers of open models, from the grids of the items alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from triweave.pretrain.encoders.flops import TowerFlops
from triweave.pretrain.model.config import ModelConfig
from triweave.pretrain.open_models.config import WHISPER_STRIDE, WHISPER_TRANSFORM, OpenEncoderConfig

MEL_FREQUENCIES = WHISPER_TRANSFORM // 2 + 1
"""Frequencies that a mel band of Whisper adds up."""


def open_tower_flops(grids: npt.NDArray[Any], settings: OpenEncoderConfig, config: ModelConfig) -> TowerFlops:
    """Return the FLOPs of one tower for M items of int [M, 3] token grids.

    N tokens, c = merge^2 positions a token, W width, F feed-forward width, D the model's.

        clip         2 N features W + 2 (N + M) layers (4 W^2 + 2 W F) + 4 layers W sum (length + 1)^2 + 2 N (W D + D^2)
        siglip       the same without the M class tokens
        qwen2_5_vl   2 N c frames patch^2 3 W + 2 N c layers (4 W^2 + 3 W F) + 4 W sum of squared positions of what each
                     block sees (a frame or its windows) + 2 N ((c W)^2 + c W D)
        whisper      `_whisper`
    """
    if settings.kind == "whisper":
        return _whisper(grids, settings, config)
    sizes = grids.astype(np.int64)
    tokens = int(sizes.prod(axis=1).sum())
    W, F, D, c = settings.width, settings.ffn_width, config.d_model, settings.merge**2
    stem = 2 * tokens * settings.features * settings.frames * W
    if settings.kind != "qwen2_5_vl":
        first = 1 if settings.kind == "clip" else 0
        positions = tokens + first * len(sizes)
        pairs = settings.layers * int(((sizes.prod(axis=1) + first) ** 2).sum())
        blocks = 2 * positions * settings.layers * (4 * W * W + 2 * W * F)
        projector = 2 * tokens * (W * D + D * D)
    else:
        full = len({number for number in settings.full_attention if 0 <= number < settings.layers})
        whole = int((sizes[:, 0] * (sizes[:, 1] * sizes[:, 2] * c) ** 2).sum())
        inner = sum(
            t * _squares(h, settings.window) * _squares(w, settings.window) * c * c for t, h, w in sizes.tolist()
        )
        pairs = full * whole + (settings.layers - full) * inner
        blocks = 2 * tokens * c * settings.layers * (4 * W * W + 3 * W * F)
        projector = 2 * tokens * ((c * W) ** 2 + c * W * D)
    return TowerFlops(stem + blocks + 4 * W * pairs + projector, stem)


def _whisper(grids: npt.NDArray[Any], settings: OpenEncoderConfig, config: ModelConfig) -> TowerFlops:
    """Return the FLOPs of Whisper's encoder and its projector; its Fourier transform is no matrix product.

    U windows of p positions and 2 p frames, P positions that the blocks compute: U p, or those of the sounds alone.

        2 U 2 p (201 bins + 3 bins W) + 2 U p 3 W^2 + 2 P layers (4 W^2 + 2 W F) + 4 layers W sum of squared positions
        of the windows + 2 N (merge W D + D^2)
    """
    lengths = grids.astype(np.int64).prod(axis=1)
    tokens, size = int(lengths.sum()), settings.positions // settings.merge
    W, F, D, bins = settings.width, settings.ffn_width, config.d_model, settings.mel_bins
    windows = int((-(-lengths // size)).sum())
    positions = windows * settings.positions if settings.whole_window else tokens * settings.merge
    pairs = windows * settings.positions**2
    if not settings.whole_window:
        pairs = settings.merge**2 * sum(_squares(length, size) for length in lengths.tolist())
    frames = windows * settings.positions * WHISPER_STRIDE
    mel, first = 2 * frames * MEL_FREQUENCIES * bins, 2 * frames * 3 * bins * W
    second = 2 * windows * settings.positions * 3 * W * W
    blocks = settings.layers * (2 * positions * (4 * W * W + 2 * W * F) + 4 * W * pairs)
    projector = 2 * tokens * (settings.merge * W * D + D * D)
    return TowerFlops(mel + first + second + blocks + projector, 2 * mel + first)


def _squares(side: int, window: int) -> int:
    """Return the sum of the squared lengths of the windows that a side falls into."""
    whole, rest = divmod(side, window)
    return whole * window**2 + rest**2
