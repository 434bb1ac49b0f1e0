"""How well near duplicates are found: every original against altered copies of it, among all other originals.

    python tests/data_pipeline/dedup_quality.py [--shards FOLDER] [--samples 500] [--dedup text,image,audio]
    python tests/data_pipeline/dedup_quality.py --index 300000 --dedup text

prints a table with a row per alteration: the share of copies that are found (recall) and the share of those found whose
named twin is the true one (precision). Without --shards the originals are generated. Originals that are near an earlier
original are counted and left out first: with real corpora most of them truly are, and have to be looked at. --index N
looks up and adds N random sketches instead: process time of the last tenth of them, and resident memory.
"""

from __future__ import annotations

import argparse
import io
import random
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr
from PIL import Image, ImageEnhance, ImageOps

from triweave.data_pipeline.dedup import audio, images
from triweave.data_pipeline.dedup.near_duplicates import NearDuplicateFinder
from triweave.data_pipeline.dedup.options import DedupOptions, dedup_options
from triweave.data_pipeline.dedup.sketch import Sketch
from triweave.data_pipeline.export.documents import read_documents
from triweave.data_pipeline.media.audio import decode_mono
from triweave.data_pipeline.media.audio import probe as probe_clip
from triweave.data_pipeline.media.images import probe as probe_picture
from triweave.data_pipeline.shards.manifest import Manifest
from triweave.data_pipeline.shards.media_encoder import MediaEncoder, MediaOptions
from triweave.data_pipeline.shards.schema import Document, MediaPart, Part, TextPart

ENCODER = MediaEncoder(MediaOptions())
LEAST_WORDS = 40
RATE_HZ = 16_000
_SYLLABLES = ("ano", "eri", "ilu", "omek", "uvat", "ast", "ind")
WORDS = [f"{first}{second}" for first in "bdfgklmnprst" for second in _SYLLABLES]


def prose(seed: int, words: int = 200) -> list[str]:
    """Return random words."""
    return random.Random(seed).choices(WORDS, k=words)


def picture_pixels(seed: int) -> np.ndarray:
    """Return a smooth scene: what a photograph has and white noise has not."""
    coarse = Image.fromarray(np.random.default_rng(seed).integers(0, 255, (7, 9, 3), np.uint8))
    return np.asarray(coarse.resize((180, 140), Image.Resampling.BICUBIC))


def picture(pixels: np.ndarray | Image.Image, form: str = "PNG", **options: int) -> bytes:
    """Return a picture's file."""
    file = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(file, form, **options)
    return file.getvalue()


def sound(seed: int, seconds: float = 1.6, rate_hz: int = RATE_HZ) -> np.ndarray:
    """Return syllables: bursts of harmonics of changing pitch, colour and length."""
    generator = np.random.default_rng(seed)
    pieces: list[np.ndarray] = []
    while sum(map(len, pieces)) < seconds * rate_hz:
        time = np.arange(int(rate_hz * generator.uniform(0.06, 0.2))) / rate_hz
        pitch, centre = generator.uniform(90, 260), generator.uniform(400, 2800)
        partials = [
            np.exp(-(((k * pitch - centre) / 500) ** 2)) * np.sin(2 * np.pi * k * pitch * time) for k in range(1, 30)
        ]
        pieces.append(np.sum(partials, axis=0) * np.hanning(len(time)) * generator.uniform(0.3, 1))
    whole = np.concatenate(pieces)[: int(seconds * rate_hz)]
    return (0.5 * whole / np.abs(whole).max()).astype(np.float32)


def clip(signal: np.ndarray, rate_hz: int = RATE_HZ, form: str = "FLAC", subtype: str | None = None) -> bytes:
    """Return a clip's file."""
    file = io.BytesIO()
    soundfile.write(file, signal, rate_hz, format=form, subtype=subtype)
    return file.getvalue()


def hash_of(data: bytes) -> int | None:
    """Return the perceptual hash of a picture's file."""
    return images.phash(data, probe_picture(data)[0])


def print_of(data: bytes) -> audio.Fingerprint | None:
    """Return the fingerprint of a clip's file."""
    return audio.fingerprint(data, probe_clip(data)[0])


def jaccard(first: list[str], second: list[str]) -> float:
    """Return the exact similarity of two texts' 5-grams."""

    def shingles(words: list[str]) -> set[tuple[str, ...]]:
        return {tuple(words[at : at + 5]) for at in range(len(words) - 4)}

    one, other = shingles(first), shingles(second)
    return len(one & other) / len(one | other)


def _words_changed(share: float) -> Callable[[str, random.Random], str]:
    def change(text: str, draw: random.Random) -> str:
        words = text.split()
        for place in draw.sample(range(len(words)), max(1, round(share * len(words)))):
            words[place] = draw.choice(WORDS)
        return " ".join(words)

    return change


def _end_cut(share: float) -> Callable[[str, random.Random], str]:
    def cut(text: str, _: random.Random) -> str:
        words = text.split()
        return " ".join(words[: round((1 - share) * len(words))])

    return cut


def _halves_swapped(text: str, _: random.Random) -> str:
    words = text.split()
    return " ".join(words[len(words) // 2 :] + words[: len(words) // 2])


TEXTS: dict[str, Callable[[str, random.Random], str]] = {
    "upper case, no line breaks": lambda text, _: " ".join(text.upper().split()),
    "1 % of the words changed": _words_changed(0.01),
    "2 % of the words changed": _words_changed(0.02),
    "5 % of the words changed": _words_changed(0.05),
    "last 10 % cut off": _end_cut(0.1),
    "last 20 % cut off": _end_cut(0.2),
    "halves swapped": _halves_swapped,
}


def _cropped(share: float) -> Callable[[Image.Image], bytes]:
    def crop(image: Image.Image) -> bytes:
        width, height = image.size
        return picture(image.crop((round(share * width), round(share * height), width, height)))

    return crop


PICTURES: dict[str, Callable[[Image.Image], bytes]] = {
    "half the size": lambda image: picture(image.resize([max(1, side // 2) for side in image.size])),
    "JPEG, quality 50": lambda image: picture(image, "JPEG", quality=50),
    "WebP, quality 30": lambda image: picture(image, "WEBP", quality=30),
    "brighter by 20 %": lambda image: picture(ImageEnhance.Brightness(image).enhance(1.2)),
    "2 % cropped left and above": _cropped(0.02),
    "5 % cropped left and above": _cropped(0.05),
    "10 % cropped left and above": _cropped(0.1),
    "mirrored (another picture)": lambda image: picture(ImageOps.mirror(image)),
}


def _noisy(mono: np.ndarray, noise_db: float) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, mono.std() * 10 ** (-noise_db / 20), len(mono))
    return (mono + noise).astype(np.float32)


CLIPS: dict[str, Callable[[np.ndarray], bytes]] = {
    "Vorbis": lambda mono: clip(mono, form="OGG", subtype="VORBIS"),
    "Opus": lambda mono: clip(mono, form="OGG", subtype="OPUS"),
    "MP3": lambda mono: clip(mono, form="MP3"),
    "8 kHz": lambda mono: clip(soxr.resample(mono, RATE_HZ, 8000), 8000),
    "12 dB softer": lambda mono: clip(mono / 4),
    "silence at both ends": lambda mono: clip(np.pad(mono, (RATE_HZ // 2, RATE_HZ // 3))),
    "50 ms cut off the beginning": lambda mono: clip(mono[RATE_HZ // 20 :]),
    "5 % cut off the beginning": lambda mono: clip(mono[len(mono) // 20 :]),
    "noise at 20 dB": lambda mono: clip(_noisy(mono, 20)),
    "2 % faster": lambda mono: clip(soxr.resample(mono, RATE_HZ * 1.02, RATE_HZ)),
}


def altered(part: Part, seed: int) -> Iterator[tuple[str, Part]]:
    """Yield (alteration, altered part)."""
    if isinstance(part, TextPart):
        for name, change in TEXTS.items():
            yield name, TextPart(text=change(part.text, random.Random(seed)))
    elif part.modality == "image":
        image = Image.open(io.BytesIO(part.data or b"")).convert("RGB")
        for name, encode in PICTURES.items():
            yield name, ENCODER.encode("image", encode(image))
    else:
        mono = decode_mono(part.data or b"", RATE_HZ)
        for name, make in CLIPS.items():
            yield name, ENCODER.encode("audio", make(mono))


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Copies made, how many were found near some original, and how many of these near their own."""

    copies: int = 0
    found: int = 0
    right: int = 0

    @property
    def recall(self) -> float:
        """Return the share of copies that were found near their own original."""
        return self.right / max(1, self.copies)

    @property
    def precision(self) -> float:
        """Return the share of those found that were found near their own original; 1 where nothing was found."""
        return self.right / self.found if self.found else 1.0


@dataclass(frozen=True, kw_only=True)
class Report:
    """originals: compared; near_originals: left out, near an earlier one; featureless: left out, nothing to compare."""

    originals: int
    near_originals: int
    featureless: int
    alterations: dict[str, Quality]


def measure(parts: list[Part], thresholds: DedupOptions) -> Report:
    """Index all parts, then look up every altered copy of every one."""
    finder = NearDuplicateFinder(thresholds=thresholds)
    kept: dict[str, Part] = {}
    near = featureless = 0
    found: dict[str, Quality] = {}
    with tempfile.TemporaryDirectory() as folder:
        index = finder.index(Path(folder))
        for number, part in enumerate(parts):
            signature = finder.signature(Document(id="", parts=(part,)))
            if not signature:
                featureless += 1
            elif index.twin(signature) is not None:
                near += 1
            else:
                index.add(str(number), signature)
                kept[str(number)] = part
        for name, part in kept.items():
            for alteration, copy in altered(part, int(name)):
                signature = finder.signature(Document(id="", parts=(copy,)))
                twin = index.twin(signature) if signature else None
                before = found.get(alteration, Quality())
                found[alteration] = Quality(
                    copies=before.copies + 1,
                    found=before.found + (twin is not None),
                    right=before.right + (twin is not None and twin.id == name),
                )
    return Report(originals=len(kept), near_originals=near, featureless=featureless, alterations=found)


def generated(modality: str, samples: int) -> list[Part]:
    """Return unrelated originals."""
    if modality == "text":
        return [TextPart(text=" ".join(prose(seed))) for seed in range(samples)]
    if modality == "image":
        return [ENCODER.encode("image", picture(picture_pixels(seed))) for seed in range(samples)]
    return [ENCODER.encode("audio", clip(sound(seed))) for seed in range(samples)]


def of_shards(folder: Path, samples: int) -> dict[str, list[Part]]:
    """Return the first distinct pictures and clips, and each document's text of at least LEAST_WORDS words."""
    found: dict[str, dict[int, Part]] = {"text": {}, "image": {}, "audio": {}}
    for _, document in read_documents(Manifest.load(folder), print):
        text = "\n".join(part.text for part in document.parts if isinstance(part, TextPart))
        parts: list[Part] = [part for part in document.parts if isinstance(part, MediaPart)]
        if len(text.split()) >= LEAST_WORDS:
            parts.append(TextPart(text=text))
        for part in parts:
            if len(found[part.modality]) < samples:
                found[part.modality].setdefault(part.xxh3, part)
    return {modality: list(parts.values()) for modality, parts in found.items()}


def measure_index(modality: str, threshold: float, documents: int) -> None:
    """Print what one more document costs when `documents` are there, and the memory without mapped files."""
    draw = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        index = NearDuplicateFinder(thresholds=DedupOptions(**{modality: threshold})).index(Path(folder))
        for number in range(documents):
            if number == documents - documents // 10:
                start = time.process_time()
            hashes = draw.integers(0, 2**64, 1 if modality == "image" else 0, dtype=np.uint64)
            words = draw.integers(0, 2**32, 128, dtype=np.uint32) if modality == "text" else None
            clips = [audio.Fingerprint(ms=1000, bits=draw.bytes(audio.BYTES))] if modality == "audio" else []
            signature = Sketch(text=words, images=hashes, clips=tuple(clips)).pack()
            if index.twin(signature) is None:
                index.add(f"folder/document-{number}.html", signature)
        each_us = (time.process_time() - start) / (documents // 10) * 1e6
        resident = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
        assert resident is not None
        print(f"{modality}: {documents} documents, {each_us:.0f} us each, {int(resident[1]) // 1024} MiB resident")


def main() -> None:
    """Measure as the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path)
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--dedup", default="text,image,audio")
    parser.add_argument("--index", type=int)
    arguments = parser.parse_args()
    asked = dedup_options(arguments.dedup).asked()
    if arguments.index:
        for modality, threshold in asked.items():
            measure_index(modality, threshold, arguments.index)
        return
    stored = of_shards(arguments.shards, arguments.samples) if arguments.shards else {}
    for modality, threshold in asked.items():
        parts = stored[modality] if arguments.shards else generated(modality, arguments.samples)
        report = measure(parts, DedupOptions(**{modality: threshold}))
        print(
            f"{modality}={threshold}: {report.originals} originals, {report.near_originals} more near one of them, "
            f"{report.featureless} with nothing to compare"
        )
        for name, quality in report.alterations.items():
            print(f"  {name:30s} recall {quality.recall:.3f}  precision {quality.precision:.3f}")


if __name__ == "__main__":
    main()
