"""Evaluate a run on what it has not seen: retrieval, classification, caption likelihood; one JSON-able dict.

With folds, each fold's own model is asked about its own held-out fold, and the queries of all are taken together.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits

from triweave.data_pipeline.machine import installed_versions, processor_name
from triweave.pretrain.checkpoints.load import LoadedRun
from triweave.pretrain.errors import PretrainError
from triweave.pretrain.evaluation import caption_nll, classification, retrieval
from triweave.pretrain.evaluation.documents import HELD_OUT_SPLIT, EvaluationDocuments, read_documents
from triweave.pretrain.evaluation.embed import PartEncoder, is_contrastive
from triweave.pretrain.evaluation.floors import SimpleFeatures
from triweave.pretrain.evaluation.tasks import AUDIO, IMAGE, Task, retrieval_tasks

VERSION = 1
PACKAGES = ("triweave", "torch", "numpy", "scikit-learn", "scipy")
Tell = Callable[[str], object]


def evaluate_run(
    run: LoadedRun,
    *,
    control: LoadedRun | None = None,
    seed: int = 0,
    tell: Tell = lambda _: None,
) -> dict[str, Any]:
    """Return the content of evaluation.json for one run, and its control where there is one.

    Deterministic for a seed on one machine and number of threads, but for `seconds`. Raises PretrainError where the run
    holds nothing out, DataError where its shards cannot be read.
    """
    return evaluate_folds([run], controls=None if control is None else [control], seed=seed, tell=tell)


def evaluate_folds(
    runs: Sequence[LoadedRun],
    *,
    controls: Sequence[LoadedRun] | None = None,
    run_dir: Path | None = None,
    split: str = HELD_OUT_SPLIT,
    seed: int = 0,
    tell: Tell = lambda _: None,
) -> dict[str, Any]:
    """Return the content of evaluation.json over the queries of all runs, each asked about what it holds out.

    runs: one run, or the runs of all folds, in order.
    controls: models trained on shuffled pairs, one beside each run.
    run_dir: what the result names; None: that of the only run.
    split: what runs that trained on a split are asked about.
    """
    evaluation = Evaluation(split=split, seed=seed, tell=tell)
    for number, run in enumerate(runs):
        evaluation.add(run, None if controls is None else controls[number])
    return evaluation.result(run_dir=runs[0].run_dir if run_dir is None else run_dir)


class Evaluation:
    """Takes in one run after another, then sums up over the queries of all.

    split: what is held out; None where folds are. left_out: held-out documents that share a part with training, over
    all runs. runs: those taken in.
    tasks: task name -> task. ranks: task name -> part of the documents -> ranks, for every pool of every run.
    pictures: label -> classified pictures of every run. nlls: modality -> caption likelihoods of every run.
    """

    def __init__(self, *, split: str = HELD_OUT_SPLIT, seed: int, tell: Tell = lambda _: None) -> None:
        """split: what runs that trained on a split are asked about. seed: of shuffles, ties and resamples."""
        self._asked_split = split
        self.split: str | None = None
        self.left_out = 0
        self.runs: list[LoadedRun] = []
        self.tasks: dict[str, Task] = {}
        self.ranks: dict[str, list[dict[str, retrieval.PoolRanks]]] = {}
        self.pictures: dict[str, list[classification.ClassifiedPictures]] = {}
        self.nlls: dict[str, list[caption_nll.CaptionNlls]] = {}
        self._seed = seed
        self._tell = tell
        self._started = time.monotonic()

    def add(self, run: LoadedRun, control: LoadedRun | None) -> None:
        """Ask a run, and its control where there is one, about what the run holds out."""
        self.runs.append(run)
        # the floors' matrices are small: a second BLAS thread gains little, and costs much on a busy machine
        with threadpool_limits(limits=1, user_api="blas"):
            self._ask(run, control)

    def result(self, *, run_dir: Path) -> dict[str, Any]:
        """Return the content of evaluation.json; `run_dir` is what it names."""
        first = self.runs[0]
        return {
            "version": VERSION,
            "run_dir": str(run_dir),
            "step": first.step,
            "parameters": sum(parameter.numel() for parameter in first.model.parameters()),
            "split": self.split,
            "folds": None if len(self.runs) == 1 else len(self.runs),
            "left_out": self.left_out,
            "seed": self._seed,
            "machine": _machine(first),
            "versions": installed_versions(PACKAGES),
            **self.summary(),
            "seconds": round(time.monotonic() - self._started, 1),
        }

    def _ask(self, run: LoadedRun, control: LoadedRun | None) -> None:
        documents = read_documents(run.config.data, asked_split=self._asked_split, locate=run.locate, tell=self._tell)
        self.split = documents.split
        self.left_out += documents.left_out
        where = f"split {documents.split}" if documents.split else f"fold {documents.fold}"
        self._tell(
            f"{run.run_dir}, step {run.step}: {len(documents.held_out)} held-out documents ({where}), "
            f"{len(documents.training)} to fit floors and probes on"
        )
        features = SimpleFeatures(documents.read)
        encoder = PartEncoder(run, documents)
        if is_contrastive(run):
            self._add_retrieval(documents, encoder, control, features)
        else:
            self._tell("retrieval is left out: model.objectives has no `contrastive`, so the run makes no embeddings")
        self._add_pictures(documents, encoder, features)
        for modality in (IMAGE, AUDIO):
            nlls = caption_nll.caption_nlls(run, documents, modality, seed=self._seed, tell=self._tell)
            if nlls is not None:
                self.nlls.setdefault(modality, []).append(nlls)

    def summary(self) -> dict[str, Any]:
        """Return the figures; raises PretrainError where there was nothing to ask."""
        if not (self.ranks or self.pictures or self.nlls):
            raise PretrainError(
                "the held-out documents allow no task: none has a caption beside a picture or speech, "
                "or there are fewer than 20; build the shards from more of the corpus"
            )
        seed = self._seed
        return {
            "retrieval": {
                name: retrieval.summarise(self.tasks[name], ranks, seed=seed) for name, ranks in self.ranks.items()
            },
            "classification": {
                name: classification.summarise(parts, seed=seed) for name, parts in self.pictures.items()
            },
            "caption_nll": {name: caption_nll.summarise(parts, seed=seed) for name, parts in self.nlls.items()},
        }

    def _add_retrieval(
        self,
        documents: EvaluationDocuments,
        encoder: PartEncoder,
        control: LoadedRun | None,
        features: SimpleFeatures,
    ) -> None:
        control_encoder = None if control is None else PartEncoder(control, documents)
        for task in retrieval_tasks(documents):
            self._tell(f"retrieval: {task.name}")
            self.tasks.setdefault(task.name, task)
            for pool in task.pools:
                ranks = retrieval.rank_pool(
                    task, pool, model=encoder, control=control_encoder, features=features, seed=self._seed
                )
                self.ranks.setdefault(task.name, []).append(ranks)

    def _add_pictures(self, documents: EvaluationDocuments, encoder: PartEncoder, features: SimpleFeatures) -> None:
        """Classify the pictures of the first corpus that has categories."""
        corpora = sorted({document.corpus for document in documents.held_out if document.category and document.media})
        for corpus in corpora:
            self._tell(f"classification: category of the pictures of {corpus}")
            found = classification.classify(documents, encoder, features, corpus=corpus)
            if found is not None:
                self.pictures.setdefault("category", []).append(found)
                return


def _machine(run: LoadedRun) -> dict[str, Any]:
    import torch

    return {
        "system": platform.system(),
        "processor": processor_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "device": str(run.device),
    }
