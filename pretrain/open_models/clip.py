"""The vision towers of CLIP and SigLIP behind LLaVA's two-layer projector.

CLIP has a class token, and learnt positions; LLaVA takes the states of an inner block, without the class token, so the
blocks behind it and the norm at the end are no part of the function and are not here. SigLIP has neither class token
nor first norm; all blocks and the norm at the end are taken, the pooling head behind it is not.
Sources: Radford et al. 2021; Zhai et al. 2023; Liu et al. 2023.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from triweave.pretrain.encoders.tower import EncoderTiles, Items
from triweave.pretrain.model.config import ModelConfig
from triweave.pretrain.open_models.config import OpenEncoderConfig
from triweave.pretrain.open_models.vision import ACTIVATIONS, ItemAttention, OpenVisionTower, through


class ClipBlock(nn.Module):
    """x + attention(norm(x)), then x + down(activation(up(norm(x)))); layer norms and biases throughout."""

    def __init__(self, settings: OpenEncoderConfig, implementation: str) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(settings.width, settings.norm_eps)
        self.attention = ItemAttention(settings, implementation)
        self.feed_forward_norm = nn.LayerNorm(settings.width, settings.norm_eps)
        self.up = nn.Linear(settings.width, settings.ffn_width)
        self.down = nn.Linear(settings.ffn_width, settings.width)
        self.activation = ACTIVATIONS[settings.activation]

    def forward(self, x: Tensor, kv_lo: Tensor, kv_hi: Tensor) -> Tensor:
        """Map x [1, P, W] to [1, P, W]; kv_lo, kv_hi int32 [1, P]."""
        x = x + self.attention(self.attention_norm(x), kv_lo, kv_hi)
        added: Tensor = x + self.down(self.activation(self.up(self.feed_forward_norm(x))))
        return added


class ClipEncoder(nn.Module):
    """Squares with learnt positions and blocks; with a class token and a norm before (CLIP), or a norm behind (SigLIP).

    An item whose grid is not the learnt one takes positions interpolated from it (bicubic, as transformers does with
    interpolate_pos_encoding), so smaller and oblong pictures are read as they are.
    """

    def __init__(self, settings: OpenEncoderConfig, implementation: str, *, recompute: bool) -> None:
        super().__init__()
        self.side, self.recompute = settings.positions, recompute
        self.first_squares = 1 if settings.kind == "clip" else 0  # positions of an item before its squares
        self.embed = nn.Linear(settings.features, settings.width, bias=settings.kind == "siglip")
        self.positions = nn.Parameter(torch.empty(self.first_squares + settings.positions**2, settings.width))
        if settings.kind == "clip":
            self.class_token = nn.Parameter(torch.zeros(settings.width))
            self.input_norm = nn.LayerNorm(settings.width, settings.norm_eps)
        else:
            self.final_norm = nn.LayerNorm(settings.width, settings.norm_eps)
        self.blocks = nn.ModuleList(ClipBlock(settings, implementation) for _ in range(settings.layers))

    def forward(self, values: Tensor, items: Items) -> Tensor:
        """Return the states [N, W] of squares [N, features], the class tokens left out."""
        N, M, extra = len(values), len(items.lengths), self.first_squares
        own = (items.item + 1) * extra + torch.arange(N, device=values.device)
        first = items.first + extra * torch.arange(M, device=values.device)
        x = self.embed(values) + self._places(items.grids)
        if extra:
            class_tokens = (self.class_token + self.positions[0]).expand(M, -1)
            joined = x.new_empty(N + M, x.shape[1])
            x = self.input_norm(joined.index_copy(0, own, x).index_copy(0, first, class_tokens))
        sizes = items.lengths + extra
        spans = torch.stack([first, first + sizes]).repeat_interleave(sizes, dim=1, output_size=len(x)).int()
        seen = (spans[:1], spans[1:])
        states = through(self.blocks, x.unsqueeze(0), lambda _: seen, recompute=self.recompute)[0, own]
        return states if extra else self.final_norm(states)

    def _places(self, grids: Tensor) -> Tensor:
        """Return the positions [N, W] of the squares of all items."""
        side = self.side
        learnt = self.positions[self.first_squares :]
        square = learnt.view(1, side, side, -1).permute(0, 3, 1, 2)
        known: dict[tuple[int, int], Tensor] = {(side, side): learnt}
        rows = []
        for frames, high, wide in grids.tolist():
            if (high, wide) not in known:
                resized = functional.interpolate(square.float(), (high, wide), mode="bicubic", align_corners=False)
                known[high, wide] = resized[0].flatten(1).t().to(learnt.dtype)
            rows += [known[high, wide]] * frames
        return torch.cat(rows)


class ClipTower(OpenVisionTower):
    """down(activation(up(states))) of the states of every square of an item."""

    def __init__(self, features: int, settings: OpenEncoderConfig, config: ModelConfig) -> None:
        """Make a tower of `settings` for a model of `config`."""
        super().__init__(features, settings, config)
        self.encoder = ClipEncoder(settings, config.attention, recompute=config.activation_checkpointing)
        self.up = nn.Linear(settings.width, config.d_model, bias=settings.projector_bias)
        self.down = nn.Linear(config.d_model, config.d_model, bias=settings.projector_bias)
        self.activation = ACTIVATIONS[settings.projector_activation]

    def forward(self, values: Tensor, lengths: Tensor, grids: Tensor, tiles: EncoderTiles = None) -> Tensor:  # noqa: ARG002
        """Return the embeddings [N, D] of payload rows `values` [N, features]; lengths [M], grids [M, 3]."""
        states = self.encoder(self.normalise(values), Items.of(lengths, grids, len(values)))
        embedded: Tensor = self.down(self.activation(self.up(states)))
        return embedded
