"""Train a tokenizer on the text of shards: sentencepiece BPE with byte fallback, nothing normalised.

examples:
  triweave tokenizer train shards/tuxpaint --vocab-size 8192 --out tokenizer.model
  triweave tokenizer train shards/tuxpaint --vocab-size 8192 --out tokenizer.model --json
  triweave tokenizer train shards/tuxpaint shards/asterisk --split train --vocab-size 4096 --out tokenizer.model
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path

from triweave.data_pipeline.errors import TokenizerError
from triweave.data_pipeline.shards.manifest import Manifest
from triweave.data_pipeline.splits import SPLITS
from triweave.data_pipeline.text.tokenizer import SAMPLE_BYTES, train_tokenizer
from triweave.launch.progress import sample_progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    train = actions.add_parser(
        "train",
        help="train on the text parts of shards",
        description="Train on the text parts of one or several shard folders.",
    )
    train.add_argument("shards", metavar="SHARDS", type=Path, nargs="+", help="folders made by `triweave build`")
    train.add_argument("--split", choices=SPLITS, help="only samples of this split, so that held-out text stays unseen")
    train.add_argument(
        "--vocab-size", metavar="V", type=int, required=True, help="tokens, with 256 bytes and the markers"
    )
    train.add_argument("--out", metavar="FILE", type=Path, required=True, help="model file to write")
    train.add_argument(
        "--sample-mb",
        metavar="M",
        type=int,
        default=SAMPLE_BYTES // 1_000_000,
        help="most megabytes of text to train on; more is sampled by hash (default: %(default)s)",
    )
    train.add_argument("--seed", metavar="N", type=int, default=0, help="of that sample (default: %(default)s)")
    train.add_argument("--json", action="store_true", help="print the report as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Train and print what came out."""
    if arguments.sample_mb < 1:
        raise TokenizerError(f"--sample-mb={arguments.sample_mb}: must be at least 1")
    manifests = [Manifest.load(folder) for folder in arguments.shards]
    started = time.monotonic()
    with sample_progress("reading text", sum(manifest.samples for manifest in manifests)) as advance:
        report = train_tokenizer(
            manifests,
            arguments.vocab_size,
            arguments.out,
            split=arguments.split,
            seed=arguments.seed,
            sample_bytes=arguments.sample_mb * 1_000_000,
            progress=advance,
        )
    seconds = round(time.monotonic() - started, 3)
    if arguments.json:
        print(json.dumps({"tokenizer": str(arguments.out), **dataclasses.asdict(report), "seconds": seconds}))
    else:
        print(
            f"{arguments.out}: {report.vocab_size} tokens from {report.texts} texts ({report.sampled_bytes} of "
            f"{report.text_bytes} bytes) in {seconds:.1f} s; hash {report.hash}"
        )
    return 0
