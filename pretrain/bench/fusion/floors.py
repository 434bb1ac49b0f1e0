"""What the task gives without any of our models: majority, chance, logistic regression and ridge on simple features.

    category    logistic regression on up to 256 principal components of the features of one part, or of all parts
    retrieval   ridge regression from the picture's or the clip's features to the caption's, and the sum of both cosines

Features are those of `evaluation.floors`; the sum of the cosines is a classical decision vote.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.decomposition import PCA

from triweave.data_pipeline.shards.schema import TEXT
from triweave.pretrain.bench.fusion.task import FusionTask
from triweave.pretrain.evaluation.classification import linear_probe
from triweave.pretrain.evaluation.floors import SimpleFeatures, ridge_scores, text_features
from triweave.pretrain.evaluation.metrics import best_ranks, chance_hits, hits
from triweave.pretrain.evaluation.tasks import AUDIO, IMAGE

COMPONENTS = 256
BOTH = "image + audio"
ALL = "image + audio + text"


def floors(task: FusionTask, *, seed: int) -> dict[str, Any]:
    """Return `category` (way -> accuracy) and `retrieval` (way -> [R@1, R@10]) of the floors; seed orders ties."""
    features = SimpleFeatures(task.documents.read)
    return {"category": _category(task, features, seed=seed), "retrieval": _retrieval(task, features, seed=seed)}


def _category(task: FusionTask, features: SimpleFeatures, *, seed: int) -> dict[str, float]:
    known = [document.category for document in task.training]
    groups = [document.group for document in task.training]
    asked = [document.category for document in task.held_out]
    inputs: dict[str, tuple[Any, Any]] = {
        name: (features.of(task.training, name), features.of(task.held_out, name)) for name in (IMAGE, AUDIO)
    }
    inputs[TEXT] = text_features(task.training, task.held_out)
    inputs = {name: _components(*pair, seed=seed) for name, pair in inputs.items()}
    every_seen, every_asked = zip(*inputs.values(), strict=True)
    inputs[ALL] = (np.concatenate(every_seen, axis=1), np.concatenate(every_asked, axis=1))
    found = {"majority": [Counter(known).most_common(1)[0][0]] * len(asked)}
    found |= {name: linear_probe(seen, known, groups, held_out) for name, (seen, held_out) in inputs.items()}
    return {name: float(np.mean(np.asarray(guesses) == np.asarray(asked))) for name, guesses in found.items()}


def _components(seen: Any, asked: Any, *, seed: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    scale = np.where(np.std(seen, axis=0) > 0, np.std(seen, axis=0), 1)
    model = PCA(min(COMPONENTS, *np.shape(seen)), random_state=seed).fit(seen / scale)
    return model.transform(seen / scale), model.transform(asked / scale)


def _retrieval(task: FusionTask, features: SimpleFeatures, *, seed: int) -> dict[str, list[float]]:
    found: dict[str, list[npt.NDArray[np.float64]]] = {"chance": [], IMAGE: [], AUDIO: [], BOTH: []}
    for places, asked in task.pools:
        language = task.held_out[places[0]].language
        training = [document for document in task.training if document.language == language]
        scores = {
            source: ridge_scores(
                training, asked.queries, asked.candidates, source=source, target=TEXT, features=features
            )
            for source in (IMAGE, AUDIO)
        }
        scores[BOTH] = scores[IMAGE] + scores[AUDIO]
        for name, values in scores.items():
            ranks = best_ranks(values, asked.correct, seed=seed)
            found[name].append(np.stack([hits(ranks, k) for k in (1, 10)]))
        found["chance"].append(np.stack([chance_hits(asked.correct, k) for k in (1, 10)]))
    return {name: np.concatenate(pools, axis=1).mean(axis=1).tolist() for name, pools in found.items()}
