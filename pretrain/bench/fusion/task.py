"""The task that every fusion is measured on: pictures of Tux Paint with their spoken and their written description.

    category   which of the 16 folders a stamp is from, by picture, speech and caption together
    retrieval  which caption belongs to picture and speech, among the held-out captions of the same language

Documents have all three parts; what is held out (split test) shares no concept, text, picture or clip with training.
Batches hold one language each, so that the candidates of training are those of the question.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from triweave.data_pipeline.config import DataConfig, SourceConfig
from triweave.data_pipeline.media.geometry import MediaGeometry
from triweave.data_pipeline.shards.schema import TEXT
from triweave.data_pipeline.stream.prompt import PromptMedia, decode_media
from triweave.data_pipeline.text.tokenizer import Tokenizer
from triweave.pretrain.errors import PretrainError
from triweave.pretrain.evaluation.documents import (
    SPEECH,
    EvaluationDocument,
    EvaluationDocuments,
    keyed_hash,
    read_documents,
)
from triweave.pretrain.evaluation.tasks import AUDIO, IMAGE, LEAST_POOL, Relation, relation

LONGEST_MS = 4000
"""Clips beyond this are left out, some 3 of 100, so that batches stay narrow."""
GEOMETRY = MediaGeometry(
    image_patch_px=32,
    image_max_tokens=4,
    audio_rate_hz=16_000,
    audio_mel_bins=80,
    audio_window_ms=25,
    audio_hop_ms=10,
    audio_frames_per_token=8,
)
"""As in launch/configs/demo_cpu.yaml."""
LEAST_CATEGORIES = 2


@dataclass(frozen=True, kw_only=True)
class FusionTask:
    """The documents of the task, and what is needed to make batches of them.

    categories: names of the classes, those of the training documents in order.
    """

    documents: EvaluationDocuments
    training: tuple[EvaluationDocument, ...]
    held_out: tuple[EvaluationDocument, ...]
    categories: tuple[str, ...]
    tokenizer: Tokenizer

    def classes(self, documents: Sequence[EvaluationDocument]) -> npt.NDArray[np.int64]:
        """Return the number of each document's category, -1 where no training document has it."""
        numbers = {name: number for number, name in enumerate(self.categories)}
        return np.asarray([numbers.get(document.category, -1) for document in documents], np.int64)

    @cached_property
    def pools(self) -> list[tuple[npt.NDArray[np.int64], Relation]]:
        """Held-out documents that are ranked among each other, by language: places in `held_out` and right answers."""
        found = []
        for language in sorted({document.language for document in self.held_out}):
            places = [number for number, document in enumerate(self.held_out) if document.language == language]
            asked = relation([self.held_out[number] for number in places], AUDIO, TEXT)
            if min(len(asked.queries), len(asked.candidates)) >= LEAST_POOL:
                found.append((np.asarray(places), asked))
        return found

    def batches(self, size: int, *, steps: int, seed: int) -> Iterator[list[EvaluationDocument]]:
        """Yield `steps` batches of one language each, epoch after epoch in an order drawn by the seed.

        The rest of a language that fills no batch waits for the next epoch, which draws anew.
        """
        languages = Counter(document.language for document in self.training)
        epoch, given = 0, 0
        while given < steps:
            drawn = []
            for language in sorted(languages):
                mine = [document for document in self.training if document.language == language]
                mine.sort(key=lambda document: keyed_hash(seed, "batch", str(epoch), document.id))
                drawn += [mine[first : first + size] for first in range(0, len(mine) - size + 1, size)]
            drawn.sort(key=lambda batch: keyed_hash(seed, "order", str(epoch), batch[0].id))
            yield from drawn[: steps - given]
            given, epoch = given + len(drawn), epoch + 1


def read_task(shards: str, tokenizer: str, *, batch: int) -> FusionTask:
    """Return the task over shards of Tux Paint; every byte of them that is used is checked.

    batch: documents of a training batch, which some language must fill. Raises PretrainError where the shards hold too
    little, DataError where they or the tokenizer cannot be read.
    """
    source = SourceConfig(name="tuxpaint", shards=shards, split="train")
    documents = read_documents(DataConfig(sources=[source], tokenizer=tokenizer, geometry=GEOMETRY))
    training, held_out = (
        tuple(document for document in part if _belongs(document)) for part in (documents.training, documents.held_out)
    )
    categories = tuple(sorted({document.category for document in training}))
    languages = Counter(document.language for document in training)
    if len(categories) < LEAST_CATEGORIES or max(languages.values(), default=0) < batch or not held_out:
        raise PretrainError(
            f"{shards}: {len(training)} training and {len(held_out)} held-out documents with a category, a picture, "
            f"speech and a caption in {len(categories)} categories; the task wants shards of all of Tux Paint, or a "
            "smaller --batch"
        )
    return FusionTask(
        documents=documents,
        training=training,
        held_out=held_out,
        categories=categories,
        tokenizer=Tokenizer.load(tokenizer),
    )


class RememberingDecoder:
    """`decode_media` that decodes every medium once; those of the whole task take about 400 MB."""

    def __init__(self) -> None:
        self._known: dict[bytes, npt.NDArray[Any]] = {}

    def __call__(self, media: PromptMedia, geometry: MediaGeometry) -> npt.NDArray[Any]:
        """Return the values of a medium."""
        if media.content not in self._known:
            self._known[media.content] = decode_media(media, geometry)
        return self._known[media.content]


def _belongs(document: EvaluationDocument) -> bool:
    return (
        document.kind == SPEECH
        and bool(document.category)
        and document.has(IMAGE, AUDIO, TEXT)
        and document.media[AUDIO].info.ms <= LONGEST_MS
    )
