"""Signatures of texts, pictures and clips: what they survive, what they tell apart; thresholds from text."""

from __future__ import annotations

import random
from pathlib import Path

import dedup_quality as made
import numpy as np
import pytest
import scipy.fft
import soxr
from PIL import Image

from triweave.data_pipeline.dedup import audio, text
from triweave.data_pipeline.dedup.options import DEFAULTS, RANGES, DedupOptions, dedup_options
from triweave.data_pipeline.errors import ConfigError
from triweave.data_pipeline.shards.schema import (
    Document,
    Part,
    TextPart,
)
from triweave.launch.cli import main

ALL = DedupOptions(text=0.8, image=6, audio=0.2)


def document(*parts: str | Part, name: str = "d") -> Document:
    return Document(id=name, parts=tuple(TextPart(text=part) if isinstance(part, str) else part for part in parts))


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        ("text=0.7", DedupOptions(text=0.7)),
        ("text, image=3", DedupOptions(text=0.8, image=3)),
        ("audio=0.1,image,text=1", DedupOptions(text=1.0, image=6, audio=0.1)),
    ],
)
def test_thresholds_from_text(asked: str, wanted: DedupOptions) -> None:
    assert dedup_options(asked) == wanted
    assert set(DEFAULTS) == set(RANGES) == set(ALL.asked())


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ("txt=0.8", "did you mean dedup.text"),
        ("text=0.3", "from 0.5 to 1"),
        ("text=nan", "from 0.5 to 1"),
        ("image=12", "from 0 to 11"),
        ("image=6.5", "a whole number"),
        ("audio=much", "a number, for example audio=0.2"),
        ("text,text=0.9", "twice"),
        (" , ", "name at least one of text, image, audio"),
    ],
)
def test_wrong_thresholds_are_one_line(
    asked: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=says):
        dedup_options(asked)
    arguments = ["build", "--source", "folder", "--input", str(tmp_path), "--out", str(tmp_path / "o")]
    assert main([*arguments, "--dedup", asked]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line


@pytest.mark.parametrize("changed", [1, 5, 12, 30, 200])
def test_signatures_estimate_the_jaccard_similarity_of_word_5_grams(changed: int) -> None:
    errors = []
    for seed in range(20):
        words = made.prose(seed)
        edited = list(words)
        for place in random.Random(seed).sample(range(len(words)), changed):
            edited[place] = f"other{place}"
        first, second = text.signature(" ".join(words)), text.signature(" ".join(edited))
        assert first is not None
        assert second is not None
        errors.append(text.similarity(first, second) - made.jaccard(words, edited))
    assert abs(np.mean(errors)) < 0.03
    assert np.max(np.abs(errors)) < 4.5 * 0.5 / np.sqrt(text.HASHES)


def test_case_punctuation_and_compatibility_forms_are_no_difference() -> None:
    plain = text.signature("The Owl, of Minerva: flies at dusk; alone")
    assert np.array_equal(plain, text.signature("“the  ｏｗｌ” of\nMINERVA (ﬂies) at dusk. Alone!"))
    assert text.signature(" – … !") is None
    short, same = text.signature("An owl"), text.signature("an OWL.")
    assert np.array_equal(short, same)
    assert not np.array_equal(short, text.signature("an owl flies"))
    assert text.normalised_words("小さな鳥。") == list("小さな鳥")


def test_long_texts_are_read_in_pieces_without_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    words = " ".join(made.prose(1, 1000))
    whole = text.signature(words)
    monkeypatch.setattr(text, "_BATCH", 7)
    assert np.array_equal(text.signature(words), whole)


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9, 0.95, 1.0])
def test_bands_find_nearly_all_pairs_at_the_threshold_and_no_more_rows_would(threshold: float) -> None:
    rows = text.band_rows(threshold)
    assert 1 - (1 - threshold**rows) ** (text.HASHES // rows) >= 0.999
    assert rows == text.HASHES or 1 - (1 - threshold ** (rows + 1)) ** (text.HASHES // (rows + 1)) < 0.999
    found = text.signature("one two three four five six")
    assert found is not None
    assert len(set(text.band_keys(found, rows).tolist())) == text.HASHES // rows


def test_phash_is_the_median_of_the_low_frequencies() -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    grey = pixels @ np.array([0.299, 0.587, 0.114])
    low = scipy.fft.dct(scipy.fft.dct(grey, axis=0), axis=1)[:8, :8]
    wanted = "".join("01"[int(value > np.median(low))] for value in low.reshape(-1))
    assert made.hash_of(made.picture(pixels)) == int(wanted, 2)


def test_phash_survives_resizing_and_encoding_and_tells_scenes_apart() -> None:
    hashes = [made.hash_of(made.picture(made.picture_pixels(seed))) for seed in range(40)]
    assert None not in hashes
    for seed in range(40):
        pixels = made.picture_pixels(seed)
        smaller = np.asarray(Image.fromarray(pixels).resize((77, 60)))
        for altered in (
            made.picture(pixels, "JPEG", quality=40),
            made.picture(smaller),
            made.picture(pixels, "WEBP", quality=30),
        ):
            assert (hashes[seed] ^ made.hash_of(altered)).bit_count() <= 6
    apart = [(hashes[a] ^ hashes[b]).bit_count() for a in range(40) for b in range(a)]
    assert min(apart) > 11


def test_a_plain_picture_has_no_phash() -> None:
    assert made.hash_of(made.picture(np.full((50, 60, 3), 128, np.uint8))) is None
    assert made.hash_of(made.picture(np.random.default_rng(0).integers(127, 129, (50, 60, 3)).astype(np.uint8))) is None


def test_fingerprints_survive_codecs_rates_loudness_and_silence() -> None:
    for seed in range(12):
        signal = made.sound(seed)
        original = made.print_of(made.clip(signal))
        assert original is not None
        altered = {
            "vorbis": made.clip(signal, form="OGG", subtype="VORBIS"),
            "mp3": made.clip(signal, form="MP3"),
            "8 kHz": made.clip(soxr.resample(signal, 16_000, 8000), 8000),
            "stereo at 44.1 kHz": made.clip(np.tile(soxr.resample(signal, 16_000, 44_100)[:, None], 2), 44_100),
            "softer": made.clip(signal / 8),
            "silence at the ends": made.clip(np.pad(signal, (7000, 5000))),
        }
        for name, data in altered.items():
            found = made.print_of(data)
            assert found is not None
            assert audio.near(original, found, 0.15), (name, seed)


def test_fingerprints_tell_clips_apart() -> None:
    found = [made.print_of(made.clip(made.sound(seed))) for seed in range(40)]
    assert None not in found
    apart = [audio.bit_errors(found[a].bits, found[b].bits) for a in range(40) for b in range(a)]
    assert min(apart) > 0.28 * audio.BITS
    longer = audio.Fingerprint(ms=found[0].ms * 2, bits=found[0].bits)
    assert not audio.near(found[0], longer, 0.2)


def test_memory_of_a_long_clip_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = made.clip(made.sound(1, seconds=6))
    whole = made.print_of(data)
    monkeypatch.setattr(audio, "_BLOCK_FRAMES", 5)
    assert made.print_of(data) == whole


def test_silent_and_tiny_clips_have_no_fingerprint() -> None:
    assert made.print_of(made.clip(np.zeros(16_000, np.float32))) is None
    assert made.print_of(made.clip(made.sound(1, seconds=0.1))) is None
