"""The demo's data stages: each calls the same function as the command of its name, and says in words what it made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from triweave.launch.errors import DemoError
from triweave.launch.stage_display import SUMMARY

IMAGE_MAX_SIDE_PX = 64
AUDIO_RATE_HZ = 16_000
"""Media as small as the demo's model takes them."""
SHARD_SIZE_MB = 16
"""Small enough for several shards, so that there is something to mix."""
LANGUAGES = ("be", "bg", "ca", "da", "de", "el", "en", "es", "fr", "it", "ja", "lt", "nl", "pt_BR", "ro", "ru")
"""All that were spoken, and some more: enough to be multilingual, few enough to be learned in minutes."""
VOCABULARY = 4096

Update = Callable[[float, float, str], None]


def fetch(given: Path | None, corpus: Path, update: Update) -> dict[str, Any]:
    """Get the stamps of Tux Paint into `corpus`."""
    from triweave.data_pipeline.fetch import fetch_tuxpaint

    fetched = fetch_tuxpaint(corpus, given=given, report=lambda line: update(0, 1, line))
    return {SUMMARY: f"stamps of Tux Paint from {fetched.origin}"}


def build_shards(corpus: Path, shards: Path, workers: int, update: Update) -> dict[str, Any]:
    """Build the shards: one document per picture and language, with speech where there is some."""
    from triweave.data_pipeline.shards.build import BuildOptions, BuildProgress, build
    from triweave.data_pipeline.shards.media_encoder import MediaOptions
    from triweave.data_pipeline.sources.tuxpaint import TuxPaintSource

    def show(progress: BuildProgress) -> None:
        update(progress.rows_done, progress.rows_total, f"{progress.rows_done:,} documents, {progress.shards} shards")

    media = MediaOptions(image_max_side_px=IMAGE_MAX_SIDE_PX, audio_rate_hz=AUDIO_RATE_HZ)
    options = BuildOptions(media=media, shard_size_bytes=SHARD_SIZE_MB << 20, workers=workers)
    manifest = build(TuxPaintSource(root=corpus, languages=LANGUAGES), shards, options, show)
    size_mb = sum(shard.tar_bytes for shard in manifest.shards) / 1e6
    return {
        "shards": len(manifest.shards),
        "samples": manifest.samples,
        SUMMARY: f"{manifest.samples:,} documents in {len(manifest.shards)} shards, {size_mb:.0f} MB",
    }


def verify_shards(shards: Path, update: Update) -> dict[str, Any]:
    """Hash everything again."""
    from triweave.data_pipeline.shards.verify import verify

    report = verify(shards, lambda done, total: update(done, total, f"{done} of {total} shards hashed"))
    if report.damage:
        raise DemoError(f"{shards}: {report.damage[0]}; remove the folder and run the demo again")
    return {SUMMARY: f"{report.samples:,} documents whole"}


def make_tokenizer(shards: Path, out: Path, update: Update) -> dict[str, Any]:
    """Train the tokenizer on the captions of the shards."""
    from triweave.data_pipeline.shards.manifest import Manifest
    from triweave.data_pipeline.text.tokenizer import train_tokenizer

    manifest = Manifest.load(shards)
    report = train_tokenizer(manifest, VOCABULARY, out, progress=_counter(update, manifest.samples, "captions read"))
    return {SUMMARY: f"{report.vocab_size:,} tokens from {report.texts:,} captions"}


def count_tokens(shards: Path, tokenizer: Path, workers: int, update: Update) -> dict[str, Any]:
    """Count the tokens of every document."""
    from triweave.data_pipeline.shards.manifest import Manifest
    from triweave.data_pipeline.text.token_counts import write_token_counts

    manifest = Manifest.load(shards)
    progress = _counter(update, manifest.samples, "documents counted")
    report = write_token_counts(manifest, tokenizer, workers=workers, progress=progress)
    return {SUMMARY: f"{report.tokens:,} text tokens, {report.tokens / max(1, report.texts):.1f} a caption"}


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
