"""Measure what a save costs the training, beside DeepSpeed's synchronous and fast saves and torch's asynchronous DCP.

examples:
  triweave bench checkpoint --json
  triweave bench checkpoint --d-model 1024 --layers 16 --folder /scratch

It needs nothing: the model is random text, one process at ZeRO 1, everything in turns. blocked: training stood still;
slowdown: what the steps until the commit took longer. DeepSpeed's fast engine needs libaio's headers (libaio-dev)
and, in DeepSpeed 0.19.8, a GPU: it pins its buffer for one, and casts tensors to bytes by an operation that is not
implemented for CPUs. Without, its figure is null and the reason said.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from triweave.data_pipeline.bench.subset import machine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--d-model", type=int, default=512, help="width of the model (default 512)")
    parser.add_argument("--layers", type=int, default=8, help="its layers (default 8)")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a step (default 512)")
    parser.add_argument("--repeats", type=int, default=5, help="saves of each kind after the first (default 5)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="disk to write to (default: the temporary folder)")
    parser.add_argument("--json", action="store_true", help="print figures as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print."""
    from rich.console import Console

    from triweave.pretrain.bench.checkpoint import bench_checkpoint

    with Console(stderr=True).status("starting") as status:
        cost = bench_checkpoint(
            d_model=arguments.d_model,
            layers=arguments.layers,
            tokens=arguments.tokens,
            repeats=arguments.repeats,
            threads=arguments.threads,
            folder=arguments.folder,
            progress=status.update,
        )
    if arguments.json:
        print(json.dumps(dataclasses.asdict(cost) | {"machine": machine() | {"storage": "disk"}}, indent=1))
        return 0
    fast = f"none ({cost.deepspeed_fast_error})"
    if cost.deepspeed_fast_s is not None:
        fast = f"{cost.deepspeed_fast_s:.3f} s"
    print(
        f"{cost.parameters:,} parameters, {cost.bytes / 1e6:,.0f} MB, step {cost.step_s:.3f} s, {cost.threads} "
        f"thread(s), median of {cost.repeats}\n"
        f"in the background    blocked {cost.blocked_s:.3f} s, slowed down {cost.slowdown_s:.3f} s, committed after "
        f"{cost.commit_s:.3f} s; first save {cost.first_blocked_s:.3f} s and {cost.first_slowdown_s:.3f} s\n"
        f"DeepSpeed            {cost.deepspeed_sync_s:.3f} s, its fast engine {fast}\n"
        f"torch DCP, async     {cost.dcp_async_s:.3f} s\n"
        f"ratio                {cost.ratio:.3f} of DeepSpeed's synchronous save"
    )
    return 0
