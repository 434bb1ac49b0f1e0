"""The demo: everything Triweave does, on small real corpora, in some minutes on two CPU cores.

    fetch -> build -> verify -> tokenizer -> tokenize -> plan -> train on 2 ranks until one is killed
          -> resume on 1 rank and finish -> score against a unigram model -> evaluate on held-out documents
          -> report.html, result.json

    OUT/corpora/NAME, OUT/shards/NAME, OUT/tokenizer.model, OUT/train (the run), OUT/stages (markers)

Interrupted at any point it continues there when it is started again; a second run repeats nothing and needs no network.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from triweave.launch.demo import data, evaluation, settings
from triweave.launch.demo.corpora import SETS, CorpusChoice, CorpusSet, fetch
from triweave.launch.demo.stage_display import StageDisplay
from triweave.launch.demo.stages import StageChain
from triweave.launch.demo.training import DemoTraining
from triweave.launch.errors import DemoError
from triweave.launch.machine import Machine, inspect_machine

DEMO_VERSION = 2
"""Raised when the stages change meaning, so that markers of older code do not count."""
DATA_STAGES = ("fetch", "build", "verify", "tokenizer", "tokenize")
STAGES = (*DATA_STAGES, "plan", "train", "resume", "score", "evaluate", "report")
TRAIN_RANKS = 2
RESUME_RANKS = 1
LEAST_STEPS = 30
"""Fewer leave no room for a checkpoint, a kill, repeated steps and a last mean."""
MEAN_STEPS = 10
"""Last steps over which losses are averaged and the unigram model is computed."""
RESULT_NAME = "result.json"
REPORT_NAME = "report.html"


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """What a user may choose.

    out: folder of everything the demo writes.
    choice: the corpora.
    steps: optimizer steps; None takes those of the shipped config.
    """

    out: Path
    choice: CorpusChoice = field(default_factory=CorpusChoice)
    steps: int | None = None


@dataclass(frozen=True, kw_only=True)
class DemoFolder:
    """Where things lie in OUT."""

    out: Path

    @property
    def corpora(self) -> Path:
        """Folder of fetched corpora."""
        return self.out / "corpora"

    @property
    def shards(self) -> Path:
        """Folder of shard folders."""
        return self.out / "shards"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer of all corpora."""
        return self.out / "tokenizer.model"


def run_demo(options: DemoOptions) -> dict[str, Any]:
    """Run or continue the demo and return what result.json holds.

    Raises DemoError where a stage fails, KeyboardInterrupt where the user stops it.
    """
    if options.steps is not None and options.steps < LEAST_STEPS:
        raise DemoError(f"--steps {options.steps}: the demo needs at least {LEAST_STEPS}")
    machine = prepare(options)
    folder, out = DemoFolder(out=options.out), options.out
    with StageDisplay(STAGES) as display:
        chain = StageChain(out / "stages", display, key=DEMO_VERSION)
        facts = data_stages(chain, options, display, machine)
        chosen = SETS[facts["corpus_set"]]
        tree = settings.demo_config(
            settings.SHORT_TEMPLATE,
            chosen,
            shards=folder.shards,
            tokenizer=folder.tokenizer,
            run_dir=out / "train",
            steps=options.steps,
        )
        config_path = settings.write_config(tree, out / "config.yaml")
        facts |= chain.run("plan", tree["data"], lambda: data.plan_packs(config_path))
        facts |= _training_stages(chain, config_path, tree, display, machine)
        run_dir, page = out / "train", out / REPORT_NAME
        file = run_dir / evaluation.EVALUATION_NAME
        facts |= chain.run("evaluate", None, lambda: evaluation.evaluate(run_dir, display.update), outputs=(file,))
        facts |= {"report": str(page)}
        # the report takes the figures of the unigram model from it
        evaluation.write_json(out / RESULT_NAME, _result(facts, tree, chain.seconds))
        chain.run("report", None, lambda: evaluation.report([run_dir], page, display.update), outputs=(page,))
    result = _result(facts, tree, chain.seconds)
    evaluation.write_json(out / RESULT_NAME, result)
    return result


def prepare(options: DemoOptions) -> Machine:
    """Check the options and settle what all stages need."""
    options.choice.check()
    os.environ["DS_ACCELERATOR"] = "cpu"  # the same on every machine; also spares looking for GPUs
    return inspect_machine()


def data_stages(chain: StageChain, options: DemoOptions, display: StageDisplay, machine: Machine) -> dict[str, Any]:
    """Get from nothing to counted tokens: what the short and the long demo share."""
    folder, workers, update = DemoFolder(out=options.out), machine.cores, display.update
    run = chain.run
    facts = run(
        "fetch",
        options.choice.as_json(),
        lambda: fetch(options.choice, folder.corpora, update=update, note=display.note),
        outputs=lambda facts: tuple(folder.corpora / name for name in facts["origins"]),
    )
    chosen = SETS[facts["corpus_set"]]
    shards = shard_folders(options.out, chosen)
    facts = facts | run(
        "build",
        data.build_options(chosen),
        lambda: data.build_shards(chosen, folder.corpora, folder.shards, workers, update),
        outputs=tuple(path / "manifest.json" for path in shards),
        discard=folder.shards,
    )
    run("verify", None, lambda: data.verify_shards(shards, update))
    run(
        "tokenizer",
        [chosen.vocabulary, data.TRAINING_SPLIT],
        lambda: data.make_tokenizer(shards, chosen.vocabulary, folder.tokenizer, update),
        outputs=(folder.tokenizer,),
    )
    run("tokenize", None, lambda: data.count_tokens(shards, folder.tokenizer, workers, update))
    return facts


def shard_folders(out: Path, chosen: CorpusSet) -> list[Path]:
    """Return the shard folder of every corpus."""
    return [DemoFolder(out=out).shards / name for name in chosen.sources]


def corpora_facts(facts: dict[str, Any], tree: dict[str, Any]) -> dict[str, Any]:
    """Return corpus -> what result.json says of it."""
    synthetic = SETS[facts["corpus_set"]].synthetic
    weights = {source["name"]: source["weight"] for source in tree["data"]["sources"]}
    return {
        name: {
            "documents": own["documents"],
            "shards": own["shards"],
            "weight": weights[name],
            "origin": facts["origins"][name],
            "synthetic_speech": synthetic,
        }
        for name, own in facts["corpus_facts"].items()
    }


def _training_stages(
    chain: StageChain, config_path: Path, tree: dict[str, Any], display: StageDisplay, machine: Machine
) -> dict[str, Any]:
    """Train on two ranks, kill one, resume on one rank, score."""
    training = DemoTraining(config_path, machine=machine, update=display.update)
    facts = chain.run(
        "train",
        [tree, TRAIN_RANKS],
        lambda: training.train_until_killed(TRAIN_RANKS),
        outputs=(training.run_dir,),
        discard=training.run_dir,
    )
    before, checkpoint_step = facts["losses_before_kill"], facts["checkpoint_step"]
    facts = facts | chain.run("resume", RESUME_RANKS, lambda: training.resume(RESUME_RANKS, before, checkpoint_step))
    return facts | chain.run("score", MEAN_STEPS, lambda: training.score(MEAN_STEPS))


def _result(facts: dict[str, Any], tree: dict[str, Any], seconds: dict[str, float]) -> dict[str, Any]:
    """Return the keys of result.json in their order."""
    names = (
        *("shards", "samples", "pack_fill", "steps", "loss_first", "loss_last", "loss_by_modality"),
        *("unigram_by_modality", "supervised_tokens_by_modality", "resume_max_abs_diff", "resume_compared_steps"),
        *("caption_nll_true", "caption_nll_shuffled", "caption_nll_by_modality", "retrieval"),
        *("data_wait_fraction", "tokens_per_s", "parameters", "report"),
    )
    return {
        "corpora": corpora_facts(facts, tree),
        "fallback_reason": facts["fallback_reason"],
        **{name: facts[name] for name in names},
        "seconds": seconds,
        "seconds_total": round(sum(seconds.values()), 1),
    }
