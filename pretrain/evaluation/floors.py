"""Floors: what simple features and classical regression reach on the same queries, fitted in the same run.

    ridge   features of the source -> features of the target by ridge regression on the training documents; candidates
            by the cosine between predicted and true features, both less the training mean
    length  the same with one feature a side: log milliseconds of speech, log characters of text; candidates by distance

    picture    16 x 16 RGB pixels, 768 numbers in [0, 1]
    sound      log-mel in 40 bands, averaged within 24 equal stretches of the clip, and log milliseconds
    text       TF-IDF of character 1- to 4-grams within words, fitted on the training texts

The penalty is the best of five by leave-one-out error. A floor knows nothing of the model and is no part of it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import RidgeCV

from triweave.data_pipeline.media import audio, images
from triweave.data_pipeline.media.geometry import MediaGeometry
from triweave.data_pipeline.media.mel import log_mel
from triweave.data_pipeline.shards.schema import TEXT
from triweave.data_pipeline.splits import normalise_text
from triweave.pretrain.evaluation.documents import EvaluationDocument, MediaRef

Features = npt.NDArray[np.float32]
"""float32 [n, features]."""

PICTURE_SIDE_PX = 16
SOUND_STRETCHES = 24
SOUND_GEOMETRY = MediaGeometry(audio_rate_hz=16_000, audio_mel_bins=40, audio_window_ms=25, audio_hop_ms=20)
"""A frame every 20 ms: half the work of the usual 10, and each stretch averages over several anyway."""
TEXT_NGRAMS = (1, 4)
TEXT_FEATURES = 1024
PENALTIES = (1.0, 10.0, 100.0, 1e3, 1e4)


class SimpleFeatures:
    """Features of media by modality; each medium is decoded once."""

    def __init__(self, read: Callable[[MediaRef], bytes]) -> None:
        """`read` returns the verified bytes of a medium."""
        self._read = read
        self._known: dict[tuple[str, int], Features] = {}

    def of(self, documents: Sequence[EvaluationDocument], modality: str) -> Features:
        """Return the features [n, F] of the documents' media of one modality."""
        refs = {document.media[modality].xxh3: document.media[modality] for document in documents}
        missing = [ref for key, ref in refs.items() if (modality, key) not in self._known]
        contents = [self._read(ref) for ref in missing]
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:  # decoding and transforms let go of the GIL
            found = list(pool.map(FEATURES[modality], missing, contents))
        self._known |= {(modality, ref.xxh3): features for ref, features in zip(missing, found, strict=True)}
        return np.stack([self._known[(modality, document.media[modality].xxh3)] for document in documents])


def picture_features(ref: MediaRef, content: bytes) -> Features:
    """Return the 16 x 16 RGB pixels of a picture, in [0, 1], [768]."""
    pixels = images.decode_resized(content, ref.info, PICTURE_SIDE_PX, PICTURE_SIDE_PX)
    return pixels.reshape(-1).astype(np.float32) / np.float32(255)


def sound_features(ref: MediaRef, content: bytes) -> Features:
    """Return the log-mel of a clip averaged within 24 equal stretches, and its log milliseconds, [961]."""
    frames = log_mel(audio.decode_mono(content, SOUND_GEOMETRY.audio_rate_hz, expected=ref.info), SOUND_GEOMETRY)
    edges = np.linspace(0, len(frames), SOUND_STRETCHES + 1)
    first = np.minimum(edges[:-1].astype(int), len(frames) - 1)
    last = np.maximum(np.ceil(edges[1:]).astype(int), first + 1)
    means = [frames[low:high].mean(axis=0) for low, high in zip(first, last, strict=True)]
    return np.append(np.concatenate(means), np.float32(log_ms(ref))).astype(np.float32)


FEATURES: dict[str, Callable[[MediaRef, bytes], Features]] = {"image": picture_features, "audio": sound_features}
"""Modality -> features of one medium."""


def log_ms(ref: MediaRef) -> float:
    """Return the natural logarithm of a clip's milliseconds, at least 0."""
    return math.log(max(1, ref.info.ms))


def log_characters(text: str) -> float:
    """Return the natural logarithm of a text's characters once normalised, at least 0."""
    return math.log(max(1, len(normalise_text(text))))


def ridge_scores(
    training: Sequence[EvaluationDocument],
    queries: Sequence[EvaluationDocument],
    candidates: Sequence[EvaluationDocument],
    *,
    source: str,
    target: str,
    features: SimpleFeatures,
) -> npt.NDArray[np.float64]:
    """Return the cosine [Q, P] between what ridge regression predicts for the queries and the candidates' features."""
    train_x, query_x = _features(training, queries, source, features)
    train_y, candidate_y = _features(training, candidates, target, features)
    if source != TEXT:
        centre, scale = train_x.mean(axis=0), train_x.std(axis=0)
        train_x, query_x = ((x - centre) / np.where(scale > 0, scale, 1) for x in (train_x, query_x))
    if target != TEXT:
        scale = train_y.std(axis=0)
        train_y, candidate_y = (y / np.where(scale > 0, scale, 1) for y in (train_y, candidate_y))
    mean = train_y.mean(axis=0)
    model = RidgeCV(alphas=PENALTIES).fit(train_x, train_y - mean)
    predicted = model.predict(query_x)
    return cosines(predicted, candidate_y - mean)


def length_scores(
    training: Sequence[EvaluationDocument],
    queries: Sequence[EvaluationDocument],
    candidates: Sequence[EvaluationDocument],
    *,
    source: str,
    target: str,
) -> npt.NDArray[np.float64]:
    """Return minus the distance [Q, P] between predicted and true log length; speech and text only."""
    slope, offset = np.polyfit(_lengths(training, source), _lengths(training, target), 1)
    predicted = slope * _lengths(queries, source) + offset
    return -np.abs(predicted[:, None] - _lengths(candidates, target)[None, :])


def cosines(left: npt.ArrayLike, right: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Return the cosine [Q, P] of every row of left [Q, F] and right [P, F]; 0 for a row of zeros."""

    def unit(rows: npt.ArrayLike) -> npt.NDArray[np.float64]:
        values = np.asarray(rows, np.float64)
        norms = np.linalg.norm(values, axis=1, keepdims=True)
        return np.asarray(values / np.where(norms > 0, norms, 1))

    return unit(left) @ unit(right).T


def _features(
    training: Sequence[EvaluationDocument],
    others: Sequence[EvaluationDocument],
    modality: str,
    features: SimpleFeatures,
) -> tuple[Any, Any]:
    """Return the features of the training documents and of the others."""
    if modality != TEXT:
        return features.of(training, modality), features.of(others, modality)
    return text_features(training, others)


def text_features(
    training: Sequence[EvaluationDocument], others: Sequence[EvaluationDocument]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return the TF-IDF features [n, TEXT_FEATURES or fewer] of both, fitted on the training documents."""
    vectoriser = TfidfVectorizer(
        analyzer="char_wb",
        ngram_range=TEXT_NGRAMS,
        max_features=TEXT_FEATURES,
        sublinear_tf=True,
        dtype=np.float32,
        preprocessor=normalise_text,
    )
    fitted = vectoriser.fit_transform([document.text for document in training]).toarray()
    return fitted, vectoriser.transform([document.text for document in others]).toarray()


def _lengths(documents: Sequence[EvaluationDocument], modality: str) -> npt.NDArray[np.float64]:
    if modality == TEXT:
        return np.asarray([log_characters(document.text) for document in documents])
    return np.asarray([log_ms(document.media[modality]) for document in documents])
