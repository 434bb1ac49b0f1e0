"""examples:
  triweave demo                                    about 8 minutes on 2 CPU cores after the download (161 MB)
  triweave demo --corpus tuxpaint-stamps-default_2022.06.04-1_all.deb
  triweave demo --out /tmp/demo --steps 40 --json

Stop it whenever you like: started again it continues. A second run repeats nothing and needs no network.
DIR/result.json has the figures, DIR/train the run (metrics.jsonl, checkpoints), DIR/config.yaml its config.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="default: runs/demo")
    parser.add_argument(
        "--corpus", type=Path, metavar="PATH", help="Tux Paint's stamps: an unpacked folder or the .deb"
    )
    parser.add_argument("--steps", type=int, metavar="N", help="optimizer steps (default: those of demo_cpu.yaml)")
    parser.add_argument("--json", action="store_true", help="print result.json instead of a table")


def run(arguments: argparse.Namespace) -> int:
    """Run or continue the demo and print its result."""
    from triweave.launch.demo import RESULT_NAME, DemoOptions, run_demo

    result = run_demo(DemoOptions(out=arguments.out, corpus=arguments.corpus, steps=arguments.steps))
    if arguments.json:
        print(json.dumps(result))
    else:
        print_table(result)
        print(f"\n{arguments.out / RESULT_NAME}")
    return 0


def print_table(result: dict[str, Any]) -> None:
    """Print the losses beside those of a unigram model, then the other figures."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Loss per token after {result['steps']} steps (nats)", title_justify="left")
    for heading in ("targets that follow", "tokens", "unigram model", "this model", "difference"):
        table.add_column(heading, justify="left" if heading.startswith("targets") else "right")
    for name, loss in result["loss_by_modality"].items():
        unigram = result["unigram_by_modality"][name]
        tokens = result["supervised_tokens_by_modality"][name]
        table.add_row(name, f"{tokens:,}", f"{unigram:.3f}", f"{loss:.3f}", f"{loss - unigram:+.3f}")
    console = Console()
    console.print(table)
    console.print(
        f"{result['samples']:,} documents in {result['shards']} shards, packs {result['pack_fill']:.2%} full; "
        f"{result['parameters']:,} parameters, {result['tokens_per_s']:,.0f} tokens/s, "
        f"waiting for data {result['data_wait_fraction']:.1%} of the time",
        highlight=False,
    )
    console.print(
        f"after the kill, {result['resume_compared_steps']} steps repeated on another number of ranks: "
        f"largest difference of a loss {result['resume_max_abs_diff']:.2e}; {result['seconds_total']:.0f} s of work",
        highlight=False,
    )
