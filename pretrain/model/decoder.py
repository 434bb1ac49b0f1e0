"""The trunk: a pre-norm decoder with grouped-query attention over one key interval per query, M-RoPE and SwiGLU.

B rows, S positions, D width, H query heads, G key/value heads, K head width, F feed-forward width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from triweave.kernels.attention import attention
from triweave.kernels.mmca import mmca
from triweave.kernels.qk_norm_rope import qk_norm_rope
from triweave.pretrain.engine.sequence_parallel import SequenceGroup
from triweave.pretrain.fusion.cross import CrossBlock, Media
from triweave.pretrain.model.config import ModelConfig
from triweave.pretrain.model.kv_cache import KeyValueCache, LayerCache
from triweave.pretrain.model.layers import FeedForward, RMSNorm
from triweave.pretrain.model.rotary import rotate

Tiles = Mapping[str, Tensor] | None
"""What `kernels.tiles.attention_tables` made of a batch's intervals, on the CPU; None lets the kernel make it."""


class Modalities(NamedTuple):
    """Modality of the keys, int [B, T], and of the queries, int [B, S]; 0 is text, any other number media."""

    keys: Tensor
    queries: Tensor


class Attention(nn.Module):
    """Self-attention of every query over the keys [kv_lo, kv_hi) of its row; text and media apart for mmca."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        H, G, K = config.heads, config.kv_heads, config.head_width
        # One product for the three projections: fewer, larger matrices, which small widths on CPU reward.
        self.qkv = nn.Linear(config.d_model, (H + 2 * G) * K, bias=config.qkv_bias)
        self.out = nn.Linear(H * K, config.d_model, bias=False)
        if config.qk_norm:
            self.q_norm = nn.Parameter(torch.ones(K))
            self.k_norm = nn.Parameter(torch.ones(K))
        self.sequence: SequenceGroup | None = None

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        kv_lo: Tensor,
        kv_hi: Tensor,
        tiles: Tiles = None,
        cache: LayerCache | None = None,
        modalities: Modalities | None = None,
    ) -> Tensor:
        """Map x [B, S, D] to [B, S, D]; positions [B, S, 3], kv_lo and kv_hi [B, S]. A query without keys gets 0.

        cache: the keys of earlier calls, which the intervals then count from; x's own are added to it.
        modalities: what mmca goes by; None for attention in one softmax.
        Where `sequence` is set, x and positions are those of this rank's slice, kv_lo and kv_hi of the whole rows.
        """
        config = self.config
        H, G, K = config.heads, config.kv_heads, config.head_width
        q, k, v = self.qkv(x).unflatten(-1, (H + 2 * G, K)).split((H, G, G), dim=2)
        if config.qk_norm:
            q, k = qk_norm_rope(
                q,
                k,
                positions,
                q_weight=self.q_norm,
                k_weight=self.k_norm,
                sections=config.sections,
                interleaved=False,
                theta=config.rope_theta,
                eps=config.norm_eps,
            )
        else:
            q, k = rotate(
                q, k, positions, sections=config.sections, theta=config.rope_theta, scaling=config.rope_scaling
            )
        if cache is not None:
            k, v = cache.extend(k, v)
        if self.sequence is not None:
            q, k, v = self.sequence.to_heads(q, k, v, kv_lo.shape[1])
        if modalities is None:
            mixed, _ = attention(q, k, v, kv_lo, kv_hi, tiles=tiles, impl=config.attention)
        else:
            mixed = mmca(q, k, v, kv_lo, kv_hi, *modalities, tiles=tiles, impl=config.attention)
        if self.sequence is not None:
            mixed = self.sequence.to_positions(mixed, H, G)
        projected: Tensor = self.out(mixed.flatten(2))
        return projected


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config)
        self.feed_forward_norm = RMSNorm(config.d_model, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        kv_lo: Tensor,
        kv_hi: Tensor,
        tiles: Tiles = None,
        cache: LayerCache | None = None,
        modalities: Modalities | None = None,
    ) -> Tensor:
        """Map x [B, S, D] to [B, S, D]."""
        x = x + self.attention(self.attention_norm(x), positions, kv_lo, kv_hi, tiles, cache, modalities)
        added: Tensor = x + self.feed_forward(self.feed_forward_norm(x))
        return added


class Decoder(nn.Module):
    """Input norm (`model.input_norm`), blocks, final norm.

    The input norm brings token and media embeddings, whatever their scale, to the same size.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute = config.activation_checkpointing
        if config.input_norm:
            self.input_norm = RMSNorm(config.d_model, config.norm_eps)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        if config.fusion.kind == "cross":
            self.cross_blocks = nn.ModuleList(CrossBlock(config) for _ in range(config.cross_layers))
        self.final_norm = RMSNorm(config.d_model, config.norm_eps)

    def share_rows(self, group: SequenceGroup) -> None:
        """Let every self-attention see whole rows, whose slices the ranks of a group hold."""
        for block in self.blocks:
            cast(Block, block).attention.sequence = group

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        kv_lo: Tensor,
        kv_hi: Tensor,
        tiles: Tiles = None,
        cache: KeyValueCache | None = None,
        media: Media | None = None,
        modalities: Modalities | None = None,
    ) -> Tensor:
        """Map embeddings [B, S, D] to normalised hidden states [B, S, D].

        cache: for decoding; x are the S tokens that follow what it holds, padded on the right with empty intervals, and
        kv_lo, kv_hi count the slots of its rows. It holds them afterwards.
        media: what cross-attention looks at. modalities: what mmca goes by.
        """
        if cache is not None:
            cache.reserve(kv_lo, kv_hi)
        if self.config.input_norm:
            x = self.input_norm(x)
        run = _recomputed if self.recompute and cache is None and torch.is_grad_enabled() else _plainly
        every = self.config.fusion.cross_every
        for number, block in enumerate(self.blocks):
            if media is not None and (number + 1) % every == 0:
                place = number // every
                x = run(self.cross_blocks[place], x, media, cache.media[place] if cache is not None else None)
            layer = cache.layers[number] if cache is not None else None
            x = run(block, x, positions, kv_lo, kv_hi, tiles, layer, modalities)
        normalised: Tensor = self.final_norm(x)
        return normalised


def _plainly(module: nn.Module, *arguments: Any) -> Tensor:
    result: Tensor = module(*arguments)
    return result


def _recomputed(module: nn.Module, *arguments: Any) -> Tensor:
    result: Tensor = checkpoint(module, *arguments, use_reentrant=False)
    return result
