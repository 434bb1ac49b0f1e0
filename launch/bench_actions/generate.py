"""Measure generation with its cache and without, in turns.

examples:
  triweave bench generate --tokens 256
  triweave bench generate --threads 2 --json

It needs nothing: the model is random, of the demo's size.
"""

from __future__ import annotations

import argparse
import dataclasses
import json

from triweave.data_pipeline.bench.subset import machine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--tokens", type=int, default=256, help="tokens to generate (default 256)")
    parser.add_argument("--repeats", type=int, default=3, help="interleaved repeats; the median counts (default 3)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    parser.add_argument("--json", action="store_true", help="print figures as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print."""
    import torch
    from rich.console import Console

    from triweave.pretrain.bench.generate import bench_generate

    torch.set_num_threads(max(1, arguments.threads))
    with Console(stderr=True).status("starting") as status:
        times = bench_generate(arguments.tokens, arguments.repeats, progress=status.update)
    if arguments.json:
        figures = dataclasses.asdict(times) | {"ratio": times.ratio}
        print(json.dumps({"machine": machine(), "generate": figures}, indent=1))
    else:
        print(
            f"{times.tokens} tokens after {times.prompt_tokens}, {times.parameters:,} parameters, {times.threads} "
            f"thread(s), median of {times.repeats}: {times.cached_s:.2f} s with the cache, {times.recomputed_s:.2f} s "
            f"recomputing, ratio {times.ratio:.1f}"
        )
    return 0
