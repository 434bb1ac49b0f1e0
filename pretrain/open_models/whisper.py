"""Whisper's encoder (Radford et al. 2022) behind a two-layer projector.

A sound is cut into windows of `positions` positions (30 s), each computed as Whisper does a clip of its own: samples
filled up with silence, log-mel spectrogram, two convolutions of which the second halves the rate, sinusoidal positions,
blocks in which every position of a window sees all of them, a norm. The projector reads the `merge` positions of a
token side by side. Positions of the silence give no tokens.

U windows of all items, c tokens a window, P positions.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from triweave.pretrain.encoders.tower import EncoderTiles, Items, Tower
from triweave.pretrain.errors import PretrainError
from triweave.pretrain.model.config import ModelConfig
from triweave.pretrain.open_models.clip import ClipBlock
from triweave.pretrain.open_models.config import OpenEncoderConfig
from triweave.pretrain.open_models.vision import ACTIVATIONS, through
from triweave.pretrain.open_models.whisper_mel import whisper_log_mel

SLOWEST = 10000.0
"""Longest wavelength of the positions over 2 pi."""


class Windows(NamedTuple):
    """Where the N tokens of all items are in U windows of c tokens.

    total: U. place: int64 [N] of each token among the U c. first, end: int64 [N] of its window, among the N tokens.
    """

    total: int
    place: Tensor
    first: Tensor
    end: Tensor

    @classmethod
    def of(cls, items: Items, size: int) -> Windows:
        """Return the windows of `size` tokens that items are cut into; reads the lengths on the host."""
        needed = (items.lengths + size - 1) // size
        before = needed.cumsum(0) - needed
        within = items.within // size
        place = (before[items.item] + within) * size + items.within % size
        first = items.first[items.item] + within * size
        end = torch.minimum(first + size, (items.first + items.lengths)[items.item])
        return cls(int(needed.sum()), place, first, end)


class WhisperEncoder(nn.Module):
    """Spectrogram, convolutions and blocks; the biases and the order of everything are the model's own."""

    def __init__(self, settings: OpenEncoderConfig, implementation: str, *, recompute: bool) -> None:
        super().__init__()
        self.settings, self.recompute = settings, recompute
        self.conv1 = nn.Conv1d(settings.mel_bins, settings.width, 3, padding=1)
        self.conv2 = nn.Conv1d(settings.width, settings.width, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList(ClipBlock(settings, implementation) for _ in range(settings.layers))
        self.final_norm = nn.LayerNorm(settings.width, settings.norm_eps)
        self.register_buffer("positions", sinusoids(settings.positions, settings.width), persistent=False)

    def forward(self, values: Tensor, items: Items) -> Tensor:
        """Return the states [N, merge W] of samples [N, features]."""
        P, merge = self.settings.positions, self.settings.merge
        size = P // merge
        windows = Windows.of(items, size)
        samples = values.new_zeros(windows.total * size, values.shape[1]).index_copy(0, windows.place, values)
        x = self.stem(whisper_log_mel(samples.view(windows.total, -1), self.settings.mel_bins))
        if self.settings.whole_window:
            starts = torch.arange(windows.total, device=x.device).repeat_interleave(P) * P
            bounds = torch.stack([starts, starts + P])
        else:
            x = x.reshape(-1, merge, x.shape[-1])[windows.place]
            bounds = torch.stack([windows.first, windows.end]).repeat_interleave(merge, dim=1) * merge
        seen = (bounds.int()[:1], bounds.int()[1:])
        x = through(self.blocks, x.reshape(1, -1, x.shape[-1]), lambda _: seen, recompute=self.recompute)
        states: Tensor = self.final_norm(x).view(-1, merge * x.shape[-1])
        return states[windows.place] if self.settings.whole_window else states

    def stem(self, mel: Tensor) -> Tensor:
        """Map log-mel frames, fp32 [U, bins, 2 P], to [U, P, W] with their positions."""
        x = functional.gelu(self.conv1(mel.to(self.conv1.weight.dtype)))
        x = functional.gelu(self.conv2(x)).transpose(1, 2)
        return x + self.get_buffer("positions").to(x.dtype)


class WhisperTower(Tower):
    """down(activation(up(states))) of the states of the positions of a token."""

    def __init__(self, features: int, settings: OpenEncoderConfig, config: ModelConfig) -> None:
        """Make a tower for tokens of `features` samples; raises PretrainError where they are not its own."""
        nn.Module.__init__(self)
        if features != settings.features:
            raise PretrainError(
                f"a token of model.open_encoders.audio has {settings.features} samples but the data gives {features} "
                f"numbers; set data.geometry={settings.geometry}"
            )
        self.features = features
        self.encoder = WhisperEncoder(settings, config.attention, recompute=config.activation_checkpointing)
        self.up = nn.Linear(settings.merge * settings.width, config.d_model, bias=settings.projector_bias)
        self.down = nn.Linear(config.d_model, config.d_model, bias=settings.projector_bias)
        self.activation = ACTIVATIONS[settings.projector_activation]

    def forward(self, values: Tensor, lengths: Tensor, grids: Tensor, tiles: EncoderTiles = None) -> Tensor:  # noqa: ARG002
        """Return the embeddings [N, D] of payload rows `values` [N, features]; lengths [M], grids [M, 3]."""
        states = self.encoder(values.float(), Items.of(lengths, grids, len(values)))
        embedded: Tensor = self.down(self.activation(self.up(states)))
        return embedded


def sinusoids(positions: int, width: int) -> Tensor:
    """Return fp32 [positions, width]: the sines, then the cosines, of position x 10000^(-j / (width / 2 - 1))."""
    speeds = torch.exp(-math.log(SLOWEST) / (width // 2 - 1) * torch.arange(width // 2))
    angles = torch.arange(positions).unsqueeze(1) * speeds
    return torch.cat([angles.sin(), angles.cos()], dim=1)
