"""The table of all fusions on one task: several seeds, one budget, each beside its best single modality and the floors.

Figures of a contender are means over the seeds; intervals (95 %) come from resampling concepts, with each document's
mean over the seeds. The best single modality of a figure is the one with the highest mean on these very questions:
choosing it so favours the single modality. A fusion beats it where the interval of the difference lies above 0.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from triweave.data_pipeline.bench.subset import machine
from triweave.data_pipeline.machine import installed_versions
from triweave.data_pipeline.shards.manifest import write_atomically
from triweave.pretrain.bench.fusion.floors import floors
from triweave.pretrain.bench.fusion.model import Contender, contenders
from triweave.pretrain.bench.fusion.task import FusionTask, RememberingDecoder
from triweave.pretrain.bench.fusion.training import Answers, Budget, train_and_ask
from triweave.pretrain.errors import PretrainError
from triweave.pretrain.evaluation.bootstrap import bootstrap
from triweave.pretrain.evaluation.metrics import hits

VERSION = 1
FIGURES = ("accuracy", "r1", "r10")
Floats = npt.NDArray[np.float64]


def select_contenders(only: Sequence[str]) -> list[Contender]:
    """Return the contenders of these names, all where none is given, and always every modality alone.

    Raises PretrainError for an unknown name.
    """
    everyone = contenders()
    fusions = [contender.name for contender in everyone if contender.is_fusion]
    if unknown := sorted(set(only) - set(fusions)):
        raise PretrainError(f"--only names {unknown[0]!r}; known: {', '.join(fusions)}")
    return [contender for contender in everyone if not contender.is_fusion or not only or contender.name in only]


def bench_fusion(
    task: FusionTask,
    chosen: Sequence[Contender],
    budget: Budget,
    *,
    seeds: int,
    work: Path | None = None,
    tell: Callable[[str], object] = lambda _: None,
) -> dict[str, Any]:
    """Return the figures of every contender, trained from the seeds 0, 1, ..., and of the floors, ready for JSON.

    work: folder that keeps the floors and each training's answers; what lies there already is taken, of this budget.
    """
    if work is not None:
        work.mkdir(parents=True, exist_ok=True)
    decode = RememberingDecoder()
    answers: dict[str, list[Answers]] = {contender.name: [] for contender in chosen}
    with threadpool_limits(limits=1, user_api="blas"):
        tell("floors")
        lowest = _floors(task, work)
        for seed in range(seeds):
            for number, contender in enumerate(chosen):
                tell(f"seed {seed}: {contender.name} ({seed * len(chosen) + number + 1}/{seeds * len(chosen)})")
                answers[contender.name].append(_answers(contender, task, decode, budget, seed, work))
    return {
        "version": VERSION,
        "task": _describe(task),
        "budget": {"steps": budget.steps, "documents": budget.batch, "seeds": seeds},
        "machine": machine(),
        "versions": installed_versions(("triweave", "torch", "numpy", "scikit-learn")),
        "floors": lowest,
        "contenders": summarise(task, chosen, answers),
    }


def summarise(task: FusionTask, chosen: Sequence[Contender], answers: dict[str, list[Answers]]) -> list[dict[str, Any]]:
    """Return one entry per contender."""
    values = {name: _values(found) for name, found in answers.items()}
    groups = _groups(task)
    singles = {
        figure: max(
            (one.name for one in chosen if not one.is_fusion and figure in values[one.name]),
            key=lambda name: float(values[name][figure].mean()),
        )
        for figure in FIGURES
    }
    rows = []
    for contender in chosen:
        mine, found = values[contender.name], answers[contender.name]
        row: dict[str, Any] = {
            "name": contender.name,
            "parts": list(contender.parts),
            "parameters": found[0].parameters,
            "cpu_s": round(sum(one.cpu_s for one in found), 1),
            "losses": [list(one.losses) for one in found],
        }
        for figure in FIGURES:
            row[figure] = None if figure not in mine else _estimate(mine[figure], groups[figure])
            if contender.is_fusion and figure in mine:
                against = mine[figure].mean(axis=0) - values[singles[figure]][figure].mean(axis=0)
                estimate = bootstrap(against, groups[figure], seed=0, signed=True)
                row[figure]["over_single"] = {
                    "single": singles[figure],
                    "mean": estimate.mean,
                    "ci": estimate.interval,
                    "beats": estimate.low > 0,
                }
        rows.append(row)
    return rows


def markdown(result: dict[str, Any]) -> str:
    """Return the result as a Markdown table, all figures in percent."""
    lines = [
        "| contender | parameters | category | R@1 | R@10 | category over single | R@10 over single |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["contenders"]:
        cells = [row["name"], f"{row['parameters']:,}"]
        cells += ["" if row[figure] is None else _percent(row[figure]) for figure in FIGURES]
        cells += [_against(row[figure]) for figure in ("accuracy", "r10")]
        lines.append("| " + " | ".join(cells) + " |")
    category, retrieval = result["floors"]["category"], result["floors"]["retrieval"]
    for name in dict.fromkeys((*category, *retrieval)):
        accuracy = f"{100 * category[name]:.1f}" if name in category else ""
        recalls = [f"{100 * value:.1f}" for value in retrieval.get(name, ())] or ["", ""]
        lines.append("| " + " | ".join([f"floor: {name}", "", accuracy, *recalls, "", ""]) + " |")
    return "\n".join(lines)


def _floors(task: FusionTask, work: Path | None) -> dict[str, Any]:
    path = None if work is None else work / "floors.json"
    if path is not None and path.exists():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    found = floors(task, seed=0)
    if path is not None:
        write_atomically(path, json.dumps(found).encode())
    return found


def _answers(
    contender: Contender, task: FusionTask, decode: RememberingDecoder, budget: Budget, seed: int, work: Path | None
) -> Answers:
    if work is None:
        return train_and_ask(contender, task, decode, budget, seed=seed)
    path = work / f"{contender.name.replace(' ', '-')}-{budget.steps}x{budget.batch}-{seed}.npz"
    if path.exists():
        return Answers.load(path)
    answers = train_and_ask(contender, task, decode, budget, seed=seed)
    answers.save(path)
    return answers


def _values(found: Sequence[Answers]) -> dict[str, Floats]:
    """Return figure -> [seeds, questions] of 0 and 1."""
    values = {"accuracy": np.stack([one.right for one in found])}
    ranks = [one.ranks for one in found if one.ranks is not None]
    return values | ({f"r{k}": np.stack([hits(each, k) for each in ranks]) for k in (1, 10)} if ranks else {})


def _groups(task: FusionTask) -> dict[str, list[str]]:
    """Return figure -> concept of every question."""
    asked = [document.group for _, pool in task.pools for document in pool.queries]
    return {"accuracy": [document.group for document in task.held_out], "r1": asked, "r10": asked}


def _estimate(values: Floats, groups: Sequence[str]) -> dict[str, Any]:
    estimate = bootstrap(values.mean(axis=0), groups, seed=0)
    return {"mean": estimate.mean, "ci": estimate.interval, "seeds": values.mean(axis=1).tolist()}


def _percent(figure: dict[str, Any]) -> str:
    spread = np.std(figure["seeds"], ddof=1) if len(figure["seeds"]) > 1 else 0.0
    return f"{100 * figure['mean']:.1f} ± {100 * spread:.1f}"


def _against(figure: dict[str, Any] | None) -> str:
    if figure is None or "over_single" not in figure:
        return ""
    found = figure["over_single"]
    low, high = found["ci"]
    verdict = "beats" if low > 0 else "below" if high < 0 else "no difference shown:"
    return f"{verdict} {found['single']} {100 * found['mean']:+.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _describe(task: FusionTask) -> dict[str, Any]:
    return {
        "corpus": "tuxpaint",
        "training": len(task.training),
        "held_out": len(task.held_out),
        "concepts": len({document.group for document in task.held_out}),
        "categories": len(task.categories),
        "languages": len(task.pools),
        "queries": sum(len(pool.queries) for _, pool in task.pools),
    }
