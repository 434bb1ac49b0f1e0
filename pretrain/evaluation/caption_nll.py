"""Does the picture (or the sound) help to tell the caption? Nats per caption token with the true one and with others.

    row       [bos] medium text          whatever order the document has; `none`: [bos] text
    nll       sum over the text's tokens of -log p(token | all before it), divided by the number of tokens
    shuffled  the medium of another document of the same corpus and language, another concept; mean over SHUFFLES draws
    gap       nll(shuffled) - nll(true), above 0 where the model uses what it sees or hears

The shuffle stays within corpus and language, so that hearing who speaks which language earns little. The interval of
the gap comes from resampling concepts, with the difference of each document against its own shuffles.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from triweave.data_pipeline.batch import TEXT_ID
from triweave.data_pipeline.shards.schema import TEXT
from triweave.data_pipeline.stream.prompt import PromptMedia, PromptPart, prompt_batch
from triweave.pretrain.checkpoints.load import LoadedRun
from triweave.pretrain.evaluation.bootstrap import bootstrap
from triweave.pretrain.evaluation.documents import (
    EFFECT,
    SPEECH,
    EvaluationDocument,
    EvaluationDocuments,
    keyed_hash,
    sample,
)
from triweave.pretrain.evaluation.tasks import AUDIO, IMAGE
from triweave.pretrain.model.heads import LanguageModelHead

Floats = npt.NDArray[np.float64]
MOST_DOCUMENTS = 250
"""Documents per modality (and fold), chosen by a keyed hash."""
SHUFFLES = 3
LEAST_DOCUMENTS = 4
"""A language with fewer has too little to shuffle."""
BATCH_ROWS = 32
FIGURES = {"true": "true", "shuffled": "shuffled", "none": "language_only"}
"""What stands before the caption -> its key in evaluation.json."""


@dataclass(frozen=True, kw_only=True)
class CaptionNlls:
    """Sums of nats over the caption of each document, [n]; `tokens` is what they are sums over.

    shuffled: mean over the draws. none: without any medium.
    """

    documents: list[EvaluationDocument]
    tokens: Floats
    true: Floats
    shuffled: Floats
    none: Floats


def caption_nlls(
    run: LoadedRun,
    documents: EvaluationDocuments,
    modality: str,
    *,
    seed: int,
    tell: Callable[[str], object] = lambda _: None,
) -> CaptionNlls | None:
    """Return the figures of the held-out documents with a caption and a medium of `modality`; None without enough."""
    chosen = [document for document in documents.held_out if _belongs(document, modality)]
    chosen = sample(chosen, MOST_DOCUMENTS, seed=seed, purpose=f"caption_nll {modality}")
    draws = [shuffled_partners(chosen, seed=seed, draw=draw) for draw in range(SHUFFLES)]
    kept = [number for number in range(len(chosen)) if all(number in partners for partners in draws)]
    if not kept:
        return None
    tell(f"caption likelihood of {len(kept)} documents with {modality}, true, {SHUFFLES} x shuffled and without")
    media = {number: documents.part(chosen[number], modality) for number in kept}
    texts = [chosen[number].text for number in kept]
    true, tokens = text_nlls(run, [[media[number], text] for number, text in zip(kept, texts, strict=True)])
    shuffled = [
        text_nlls(run, [[media[partners[number]], text] for number, text in zip(kept, texts, strict=True)])[0]
        for partners in draws
    ]
    return CaptionNlls(
        documents=[chosen[number] for number in kept],
        tokens=tokens,
        true=true,
        shuffled=np.mean(shuffled, axis=0),
        none=text_nlls(run, [[text] for text in texts])[0],
    )


def shuffled_partners(documents: Sequence[EvaluationDocument], *, seed: int, draw: int) -> dict[int, int]:
    """Return document -> document whose medium takes its place: same corpus and language, another concept.

    Each is taken once. Documents are put in a keyed order, concept by concept, and moved on by at least the largest
    concept. Documents of a language with fewer than LEAST_DOCUMENTS of their corpus, or with a concept of more than
    half of them, have no partner.
    """
    partners: dict[int, int] = {}
    for kin in sorted({(document.corpus, document.language) for document in documents}):
        mine = [number for number, document in enumerate(documents) if (document.corpus, document.language) == kin]
        largest = max(Counter(documents[number].group for number in mine).values())
        if len(mine) < LEAST_DOCUMENTS or 2 * largest > len(mine):
            continue

        def place(number: int) -> tuple[int, str, str]:
            group = documents[number].group
            return keyed_hash(seed + draw, "shuffle", group), group, documents[number].id

        order = sorted(mine, key=place)
        offsets = len(mine) - 2 * largest + 1
        move = largest + keyed_hash(seed + draw, "move", *kin) % offsets
        partners |= {number: order[(here + move) % len(order)] for here, number in enumerate(order)}
    return partners


@torch.inference_mode()
def text_nlls(run: LoadedRun, prompts: Sequence[Sequence[PromptPart]]) -> tuple[Floats, Floats]:
    """Return (nats, tokens) [n] of each prompt's last part, which must be text: the sum of -log p and its length."""
    order = sorted(range(len(prompts)), key=lambda number: (_rough_length(prompts[number]), number))
    nats, tokens = np.zeros(len(prompts)), np.zeros(len(prompts))
    for first in range(0, len(order), BATCH_ROWS):
        chosen = order[first : first + BATCH_ROWS]
        rows = [prompts[number] for number in chosen]
        packed = prompt_batch(rows, tokenizer=run.tokenizer, geometry=run.config.data.geometry)
        nats[chosen], tokens[chosen] = _row_nlls(run, packed)
    return nats, tokens


def _row_nlls(run: LoadedRun, packed: Any) -> tuple[Floats, Floats]:
    """Return the sums over each row's targets behind its last medium, and their number."""
    B, S = packed.tokens.shape
    row_of_target = packed.row_index // S
    media = packed.modality_ids > TEXT_ID
    last_medium = np.where(media.any(axis=1), S - 1 - media[:, ::-1].argmax(axis=1), 0)
    scored = packed.row_index % S >= last_medium[row_of_target]
    target = packed.targets[scored]
    batch = run.to_device(packed)
    where = batch.row_index[torch.from_numpy(scored).to(run.device)]  # places as the model reads them
    head = cast(LanguageModelHead, run.model.heads["language_model"])
    states = run.model.hidden(batch).flatten(0, 1)[where]
    logits = head.logits(states).float()
    nats = functional.cross_entropy(logits, torch.from_numpy(target).to(run.device), reduction="none")
    rows = row_of_target[scored]
    sums, counts = np.bincount(rows, nats.double().cpu().numpy(), B), np.bincount(rows, minlength=B)
    return sums.astype(np.float64), counts.astype(np.float64)


def summarise(parts: Sequence[CaptionNlls], *, seed: int) -> dict[str, Any]:
    """Return the entry of evaluation.json over the documents of all parts (folds), and per corpus and language."""
    documents = [document for part in parts for document in part.documents]
    sums = {
        name: np.concatenate([getattr(part, name) for part in parts]) for name in ("tokens", "true", "shuffled", "none")
    }

    def figure(chosen: npt.NDArray[np.bool_]) -> dict[str, Any]:
        tokens = sums["tokens"][chosen].sum()
        groups = [document.group for document, is_in in zip(documents, chosen, strict=True) if is_in]
        difference = (sums["shuffled"] - sums["true"])[chosen]
        gap = bootstrap(difference, groups, weights=sums["tokens"][chosen], seed=seed)
        means = {words: float(sums[name][chosen].sum() / tokens) for name, words in FIGURES.items()}
        return {"n": len(groups), "tokens": int(tokens), **means, "gap": gap.mean, "ci": gap.interval}

    def split(name: str) -> dict[str, Any]:
        values = np.asarray([getattr(document, name) for document in documents])
        figures = {}
        for value in np.unique(values):
            chosen = values == value
            concepts = {document.group for document, is_in in zip(documents, chosen, strict=True) if is_in}
            if len(concepts) > 1:  # one concept has no interval
                figures[str(value)] = figure(chosen)
        return figures

    whole = figure(np.ones(len(documents), np.bool_))
    return {**whole, "corpora": split("corpus"), "languages": split("language")}


def _belongs(document: EvaluationDocument, modality: str) -> bool:
    """Tell whether the text says what is in the medium: captions of pictures, transcripts of speech."""
    wanted = {IMAGE: document.kind != EFFECT, AUDIO: document.kind == SPEECH}
    return wanted.get(modality, True) and document.has(modality, TEXT)


def _rough_length(prompt: Sequence[PromptPart]) -> int:
    """Return a number that grows with a prompt's tokens, to batch like with like."""
    total = 0
    for part in prompt:
        if isinstance(part, PromptMedia):
            total += part.info.width * part.info.height // 256 + part.info.ms // 10
        else:
            total += len(part)
    return total
