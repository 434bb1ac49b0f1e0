"""The demo's last stages: what the model knows of held-out documents, and the page that shows it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from triweave.data_pipeline.shards.manifest import write_atomically
from triweave.launch.demo.stage_display import SUMMARY

EVALUATION_NAME = "evaluation.json"
Update = Callable[[float, float | None, str], None]


def evaluate(run_dir: Path, update: Update) -> dict[str, Any]:
    """Evaluate the run's last checkpoint, write RUN/evaluation.json, return the figures of result.json."""
    from triweave.pretrain.checkpoints.load import load_run
    from triweave.pretrain.evaluation.evaluate import evaluate_run

    tell = telling(update)
    evaluation = evaluate_run(load_run(run_dir, tell=tell), tell=tell)
    write_json(run_dir / EVALUATION_NAME, evaluation)
    facts = result_figures(evaluation)
    gaps = [f"by {name} {figure['gap']:+.3f} nats" for name, figure in facts["caption_nll_by_modality"].items()]
    words = f"{len(facts['retrieval'])} retrieval tasks; captions worse when shuffled {', '.join(gaps) or 'unknown'}"
    return {**facts, SUMMARY: words}


def result_figures(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Return what result.json takes of an evaluation; `floor` is the best floor of the task by R@10."""
    nlls = {
        name: {key: figure[key] for key in ("true", "shuffled", "gap", "ci", "n")}
        for name, figure in evaluation["caption_nll"].items()
    }
    pictures = nlls.get("image")
    return {
        "caption_nll_true": None if pictures is None else pictures["true"],
        "caption_nll_shuffled": None if pictures is None else pictures["shuffled"],
        "caption_nll_by_modality": nlls,
        "retrieval": {
            name: {
                **{key: task[key] for key in ("r1", "r10", "ci")},
                "floor": task["floors"][task["difference"]["floor"]],
                **{key: task[key] for key in ("chance", "n")},
            }
            for name, task in evaluation["retrieval"].items()
        },
    }


def report(run_dirs: Sequence[Path], page: Path, update: Update) -> dict[str, Any]:
    """Write the page of some runs."""
    from triweave.launch.report.write import write_report

    written = write_report(run_dirs, page, tell=telling(update))
    return {SUMMARY: f"{page}, {written['bytes'] / (1 << 20):.1f} MiB"}


def telling(update: Update) -> Callable[[str], None]:
    """Return a function that shows lines in the progress display, on a bar whose end nobody knows."""
    told = 0

    def tell(line: str) -> None:
        nonlocal told
        told += 1
        update(told, None, line)

    return tell


def write_json(path: Path, content: Any) -> None:
    """Write JSON in one act."""
    write_atomically(path, json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n")
