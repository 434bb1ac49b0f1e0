"""Write the weights of a checkpoint as a folder of safetensors, by whole parameters under the model's names.

examples:
  triweave checkpoint export runs/demo/train --out exported/demo
  triweave checkpoint export s3://bucket/runs/one --step 2000 --dtype bf16 --out exported/one
  triweave checkpoint export runs/qwen --layout transformers --out exported/qwen
  triweave checkpoint export runs/qwen-whisper --layout transformers --tower audio --out exported/whisper

fp32 is bit by bit what training keeps. Every byte is checked as it is read. Memory holds one file of
--shard-gb at most. With --layout transformers the model is loaded whole and written to one file, with its
config.json and tokenizer, for plain transformers to load. --tower writes one tower instead, in the layout of the CLIP,
SigLIP or Whisper folder that it was imported from; the rest of that folder goes along, its tensors in --dtype too.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("run", metavar="RUN", help="run_dir of a training, or s3://bucket/prefix of its checkpoints")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="new folder to write to")
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint of step N (default: the newest whole one)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the weights (default fp32)")
    parser.add_argument(
        "--layout", choices=("triweave", "transformers"), default="triweave", help="names and config (default: our own)"
    )
    parser.add_argument(
        "--leave-out", metavar="MODALITY", action="append", default=[], help="tower that transformers has no place for"
    )
    parser.add_argument("--tower", metavar="MODALITY", help="write this tower as the folder that it was imported from")
    parser.add_argument("--shard-gb", type=float, default=4.0, metavar="GB", help="largest file (default 4)")
    parser.add_argument("--json", action="store_true", help="print what was written as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Export and print."""
    import sys

    from triweave.launch.errors import LaunchError
    from triweave.pretrain.checkpoints.checkpoint import find_whole_checkpoint
    from triweave.pretrain.checkpoints.export import export_weights

    if not arguments.shard_gb > 0:
        raise LaunchError(f"--shard-gb {arguments.shard_gb:g}: must be above 0")

    def tell(message: str) -> None:
        print(f"triweave checkpoint: {message}", file=sys.stderr)

    if arguments.tower and (arguments.layout != "transformers" or arguments.leave_out):
        raise LaunchError("--tower goes with --layout transformers, and without --leave-out")
    if arguments.layout == "transformers":
        return _to_transformers(arguments, tell)
    checkpoint = find_whole_checkpoint(arguments.run, arguments.step, tell=tell)
    exported = export_weights(
        checkpoint, arguments.out, dtype=arguments.dtype, shard_bytes=int(arguments.shard_gb * (1 << 30))
    )
    if arguments.json:
        print(json.dumps({"out": str(arguments.out), **dataclasses.asdict(exported)}))
    else:
        print(
            f"{arguments.out}: step {exported.step:,}, {exported.parameters} tensors, {exported.elements:,} elements, "
            f"{exported.bytes / 1e6:,.1f} MB in {exported.files} file(s)"
        )
    return 0


def _to_transformers(arguments: argparse.Namespace, tell: Callable[[str], None]) -> int:
    from triweave.data_pipeline.errors import ExportError
    from triweave.data_pipeline.new_folder import new_folder
    from triweave.pretrain.checkpoints.load import load_run
    from triweave.pretrain.open_models.export import export_run
    from triweave.pretrain.open_models.export_tower import export_tower

    loaded = load_run(arguments.run, step=arguments.step, tell=tell)
    with new_folder(arguments.out, ExportError) as (folder, _):
        if arguments.tower:
            written = export_tower(loaded, arguments.tower, folder, precision=arguments.dtype)
        else:
            written = export_run(loaded, folder, precision=arguments.dtype, leave_out=arguments.leave_out)
    if arguments.json:
        print(json.dumps({"out": str(arguments.out), "step": loaded.step, **written}))
    else:
        print(
            f"{arguments.out}: step {loaded.step:,} as {written['model_type']}, {written['tensors']} tensors, "
            f"{written['parameters']:,} elements{'' if written.get('tokenizer', True) else ', without a tokenizer'}"
        )
    return 0
