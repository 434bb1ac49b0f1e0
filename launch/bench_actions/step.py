"""Measure what a training step costs over a bare DeepSpeed loop and torch's FSDP2, and what its state takes.

examples:
  triweave bench step --json
  triweave bench step --config launch/configs/demo_cpu.yaml --stages 1,3 --num-ranks 2
  triweave bench step model.d_model=256 model.layers=8 data.sequence_length=1024

The default config is the demo's; its shards and tokenizer are what `triweave demo` leaves behind. The objective is the
language model's alone: a bare loop cannot have the loss of a whole step. `data_wait_fraction` is of a real run of the
same config with one loader worker a rank.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from triweave.launch.errors import LaunchError

CONFIG = Path(__file__).parents[1] / "configs" / "demo_cpu.yaml"
WARM_UP_STEPS = 5
"""Steps of the real run that do not count: its loader starts."""
LANGUAGE_MODEL_ALONE = ("model.objectives={language_model: 1.0}", "data.packing.contrastive_share=0.0")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--config", type=Path, default=CONFIG, help="YAML of a run (default: the demo's)")
    parser.add_argument("--stages", default="0,1,2,3", help="ZeRO stages, by comma (default 0,1,2,3)")
    parser.add_argument("--num-ranks", type=int, default=2, help="ranks on this machine (default 2)")
    parser.add_argument("--steps", type=int, default=10, help="steps of one turn (default 10)")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each; the median ratio counts (default 5)")
    parser.add_argument("--wait-steps", type=int, default=30, help="steps of the run with a loader (default 30)")
    parser.add_argument("--json", action="store_true", help="print figures as JSON")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted settings of the config")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print."""
    from rich.console import Console

    from triweave.data_pipeline.bench.subset import machine

    stages = _stages(arguments.stages)
    for name in ("num_ranks", "steps", "repeats", "wait_steps"):
        if getattr(arguments, name) < 1:
            raise LaunchError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: must be at least 1")
    rows = []
    with Console(stderr=True).status("starting") as status:
        for stage in stages:
            status.update(f"ZeRO {stage}: spine, bare loop{' and FSDP2' if stage == 3 else ''} in turns")
            figures = _step_figures(arguments, stage)
            status.update(f"ZeRO {stage}: {arguments.wait_steps} steps with a loader")
            rows.append(figures | {"data_wait_fraction": _data_wait(arguments, stage)})
    if arguments.json:
        print(json.dumps({"machine": machine() | {"processes": arguments.num_ranks}, "rows": rows}, indent=1))
    else:
        _print_table(rows)
    return 0


def _stages(text: str) -> list[int]:
    found = text.split(",")
    if wrong := [word for word in found if word not in ("0", "1", "2", "3")]:
        raise LaunchError(f"--stages {text}: {wrong[0]!r} is none of 0, 1, 2, 3")
    return [int(word) for word in found]


def _step_figures(arguments: argparse.Namespace, stage: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        request = Path(folder) / "request.json"
        content = {
            "config": str(arguments.config),
            "overrides": [*_overrides(arguments, stage, folder), "data.workers=0"],
            "steps": arguments.steps,
            "repeats": arguments.repeats,
        }
        request.write_text(json.dumps(content), encoding="utf-8")
        _ranks(arguments.num_ranks, "triweave.pretrain.bench.step", str(request))
        figures: dict[str, Any] = json.loads(request.with_suffix(".figures").read_bytes())
        return figures


def _data_wait(arguments: argparse.Namespace, stage: int) -> float:
    """Return the median share of a step that a real run with one loader worker a rank waits for data."""
    with tempfile.TemporaryDirectory() as folder:
        steps = WARM_UP_STEPS + arguments.wait_steps
        settings = [*_overrides(arguments, stage, folder), f"train.steps={steps}", "data.workers=1"]
        _ranks(arguments.num_ranks, "triweave.pretrain.train", str(arguments.config), *settings)
        lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return statistics.median(json.loads(line)["data_wait_fraction"] for line in lines[WARM_UP_STEPS:])


def _overrides(arguments: argparse.Namespace, stage: int, folder: str) -> list[str]:
    own = [f"run_dir={folder}", f"train.zero_stage={stage}", "checkpoint.every_steps=0"]
    return [*LANGUAGE_MODEL_ALONE, *arguments.overrides, *own]


def _ranks(count: int, module: str, *words: str) -> None:
    """Run a module on `count` ranks of this machine. Raises LaunchError with what the ranks said last."""
    threads = str(max(1, (os.cpu_count() or 1) // count))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count),
         "-m", module, *words],
        env={**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    if done.returncode:
        error = Path(words[0]).with_suffix(".error")
        known = error.read_text(encoding="utf-8") if error.exists() else ""
        said = [line for line in done.stderr.splitlines() if "Error" in line or line.startswith("triweave")]
        raise LaunchError(known or f"{module} ended with {done.returncode}: {' '.join(said[:3]) or 'no message'}")


def _print_table(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="one training step")
    for column in ("ZeRO", "spine / bare", "FSDP2 / bare", "data wait", "bytes a parameter", "by formula"):
        table.add_column(column, justify="right")
    for row in rows:
        fsdp2 = row["fsdp2_over_bare"]
        table.add_row(
            str(row["stage"]),
            f"{row['spine_over_bare']:.3f}",
            "" if fsdp2 is None else f"{fsdp2:.3f}",
            f"{row['data_wait_fraction']:.2%}",
            f"{row['bytes_per_param']:.2f}",
            f"{row['formula_bytes_per_param']:.2f}",
        )
    Console().print(table)
