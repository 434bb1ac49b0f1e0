"""One trunk under every fusion, with the two heads of the task: a category, and embeddings that find each other.

    early (sequence, cross, mmca)   u = mean over the trunk's positions of the document's final states
    late                            u = operator over the means of its parts, each encoded alone
    category logits  C u                                      u of picture, speech and caption
    retrieval        cosine of Q u and T v                    u of picture and speech, v of the caption alone

A single modality is the sequence fusion over one part, so the trunk and the heads are the same. Weights follow from
(seed, name): all fusions start from the same trunk and heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from triweave.data_pipeline.batch import PADDING_ID, TEXT_ID, PackedBatch
from triweave.data_pipeline.media.modalities import MODALITIES
from triweave.data_pipeline.shards.schema import TEXT
from triweave.data_pipeline.stream.prompt import prompt_batch
from triweave.pretrain.batch import DeviceBatch, KernelTables, kernel_tables, to_device
from triweave.pretrain.bench.fusion.task import GEOMETRY, FusionTask, RememberingDecoder
from triweave.pretrain.evaluation.documents import EvaluationDocument
from triweave.pretrain.evaluation.tasks import AUDIO, IMAGE
from triweave.pretrain.fusion.config import FusionConfig
from triweave.pretrain.late.config import OPERATORS, LateConfig
from triweave.pretrain.late.features import linear
from triweave.pretrain.late.fusion import LateFusion
from triweave.pretrain.model.config import ContrastiveConfig, ModelConfig
from triweave.pretrain.model.model import MultimodalTransformer, initialise
from triweave.pretrain.objectives.head import mean_states

PARTS = (IMAGE, AUDIO, TEXT)
"""Parts of a document, in the order in which an early fusion reads them."""
QUERY = (IMAGE, AUDIO)
"""What asks for the caption."""
EMBEDDING_WIDTH = 64
TRUNK = ModelConfig(d_model=64, layers=2, heads=4, kv_heads=2, head_width=16, tie_embeddings=True)


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One row of the table: a fusion over all parts, or one modality alone."""

    name: str
    config: ModelConfig = TRUNK
    late: LateConfig | None = None
    parts: tuple[str, ...] = PARTS

    @property
    def is_fusion(self) -> bool:
        """Whether it joins modalities."""
        return len(self.parts) > 1

    @property
    def query(self) -> tuple[str, ...]:
        """What of its parts asks for the caption; none for the caption alone."""
        return tuple(part for part in self.parts if part in QUERY)


def contenders() -> list[Contender]:
    """Return every fusion, then every modality alone."""
    cross = FusionConfig(kind="cross", cross_every=1, scope="preceding")
    early = [
        Contender(name=fusion.kind, config=replace(TRUNK, fusion=fusion))
        for fusion in (FusionConfig(), cross, FusionConfig(kind="mmca"))
    ]
    late = [Contender(name=f"late {name}", late=LateConfig(operator=cast(Any, name))) for name in OPERATORS]
    return early + late + [Contender(name=f"{part} alone", parts=(part,)) for part in PARTS]


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a forward pass reads of N documents: `whole` for the category, `query` and `target` for retrieval.

    late: everything is in `whole`, all parts alone. query, target: None for it, and where nothing is asked.
    """

    count: int
    whole: DeviceBatch
    query: DeviceBatch | None
    target: DeviceBatch | None


class Outputs:
    """Category logits [N, classes]; unit embeddings [N, E] of the queries and captions, None where nothing is asked."""

    def __init__(self, logits: Tensor, query: Tensor | None, target: Tensor | None) -> None:
        self.logits, self.query, self.target = logits, query, target


class InputMaker:
    """Makes the inputs of a contender from documents."""

    def __init__(self, contender: Contender, task: FusionTask, decode: RememberingDecoder) -> None:
        self._contender, self._task, self._decode = contender, task, decode
        self._tables: KernelTables = kernel_tables(contender.config, torch.device("cpu"), torch.float32)

    def __call__(self, documents: Sequence[EvaluationDocument]) -> Inputs:
        """Return the inputs of some documents."""
        contender = self._contender
        if contender.late is not None:
            whole = self._batch(documents, contender.parts, alone=True)
            return Inputs(count=len(documents), whole=whole, query=None, target=None)
        asks = bool(contender.query)
        return Inputs(
            count=len(documents),
            whole=self._batch(documents, contender.parts),
            query=self._batch(documents, contender.query) if asks and contender.query != contender.parts else None,
            target=self._batch(documents, (TEXT,), alone=True) if asks else None,
        )

    def _batch(
        self, documents: Sequence[EvaluationDocument], parts: Sequence[str], *, alone: bool = False
    ) -> DeviceBatch:
        source = self._task.documents
        packed: PackedBatch = prompt_batch(
            [[source.part(document, part) for part in parts] for document in documents],
            tokenizer=self._task.tokenizer,
            geometry=GEOMETRY,
            end=True,
            alone=alone,
            decode=self._decode,
        )
        return to_device(replace(packed, extra={**packed.extra, **self._tables(packed)}), "cpu")


class FusionModel(nn.Module):
    """The trunk of a contender, its operator where it has one, and the two heads."""

    def __init__(self, contender: Contender, *, vocab_size: int, classes: int, seed: int) -> None:
        super().__init__()
        config = contender.config
        self.contender = contender
        media = {name: modality.features(GEOMETRY) for name, modality in MODALITIES.items() if name in PARTS}
        self.trunk = MultimodalTransformer(config, vocab_size=vocab_size, media_features=media, seed=seed)
        self.late = None if contender.late is None else LateFusion(contender.late, config.d_model)
        self.category = linear(config.d_model, classes)
        self.query = linear(config.d_model, EMBEDDING_WIDTH)
        self.target = linear(config.d_model, EMBEDDING_WIDTH)
        scale = ContrastiveConfig(loss="infonce").initial_scale
        self.log_scale = nn.Parameter(torch.tensor([math.log(scale)]))
        initialise(self, config, seed)

    def forward(self, inputs: Inputs) -> Outputs:
        """Return the outputs for N documents."""
        if self.late is not None:
            return self._late(inputs)
        whole = _mean_state(self.trunk, inputs.whole)
        if inputs.target is None:
            return Outputs(self.category(whole), None, None)
        asking = whole if inputs.query is None else _mean_state(self.trunk, inputs.query)
        captions = _pooled(self.trunk, inputs.target)
        return Outputs(self.category(whole), _unit(self.query(asking)), _unit(self.target(captions)))

    def _late(self, inputs: Inputs) -> Outputs:
        assert self.late is not None
        batch = inputs.whole
        pooled, modalities = _pooled(self.trunk, batch), batch.segment_modality
        items = torch.arange(inputs.count).repeat_interleave(len(PARTS))
        asks = modalities != TEXT_ID
        whole = self.late(pooled, modalities, items, inputs.count)
        asking = self.late(pooled[asks], modalities[asks], items[asks], inputs.count)
        return Outputs(self.category(whole), _unit(self.query(asking)), _unit(self.target(pooled[~asks])))


def _mean_state(trunk: MultimodalTransformer, batch: DeviceBatch) -> Tensor:
    """Return the mean final state [N, D] of every row's document."""
    filled = (batch.modality_ids != PADDING_ID).float()
    mean: Tensor = (trunk.hidden(batch) * filled[:, :, None]).sum(1) / filled.sum(1, keepdim=True)
    return mean


def _pooled(trunk: MultimodalTransformer, batch: DeviceBatch) -> Tensor:
    return mean_states(trunk.hidden(batch), batch.segment_index, batch.segment_lengths)


def _unit(vectors: Tensor) -> Tensor:
    unit: Tensor = nn.functional.normalize(vectors, dim=1)
    return unit
