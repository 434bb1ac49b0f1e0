"""MultimodalTransformer: media embedded into a packed token sequence, one decoder, heads that return loss sums."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Set
from typing import cast

import torch
from torch import Tensor, nn

from triweave.pretrain.batch import DeviceBatch
from triweave.pretrain.decoder import Decoder
from triweave.pretrain.embedders import EMBEDDERS, PatchEmbedder
from triweave.pretrain.errors import PretrainError
from triweave.pretrain.heads import HEADS, ContrastiveHead, LanguageModelHead
from triweave.pretrain.kv_cache import KeyValueCache
from triweave.pretrain.losses import LossSums, combine
from triweave.pretrain.model_config import ModelConfig
from triweave.pretrain.participation import tie_zero

RESIDUAL_WRITERS = ("attention.out.weight", "feed_forward.down.weight")
"""Ends of the names of matrices that add to the residual stream; their initial scale falls with depth."""


class MultimodalTransformer(nn.Module):
    """Early fusion: embed tokens, overwrite media positions with their towers' output, decode, sum losses.

    Parameters under `towers.<modality>.` belong to that modality's embedder, all others to the trunk.
    """

    def __init__(self, config: ModelConfig, *, vocab_size: int, media_features: dict[str, int], seed: int = 0) -> None:
        """Build the model with weights that depend on `seed` and the parameters' names only.

        media_features: modality -> numbers per media token; its order is the order of the towers and must be the same
            on all ranks. Raises PretrainError for a modality without an embedder.
        """
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(vocab_size, config.d_model)
        self.towers = nn.ModuleDict(
            {name: _embedder_of(name)(features, config.d_model) for name, features in media_features.items()}
        )
        self.decoder = Decoder(config)
        self.heads = nn.ModuleDict({name: HEADS[name](config, vocab_size=vocab_size) for name in config.objectives})
        if config.tie_embeddings:
            self.heads["language_model"].weight = self.token_embedding.weight
        initialise(self, config, seed)

    def forward(
        self, batch: DeviceBatch, guards: Set[str] = frozenset(), only: Collection[str] | None = None
    ) -> LossSums:
        """Return the loss sums of one micro-batch, over the heads `only` where given.

        guards: modalities that this rank does not hold but must take part in. Their towers run on one zero token,
            change nothing in the result, and get gradients of exactly 0. A tower neither held nor guarded is not
            called and gets no gradient.
        """
        hidden = self.hidden(batch, guards)
        sums = {name: head(hidden, batch) for name, head in self.heads.items() if only is None or name in only}
        return combine(sums, self.config.objectives)

    def hidden(self, batch: DeviceBatch, guards: Set[str] = frozenset(), cache: KeyValueCache | None = None) -> Tensor:
        """Return the final hidden states [B, S, D]; raises PretrainError for a payload without a tower.

        cache: for decoding, what came before the batch's positions in each row; see `Decoder.forward`.
        """
        for name in batch.payloads:
            if name not in self.towers:
                raise PretrainError(
                    f"the batch holds {name!r} but the model has towers for {', '.join(self.towers)} only"
                )
        x = self.token_embedding(batch.tokens)
        rows, length, width = x.shape
        x = x.view(rows * length, width)
        for name, tower in self.towers.items():
            if name in batch.payloads:
                payload = batch.payloads[name]
                embedded = tower(payload.values, payload.lengths, payload.grids)
                x = x.index_copy(0, payload.token_index, embedded.to(x.dtype))
            elif name in guards:
                zeros = cast(PatchEmbedder, tower).zero_payload(x.device)
                x = tie_zero(x, tower(*zeros))
        x = x.view(rows, length, width)
        hidden: Tensor = self.decoder(x, batch.positions, batch.kv_lo, batch.kv_hi, batch.tiles, cache)
        return hidden

    def embed(self, batch: DeviceBatch) -> Tensor:
        """Return the unit embeddings [C, E], fp32, of the batch's one-span segments; with whole (ungathered) weights.

        Raises PretrainError for a model without the contrastive head.
        """
        if "contrastive" not in self.heads:
            raise PretrainError(
                f"the model has the heads {', '.join(self.heads)} but no contrastive one, so it makes no embeddings; "
                "train with model.objectives.contrastive above 0"
            )
        return cast(ContrastiveHead, self.heads["contrastive"]).embed(self.hidden(batch), batch)

    def logits(self, batch: DeviceBatch) -> Tensor:
        """Return the language model's logits [B, S, V] at every position, padding included."""
        head = cast(LanguageModelHead, self.heads["language_model"])
        return head.logits(self.hidden(batch))


def initialise(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Draw every matrix from a normal distribution seeded by (seed, its name); norms stay 1, biases become 0.

    Keyed by name, a parameter's value does not depend on which other parameters exist nor on who builds the model.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                std = config.init_std
                if name.endswith(RESIDUAL_WRITERS):
                    std /= math.sqrt(2 * config.layers)
                digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=7).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest))
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float32) * std)
            elif name.endswith("bias"):
                parameter.zero_()


def _embedder_of(modality: str) -> type[PatchEmbedder]:
    if modality not in EMBEDDERS:
        raise PretrainError(f"there is no embedder for modality {modality!r}; known: {', '.join(EMBEDDERS)}")
    return EMBEDDERS[modality]
