"""The category of held-out pictures: by the words for it, and by a linear probe, beside pixels and the majority.

    prompt        the category whose words' mean embedding is nearest to the picture's
    probe         multinomial logistic regression on the picture's embeddings, fitted on training pictures
    probe_hidden  the same on the mean hidden states of the picture, also for models without embeddings
    pixels        the same on 16 x 16 RGB pixels
    majority      the most frequent category of the training pictures

Features are standardised; the penalty is the best of three by cross-validation over concepts of the training pictures.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from triweave.data_pipeline.shards.schema import TEXT
from triweave.pretrain.evaluation.bootstrap import bootstrap
from triweave.pretrain.evaluation.documents import EvaluationDocument, EvaluationDocuments
from triweave.pretrain.evaluation.embed import PartEncoder, Vectors, is_contrastive
from triweave.pretrain.evaluation.floors import SimpleFeatures
from triweave.pretrain.evaluation.metrics import accuracy
from triweave.pretrain.evaluation.tasks import IMAGE

INVERSE_PENALTIES = (1e-3, 1e-2, 1e-1)
"""C of the logistic regressions; the features are standardised, and there are about as many as pictures."""
CROSS_VALIDATION_FOLDS = 3
MOST_ITERATIONS = 100
CLASS_WORDS: dict[str, tuple[str, ...]] = {
    "animals": ("an animal", "animals"),
    "clothes": ("clothes", "a piece of clothing"),
    "food": ("food", "something to eat"),
    "hobbies": ("a hobby", "hobbies"),
    "household": ("household", "a thing in the house"),
    "medical": ("medical", "medicine"),
    "military": ("military", "a soldier"),
    "naturalforces": ("a force of nature", "the weather"),
    "people": ("people", "a person"),
    "plants": ("a plant", "plants"),
    "seasonal": ("seasonal", "a holiday"),
    "space": ("space", "a planet"),
    "sports": ("sports", "a ball game"),
    "symbols": ("a symbol", "a letter or a number"),
    "town": ("a town", "a building in the town"),
    "vehicles": ("a vehicle", "vehicles"),
}
"""Folder of Tux Paint -> English words for it; other categories are called by their name."""


@dataclass(frozen=True, kw_only=True)
class ClassifiedPictures:
    """Held-out pictures with the categories that each way of classifying gave them.

    predicted: way -> [n] category; `majority` and `pixels` are the floors.
    """

    categories: list[str]
    groups: list[str]
    predicted: dict[str, list[str]]


def classify(
    documents: EvaluationDocuments, encoder: PartEncoder, features: SimpleFeatures, *, corpus: str
) -> ClassifiedPictures | None:
    """Classify the held-out pictures of a corpus; None where it has fewer than two categories to tell apart."""
    held_out = pictures(documents.held_out, corpus)
    training = pictures(documents.training, corpus)
    known = [document.category for document in training]
    if len(set(known)) < 2 or not held_out:
        return None
    groups = [document.group for document in training]
    encoder.prepare((document, IMAGE) for document in (*held_out, *training))
    inputs: dict[str, tuple[Any, Any]] = {
        "probe_hidden": (encoder.hidden(training, IMAGE), encoder.hidden(held_out, IMAGE)),
        "pixels": (features.of(training, IMAGE), features.of(held_out, IMAGE)),
    }
    predicted = {"majority": [Counter(known).most_common(1)[0][0]] * len(held_out)}
    if is_contrastive(encoder.run):
        mine = encoder.embeddings(held_out, IMAGE)
        inputs["probe"] = (encoder.embeddings(training, IMAGE), mine)
        predicted["prompt"] = nearest_words(encoder, mine, sorted(set(known)))
    for name, (seen, asked) in inputs.items():
        predicted[name] = linear_probe(seen, known, groups, asked)
    return ClassifiedPictures(
        categories=[document.category for document in held_out],
        groups=[document.group for document in held_out],
        predicted=predicted,
    )


def pictures(documents: Sequence[EvaluationDocument], corpus: str) -> list[EvaluationDocument]:
    """Return the documents of a corpus with a category and a picture, the first with each picture."""
    distinct: dict[str, EvaluationDocument] = {}
    for document in documents:
        if document.corpus == corpus and document.category and document.has(IMAGE):
            distinct.setdefault(document.key(IMAGE), document)
    return list(distinct.values())


def nearest_words(encoder: PartEncoder, embedded: Vectors, categories: Sequence[str]) -> list[str]:
    """Return for each embedded picture [n, E] the category whose words' mean embedding has the largest cosine."""
    centres = []
    for category in categories:
        words = CLASS_WORDS.get(category, (category.replace("_", " "),))
        texts = [_word(text) for text in words]
        mean = encoder.embeddings(texts, TEXT).mean(axis=0)
        centres.append(mean / max(float(np.linalg.norm(mean)), 1e-12))
    nearest = (embedded @ np.stack(centres).T).argmax(axis=1)
    return [categories[number] for number in nearest]


def linear_probe(
    training: npt.ArrayLike, categories: Sequence[str], groups: Sequence[str], held_out: npt.ArrayLike
) -> list[str]:
    """Fit logistic regression on training vectors [n, F] of known categories; return those of held_out [m, F]."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, GroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=MOST_ITERATIONS))
    folds = min(CROSS_VALIDATION_FOLDS, len(set(groups)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the weakest penalty may need more; it is rarely chosen
        if folds > 1:
            grid = {"logisticregression__C": list(INVERSE_PENALTIES)}
            search = GridSearchCV(model, grid, cv=GroupKFold(folds))
            model = search.fit(np.asarray(training), list(categories), groups=list(groups)).best_estimator_
        else:
            model.fit(np.asarray(training), list(categories))
        return [str(name) for name in model.predict(np.asarray(held_out))]


def summarise(parts: Sequence[ClassifiedPictures], *, seed: int) -> dict[str, Any]:
    """Return the entry of evaluation.json over the pictures of all parts (folds)."""
    categories = [name for part in parts for name in part.categories]
    groups = [group for part in parts for group in part.groups]

    def figure(way: str) -> dict[str, Any] | None:
        if any(way not in part.predicted for part in parts):
            return None
        right = accuracy([name for part in parts for name in part.predicted[way]], categories)
        estimate = bootstrap(right, groups, seed=seed)
        return {"accuracy": estimate.mean, "ci": estimate.interval}

    floors: Mapping[str, Any] = {name: figure(name) for name in ("pixels", "majority")}
    return {
        "n": len(categories),
        "classes": len(set(categories)),
        **{name: figure(name) for name in ("prompt", "probe", "probe_hidden")},
        "floors": {name: value["accuracy"] for name, value in floors.items()},
        "floors_ci": {name: value["ci"] for name, value in floors.items()},
    }


def _word(text: str) -> EvaluationDocument:
    return EvaluationDocument(id=f"word:{text}", corpus="", kind="", language="en", category="", group="", text=text)
