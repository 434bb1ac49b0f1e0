"""The long demo: the same data as the short one, three seeds and a control, about an hour on two CPU cores.

    data stages of the short demo (shared) -> train seed0, seed1, seed2, control -> evaluate, pool over seeds
          -> report.html, result.json

    OUT/long/NAME (a run each), OUT/long/configs/NAME.yaml, OUT/long/stages (markers)

The control is trained like seed0, with every picture and sound exchanged for another one: what it can do is not learnt
from the pairs. Interrupted, the same command continues, every training from its newest checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from triweave.launch.demo import evaluation, settings
from triweave.launch.demo.corpora import SETS
from triweave.launch.demo.parallel import train_side_by_side
from triweave.launch.demo.short import (
    DATA_STAGES,
    DEMO_VERSION,
    MEAN_STEPS,
    REPORT_NAME,
    RESULT_NAME,
    DemoFolder,
    DemoOptions,
    corpora_facts,
    data_stages,
    prepare,
)
from triweave.launch.demo.stage_display import SUMMARY, StageDisplay
from triweave.launch.demo.stages import StageChain
from triweave.launch.errors import DemoError
from triweave.launch.metrics import mean_loss_by_modality, read_metrics
from triweave.launch.variants import SHUFFLE_SEED

LONG_VERSION = 1
"""Raised when the stages change meaning, so that markers of older code do not count."""
SEEDS = 3
CONTROL = "control"
LEAST_STEPS = MEAN_STEPS
STAGES = (*DATA_STAGES, "train", "evaluate", "report")


def run_long(options: DemoOptions) -> dict[str, Any]:
    """Run or continue the long demo and return what OUT/long/result.json holds.

    Raises DemoError where a stage fails or OUT/long holds trainings with other settings, KeyboardInterrupt where the
    user stops it.
    """
    if options.steps is not None and options.steps < LEAST_STEPS:
        raise DemoError(f"--steps {options.steps}: the long demo needs at least {LEAST_STEPS}")
    machine = prepare(options)
    out = options.out / "long"
    page = out / REPORT_NAME
    with StageDisplay(STAGES) as display:
        update = display.update
        data = StageChain(options.out / "stages", display, key=DEMO_VERSION)
        facts = data_stages(data, options, display, machine)
        trees = run_configs(options, facts["corpus_set"])
        configs = write_configs(trees, out)
        steps = next(iter(trees.values()))["train"]["steps"]
        chain = StageChain(out / "stages", display, key=[LONG_VERSION, data.key])
        folders = {name: out / name for name in trees}
        facts |= chain.run(
            "train",
            trees,
            lambda: _train(configs, folders, steps, machine.cores, update),
            outputs=tuple(folders.values()),
        )
        facts |= chain.run(
            "evaluate",
            None,
            lambda: _evaluate(folders, update),
            outputs=tuple(folder / evaluation.EVALUATION_NAME for folder in folders.values()),
        )
        run_dirs = list(folders.values())
        chain.run("report", None, lambda: evaluation.report(run_dirs, page, update), outputs=(page,))
    result = {
        "steps": steps,
        "seeds": SEEDS,
        "corpora": corpora_facts(facts, next(iter(trees.values()))),
        "fallback_reason": facts["fallback_reason"],
        **{name: facts[name] for name in ("parameters", "runs", "retrieval", "classification", "caption_nll")},
        **{name: facts[name] for name in ("split", "left_out", "machine", "versions")},
        "report": str(page),
        "seconds": {**data.seconds, **chain.seconds},
    }
    result["seconds_total"] = round(sum(result["seconds"].values()), 1)
    evaluation.write_json(out / RESULT_NAME, result)
    return result


def run_configs(options: DemoOptions, corpus_set: str) -> dict[str, dict[str, Any]]:
    """Return run -> its config: the seeds in order, then the control of the first."""
    folder, out = DemoFolder(out=options.out), options.out / "long"
    base = settings.demo_config(
        settings.LONG_TEMPLATE,
        SETS[corpus_set],
        shards=folder.shards,
        tokenizer=folder.tokenizer,
        run_dir=out,
        steps=options.steps,
    )
    first = int(base["seed"])
    runs = {f"seed{number}": first + number for number in range(SEEDS)}
    trees = {name: settings.with_seed(base, seed, out / name) for name, seed in runs.items()}
    return trees | {CONTROL: settings.with_shuffled_pairs(trees["seed0"], SHUFFLE_SEED, out / CONTROL)}


def write_configs(trees: dict[str, dict[str, Any]], out: Path) -> dict[str, Path]:
    """Write the configs and return their paths. Raises DemoError where a run was begun with another one."""
    paths = {name: out / "configs" / f"{name}.yaml" for name in trees}
    for name, path in paths.items():
        begun = path.exists() and (out / name).exists()
        if begun and yaml.safe_load(path.read_text(encoding="utf-8")) != trees[name]:
            raise DemoError(
                f"{out / name} was trained with other settings (compare {path}); remove {out} to train anew, "
                "or choose another --out"
            )
    for name, path in paths.items():
        settings.write_config(trees[name], path)
    return paths


def _train(
    configs: dict[str, Path],
    folders: dict[str, Path],
    steps: int,
    cores: int,
    update: evaluation.Update,
) -> dict[str, Any]:
    """Train all runs, as many at a time as there are cores; return what the last steps say of each."""
    train_side_by_side(configs, steps=steps, at_once=max(1, cores), update=update)
    runs = {}
    for name, folder in folders.items():
        metrics = read_metrics(folder)
        entries = [metrics[step] for step in sorted(metrics)]
        last = entries[-MEAN_STEPS:]
        seconds = sum(entry["step_s"] for entry in entries)
        runs[name] = {
            "run_dir": str(folder),
            "shuffled_pairs": name == CONTROL,
            "loss_last": sum(entry["loss"] for entry in last) / len(last),
            "loss_by_modality": mean_loss_by_modality(last),
            "tokens_per_s": sum(entry["tokens"] for entry in entries) / seconds,
            "train_seconds": round(seconds, 1),
        }
    words = ", ".join(f"{name} {own['loss_last']:.2f}" for name, own in runs.items())
    return {"runs": runs, SUMMARY: f"{steps} steps each; loss of the last {MEAN_STEPS}: {words}"}


def _evaluate(folders: dict[str, Path], update: evaluation.Update) -> dict[str, Any]:
    """Evaluate every run, write its evaluation.json, and return the figures over the seeds."""
    from triweave.pretrain.checkpoints.load import load_run
    from triweave.pretrain.evaluation.evaluate import Evaluation
    from triweave.pretrain.evaluation.pool import pool_seeds

    tell = evaluation.telling(update)
    loaded = {name: load_run(folder, tell=tell) for name, folder in folders.items()}
    control = loaded[CONTROL]
    found: dict[str, Evaluation] = {}
    results: dict[str, dict[str, Any]] = {}
    for name, run in loaded.items():
        found[name] = Evaluation(seed=0, tell=lambda line, name=name: tell(f"{name}: {line}"))  # type: ignore[misc]
        found[name].add(run, control if run is not control else None)
        results[name] = found[name].result(run_dir=folders[name])
        evaluation.write_json(folders[name] / evaluation.EVALUATION_NAME, results[name])
    tell("pooling the seeds")
    pooled = pool_seeds([own for name, own in found.items() if name != CONTROL], found[CONTROL], seed=0)
    facts = {name: results["seed0"][name] for name in ("parameters", "split", "left_out", "machine", "versions")}
    return {**pooled, **facts, SUMMARY: f"{len(pooled['retrieval'])} retrieval tasks, {SEEDS} seeds, 1 control"}
