"""What the key/value cache is worth: the same greedy tokens with it and with recomputing every position.

Both read one interleaved prompt (a picture, words, three seconds of sound, words) and find logits only where a token is
drawn; the model and the prompt are random and of the demo's size, which changes no time. The two take turns in one
process, and the median of their repeats counts. The ratio grows with the prompt: recomputing pays for all of it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from triweave.data_pipeline.batch import PackedBatch
from triweave.data_pipeline.media.geometry import MediaGeometry
from triweave.data_pipeline.media.modalities import MODALITIES
from triweave.data_pipeline.stream.collate import Row, collate
from triweave.data_pipeline.stream.content import Piece
from triweave.data_pipeline.stream.layout import Run
from triweave.pretrain.errors import PretrainError
from triweave.pretrain.generation.continuation import Continuation
from triweave.pretrain.model.config import ModelConfig
from triweave.pretrain.model.model import MultimodalTransformer

DEMO_MODEL = ModelConfig(d_model=256, layers=4, heads=8, kv_heads=2, head_width=32, tie_embeddings=True)
VOCAB_SIZE = 4096
GEOMETRY = MediaGeometry(image_max_tokens=4)
PROMPT: tuple[Run, ...] = ((0, 2, 2, 1, 1), (1, 4, 1, 2, 2), (0, 12, 12, 1, 1), (2, 38, 38, 1, 1), (0, 8, 8, 1, 1))
"""Runs of the prompt, 64 tokens: a picture of four patches, 38 tokens of sound, and text around them."""
PROMPT_TOKENS = sum(run[1] for run in PROMPT)


@dataclass(frozen=True, kw_only=True)
class GenerateTimes:
    """Median seconds of generating `tokens` tokens, with the cache and by recomputation."""

    tokens: int
    prompt_tokens: int
    parameters: int
    threads: int
    repeats: int
    cached_s: float
    recomputed_s: float

    @property
    def ratio(self) -> float:
        """How many times faster the cache is."""
        return self.recomputed_s / self.cached_s


def bench_generate(
    tokens: int = 256,
    repeats: int = 3,
    *,
    config: ModelConfig = DEMO_MODEL,
    progress: Callable[[str], None] = lambda _: None,
) -> GenerateTimes:
    """Time both ways of generating `tokens` tokens after the prompt, `repeats` times each.

    Raises PretrainError where one of the numbers is below 1, or where the two ways disagree on a token.
    """
    if tokens < 1 or repeats < 1:
        raise PretrainError(f"{tokens} tokens, {repeats} repeats: both must be at least 1")
    features = {name: modality.features(GEOMETRY) for name, modality in MODALITIES.items()}
    model = MultimodalTransformer(config, vocab_size=VOCAB_SIZE, media_features=features).eval().requires_grad_(False)
    prompt = _prompt()
    seconds: dict[bool, list[float]] = {True: [], False: []}
    texts = set()
    _greedy(model, prompt, 4, cache=True)  # the first calls load kernels
    for repeat in range(repeats):
        for cache in (True, False):
            progress(f"repeat {repeat + 1} of {repeats}: {'with the cache' if cache else 'recomputing'}")
            start = time.perf_counter()
            texts.add(_greedy(model, prompt, tokens, cache=cache))
            seconds[cache].append(time.perf_counter() - start)
    if len(texts) > 1:
        raise PretrainError("the cache and recomputation chose different tokens, so their times say nothing")
    return GenerateTimes(
        tokens=tokens,
        prompt_tokens=PROMPT_TOKENS,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        threads=torch.get_num_threads(),
        repeats=repeats,
        cached_s=statistics.median(seconds[True]),
        recomputed_s=statistics.median(seconds[False]),
    )


def _greedy(model: MultimodalTransformer, prompt: PackedBatch, tokens: int, *, cache: bool) -> tuple[int, ...]:
    """Return the most likely tokens; eos is one like any other."""
    made = []
    with torch.inference_mode():
        continuation = Continuation(model, prompt, cache=cache)
        for count in range(1, tokens + 1):
            token = continuation.logits.argmax(-1).cpu()
            made.append(int(token))
            if count < tokens:
                continuation.append(token)
    return tuple(made)


def _prompt() -> PackedBatch:
    generator = np.random.default_rng(0)
    tokens = generator.integers(4, VOCAB_SIZE, PROMPT_TOKENS).astype(np.int32)
    piece = Piece(tokens=tokens, runs=list(PROMPT), weight=1.0, sample_id="prompt", sample_hash=0)
    media = {
        modality.id: generator.integers(
            0, 255, (sum(run[1] for run in PROMPT if run[0] == modality.id), modality.features(GEOMETRY))
        ).astype(modality.dtype)
        for modality in MODALITIES.values()
        if any(run[0] == modality.id for run in PROMPT)
    }
    return collate([Row(0, [piece])], media, sequence_length=PROMPT_TOKENS, pad_id=0)
