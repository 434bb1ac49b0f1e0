"""What the demo prints at its end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from triweave.launch.demo.corpora import fallback_line

MARKDOWN_COLUMNS = 220
"""Wide enough for every row: a terminal may wrap them, a file must not."""


def print_result(result: dict[str, Any]) -> None:
    """Print the losses beside a unigram model's, caption likelihoods, retrieval, and the other figures."""
    console = Console()
    console.print(loss_table(result))
    if result["caption_nll_by_modality"]:
        console.print(nll_table(result["caption_nll_by_modality"]))
    if result["retrieval"]:
        console.print(retrieval_table(result["retrieval"]))
    console.print("\n".join(other_lines(result)), highlight=False, markup=False, soft_wrap=True)


def print_long_result(result: dict[str, Any]) -> None:
    """Print the learning tables as Markdown, so that they can be copied, and where the page is."""
    console = Console(width=MARKDOWN_COLUMNS)
    console.print(learning_table(result["retrieval"]))
    console.print(learning_nll_table(result["caption_nll"]))
    if result["classification"]:
        console.print(learning_accuracy_table(result["classification"]))
    console.print("\n".join(long_lines(result)), highlight=False, markup=False, soft_wrap=True)


def learning_table(tasks: dict[str, Any]) -> Table:
    """Return R@10 of every task over the seeds, beside its best floor, the control and chance."""
    headings = (
        "queries",
        "R@1",
        "R@10 [95 %]",
        "seeds",
        "best floor",
        "model - floor [95 %]",
        "control [95 %]",
        "chance",
    )
    table = _markdown("retrieval, held out, %", headings)
    for name, task in tasks.items():
        difference, control = task["difference"], task["control"]
        table.add_row(
            name,
            f"{task['n']:,}",
            _percent(task["r1"]),
            f"{_percent(task['r10'])} [{_percents(task['ci']['r10'])}]",
            ", ".join(map(_percent, task["seeds"]["r10"])),
            f"{_percent(task['floors'][difference['floor']]['r10'])} ({difference['floor']})",
            f"{100 * difference['r10']['mean']:+.1f} [{_percents(difference['r10']['ci'])}]",
            f"{_percent(control['r10'])} [{_percents(control['ci']['r10'])}]",
            _percent(task["chance"]["r10"]),
        )
    return table


def learning_nll_table(media: dict[str, Any]) -> Table:
    """Return the likelihood of captions over the seeds, with the gap of the control."""
    headings = ("documents", "true", "shuffled", "text alone", "shuffled - true [95 %]", "seeds", "control's [95 %]")
    table = _markdown("captions, held out, nats per token", headings)
    words = {"image": "given a picture", "audio": "given a sound"}
    for name, figure in media.items():
        control = figure["control"]
        table.add_row(
            words.get(name, name),
            f"{figure['n']:,}",
            *(f"{figure[key]:.3f}" for key in ("true", "shuffled", "language_only")),
            f"{figure['gap']:+.3f} [{_nats(figure['ci'])}]",
            ", ".join(f"{gap:+.3f}" for gap in figure["seeds"]),
            f"{control['gap']:+.3f} [{_nats(control['ci'])}]",
        )
    return table


def learning_accuracy_table(labels: dict[str, Any]) -> Table:
    """Return the accuracies over the seeds, beside their floors."""
    table = _markdown("label of held-out pictures, %", ("pictures", "classes", "by", "accuracy [95 %]", "control"))
    for name, label in labels.items():
        size = (name, f"{label['n']:,}", f"{label['classes']}")
        for way in ("prompt", "probe", "probe_hidden"):
            figure = label[way]
            if figure is not None:
                accuracy = f"{_percent(figure['accuracy'])} [{_percents(figure['ci'])}]"
                table.add_row(*size, way, accuracy, _percent(label["control"][way]["accuracy"]))
        for floor, share in label["floors"].items():
            table.add_row(*size, f"floor: {floor}", _percent(share), "")
    return table


def long_lines(result: dict[str, Any]) -> list[str]:
    """Return the lines below the learning tables."""
    return [
        *([fallback_line(result["fallback_reason"])] if result["fallback_reason"] else []),
        f"{corpora_words(result)}; {result['parameters']:,} parameters, {result['steps']} steps, "
        f"{result['seeds']} seeds; intervals over concepts and seeds; control: trained on shuffled pairs; "
        f"{result['seconds_total']:.0f} s of work",
        f"open {result['report']} in a browser: the runs side by side",
    ]


def loss_table(result: dict[str, Any]) -> Table:
    """Return the losses of the last steps."""
    table = _table(f"Loss per token after {result['steps']} steps (nats)", "targets that follow")
    for heading in ("tokens", "unigram model", "this model", "difference"):
        table.add_column(heading, justify="right")
    for name, loss in result["loss_by_modality"].items():
        unigram = result["unigram_by_modality"][name]
        tokens = result["supervised_tokens_by_modality"][name]
        table.add_row(name, f"{tokens:,}", f"{unigram:.3f}", f"{loss:.3f}", f"{loss - unigram:+.3f}")
    return table


def nll_table(by_modality: dict[str, Any]) -> Table:
    """Return the likelihood of held-out captions with the true medium and with another one."""
    table = _table("Held-out captions (nats per token): above 0, the model uses what it sees or hears", "given")
    for heading in ("documents", "true", "shuffled", "shuffled - true", "95 % interval"):
        table.add_column(heading, justify="right")
    words = {"image": "a picture", "audio": "a sound"}
    for name, figure in by_modality.items():
        low, high = figure["ci"]
        table.add_row(
            words.get(name, name),
            f"{figure['n']:,}",
            f"{figure['true']:.3f}",
            f"{figure['shuffled']:.3f}",
            f"{figure['gap']:+.3f}",
            f"{low:+.3f}..{high:+.3f}",
        )
    return table


def retrieval_table(tasks: dict[str, Any]) -> Table:
    """Return R@10 of every task beside chance and its best floor."""
    table = _table("Held-out retrieval, R@10 in % (floor: ridge regression or length)", "task")
    for heading in ("queries", "this model", "95 % interval", "floor", "chance"):
        table.add_column(heading, justify="right")
    for name, task in tasks.items():
        low, high = task["ci"]["r10"]
        table.add_row(
            name,
            f"{task['n']:,}",
            f"{100 * task['r10']:.1f}",
            f"{100 * low:.1f}..{100 * high:.1f}",
            f"{100 * task['floor']['r10']:.1f}",
            f"{100 * task['chance']['r10']:.1f}",
        )
    return table


def other_lines(result: dict[str, Any]) -> list[str]:
    """Return the lines below the tables."""
    return [
        *([fallback_line(result["fallback_reason"])] if result["fallback_reason"] else []),
        f"{corpora_words(result)} in {result['shards']} shards, packs {result['pack_fill']:.2%} full; "
        f"{result['parameters']:,} parameters, {result['tokens_per_s']:,.0f} tokens/s, "
        f"waiting for data {result['data_wait_fraction']:.1%} of the time",
        f"after the kill, {result['resume_compared_steps']} steps repeated on another number of ranks: "
        f"largest difference of a loss {result['resume_max_abs_diff']:.2e}; {result['seconds_total']:.0f} s of work",
        f"open {result['report']} in a browser: curves, retrieval, and captions that the model writes",
    ]


def corpora_words(result: dict[str, Any]) -> str:
    """Return the corpora with their numbers of documents."""
    return ", ".join(
        f"{own['documents']:,} documents of {name}{' (synthetic speech)' if own['synthetic_speech'] else ''}"
        for name, own in result["corpora"].items()
    )


def _table(title: str, first: str) -> Table:
    """Return a table that is narrow enough for 80 columns."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column(first, no_wrap=True)
    return table


def _markdown(first: str, headings: Sequence[str]) -> Table:
    """Return a table in Markdown, figures to the right."""
    table = Table(box=box.MARKDOWN)
    table.add_column(first, no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _percents(ends: Sequence[float]) -> str:
    return f"{100 * ends[0]:.1f}, {100 * ends[1]:.1f}"


def _nats(ends: Sequence[float]) -> str:
    return f"{ends[0]:+.3f}, {ends[1]:+.3f}"
