"""Take over an open model: check a local transformers folder tensor by tensor and write the config that continues it.

examples:
  triweave import models/Qwen2.5-VL-3B --out imported/qwen
  triweave tokenize shards/tuxpaint --tokenizer imported/qwen/tokenizer
  triweave launch imported/qwen/config.yaml 'data.sources=[{name: tuxpaint, shards: shards/tuxpaint}]'
  triweave import models/Llama-3-8B --vision models/clip-vit-large --out imported/llama --modality audio
  triweave import models/Qwen2.5-VL-3B --audio models/whisper-small --out imported/qwen-whisper

families: llama, qwen2, qwen3, llava (with CLIP), qwen2_5_vl; clip and siglip as --vision, whisper as --audio. A folder
holds config.json, safetensors and tokenizer.json; code in it is never run and pickles are never read. The way back is
`triweave checkpoint export RUN --layout transformers`, with --tower for a tower that came from a folder of its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="local transformers folder")
    parser.add_argument("--out", required=True, metavar="DIR", type=Path, help="new folder for config and tokenizer")
    parser.add_argument(
        "--modality", metavar="NAME", action="append", default=[], help="read this kind of media too; may be repeated"
    )
    parser.add_argument(
        "--vision", metavar="FOLDER", type=Path, help="CLIP or SigLIP that the decoder gets as its vision tower"
    )
    parser.add_argument(
        "--audio", metavar="FOLDER", type=Path, help="Whisper whose encoder becomes the tower of sounds"
    )
    parser.add_argument("--json", action="store_true", help="print what was found as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Check, write and print."""
    from triweave.data_pipeline.errors import DataError
    from triweave.data_pipeline.new_folder import new_folder
    from triweave.pretrain.open_models.prepare import prepare

    towers = {"image": arguments.vision, "audio": arguments.audio}
    with new_folder(arguments.out, DataError) as (folder, _):
        prepared = prepare(
            arguments.folder,
            folder,
            out_name=arguments.out,
            modalities=arguments.modality,
            towers={modality: path for modality, path in towers.items() if path is not None},
        )
    if arguments.json:
        print(json.dumps(dataclasses.asdict(prepared)))
        return 0
    print(f"{arguments.folder}: {prepared.family}, every one of {prepared.tensors} tensors has its place")
    if prepared.unused:
        print(f"  {prepared.unused} more tensors are stored that the model does not compute with")
    print(f"  {prepared.config}: name your shards in data.sources")
    print(f"  {prepared.tokenizer}: count them with `triweave tokenize SHARDS --tokenizer {prepared.tokenizer}`")
    return 0
