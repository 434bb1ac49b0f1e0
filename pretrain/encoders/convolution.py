"""Convolutions over the items of a packed micro-batch: `cnn` for pictures, `conv` for spectrograms.

    block(x) = s + conv2(relu(norm(conv1(relu(norm(x)))))),  s = x, or W relu(norm(x)) where the shape changes

Residual blocks with the norm first (He et al. 2016, Identity Mappings); the norm is that of each position over its
channels (as ConvNeXt's, Liu et al. 2022) where theirs is BatchNorm, so that no statistic crosses items. Beyond the edge
of an item there are zeros, never its neighbour.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from triweave.pretrain.encoders.config import COLOURS, EncoderConfig
from triweave.pretrain.encoders.tower import EncoderTiles, Items, LogMel, Pixels, cut_squares
from triweave.pretrain.encoders.transformer import EncoderTower
from triweave.pretrain.model.config import ModelConfig
from triweave.pretrain.model.layers import RMSNorm


class PixelNorm(RMSNorm):
    """The RMS norm of every pixel over its channels."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x [G, C, height, width] normalised over C."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class PixelBlock(nn.Module):
    """A residual block of two 3 x 3 convolutions over [1, C, height, width]; the first may halve the resolution."""

    def __init__(self, width: int, out: int, stride: int, eps: float) -> None:
        """Make it from `width` to `out` channels."""
        super().__init__()
        self.first_norm = PixelNorm(width, eps)
        self.first = nn.Conv2d(width, out, 3, stride, padding=1, bias=False)
        self.second_norm = PixelNorm(out, eps)
        self.second = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(width, out, 1, stride, bias=False) if (width, 1) != (out, stride) else None

    def forward(self, x: Tensor, outside: Tensor) -> Tensor:
        """Map x [1, width, h, w] to [1, out, h / stride, w / stride]; outside: bool, where the result must be 0."""
        ready = functional.relu(self.first_norm(x))
        kept = x if self.shortcut is None else self.shortcut(ready)
        inner = self.first(ready).masked_fill(outside, 0.0)
        added: Tensor = kept + self.second(functional.relu(self.second_norm(inner))).masked_fill(outside, 0.0)
        return added


class PixelNetwork(nn.Module):
    """A stem of patches that do not overlap, residual blocks at halving resolutions and doubling widths, norm, relu."""

    def __init__(self, width: int, stem: int, blocks: tuple[int, ...], eps: float) -> None:
        """Make it for `width` channels in the end; stem: its stride. blocks: at each resolution, finest first."""
        super().__init__()
        widths = [width >> (len(blocks) - 1 - stage) for stage in range(len(blocks))]
        self.stem = nn.Conv2d(COLOURS, widths[0], stem, stem)
        self.scales = [2 ** (len(blocks) - 1 - stage) for stage, count in enumerate(blocks) for _ in range(count)]
        layers: list[PixelBlock] = []
        for stage, count in enumerate(blocks):
            before = widths[max(stage - 1, 0)]
            layers += [PixelBlock(before, widths[stage], 2 if stage else 1, eps)]
            layers += [PixelBlock(widths[stage], widths[stage], 1, eps) for _ in range(count - 1)]
        self.blocks = nn.ModuleList(layers)
        self.final_norm = PixelNorm(width, eps)

    def forward(self, canvas: Tensor, outside: Tensor) -> Tensor:
        """Map a canvas of pictures [1, 3, height, width] to [1, W, rows, columns]; outside: bool [rows, columns].

        Beyond the pictures everything is kept at 0, so that convolutions read zeros there as they do beyond the canvas.
        """
        masks = {scale: _enlarged(outside, scale) for scale in set(self.scales)}
        x = self.stem(canvas).masked_fill(masks[self.scales[0]], 0.0)
        for block, scale in zip(self.blocks, self.scales, strict=True):
            x = block(x, masks[scale])
        return functional.relu(self.final_norm(x))


def _enlarged(mask: Tensor, scale: int) -> Tensor:
    return mask.repeat_interleave(scale, 0).repeat_interleave(scale, 1)


class ImageConvolution(Pixels, EncoderTower):
    """A residual network over whole pictures; m x m positions of its output are a token.

    The pictures of a micro-batch lie on one canvas, apart by one output position, so that the network runs once on
    every rank, whatever it holds: ZeRO-3 gathers in every call. It reads the grids on the host, so a GPU waits for the
    copy.
    """

    modality = "image"

    def __init__(self, features: int, settings: EncoderConfig, config: ModelConfig) -> None:
        """Make a network whose stride is a token's side over `merge`."""
        super().__init__(features, settings, config)
        stem, blocks = settings.resolutions(self.modality, features)
        self.encoder = PixelNetwork(settings.width, stem, blocks, config.norm_eps)

    def encode(self, values: Tensor, items: Items, tiles: EncoderTiles) -> Tensor:  # noqa: ARG002
        """Return the states [N m m, W] of normalised rows [N, features]."""
        side, grids = self.stride, items.grids.tolist()
        pictures = [(high * self.merge, wide * self.merge) for times, high, wide in grids for _ in range(times)]
        rows, columns, corners = shelves(pictures)
        before = torch.tensor([0, *(times for times, _, _ in grids)], device=values.device).cumsum(0)
        time, y, x = self.places(items)[0].unbind(1)
        picture = before[items.item].repeat_interleave(self.positions) + time
        top, left = torch.tensor(corners, device=values.device)[picture].unbind(1)
        cells = (top + y) * columns + left + x
        canvas = values.new_zeros(rows * columns, side * side * COLOURS)
        canvas = canvas.index_copy(0, cells, cut_squares(values, self.merge, side))
        canvas = canvas.view(rows, columns, side, side, COLOURS).permute(4, 0, 2, 1, 3)
        outside = torch.ones(rows * columns, dtype=torch.bool, device=values.device).index_fill(0, cells, False)
        mapped = self.encoder(canvas.reshape(1, COLOURS, rows * side, columns * side), outside.view(rows, columns))
        states: Tensor = mapped[0].flatten(1).t().index_select(0, cells)
        return states


def shelves(sizes: Sequence[tuple[int, int]]) -> tuple[int, int, list[tuple[int, int]]]:
    """Return (rows, columns) of a canvas and the (top, left) corner of each picture of `sizes` (rows, columns) on it.

    Pictures stand on shelves, the highest first, with one free row or column between any two.
    """
    area = sum((high + 1) * (wide + 1) for high, wide in sizes)
    columns = max(math.isqrt(area) - 1, *(wide for _, wide in sizes))
    corners = [(0, 0)] * len(sizes)
    top, left, shelf = 0, 0, 0
    for number in sorted(range(len(sizes)), key=lambda number: (-sizes[number][0], number)):
        high, wide = sizes[number]
        if left and left + wide > columns:
            top, left, shelf = top + shelf + 1, 0, 0
        corners[number] = (top, left)
        left, shelf = left + wide + 1, max(shelf, high)
    return top + shelf, columns, corners


class FrameConvolution(nn.Module):
    """A convolution of three frames over packed sounds: W [x_before; x; x_after], zero beyond an item's ends.

    One product, since the frames beside each other are read by a shift and not by torch's convolution, which would need
    gaps between items.
    """

    def __init__(self, width: int, out: int, stride: int = 1) -> None:
        """Make it from `width` to `out` numbers; stride 2 keeps every even frame."""
        super().__init__()
        self.stride = stride
        self.taps = nn.Linear(3 * width, out)

    def forward(self, x: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
        """Map x [P, width] to [P / stride, out]; starts, ends: bool [P], whether a frame is an item's first or last."""
        before = x.roll(1, 0).masked_fill(starts.unsqueeze(1), 0.0)
        after = x.roll(-1, 0).masked_fill(ends.unsqueeze(1), 0.0)
        mapped: Tensor = self.taps(torch.cat([before, x, after], dim=1)[:: self.stride])
        return mapped


class FrameBlock(nn.Module):
    """A residual block of two convolutions over time, with an RMS norm of each frame."""

    def __init__(self, width: int, stride: int, eps: float) -> None:
        """Make it `width` wide; stride 2 halves the frames."""
        super().__init__()
        self.stride = stride
        self.first_norm = RMSNorm(width, eps)
        self.first = FrameConvolution(width, width, stride)
        self.second_norm = RMSNorm(width, eps)
        self.second = FrameConvolution(width, width)

    def forward(self, x: Tensor, ends: tuple[Tensor, Tensor], ends_after: tuple[Tensor, Tensor]) -> Tensor:
        """Map x [P, W] to [P / stride, W]; first and last frames of the items before and after the stride."""
        inner = self.first(functional.relu(self.first_norm(x)), *ends)
        inner = self.second(functional.relu(self.second_norm(inner)), *ends_after)
        added: Tensor = x[:: self.stride] + inner
        return added


class FrameNetwork(nn.Module):
    """A convolution over mel bands to W, residual blocks at halving rates, norm and relu."""

    def __init__(self, bins: int, width: int, blocks: tuple[int, ...], eps: float) -> None:
        """Make it for frames of `bins` numbers; blocks: at each rate, highest first."""
        super().__init__()
        self.stem = FrameConvolution(bins, width)
        self.strides = [
            2 if stage and not number else 1 for stage, count in enumerate(blocks) for number in range(count)
        ]
        self.blocks = nn.ModuleList(FrameBlock(width, stride, eps) for stride in self.strides)
        self.final_norm = RMSNorm(width, eps)

    def forward(self, frames: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
        """Map frames [P, bins] to [P / stride, W]; starts, ends: bool [P]."""
        x = self.stem(frames, starts, ends)
        now = (starts, ends)
        for block, stride in zip(self.blocks, self.strides, strict=True):
            # an item has whole strides of frames, so that its first is kept and its last is beside the last that is
            after = (now[0][::stride], now[1][stride - 1 :: stride])
            x = block(x, now, after)
            now = after
        return functional.relu(self.final_norm(x))


class SpectrogramConvolution(LogMel, EncoderTower):
    """Convolutions over the frames of whole sounds; m positions of the output are a token."""

    modality = "audio"

    def __init__(self, features: int, settings: EncoderConfig, config: ModelConfig) -> None:
        """Make a network whose stride is a token's frames over `merge`."""
        super().__init__(features, settings, config)
        _, blocks = settings.resolutions(self.modality, features)
        self.frames = self.merge * self.stride
        self.encoder = FrameNetwork(settings.mel_bins, settings.width, blocks, config.norm_eps)

    def encode(self, values: Tensor, items: Items, tiles: EncoderTiles) -> Tensor:  # noqa: ARG002
        """Return the states [N m, W] of normalised rows [N, features]."""
        starts, ends = items.edges(self.frames)
        states: Tensor = self.encoder(values.reshape(len(values) * self.frames, -1), starts, ends)
        return states
