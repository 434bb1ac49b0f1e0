"""Heads of the objectives whose rows a loader worker has made (`rows`): each returns an unnormalised sum over its rows.

D model width, C rows of the micro-batch. A micro-batch without rows gives a sum of 0 and gradients of exactly 0, also
to the head's own parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from triweave.kernels.linear_cross_entropy import linear_cross_entropy
from triweave.pretrain.batch import DeviceBatch, DeviceRows
from triweave.pretrain.late.config import LateConfig
from triweave.pretrain.late.fusion import LateFusion
from triweave.pretrain.model.config import ModelConfig
from triweave.pretrain.objectives.head import Head, mean_states
from triweave.pretrain.objectives.losses import HeadSums


class _RowsHead(Head):
    """A linear map of pooled states: weight [outputs, D] and bias [outputs].

    Over items, `late` joins the pooled states of their parts first.
    """

    def __init__(self, outputs: int, width: int, late: LateConfig | None = None) -> None:
        super().__init__()
        self.late = None if late is None else LateFusion(late, width)
        self.weight = nn.Parameter(torch.empty(outputs, width))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def _outputs(self, hidden: Tensor, rows: DeviceRows) -> Tensor:
        """Return fp32 [C, outputs]."""
        pooled = mean_states(hidden, rows.index, rows.lengths)
        if self.late is not None:
            items, modalities = rows.parts.unbind(1)
            pooled = self.late(pooled, modalities, items, len(rows.weights))
        return functional.linear(pooled.to(self.weight.dtype), self.weight, self.bias).float()

    def forward(self, hidden: Tensor, batch: DeviceBatch, *, idle: bool = False) -> HeadSums:
        """Return the sums as `Head` does; the operator is whole in its own forward only, so it idles without rows."""
        if idle and self.late is not None:
            return self.sums(hidden, replace(batch, objectives={}))
        return super().forward(hidden, batch, idle=idle)


class ClassificationHead(_RowsHead):
    """Cross-entropy of the class:  sum_c w_c (logsumexp(W p_c + b) - (W p_c + b)_{y_c}),  p_c the pooled state."""

    def __init__(self, config: ModelConfig, **_: Any) -> None:
        late = config.fusion.late if config.classification.over == "items" else None
        super().__init__(len(config.classification.classes), config.d_model, late)

    def sums(self, hidden: Tensor, batch: DeviceBatch) -> HeadSums:
        """Return the sum over the batch's labelled documents or segments; hits: those whose largest logit is theirs."""
        rows = batch.rows_of("classification")
        logits = self._outputs(hidden, rows)
        targets = rows.targets.long()
        total = (functional.cross_entropy(logits, targets, reduction="none") * rows.weights).sum()
        return HeadSums.of(total, hits=((logits.detach().argmax(1) == targets) * rows.weights).sum())


class RegressionHead(_RowsHead):
    """Half the squared error:  sum_c w_c (W p_c + b - y_c)^2 / 2,  y the standardised label."""

    def __init__(self, config: ModelConfig, **_: Any) -> None:
        super().__init__(1, config.d_model, config.fusion.late if config.regression.over == "items" else None)

    def sums(self, hidden: Tensor, batch: DeviceBatch) -> HeadSums:
        """Return the sum over the batch's labelled documents or segments."""
        rows = batch.rows_of("regression")
        errors = self._outputs(hidden, rows)[:, 0] - rows.targets
        return HeadSums.of((errors.square() * rows.weights).sum() / 2)


class MatchingHead(_RowsHead):
    """Binary cross-entropy:  sum_c w_c softplus(-z_c l_c),  l = W p + b,  z = 1 for own media, -1 for exchanged ones.

    The image-text matching of ALBEF (Li et al. 2021) on the last state of a document, which has seen text and media.
    """

    def __init__(self, config: ModelConfig, **_: Any) -> None:
        super().__init__(1, config.d_model)

    def sums(self, hidden: Tensor, batch: DeviceBatch) -> HeadSums:
        """Return the sum over the batch's documents with text and media; hits: those on the right side of 0."""
        rows = batch.rows_of("matching")
        signed = self._outputs(hidden, rows)[:, 0] * (2 * rows.targets - 1)
        total = (functional.softplus(-signed) * rows.weights).sum()
        return HeadSums.of(total, hits=((signed.detach() > 0) * rows.weights).sum())


class MaskedTokensHead(Head):
    """Cross-entropy of the hidden tokens:  sum_c w_c CE(E gelu(T h_c), y_c);  one-span segments see both sides (BERT).

    E [V, D] is the matrix of token lookup where `model.tie_embeddings` is set.
    """

    def __init__(self, config: ModelConfig, *, vocab_size: int, **_: Any) -> None:
        super().__init__()
        self.transform = nn.Parameter(torch.empty(config.d_model, config.d_model))
        self.weight = nn.Parameter(torch.empty(vocab_size, config.d_model))

    def sums(self, hidden: Tensor, batch: DeviceBatch) -> HeadSums:
        """Return the sum over the batch's hidden text tokens."""
        rows = batch.rows_of("masked_tokens")
        states = functional.gelu(hidden.flatten(0, 1)[rows.index] @ self.transform.t())
        targets = rows.targets.long()
        total, _, _ = linear_cross_entropy(
            states,
            self.weight,
            targets,
            torch.arange(len(targets), device=hidden.device),
            rows.weights,
            torch.zeros_like(targets),
            modalities=1,
        )
        return HeadSums.of(total)


class MaskedMediaHead(Head):
    """Squared error of hidden media tokens' payload:  sum_c w_c mean_f (W_m h_c + b_m - y_c)_f^2,  as in MAE.

    y is the payload row to mean 0 and variance 1. Every modality has its own map; all are there in every micro-batch.
    """

    def __init__(self, config: ModelConfig, *, media_features: Mapping[str, int], **_: Any) -> None:
        super().__init__()
        self.modalities = tuple(media_features)
        for name, features in media_features.items():
            self.register_parameter(f"weight_{name}", nn.Parameter(torch.empty(features, config.d_model)))
            self.register_parameter(f"offset_{name}", nn.Parameter(torch.zeros(features)))

    def sums(self, hidden: Tensor, batch: DeviceBatch) -> HeadSums:
        """Return the sum over the batch's hidden media tokens."""
        parts = []
        for name in self.modalities:
            weight, offset = getattr(self, f"weight_{name}"), getattr(self, f"offset_{name}")
            rows = batch.rows_of(f"masked_media/{name}", features=len(offset))
            errors = functional.linear(hidden.flatten(0, 1)[rows.index], weight, offset).float() - rows.targets
            parts.append((errors.square().mean(1) * rows.weights).sum())
        return HeadSums.of(torch.stack(parts).sum())


class MaskEmbedding(nn.Module):
    """Puts one learnt vector [D] where tokens are hidden: x[n] = m at the positions n of `DeviceBatch.masked_index`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, width))

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        """Return x [B * S, D] with the vector at the flat positions index [M]; M = 0 gives it gradients of 0."""
        return x.index_copy(0, index, self.weight.to(x.dtype).expand(len(index), -1))
