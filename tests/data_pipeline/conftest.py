"""Shared corpora of the data_pipeline tests, made on the spot: no file of any real corpus is in the repository."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from triweave.data_pipeline.shards.build import BuildOptions, build
from triweave.data_pipeline.shards.manifest import Manifest
from triweave.data_pipeline.sources.folder import FolderSource
from triweave.data_pipeline.sources.manifest import ManifestSource
from triweave.data_pipeline.splits import split_of
from triweave.data_pipeline.text.token_counts import write_token_counts
from triweave.data_pipeline.text.tokenizer import train_tokenizer

CAPTIONS = {
    "en": "A small bird sits on a branch and sings.",
    "de": "Ein kleiner Vogel sitzt auf einem Ast und singt.",
    "fr": "Un petit oiseau chante sur une branche d'été.",
    "ru": "Маленькая птица сидит на ветке и поёт.",
    "ja": "小さな鳥が枝にとまって歌っている。",
    "ar": "طائر صغير يجلس على غصن ويغني.",
}
"""One caption per language; documents add their number, so no two are alike."""


def image_bytes(number: int, *, width: int = 48, height: int = 40, form: str = "PNG") -> bytes:
    """Return a picture of coloured stripes and noise, different for every number."""
    generator = np.random.default_rng(number)
    pixels = generator.integers(0, 64, (height, width, 3), np.uint8)
    pixels[:, :: 2 + number % 5, number % 3] = 60 + number % 190
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form, **({"quality": 90} if form == "JPEG" else {}))
    return file.getvalue()


def audio_bytes(number: int, *, rate_hz: int = 16_000, ms: int = 400, form: str = "FLAC") -> bytes:
    """Return a decaying tone, different for every number."""
    time = np.arange(rate_hz * ms // 1000) / rate_hz
    tone = 0.4 * np.sin(2 * np.pi * (180 + 37 * number) * time) * np.exp(-3 * time)
    file = io.BytesIO()
    soundfile.write(
        file, tone.astype(np.float32), rate_hz, format=form, subtype="VORBIS" if form == "OGG" else "PCM_16"
    )
    return file.getvalue()


def write_corpus(folder: Path, documents: int = 24) -> Path:
    """Write `documents` synthetic documents as media files with sidecars.

    By number modulo 4: 0 picture + text, 1 picture + clip + text, 2 clip + text, 3 text alone.
    """
    languages = list(CAPTIONS)
    for number in range(documents):
        language = languages[number % len(languages)]
        stem = folder / language / f"item{number:03d}"
        stem.parent.mkdir(parents=True, exist_ok=True)
        if number % 4 in (0, 1):
            form, ending = (("JPEG", "jpg"), ("PNG", "png"))[number % 3 % 2]
            size = {"width": 40 + 8 * (number % 7), "height": 32 + 8 * (number % 5)}
            stem.with_suffix(f".{ending}").write_bytes(image_bytes(number, form=form, **size))
        if number % 4 in (1, 2):
            stem.with_suffix(".flac").write_bytes(audio_bytes(number, ms=200 + 100 * (number % 6)))
        sidecar = {"text": f"{number}. {CAPTIONS[language]}", "labels": {"language": language, "number": number}}
        if number % 2:
            stem.with_suffix(".json").write_text(json.dumps(sidecar, ensure_ascii=False), encoding="utf-8")
        else:
            stem.with_suffix(".txt").write_text(str(sidecar["text"]), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def picture() -> Callable[..., bytes]:
    """`image_bytes`, for tests: modules cannot import a conftest."""
    return image_bytes


@pytest.fixture(scope="session")
def clip() -> Callable[..., bytes]:
    """`audio_bytes`, for tests."""
    return audio_bytes


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 documents of pictures, clips and text in six languages, as a folder with sidecars. Read only."""
    return write_corpus(tmp_path_factory.mktemp("tiny_corpus"))


@pytest.fixture(scope="session")
def tiny_shards(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """The tiny corpus as several small shards. Read only: copy the folder to damage it."""
    out = tmp_path_factory.mktemp("tiny_shards") / "shards"
    return build(FolderSource(root=tiny_corpus), out, BuildOptions(shard_size_bytes=60_000))


def write_records(path: Path, documents: int) -> Path:
    """Write a JSONL manifest of documents that strain planning: several pictures, long texts, pictures no pack holds.

    By number modulo 6: 0 picture + text, 1 picture + clip + text, 2 text between three pictures, 3 text alone,
    4 a text of several packs around a picture, 5 a picture larger than a pack, and text.
    """

    def image(number: int, width: int, height: int) -> dict[str, str]:
        data = image_bytes(number, width=width, height=height)
        return {"modality": "image", "bytes": base64.b64encode(data).decode()}

    lines = []
    for number in range(documents):
        language = list(CAPTIONS)[number % len(CAPTIONS)]
        text = {"modality": "text", "text": f"{path.stem} {number}. {CAPTIONS[language]}"}
        clip = base64.b64encode(audio_bytes(number, ms=200 + 90 * (number % 5))).decode()
        parts = [
            [image(number, 40, 24 + 8 * (number % 4)), text],
            [image(number, 32, 32), {"modality": "audio", "bytes": clip}, text],
            [image(number, 24, 24), text, image(number + 1000, 16, 32), text, image(number + 2000, 40, 16)],
            [text],
            [{"modality": "text", "text": text["text"] * 4}, image(number, 24, 16), {**text, "text": text["text"] * 5}],
            [image(number, 160, 160), text],
        ][number % 6]
        lines.append(json.dumps({"id": f"{path.stem}-{number}", "parts": parts}, ensure_ascii=False))
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@dataclass(frozen=True)
class StreamData:
    """Two tokenised shard folders and their tokenizer. Read only: copy a folder to damage it."""

    birds: Path
    talk: Path
    tokenizer: Path


@pytest.fixture(scope="session")
def stream_data(tmp_path_factory: pytest.TempPathFactory) -> StreamData:
    """72 + 18 documents of `write_records`, in several shards each, with token counts."""
    folder = tmp_path_factory.mktemp("stream")
    tokenizer = folder / "tokenizer.model"
    for name, documents in (("birds", 72), ("talk", 18)):
        records = write_records(folder / f"{name}.jsonl", documents)
        manifest = build(ManifestSource(root=records), folder / name, BuildOptions(shard_size_bytes=150_000))
        if not tokenizer.exists():
            train_tokenizer([manifest], 600, tokenizer)
        write_token_counts(manifest, tokenizer)
    return StreamData(birds=folder / "birds", talk=folder / "talk", tokenizer=tokenizer)


@dataclass(frozen=True)
class ConceptData:
    """A tokenised shard folder whose documents know their concept. Read only: copy the folder to damage it."""

    shards: Path
    tokenizer: Path


def concept_records(path: Path, concepts: int = 14) -> Path:
    """Write a JSONL manifest of three documents per concept, which show the same picture and say other words.

    By number modulo 4: 0 text between two pictures, 1 picture + clip + text, 2 clip + text, 3 text alone; number 18 has
    a text of hundreds of tokens.
    """
    lines = []
    for number in range(3 * concepts):
        concept = number // 3
        image, other = (
            {"modality": "image", "bytes": base64.b64encode(image_bytes(seed, width=24, height=16 + 8 * high)).decode()}
            for seed, high in ((concept, concept % 2), (1000 + number, 0))
        )
        audio = {
            "modality": "audio",
            "bytes": base64.b64encode(audio_bytes(number, ms=200 + 60 * (number % 3))).decode(),
        }
        words = list(CAPTIONS.values())[number % len(CAPTIONS)] * (20 if number == 18 else 1)
        text = {"modality": "text", "text": f"{number}. {words}"}
        parts = ([image, text, other], [image, audio, text], [audio, text], [text])[number % 4]
        labels = {"group": f"concept {concept}", "split": split_of(f"concept {concept}"), "number": number}
        lines.append(json.dumps({"id": f"item-{number}", "parts": parts, "labels": labels}, ensure_ascii=False))
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def concept_data(tmp_path_factory: pytest.TempPathFactory) -> ConceptData:
    """42 documents of 14 concepts in one shard, with labels `group`, `split` and `number`, and token counts."""
    return _built_concepts(tmp_path_factory.mktemp("concepts"), BuildOptions())


@pytest.fixture(scope="session")
def concepts_in_shards(tmp_path_factory: pytest.TempPathFactory) -> ConceptData:
    """The documents of `concept_data` in several shards."""
    return _built_concepts(tmp_path_factory.mktemp("several"), BuildOptions(shard_size_bytes=20_000))


def _built_concepts(folder: Path, options: BuildOptions) -> ConceptData:
    records = concept_records(folder / "concepts.jsonl")
    manifest = build(ManifestSource(root=records), folder / "shards", options)
    train_tokenizer([manifest], 500, folder / "tokenizer.model")
    write_token_counts(manifest, folder / "tokenizer.model")
    return ConceptData(shards=folder / "shards", tokenizer=folder / "tokenizer.model")
