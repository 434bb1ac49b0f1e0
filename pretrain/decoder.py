"""The trunk: a pre-norm decoder with grouped-query attention over one key interval per query, M-RoPE and SwiGLU.

B rows, S positions, D width, H query heads, G key/value heads, K head width, F feed-forward width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from triweave.kernels.attention import attention
from triweave.kernels.qk_norm_rope import qk_norm_rope
from triweave.kernels.rms_norm import rms_norm
from triweave.kernels.swiglu import swiglu
from triweave.pretrain.kv_cache import KeyValueCache, LayerCache
from triweave.pretrain.model_config import ModelConfig

Tiles = Mapping[str, Tensor] | None
"""What `kernels.tiles.attention_tables` made of a batch's intervals, on the CPU; None lets the kernel make it."""


class RMSNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Return x normalised; same shape and dtype."""
        normalised: Tensor = rms_norm(x, self.weight, eps=self.eps)
        return normalised


class Attention(nn.Module):
    """Self-attention of every query over the keys [kv_lo, kv_hi) of its row."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        H, G, K = config.heads, config.kv_heads, config.head_width
        # One product for the three projections: fewer, larger matrices, which small widths on CPU reward.
        self.qkv = nn.Linear(config.d_model, (H + 2 * G) * K, bias=False)
        self.out = nn.Linear(H * K, config.d_model, bias=False)
        self.q_norm = nn.Parameter(torch.ones(K))
        self.k_norm = nn.Parameter(torch.ones(K))

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        kv_lo: Tensor,
        kv_hi: Tensor,
        tiles: Tiles = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Map x [B, S, D] to [B, S, D]; positions [B, S, 3], kv_lo and kv_hi [B, S]. A query without keys gets 0.

        cache: the keys of earlier calls, which the intervals then count from; x's own are added to it.
        """
        config = self.config
        H, G, K = config.heads, config.kv_heads, config.head_width
        q, k, v = self.qkv(x).unflatten(-1, (H + 2 * G, K)).split((H, G, G), dim=2)
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
        if cache is not None:
            k, v = cache.extend(k, v)
        mixed, _ = attention(q, k, v, kv_lo, kv_hi, tiles=tiles, impl=config.attention)
        projected: Tensor = self.out(mixed.flatten(2))
        return projected


class FeedForward(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.d_model, 2 * config.ffn_width, bias=False)
        self.down = nn.Linear(config.ffn_width, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, S, D] to [B, S, D]."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        projected: Tensor = self.down(swiglu(gate, up))
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
    ) -> Tensor:
        """Map x [B, S, D] to [B, S, D]."""
        x = x + self.attention(self.attention_norm(x), positions, kv_lo, kv_hi, tiles, cache)
        added: Tensor = x + self.feed_forward(self.feed_forward_norm(x))
        return added


class Decoder(nn.Module):
    """Input norm, blocks, final norm.

    The input norm brings token and media embeddings, whatever their scale, to the same size.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.recompute = config.activation_checkpointing
        self.input_norm = RMSNorm(config.d_model, config.norm_eps)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.final_norm = RMSNorm(config.d_model, config.norm_eps)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        kv_lo: Tensor,
        kv_hi: Tensor,
        tiles: Tiles = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Map embeddings [B, S, D] to normalised hidden states [B, S, D].

        cache: for decoding; x are the S tokens that follow what it holds, padded on the right with empty intervals, and
        kv_lo, kv_hi count the slots of its rows. It holds them afterwards.
        """
        if cache is not None:
            cache.reserve(kv_lo, kv_hi)
        x = self.input_norm(x)
        for number, block in enumerate(self.blocks):
            if cache is not None:
                x = block(x, positions, kv_lo, kv_hi, tiles, cache.layers[number])
            elif self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, positions, kv_lo, kv_hi, tiles, use_reentrant=False)
            else:
                x = block(x, positions, kv_lo, kv_hi, tiles)
        normalised: Tensor = self.final_norm(x)
        return normalised
