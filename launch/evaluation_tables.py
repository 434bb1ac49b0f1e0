"""The result of `triweave evaluate` as tables: every figure beside its floor, its control and chance."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

WAYS = {"prompt": "words for it", "probe": "probe of embeddings", "probe_hidden": "probe of hidden states"}
"""Way of classifying -> how the table calls it."""


def print_tables(result: dict[str, Any], console: Console | None = None) -> None:
    """Print retrieval, classification and caption likelihood; sections without figures are left out."""
    console = Console() if console is None else console
    held_out = f"split {result['split']}" if result["folds"] is None else f"{result['folds']} folds"
    console.print(
        f"{result['run_dir']}, step {result['step']}, {result['parameters']:,} parameters; held out: {held_out}; "
        f"{result['seconds']:.0f} s",
        highlight=False,
        markup=False,
    )
    if result["retrieval"]:
        console.print(retrieval_table(result["retrieval"]))
        console.print(floor_table(result["retrieval"]))
    else:
        console.print("retrieval: none; the run has no contrastive objective, or nothing to retrieve", highlight=False)
    if result["classification"]:
        console.print(classification_table(result["classification"]))
    if result["caption_nll"]:
        console.print(nll_table(result["caption_nll"]))


def retrieval_table(tasks: dict[str, Any]) -> Table:
    """Return the recalls of every task, beside chance and the control."""
    table = _table("Retrieval, % (95 % interval over concepts; control: trained on shuffled pairs)", "task")
    for heading in ("n", "R@1", "R@10", "interval", "chance", "control"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, task in tasks.items():
        table.add_row(
            escape(name),
            f"{task['n']:,}",
            _percent(task["r1"]),
            _percent(task["r10"]),
            _interval(task["ci"]["r10"]),
            _percent(task["chance"]["r10"]),
            "" if task["control"] is None else _percent(task["control"]["r10"]),
        )
    return table


def floor_table(tasks: dict[str, Any]) -> Table:
    """Return the best floor of every task, the difference to it, and R@10 without letters and digits."""
    table = _table("R@10 of the best floor, model minus it; R@10 of the model without symbols, %", "task")
    for heading in ("floor", "R@10", "model -", "interval", "no sym."):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, task in tasks.items():
        difference, without = task["difference"], task["without_symbols"]
        table.add_row(
            escape(name),
            difference["floor"],
            _percent(task["floors"][difference["floor"]]["r10"]),
            f"{100 * difference['r10']['mean']:+.1f}",
            _interval(difference["r10"]["ci"]),
            "" if without is None else _percent(without["r10"]),
        )
    return table


def classification_table(targets: dict[str, Any]) -> Table:
    """Return the accuracies."""
    table = _table("Accuracy on held-out pictures, %", "label")
    for heading in ("pictures", "classes", "by", "accuracy", "interval"):
        table.add_column(heading, justify="right")
    for name, target in targets.items():
        ways = {words: target[way] for way, words in WAYS.items() if target[way] is not None}
        for floor, share in target["floors"].items():
            ways[f"floor: {floor}"] = {"accuracy": share, "ci": target["floors_ci"][floor]}
        for words, figure in ways.items():
            size = (escape(name), f"{target['n']:,}", str(target["classes"]))
            table.add_row(*size, words, _percent(figure["accuracy"]), _interval(figure["ci"]))
    return table


def nll_table(media: dict[str, Any]) -> Table:
    """Return the caption likelihoods with true and shuffled media."""
    table = _table("Nats per caption token, by what stands before it", "medium")
    for heading in ("documents", "true", "shuffled", "none", "shuffled - true", "interval"):
        table.add_column(heading, justify="right")
    for name, figures in media.items():
        low, high = figures["ci"]
        table.add_row(
            escape(name),
            f"{figures['n']:,}",
            *(f"{figures[which]:.3f}" for which in ("true", "shuffled", "language_only")),
            f"{figures['gap']:+.3f}",
            f"{low:+.3f}..{high:+.3f}",
        )
    return table


def _table(title: str, first: str) -> Table:
    """Return a table that is narrow enough for 80 columns."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column(first, no_wrap=True)
    return table


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _interval(ends: list[float]) -> str:
    return f"{100 * ends[0]:.1f}..{100 * ends[1]:.1f}"
