"""Texts that stand alone, encoded by an encoder of their own instead of the trunk."""

from __future__ import annotations

from torch import Tensor, nn

from triweave.data_pipeline.batch import TEXT_ID
from triweave.pretrain.batch import DeviceBatch
from triweave.pretrain.encoders.text import TEXT_ENCODERS
from triweave.pretrain.encoders.text_config import TextEncoderConfig
from triweave.pretrain.engine.participation import tie_zero
from triweave.pretrain.late.features import linear
from triweave.pretrain.model.config import ModelConfig


class LateText(nn.Module):
    """Final states of one-span text segments:  h_i = P e(x)_i,  x the segment's token embeddings, P: W x D.

    States of all other positions stay the trunk's. A micro-batch without such segments gives the encoder gradients of
    exactly 0: it runs on one zero token then, so that every rank calls it.
    """

    def __init__(self, settings: TextEncoderConfig, config: ModelConfig) -> None:
        super().__init__()
        self.encoder = TEXT_ENCODERS[settings.kind](config.d_model, settings, config)
        self.project = linear(settings.width, config.d_model)

    def forward(self, hidden: Tensor, embedded: Tensor, batch: DeviceBatch) -> Tensor:
        """Return hidden [B, S, D] with the states of text segments replaced; embedded: token embeddings [B, S, D]."""
        chosen = batch.segment_modality == TEXT_ID
        index = batch.segment_index[chosen.repeat_interleave(batch.segment_lengths)]
        lengths = batch.segment_lengths[chosen]
        if not len(index):
            zero, one = embedded.new_zeros(1, embedded.shape[2]), lengths.new_ones(1)
            return tie_zero(hidden, self.project(self.encoder(zero, one)))
        states = self.project(self.encoder(embedded.flatten(0, 1)[index], lengths))
        replaced: Tensor = hidden.flatten(0, 1).index_copy(0, index, states.to(hidden.dtype))
        return replaced.view_as(hidden)
