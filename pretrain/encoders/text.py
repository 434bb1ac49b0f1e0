"""Text encoders for fusions that pool each modality by itself: a Transformer, an LSTM, a GRU over packed texts.

L positions of C texts that lie one after the other, W the encoder's width. A text's states depend on nothing outside.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_sequence, unpad_sequence

from triweave.pretrain.encoders.config import EncoderConfig
from triweave.pretrain.encoders.text_config import TextEncoderConfig
from triweave.pretrain.encoders.tower import Items
from triweave.pretrain.encoders.transformer import PackedTransformer
from triweave.pretrain.encoders.transformer_config import sections_of, transformer_config
from triweave.pretrain.model.config import ModelConfig


class TransformerTextEncoder(nn.Module):
    """Every position attends to the whole of its own text; places enter by rotation."""

    def __init__(self, features: int, settings: TextEncoderConfig, config: ModelConfig) -> None:
        """Make it for embeddings of `features` numbers; `config` of the model."""
        super().__init__()
        own = EncoderConfig(kind="vit", width=settings.width, heads=settings.heads)
        sections = sections_of("text", own.head_width)
        self.transformer = PackedTransformer(
            features,
            transformer_config(own, config, sections, layers=settings.layers),
            recompute=config.activation_checkpointing,
        )

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Map embeddings x [L, features] of texts of `lengths` [C] to states [L, W]."""
        grids = torch.stack([lengths, torch.ones_like(lengths), torch.ones_like(lengths)], dim=1)
        items = Items.of(lengths, grids, len(x))
        states: Tensor = self.transformer(x.unsqueeze(0), items.coordinates(1, 1), *items.intervals(1, 1))
        return states.squeeze(0)


class RecurrentTextEncoder(nn.Module):
    """An LSTM or a GRU from both ends of every text; the states of both directions side by side."""

    def __init__(self, features: int, settings: TextEncoderConfig, config: ModelConfig) -> None:  # noqa: ARG002 - made alike
        """Make it for embeddings of `features` numbers.

        Biases start at 0, those of an LSTM's forget gate at 1 (Jozefowicz et al. 2015).
        """
        super().__init__()
        make = nn.LSTM if settings.kind == "lstm" else nn.GRU
        hidden = settings.width // 2
        self.recurrence = make(features, hidden, settings.layers, bidirectional=True)
        for name, parameter in self.recurrence.named_parameters():
            if parameter.ndim == 1:
                nn.init.zeros_(parameter)
                if settings.kind == "lstm" and name.startswith("bias_ih"):
                    nn.init.ones_(parameter.data[hidden : 2 * hidden])  # gates are input, forget, cell, output

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Map embeddings x [L, features] of texts of `lengths` [C] to states [L, W]; waits for `lengths` on a GPU."""
        sizes = lengths.cpu()
        padded = pad_sequence(list(x.split(sizes.tolist())))
        states, _ = self.recurrence(pack_padded_sequence(padded, sizes, enforce_sorted=False))
        assert isinstance(states, PackedSequence)
        unpacked, _ = nn.utils.rnn.pad_packed_sequence(states)
        return torch.cat(unpad_sequence(unpacked, sizes))


TEXT_ENCODERS: dict[str, type[TransformerTextEncoder] | type[RecurrentTextEncoder]] = {
    "transformer": TransformerTextEncoder,
    "lstm": RecurrentTextEncoder,
    "gru": RecurrentTextEncoder,
}
"""Kind of a text encoder -> class; made by `(features, settings, config)`."""
