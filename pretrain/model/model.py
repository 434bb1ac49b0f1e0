"""MultimodalTransformer: media embedded into a packed token sequence, one decoder, heads that return loss sums."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping, Set
from typing import cast

import torch
from torch import Tensor, nn

from triweave.pretrain.batch import DeviceBatch
from triweave.pretrain.encoders.registry import build_tower
from triweave.pretrain.encoders.tower import Tower
from triweave.pretrain.engine.optimizer import tower_of
from triweave.pretrain.engine.participation import tie_zero
from triweave.pretrain.errors import PretrainError
from triweave.pretrain.fusion.cross import Media, MediaKeys
from triweave.pretrain.late.text import LateText
from triweave.pretrain.model.config import ModelConfig
from triweave.pretrain.model.decoder import Decoder, Modalities
from triweave.pretrain.model.heads import HEADS, ContrastiveHead, LanguageModelHead
from triweave.pretrain.model.kv_cache import KeyValueCache
from triweave.pretrain.objectives.heads import MaskEmbedding
from triweave.pretrain.objectives.joint_loss import JointLoss
from triweave.pretrain.objectives.losses import LossSums, combine

RESIDUAL_WRITERS = ("attention.out.weight", "feed_forward.down.weight")
"""Ends of the names of matrices that add to the residual stream; their initial scale falls with depth."""


class MultimodalTransformer(nn.Module):
    """Embed tokens, bring media to them as `model.fusion` says, decode, sum losses.

    sequence and mmca overwrite media positions with their towers' output; cross keeps media beside the text.

    Parameters under `towers.<modality>.` belong to that modality's encoder and connector, all others to the trunk.
    """

    def __init__(self, config: ModelConfig, *, vocab_size: int, media_features: dict[str, int], seed: int = 0) -> None:
        """Build the model with weights that depend on `seed` and the parameters' names only.

        media_features: modality -> numbers per media token; its order is the order of the towers and must be the same
            on all ranks. Raises PretrainError for a modality without an encoder, or one that cannot
            read its tokens.
        """
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(vocab_size, config.d_model)
        self.towers = nn.ModuleDict(
            {name: build_tower(name, features, config) for name, features in media_features.items()}
        )
        if config.fusion.kind == "cross":
            self.media_keys = MediaKeys(config)
        self.decoder = Decoder(config)
        self.heads = nn.ModuleDict(
            {
                name: HEADS[name](config, vocab_size=vocab_size, media_features=media_features)
                for name in config.objectives
            }
        )
        if config.tie_embeddings:
            for name in {"language_model", "masked_tokens"} & set(config.objectives):
                self.heads[name].weight = self.token_embedding.weight
        text = config.fusion.late.text
        self.late_text = None if text is None else LateText(text, config)
        self.joint_loss = JointLoss(config.objective_names, learnt=config.joint_loss.weighting == "uncertainty")
        if config.masks:
            self.mask_embedding = MaskEmbedding(config.d_model)
        initialise(self, config, seed)

    def forward(
        self,
        batch: DeviceBatch,
        guards: Set[str] = frozenset(),
        only: Collection[str] | None = None,
        factors: Mapping[str, float] | None = None,
    ) -> LossSums:
        """Return the loss sums of one micro-batch, over the heads `only` where given.

        Where gradients are made, the heads that `only` leaves out take part idly, with gradients of exactly 0.
        factors: head name -> what its sum is multiplied by in `total`; None: the weights of the objectives.
        guards: modalities that this rank does not hold but must take part in. Their towers run on one zero token,
            change nothing in the result, and get gradients of exactly 0. A tower neither held nor guarded is not
            called and gets no gradient.
        """
        hidden = self.hidden(batch, guards)
        sums = {
            name: head(hidden, batch, idle=only is not None and name not in only)
            for name, head in self.heads.items()
            if only is None or name in only or torch.is_grad_enabled()
        }
        totals = {name: head.total for name, head in sums.items()}
        return combine(sums, *self.joint_loss(totals, factors or self.config.objectives), sources=batch.sources)

    def hidden(self, batch: DeviceBatch, guards: Set[str] = frozenset(), cache: KeyValueCache | None = None) -> Tensor:
        """Return the final hidden states [B, S, D]; raises PretrainError for a payload without a tower.

        cache: for decoding, what came before the batch's positions in each row; see `Decoder.forward`.
        """
        made_for, wanted = (batch.layout, batch.arrangement), (self.config.layout, self.config.fusion.arrangement)
        if made_for != wanted:
            raise PretrainError(
                f"the batch is arranged for {made_for}, not for {wanted}; make it with the model's kernel_tables"
            )
        for name in batch.payloads:
            if name not in self.towers:
                raise PretrainError(
                    f"the batch holds {name!r} but the model has towers for {', '.join(self.towers)} only"
                )
        x = self.token_embedding(batch.tokens)
        rows, length, width = x.shape
        media, modalities = None, None
        if self.config.fusion.kind == "cross":
            media = self._media(batch, guards, x)
        else:
            x = self._with_media(x.view(rows * length, width), batch, guards).view(rows, length, width)
        if self.config.fusion.kind == "mmca":
            modalities = Modalities(
                keys=batch.modality_ids if batch.cached_modality is None else batch.cached_modality,
                queries=batch.modality_ids,
            )
        if self.config.masks and batch.masked_index is not None:
            x = self.mask_embedding(x.view(rows * length, width), batch.masked_index).view(rows, length, width)
        hidden: Tensor = self.decoder(
            x, batch.positions, batch.kv_lo, batch.kv_hi, batch.tiles, cache, media, modalities
        )
        if self.late_text is not None and cache is None:
            hidden = self.late_text(hidden, x, batch)
        return hidden

    def _with_media(self, x: Tensor, batch: DeviceBatch, guards: Set[str]) -> Tensor:
        """Return x [places, D] with the towers' output at the places of the batch's media."""
        for name, tower in self.towers.items():
            if name in batch.payloads:
                payload = batch.payloads[name]
                embedded = tower(payload.values, payload.lengths, payload.grids, payload.tiles)
                if payload.here is not None:
                    embedded = embedded.index_select(0, payload.here)
                x = x.index_copy(0, payload.token_index, embedded.to(x.dtype))
            elif name in guards:
                zeros = cast(Tower, tower).zero_payload(x.device)
                x = tie_zero(x, tower(*zeros))
        return x

    def _media(self, batch: DeviceBatch, guards: Set[str], x: Tensor) -> Media:
        """Return what the cross-attentions look at; a batch without media has keys too, which nobody sees."""
        assert batch.media_lo is not None
        assert batch.media_hi is not None
        keys = None
        if batch.axis is not None:
            rows, tokens = batch.axis.positions.shape[:2]
            empty = x.new_zeros(rows * tokens, x.shape[-1])
            media = self._with_media(empty, batch, guards).view(rows, tokens, -1)
            keys = self.media_keys(media, batch.axis, batch.latent_tiles)
        return Media(keys=keys, lo=batch.media_lo, hi=batch.media_hi, tiles=batch.media_tiles)

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
                std = getattr(parameter, "initial_std", config.init_std)
                if name.endswith(RESIDUAL_WRITERS):
                    std /= math.sqrt(2 * _depth(name, config))
                digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=7).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest))
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float32) * std)
            elif name.endswith("bias"):
                parameter.zero_()


def _depth(name: str, config: ModelConfig) -> int:
    """Return the blocks of the residual stream that a parameter writes to."""
    settings = config.encoders.get(tower_of(name))
    if settings is None:
        return config.layers
    return settings.connector_layers if ".connector." in name else settings.layers
