"""Look at the packs of a run's config before any of it is read: fill, balance, shuffling, bytes, left out.

examples:
  triweave plan launch/configs/demo_cpu.yaml
  triweave plan demo.yaml --json | jq .max_over_mean_rank_cost
  triweave plan demo.yaml --lengths 512,1024,4096 --num-ranks 16
  triweave plan demo.yaml data.packing.images=8 data.seed=1

Needs the shards, the tokenizer and the token counts that the config's `data:` names; loads neither torch nor deepspeed.
The figures follow from metadata. Requests, cache and reading time are a model of an object store; the time of planning
is measured here. `--json` prints one object, with several lengths {"lengths": [...]}, and where the config has a
schedule {"segments": [...]}, one object for each. What each key means: docs/planning.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

from triweave.data_pipeline.config import DataConfig, load_data_config
from triweave.data_pipeline.errors import ConfigError
from triweave.data_pipeline.stream.plan_report import FILL_BORDERS, PlanOptions, PlanReport, report_plan
from triweave.launch.train_section import train_number, whole_number

BAR_CHARACTERS = 40
USUAL_RANKS = 8
"""Ranks that balance is looked at for, where nothing is said; fewer where a step has fewer rows."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("config", help="YAML of a run; only its `data:` is read, and the rows of a batch from `train:`")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example data.sequence_length=1024")
    parser.add_argument("--lengths", help="sequence lengths to compare, separated by commas (default: the config's)")
    parser.add_argument("--global-batch-rows", type=int, help="packs per step (default: train.global_batch_rows)")
    parser.add_argument("--num-ranks", type=int, help=f"ranks to balance (default {USUAL_RANKS}, or a step's rows)")
    parser.add_argument("--link-mb-per-s", type=float, default=200.0, help="rate of the object store (default 200)")
    parser.add_argument("--link-latency-ms", type=float, default=20.0, help="its time to first byte (default 20)")
    parser.add_argument("--json", action="store_true", help="print figures as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Plan one epoch at each length, or of each segment of the schedule, and print what came out."""
    config = load_data_config(arguments.config, arguments.overrides)
    options = _options(arguments)
    lengths = _lengths(arguments.lengths)
    kind = "lengths" if lengths else "segments"
    looked_at = [(config, length) for length in lengths] or [(one, one.sequence_length) for one in config.segments]
    reports = [report_plan(one, length, options) for one, length in looked_at]
    if arguments.json:
        print(json.dumps(_as_json(kind, config, reports, one_object=not lengths and len(reports) == 1), indent=1))
    else:
        _show(reports, _headings(kind, config, reports))
    return 0


def _as_json(kind: str, config: DataConfig, reports: list[PlanReport], *, one_object: bool) -> dict[str, Any]:
    objects = [dataclasses.asdict(report) for report in reports]
    if one_object:
        return objects[0]
    if kind == "segments":
        starts = [0, *(entry.after_step for entry in config.schedule)]
        objects = [{"after_step": start, **item} for start, item in zip(starts, objects, strict=True)]
    return {kind: objects}


def _headings(kind: str, config: DataConfig, reports: list[PlanReport]) -> list[str]:
    if kind == "lengths" or len(reports) == 1:
        return [f"{report.sequence_length:,}" for report in reports]
    starts = [0, *(entry.after_step for entry in config.schedule)]
    return [f"{report.sequence_length:,} from step {at:,}" for at, report in zip(starts, reports, strict=True)]


def _options(arguments: argparse.Namespace) -> PlanOptions:
    """Return what to look for, from the options, the overrides and the YAML's `train:`, in this order."""
    rows, config, overrides = arguments.global_batch_rows, arguments.config, arguments.overrides
    if rows is None:
        rows = train_number(config, overrides, "global_batch_rows")
    else:
        rows = whole_number("global_batch_rows", rows)
    micro = train_number(config, overrides, "micro_batch_rows") or 1
    ranks = arguments.num_ranks
    ranks = min(USUAL_RANKS, rows or USUAL_RANKS) if ranks is None else whole_number("--num-ranks", ranks)
    for name in ("link_mb_per_s", "link_latency_ms"):
        value = getattr(arguments, name)
        if not 0 <= value < float("inf") or (name == "link_mb_per_s" and not value):
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be a positive number")
    return PlanOptions(
        global_batch_rows=rows,
        micro_batch_rows=micro,
        ranks=ranks,
        link_mb_per_s=arguments.link_mb_per_s,
        link_latency_ms=arguments.link_latency_ms,
    )


def _lengths(text: str | None) -> list[int]:
    try:
        lengths = [int(length) for length in (text or "").split(",") if length]
    except ValueError:
        raise ConfigError(f"--lengths {text}: give whole numbers separated by commas, for example 512,4096") from None
    return lengths


def _show(reports: list[PlanReport], headings: list[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title="packs of one epoch")
    table.add_column("sequence length")
    for heading in headings:
        table.add_column(heading, justify="right")
    for name, values in (_pack_lines(reports) | _stream_lines(reports)).items():
        table.add_row(name, *values)
    console.print(table)
    for report in reports:
        console.print(f"\npack fill at length {report.sequence_length}")
        uppers = [f"< {border:>4.0%}" for border in FILL_BORDERS[1:]] + ["full  "]
        for lower, upper, count in zip(FILL_BORDERS, uppers, report.fill_counts, strict=True):
            bar = "█" * -(-count * BAR_CHARACTERS // max(1, *report.fill_counts))
            console.print(f"  {lower:>4.0%} {upper} {count:>9,} {bar}", highlight=False)
        for reason, count in report.left_out.items():
            console.print(f"  left out: {count:,} x {reason}", highlight=False, markup=False)


def _pack_lines(reports: list[PlanReport]) -> dict[str, list[str]]:
    """Return the table's lines on packs: name -> a value for each report."""
    lines = {
        "fill": [f"{report.fill:.2%}" for report in reports],
        "fill without each block's last": [f"{report.fill_without_last:.2%}" for report in reports],
        "rows (packs)": [f"{report.rows:,}" for report in reports],
        "samples": [f"{report.samples:,}" for report in reports],
        "pieces": [f"{report.pieces:,}" for report in reports],
    }
    for name in reports[0].tokens_per_modality:
        lines[f"{name} tokens"] = [f"{report.tokens_per_modality[name]:,}" for report in reports]
    if any(report.alone_tokens for report in reports):
        lines["tokens in parts alone"] = [f"{report.alone_tokens:,}" for report in reports]
        lines["parts alone per contrastive group"] = [f"{report.segments_per_group:.1f}" for report in reports]
        lines["documents they are from"] = [f"{report.items_per_group:.1f}" for report in reports]
    return lines


def _stream_lines(reports: list[PlanReport]) -> dict[str, list[str]]:
    """Return the table's lines on steps, shuffling and reading."""
    lines = {}
    if reports[0].steps_per_epoch:
        lines["steps per epoch"] = [f"{report.steps_per_epoch:,}" for report in reports]
        name = f"costliest / mean rank, {reports[0].ranks} ranks"
        lines[name] = [_ratio(report.max_over_mean_rank_cost) for report in reports]
        lines["the same, worst step"] = [_ratio(report.worst_step_rank_cost) for report in reports]
    lines |= {
        "shuffle distance (1: random)": [_ratio(report.shuffle_distance) for report in reports],
        "shuffle entropy (1: random)": [_ratio(report.shuffle_entropy) for report in reports],
        "MB to read": [_megabytes(report.bytes_to_read) for report in reports],
    }
    if any(report.requests_to_read for report in reports):
        lines["model: requests"] = [f"{report.requests_to_read:,}" for report in reports]
        lines["model: MB from the store"] = [_megabytes(report.bytes_from_store) for report in reports]
        lines["model: MB of cache"] = [_megabytes(report.cache_bytes) for report in reports]
        lines["model: read the first batch, s"] = [f"{report.first_batch_read_s:.3f}" for report in reports]
    lines["MB of the first batch"] = [_megabytes(report.first_batch_bytes) for report in reports]
    lines["measured: plan the first block, s"] = [f"{report.first_batch_plan_s:.3f}" for report in reports]
    lines["measured: planning, us per sample"] = [f"{report.plan_us_per_sample:.1f}" for report in reports]
    return lines


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _megabytes(value: int) -> str:
    return f"{value / 1e6:,.1f}"
