"""Show the packs of a run's config without reading a sample: fill, rows, tokens per modality, what is left out.

examples:
  triweave plan launch/configs/demo_cpu.yaml
  triweave plan demo.yaml --lengths 512,1024,4096 --json
  triweave plan demo.yaml data.packing.images=8 data.seed=1

Needs the shards, the tokenizer and the token counts that the config's `data:` names; loads neither torch nor deepspeed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json

from triweave.data_pipeline.config import load_data_config, read_yaml
from triweave.data_pipeline.errors import ConfigError
from triweave.data_pipeline.stream.plan_report import FILL_BORDERS, PlanReport, report_plan

BAR_CHARACTERS = 40


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("config", help="YAML of a run; only its `data:` is read, and `train.global_batch_rows`")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example data.sequence_length=1024")
    parser.add_argument("--lengths", help="sequence lengths to compare, separated by commas (default: the config's)")
    parser.add_argument("--global-batch-rows", type=int, help="packs per step, for the steps of an epoch")
    parser.add_argument("--json", action="store_true", help="print figures as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Plan one epoch at each length and print what came out."""
    config = load_data_config(arguments.config, arguments.overrides)
    batch_rows = _global_batch_rows(arguments)
    reports = [
        report_plan(config, length, batch_rows) for length in _lengths(arguments.lengths) or [config.sequence_length]
    ]
    if arguments.json:
        print(json.dumps({"lengths": [dataclasses.asdict(report) for report in reports]}, indent=1))
    else:
        _show(reports)
    return 0


def _lengths(text: str | None) -> list[int]:
    try:
        lengths = [int(length) for length in (text or "").split(",") if length]
    except ValueError:
        raise ConfigError(f"--lengths {text}: give whole numbers separated by commas, for example 512,4096") from None
    return lengths


def _global_batch_rows(arguments: argparse.Namespace) -> int | None:
    """Return the option, an override, or the YAML's `train.global_batch_rows`, in this order; None without any."""
    rows = arguments.global_batch_rows
    if rows is None:
        train = read_yaml(arguments.config).get("train")
        rows = train.get("global_batch_rows") if isinstance(train, dict) else None
        for override in arguments.overrides:
            if override.startswith("train.global_batch_rows="):
                rows = override.partition("=")[2]
    if rows is None:
        return None
    try:
        number = int(rows)
    except (TypeError, ValueError):
        number = 0
    if number < 1:
        raise ConfigError(f"global_batch_rows={rows!r}: must be a whole number of at least 1")
    return number


def _show(reports: list[PlanReport]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title="packs of one epoch")
    table.add_column("sequence length")
    for report in reports:
        table.add_column(f"{report.sequence_length:,}", justify="right")
    lines: dict[str, list[str]] = {
        "fill": [f"{report.fill:.2%}" for report in reports],
        "fill without each block's last": [f"{report.fill_without_last:.2%}" for report in reports],
        "rows (packs)": [f"{report.rows:,}" for report in reports],
        "samples": [f"{report.samples:,}" for report in reports],
        "pieces": [f"{report.pieces:,}" for report in reports],
    }
    for name in reports[0].tokens:
        lines[f"{name} tokens"] = [f"{report.tokens[name]:,}" for report in reports]
    if any(report.alone_tokens for report in reports):
        lines["tokens in parts alone"] = [f"{report.alone_tokens:,}" for report in reports]
        lines["parts alone per contrastive group"] = [f"{report.segments_per_group:.1f}" for report in reports]
        lines["documents they are from"] = [f"{report.items_per_group:.1f}" for report in reports]
    if reports[0].steps_per_epoch:
        lines["steps per epoch"] = [f"{report.steps_per_epoch:,}" for report in reports]
    lines["planning, us per sample"] = [f"{report.plan_us_per_sample:.1f}" for report in reports]
    for heading, values in lines.items():
        table.add_row(heading, *values)
    console.print(table)
    for report in reports:
        console.print(f"\npack fill at length {report.sequence_length}")
        uppers = [f"< {border:>4.0%}" for border in FILL_BORDERS[1:]] + ["full  "]
        for lower, upper, count in zip(FILL_BORDERS, uppers, report.fill_counts, strict=True):
            bar = "█" * -(-count * BAR_CHARACTERS // max(1, *report.fill_counts))
            console.print(f"  {lower:>4.0%} {upper} {count:>9,} {bar}", highlight=False)
        for reason, count in report.left_out.items():
            console.print(f"  left out: {count:,} x {reason}", highlight=False, markup=False)
