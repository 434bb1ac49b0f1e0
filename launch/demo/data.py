"""The demo's data stages: each calls the same function as the command of its name, and says in words what it made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from triweave.launch.demo.corpora import CorpusSet
from triweave.launch.demo.stage_display import SUMMARY
from triweave.launch.errors import DemoError

IMAGE_MAX_SIDE_PX = 64
AUDIO_RATE_HZ = 16_000
"""Media as small as the demo's model takes them."""
SHARD_SIZE_MB = 16
"""Small enough for several shards, so that there is something to mix."""
TRAINING_SPLIT = "train"
"""The tokenizer sees no held-out text."""

Update = Callable[[float, float | None, str], None]


def build_options(chosen: CorpusSet) -> Any:
    """Return what the shards depend on beside the corpora, as a JSON value."""
    return [IMAGE_MAX_SIDE_PX, AUDIO_RATE_HZ, SHARD_SIZE_MB, chosen.sources]


def build_shards(chosen: CorpusSet, corpora: Path, shards: Path, workers: int, update: Update) -> dict[str, Any]:
    """Build the shards of every corpus, with the labels that say which split a document belongs to."""
    from triweave.data_pipeline.shards.build import BuildOptions, BuildProgress, build
    from triweave.data_pipeline.shards.media_encoder import MediaOptions
    from triweave.data_pipeline.sources.registry import SOURCES

    media = MediaOptions(image_max_side_px=IMAGE_MAX_SIDE_PX, audio_rate_hz=AUDIO_RATE_HZ)
    options = BuildOptions(media=media, shard_size_bytes=SHARD_SIZE_MB << 20, workers=workers)
    corpus_facts: dict[str, Any] = {}
    for name, source_options in chosen.sources.items():

        def show(progress: BuildProgress, name: str = name) -> None:
            words = f"{name}: {progress.rows_done:,} documents, {progress.shards} shards"
            update(progress.rows_done, progress.rows_total, words)

        source = SOURCES[name](root=corpora / name, **source_options)
        manifest = build(source, shards / name, options, show)
        size_mb = sum(shard.tar_bytes for shard in manifest.shards) / 1e6
        corpus_facts[name] = {"documents": manifest.samples, "shards": len(manifest.shards), "megabytes": size_mb}
    totals = {key: sum(facts[key] for facts in corpus_facts.values()) for key in ("documents", "shards", "megabytes")}
    each = ", ".join(f"{facts['documents']:,} of {name}" for name, facts in corpus_facts.items())
    return {
        "shards": totals["shards"],
        "samples": totals["documents"],
        "corpus_facts": corpus_facts,
        SUMMARY: f"{each}: {totals['shards']} shards, {totals['megabytes']:.0f} MB",
    }


def verify_shards(folders: Sequence[Path], update: Update) -> dict[str, Any]:
    """Hash everything again."""
    from triweave.data_pipeline.shards.verify import verify

    samples = 0
    for folder in folders:

        def show(done: int, total: int, folder: Path = folder) -> None:
            update(done, total, f"{folder.name}: {done} of {total} shards hashed")

        report = verify(folder, show)
        if report.damage:
            raise DemoError(f"{folder}: {report.damage[0]}; remove the folder and run the demo again")
        samples += report.samples
    return {SUMMARY: f"{samples:,} documents whole"}


def make_tokenizer(folders: Sequence[Path], vocabulary: int, out: Path, update: Update) -> dict[str, Any]:
    """Train the tokenizer on the training texts of all corpora."""
    from triweave.data_pipeline.shards.manifest import Manifest
    from triweave.data_pipeline.text.tokenizer import train_tokenizer

    manifests = [Manifest.load(folder) for folder in folders]
    progress = _counter(update, sum(manifest.samples for manifest in manifests), "documents read")
    report = train_tokenizer(manifests, vocabulary, out, split=TRAINING_SPLIT, progress=progress)
    return {SUMMARY: f"{report.vocab_size:,} tokens from {report.texts:,} texts of the training split"}


def count_tokens(folders: Sequence[Path], tokenizer: Path, workers: int, update: Update) -> dict[str, Any]:
    """Count the tokens of every document."""
    from triweave.data_pipeline.shards.manifest import Manifest
    from triweave.data_pipeline.text.token_counts import write_token_counts

    manifests = [Manifest.load(folder) for folder in folders]
    progress = _counter(update, sum(manifest.samples for manifest in manifests), "documents counted")
    reports = [write_token_counts(manifest, tokenizer, workers=workers, progress=progress) for manifest in manifests]
    tokens, texts = sum(report.tokens for report in reports), sum(report.texts for report in reports)
    return {SUMMARY: f"{tokens:,} text tokens, {tokens / max(1, texts):.1f} a text"}


def plan_packs(config_path: Path) -> dict[str, Any]:
    """Pack the first block, as training will."""
    from triweave.data_pipeline.config import load_data_config
    from triweave.data_pipeline.stream.plan import Planner

    data = load_data_config(config_path)
    plan = Planner(data).block(0)
    fill = float(plan.row_tokens.sum()) / (plan.rows * data.sequence_length)
    tokens = ", ".join(f"{count:,} {name}" for name, count in plan.modality_tokens.items())
    return {
        "pack_fill": fill,
        SUMMARY: f"{plan.rows:,} packs of {data.sequence_length}, {fill:.2%} full; tokens: {tokens}",
    }


def _counter(update: Update, total: int, words: str) -> Callable[[int], None]:
    done = 0

    def advance(number: int) -> None:
        nonlocal done
        done += number
        update(done, total, f"{done:,} {words}")

    return advance
