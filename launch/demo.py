"""The demo: everything Triweave does, on a small real corpus, in some minutes on two CPU cores.

    fetch -> build -> verify -> tokenizer -> tokenize -> plan -> train on 2 ranks until one is killed
          -> resume on 1 rank and finish -> score against a unigram model -> result.json

Interrupted at any point it continues there when it is started again; a second run repeats nothing and needs no network.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triweave.launch import demo_data, demo_training
from triweave.launch.errors import DemoError
from triweave.launch.machine import Machine, inspect_machine
from triweave.launch.stage_display import StageDisplay
from triweave.launch.stages import StageChain

DEMO_VERSION = 1
"""Raised when the stages change meaning, so that markers of older code do not count."""
STAGES = ("fetch", "build", "verify", "tokenizer", "tokenize", "plan", "train", "resume", "score")
TRAIN_RANKS = 2
RESUME_RANKS = 1
LEAST_STEPS = 30
"""Fewer leave no room for a checkpoint, a kill, repeated steps and a last mean."""
MEAN_STEPS = 10
"""Last steps over which losses are averaged and the unigram model is computed."""
RESULT_NAME = "result.json"


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """What a user may choose.

    out: folder of everything the demo writes.
    corpus: an unpacked Tux Paint folder or its .deb; None lets `fetch` find or download one.
    steps: optimizer steps; None takes those of launch/configs/demo_cpu.yaml.
    """

    out: Path
    corpus: Path | None = None
    steps: int | None = None


def run_demo(options: DemoOptions) -> dict[str, Any]:
    """Run or continue the demo and return what result.json holds.

    Raises DemoError where a stage fails, KeyboardInterrupt where the user stops it.
    """
    if options.steps is not None and options.steps < LEAST_STEPS:
        raise DemoError(f"--steps {options.steps}: the demo needs at least {LEAST_STEPS}")
    os.environ["DS_ACCELERATOR"] = "cpu"  # the same on every machine; also spares looking for GPUs
    machine = inspect_machine()
    config_path = demo_training.write_config(options.out, options.steps)
    with StageDisplay(STAGES) as display:
        chain = StageChain(options.out / "stages", display, key=DEMO_VERSION)
        facts = _data_stages(chain, options, config_path, display, machine)
        facts |= _training_stages(chain, config_path, display, machine)
    result = _result(facts, chain.seconds)
    target = options.out / RESULT_NAME
    temporary = target.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    temporary.replace(target)
    return result


def _data_stages(
    chain: StageChain,
    options: DemoOptions,
    config_path: Path,
    display: StageDisplay,
    machine: Machine,
) -> dict[str, Any]:
    """Get from nothing to planned packs."""
    out = options.out
    corpus, shards, tokenizer = out / "corpus", out / "shards", out / "tokenizer.model"
    workers, update = machine.cores, display.update
    given = None if options.corpus is None else str(options.corpus.resolve())
    run = chain.run
    facts = run("fetch", given, lambda: demo_data.fetch(options.corpus, corpus, update), outputs=(corpus,))
    facts |= run(
        "build",
        [demo_data.IMAGE_MAX_SIDE_PX, demo_data.AUDIO_RATE_HZ, demo_data.SHARD_SIZE_MB, demo_data.LANGUAGES],
        lambda: demo_data.build_shards(corpus, shards, workers, update),
        outputs=(shards / "manifest.json",),
        discard=shards,
    )
    facts |= run("verify", None, lambda: demo_data.verify_shards(shards, update))
    facts |= run(
        "tokenizer",
        demo_data.VOCABULARY,
        lambda: demo_data.make_tokenizer(shards, tokenizer, update),
        outputs=(tokenizer,),
    )
    facts |= run("tokenize", None, lambda: demo_data.count_tokens(shards, tokenizer, workers, update))
    facts |= run("plan", _section(config_path, "data"), lambda: demo_data.plan_packs(config_path))
    return facts


def _training_stages(chain: StageChain, config_path: Path, display: StageDisplay, machine: Machine) -> dict[str, Any]:
    """Train on two ranks, kill one, resume on one rank, score."""
    training = demo_training.DemoTraining(config_path, machine=machine, update=display.update)
    facts = chain.run(
        "train",
        [_section(config_path), TRAIN_RANKS],
        lambda: training.train_until_killed(TRAIN_RANKS),
        outputs=(training.run_dir,),
        discard=training.run_dir,
    )
    before, checkpoint_step = facts["losses_before_kill"], facts["checkpoint_step"]
    facts = facts | chain.run("resume", RESUME_RANKS, lambda: training.resume(RESUME_RANKS, before, checkpoint_step))
    return facts | chain.run("score", MEAN_STEPS, lambda: training.score(MEAN_STEPS))


def _section(config_path: Path, name: str | None = None) -> Any:
    """Return the config file, or one section of it, as JSON values."""
    import yaml

    tree = yaml.safe_load(config_path.read_text(encoding="utf-8"))
    return tree if name is None else tree[name]


def _result(facts: dict[str, Any], seconds: dict[str, float]) -> dict[str, Any]:
    """Return the keys of result.json in their order."""
    names = (
        *("shards", "samples", "pack_fill", "steps", "loss_first", "loss_last", "loss_by_modality"),
        *("unigram_by_modality", "supervised_tokens_by_modality", "resume_max_abs_diff", "resume_compared_steps"),
        *("data_wait_fraction", "tokens_per_s", "parameters"),
    )
    return {name: facts[name] for name in names} | {
        "seconds": seconds,
        "seconds_total": round(sum(seconds.values()), 1),
    }
