"""Import small random LLaVA and Qwen2.5-VL folders, train them on real shards under ZeRO-3, export, compare logits.

    python tests/pretrain/open_models_on_shards.py
    python tests/pretrain/open_models_on_shards.py --shards shards/tuxpaint --ranks 3 --json

Every step is a command of triweave (import, tokenize, launch, checkpoint export); then plain transformers loads the
exported folder and its logits are compared with ours, document by document, over packs of the same stream. Exit code 1
where they differ by 1e-5 or more. Without --shards: those of the demo, else Tux Paint is fetched (161 MB) and built.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from open_folders import TOLERANCE, make, their_logits, write_tokenizer

from triweave.data_pipeline.batch import PackedBatch
from triweave.data_pipeline.stream.loader import StepLoader
from triweave.launch.cli import main as triweave
from triweave.pretrain.checkpoints.load import LoadedRun, load_run

FAMILIES = ("llava", "qwen2_5_vl")
STEPS, ROWS, SEQUENCE_LENGTH = 5, 6, 512
DEMO_SHARDS = Path("runs/demo/shards/tuxpaint")


def main() -> int:
    """Print what was compared; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, metavar="DIR", help="shards with pictures (default: the demo's)")
    parser.add_argument("--family", action="append", choices=FAMILIES, help="default: both")
    parser.add_argument("--ranks", type=int, default=2, metavar="N", help="ranks on this machine (default 2)")
    parser.add_argument("--json", action="store_true", help="print one JSON row per family")
    arguments = parser.parse_args()
    differences = []
    with tempfile.TemporaryDirectory(prefix="open-models-") as name:
        work = Path(name)
        shutil.copytree(arguments.shards or _tux_paint(work), work / "shards")  # token counts are written beside them
        for family in arguments.family or FAMILIES:
            row = train_and_compare(family, work / "shards", work / family, ranks=arguments.ranks)
            differences.append(row["max_abs_difference"])
            print(json.dumps(row) if arguments.json else "  ".join(f"{key} {value}" for key, value in row.items()))
    return int(not max(differences) < TOLERANCE)


def train_and_compare(family: str, shards: Path, work: Path, *, ranks: int) -> dict[str, Any]:
    """Import, train, export and compare one family in the new folder `work`."""
    work.mkdir()
    begun = make(family, vocab_size=320, image=(1, 2))
    begun.save_pretrained(work / "open")
    write_tokenizer(work / "open")
    imported, run_dir, exported = work / "imported", work / "run", work / "exported"
    _run("import", str(work / "open"), "--out", str(imported))
    _run("tokenize", str(shards), "--tokenizer", str(imported / "tokenizer"), "--workers", "1")
    settings = {
        "run_dir": run_dir, "data.sources": f"[{{name: shards, shards: {shards}}}]", "data.workers": 1,
        "data.sequence_length": SEQUENCE_LENGTH, "data.geometry.image_max_tokens": 16, "optimizer.lr": 1e-3,
        "optimizer.eps": 1e-5, "schedule.warmup_steps": 1, "train.steps": STEPS, "train.global_batch_rows": ROWS,
        "train.micro_batch_rows": 1, "train.zero_stage": 3, "train.device": "cpu", "train.torch_threads": 1,
    }  # fmt: skip
    overrides = [f"{key}={value}" for key, value in settings.items()]
    _run("launch", str(imported / "config.yaml"), *overrides, "--num-ranks", str(ranks), "--oversubscribe")
    _run("checkpoint", "export", str(run_dir), "--layout", "transformers", "--out", str(exported))
    theirs, told = type(begun).from_pretrained(exported, output_loading_info=True)
    assert not any(told.values()), told
    run = load_run(run_dir)
    before = dict(begun.named_parameters())
    assert sum(not torch.equal(parameter, before[name]) for name, parameter in theirs.named_parameters()) > 10
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    compared = compare(run, theirs.eval(), packs(run, rows=ROWS))
    return {"family": family, "ranks": ranks, "zero_stage": 3, "steps": run.step, "loss_first": losses[0],
            "loss_last": losses[-1], **compared}  # fmt: skip


def packs(run: LoadedRun, *, rows: int) -> list[PackedBatch]:
    """Return the first packs of the run's own stream."""
    loader = StepLoader(run.config.data, rank=0, world_size=1, global_batch_rows=rows, micro_batch_rows=1)
    return next(iter(loader)).micro_batches


def compare(run: LoadedRun, theirs: Any, batches: list[PackedBatch]) -> dict[str, Any]:
    """Return the largest difference between our logits of packs of one row and transformers' of each document alone."""
    largest, documents, pictures, tokens = 0.0, 0, 0, 0
    for batch in batches:
        with torch.no_grad():
            computed = run.model.logits(run.to_device(batch))[0]
        shown: dict[int, list[Any]] = {}
        for payload in batch.payloads.values():
            first = payload.lengths.cumsum() - payload.lengths
            for at, length, grid in zip(first, payload.lengths, payload.grids, strict=True):
                document = int(batch.document_ids[0, payload.token_index[at]])
                shown.setdefault(document, []).append((payload.values[at : at + length], grid.tolist()))
        for document in range(int(batch.document_ids.max()) + 1):
            places = batch.document_ids[0] == document
            expected = their_logits(theirs, batch.tokens[0, places], shown.get(document, []))
            largest = max(largest, float((expected - computed[torch.from_numpy(places)]).abs().max()))
            documents, pictures = documents + 1, pictures + len(shown.get(document, []))
            tokens += int(places.sum())
    return {"documents": documents, "pictures": pictures, "tokens": tokens, "max_abs_difference": largest}


def _tux_paint(work: Path) -> Path:
    """Return shards of Tux Paint: the demo's, else fetched and built."""
    if (DEMO_SHARDS / "manifest.json").is_file():
        return DEMO_SHARDS
    _run("fetch", "tuxpaint", "--out", str(work / "corpus"))
    built = work / "built"
    _run("build", "--source", "tuxpaint", "--input", str(work / "corpus"), "--out", str(built),
         "--image-max-side", "64", "--audio-rate", "16000")  # fmt: skip
    return built


def _run(*arguments: str) -> None:
    """Run a command of triweave, its own output on stderr."""
    with contextlib.redirect_stdout(sys.stderr):
        code = triweave(list(arguments))
    if code:
        raise SystemExit(f"triweave {' '.join(arguments)} ended with {code}")


if __name__ == "__main__":
    raise SystemExit(main())
