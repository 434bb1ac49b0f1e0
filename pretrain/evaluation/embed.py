"""What a model makes of single parts: the contrastive embedding, and the mean of the hidden states."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch

from triweave.data_pipeline.shards.schema import TEXT
from triweave.data_pipeline.stream.prompt import PromptPart, prompt_batch
from triweave.pretrain.checkpoints.load import LoadedRun
from triweave.pretrain.evaluation.documents import EvaluationDocument, EvaluationDocuments
from triweave.pretrain.model.heads import ContrastiveHead

Vectors = npt.NDArray[np.float32]
"""float32 [n, width]."""
BATCH_PARTS = 64


class Encoded(NamedTuple):
    """The parts as vectors.

    embeddings: [n, E] unit rows; None where the model has no contrastive head.
    hidden: [n, D] mean over the segment of the final hidden states.
    """

    embeddings: Vectors | None
    hidden: Vectors


def is_contrastive(run: LoadedRun) -> bool:
    """Tell whether the run's model makes embeddings."""
    return "contrastive" in run.model.heads


@torch.inference_mode()
def encode_parts(run: LoadedRun, parts: Sequence[PromptPart]) -> Encoded:
    """Return the vectors of n parts, each on its own as `[bos] part [eos]`, in their order."""
    embeddings: list[Vectors] = []
    hidden: list[Vectors] = []
    for first in range(0, len(parts), BATCH_PARTS):
        rows = [[part] for part in parts[first : first + BATCH_PARTS]]
        packed = prompt_batch(rows, tokenizer=run.tokenizer, geometry=run.config.data.geometry, alone=True)
        batch = run.to_device(packed)
        states = run.model.hidden(batch)
        lengths = batch.segment_lengths
        summed = torch.segment_reduce(states.flatten(0, 1)[batch.segment_index], "sum", lengths=lengths, axis=0)
        hidden.append((summed / lengths[:, None]).float().cpu().numpy())
        if is_contrastive(run):
            head = cast(ContrastiveHead, run.model.heads["contrastive"])
            embeddings.append(head.embed(states, batch).float().cpu().numpy())
    return Encoded(np.concatenate(embeddings) if embeddings else None, np.concatenate(hidden))


class PartEncoder:
    """Vectors of documents' parts; parts with the same key are encoded once."""

    def __init__(
        self, run: LoadedRun, documents: EvaluationDocuments, *, tell: Callable[[str], object] = lambda _: None
    ) -> None:
        self.run = run
        self._documents = documents
        self._tell = tell
        self._known: dict[tuple[str, str], tuple[Vectors | None, Vectors]] = {}

    def prepare(self, wanted: Iterable[tuple[EvaluationDocument, str]]) -> None:
        """Encode what is not known yet of (document, modality) pairs, shorter ones together."""
        missing: dict[tuple[str, str], tuple[EvaluationDocument, str]] = {}
        for document, modality in wanted:
            key = (modality, _key(document, modality))
            if key not in self._known:
                missing.setdefault(key, (document, modality))
        order = sorted(missing, key=lambda key: (key[0], _size(*missing[key]), key[1]))
        if order:
            self._tell(f"encoding {len(order)} parts")
        encoded = encode_parts(self.run, [self._documents.part(*missing[key]) for key in order]) if order else None
        for number, key in enumerate(order):
            assert encoded is not None
            embedding = None if encoded.embeddings is None else encoded.embeddings[number]
            self._known[key] = (embedding, encoded.hidden[number])

    def embeddings(self, documents: Sequence[EvaluationDocument], modality: str) -> Vectors:
        """Return the embeddings [n, E] of one part of each document; the model must have a contrastive head."""
        self.prepare((document, modality) for document in documents)
        found = [self._known[(modality, _key(document, modality))][0] for document in documents]
        return np.stack([vector for vector in found if vector is not None])

    def hidden(self, documents: Sequence[EvaluationDocument], modality: str) -> Vectors:
        """Return the mean hidden states [n, D] of one part of each document."""
        self.prepare((document, modality) for document in documents)
        return np.stack([self._known[(modality, _key(document, modality))][1] for document in documents])


def _key(document: EvaluationDocument, modality: str) -> str:
    """Return what two parts share that encode alike: the exact text, or the bytes' xxh3."""
    return document.text if modality == TEXT else document.key(modality)


def _size(document: EvaluationDocument, modality: str) -> int:
    if modality == TEXT:
        return len(document.text)
    info = document.media[modality].info
    return info.width * info.height + info.ms
