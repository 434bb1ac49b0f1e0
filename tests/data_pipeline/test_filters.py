"""Filters: each rule on both sides of its threshold, media that go, documents that go with them, the ledger."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from triweave.data_pipeline.errors import BuildError, ConfigError
from triweave.data_pipeline.filters import media_rules, text_rules
from triweave.data_pipeline.filters.apply import filtered
from triweave.data_pipeline.filters.options import PRESETS, FilterOptions, filter_options
from triweave.data_pipeline.media.geometry import MediaInfo
from triweave.data_pipeline.shards.build import BuildOptions, build
from triweave.data_pipeline.shards.ledger import read_ledger
from triweave.data_pipeline.shards.media_encoder import MediaEncoder, MediaOptions
from triweave.data_pipeline.shards.schema import Document, MediaPart, Part, TextPart
from triweave.data_pipeline.sources.base import FilteredError
from triweave.data_pipeline.sources.folder import FolderSource
from triweave.launch.cli import main

Media = Callable[..., bytes]
ENCODER = MediaEncoder(MediaOptions())
PROSE = """Owls hunt at night and have ears that sit at two different heights.
A mouse that moves below the snow can be heard from far away, and that is how most of them are caught.
Their feathers have soft edges, so the wings make no sound when the bird comes down to the ground.
By day they sit close to the trunk of a tree, where the colour of bark hides them from smaller birds."""


def clip_bytes(signal: np.ndarray, rate_hz: int = 8000) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, signal.astype(np.float32), rate_hz, format="FLAC")
    return file.getvalue()


def image_bytes(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def document(*parts: str | Part, **more: Any) -> Document:
    made = tuple(TextPart(text=part) if isinstance(part, str) else part for part in parts)
    return Document(id="d", parts=made, **more)


def refusal(found: Document, **options: Any) -> str:
    """Return why a document is refused, an empty string if it is not."""
    try:
        filtered(found, FilterOptions(**options))
    except FilteredError as why:
        return str(why)
    return ""


@pytest.mark.parametrize(
    ("rule", "good", "bad", "text"),
    [
        ("min_words", 3, 4, "one two three"),
        ("max_words", 3, 2, "one two three"),
        ("min_words", 4, 5, "梟は 夜に"),
        ("min_mean_word_letters", 3, 4, "abc abc"),
        ("max_mean_word_letters", 3, 2, "abc abc"),
        ("min_letter_word_share", 0.5, 0.6, "abc 12 x1 -"),
        ("max_symbols_per_word", 0.5, 0.4, "#a b c# d"),
        ("max_bullet_line_share", 0.5, 0.4, "- a\nb"),
        ("max_ellipsis_line_share", 0.5, 0.4, "a ...\nb"),
        ("min_terminal_line_share", 0.5, 0.6, "a.\nb"),
        ("max_duplicate_line_share", 0.5, 0.4, "a\na\n\nb\na"),
        ("max_repeated_words_share", 0.5, 0.4, "a b c d e A B C D E"),
    ],
)
def test_text_rules_on_both_sides(rule: str, good: float, bad: float, text: str) -> None:
    assert refusal(document(text), **{rule: good}) == ""
    assert refusal(document(text), **{rule: bad}) == f"{rule}: {'below' if rule.startswith('min') else 'above'} {bad:g}"


def test_a_run_that_overlaps_itself_is_counted_once() -> None:
    assert text_rules.repeated_words_share(["a"] * 10) == pytest.approx(0.9)
    assert text_rules.repeated_words_share(list("abcdefghij")) == 0


def test_stop_words_are_asked_of_english_only() -> None:
    german = document("Eulen jagen nachts", labels={"language": "de"})
    assert refusal(german, min_stop_words=2) == ""
    assert refusal(document("Owls hunt", labels={"language": "en_GB"}), min_stop_words=2) == "min_stop_words: below 2"
    assert refusal(document("The owl of Minerva", labels={"language": "en"}), min_stop_words=2) == ""


def test_opt_out_licence_and_language() -> None:
    assert refusal(document("x", source={"opt_out": True})).startswith("drop_opt_out")
    assert refusal(document("x", source={"opt_out": True}), drop_opt_out=False) == ""
    assert refusal(document("x", source={"license": "MIT"}), licenses=("MIT",)) == ""
    assert refusal(document("x"), licenses=("MIT",)) == "licenses: none"
    assert refusal(document("x", labels={"language": "xx"}), languages=("en",)) == "languages: xx"


@pytest.fixture
def pictures() -> dict[str, MediaPart]:
    """A noisy picture, a flat one, a thin one and a small one."""
    noise = np.random.default_rng(0).integers(0, 255, (100, 120, 3))
    made = {"sharp": noise, "blurred": np.full((100, 120, 3), 90), "thin": noise[:20], "small": noise[:16, :16]}
    return {name: ENCODER.encode("image", image_bytes(pixels)) for name, pixels in made.items()}


def test_pictures_that_fail_go_and_the_rest_stays(pictures: dict[str, MediaPart]) -> None:
    rules = {"image_min_side_px": 18, "image_max_aspect": 4, "image_min_sharpness": 20.0}
    found = filtered(document("a", *pictures.values(), "b"), FilterOptions(**rules))
    assert [part for part in found.parts if isinstance(part, MediaPart)] == [pictures["sharp"]]
    assert len(found.parts) == 3
    assert found.left_out == (
        "without 3 media that a filter refused: image_max_aspect: above 4; image_min_sharpness: below 20; "
        "image_min_side_px: below 18"
    )
    assert refusal(document("a", pictures["thin"]), **rules) == "image_max_aspect: above 4"
    assert refusal(document("a", pictures["thin"]), keep_without_media=True, **rules) == ""
    assert refusal(document(pictures["thin"]), keep_without_media=True, **rules) == "image_max_aspect: above 4"


def test_words_per_picture(pictures: dict[str, MediaPart]) -> None:
    page = document("one two three four", pictures["sharp"], pictures["small"])
    assert refusal(page, min_words_per_image=2, max_words_per_image=2) == ""
    assert refusal(page, min_words_per_image=2.5) == "min_words_per_image: below 2.5"
    assert refusal(document("one"), min_words_per_image=5) == ""


def test_sharpness_is_the_variance_of_the_laplacian() -> None:
    pixels = np.random.default_rng(1).integers(0, 255, (9, 7), np.uint8)
    grey = pixels.astype(np.float64)
    wanted = np.var(
        [
            grey[y - 1, x] + grey[y + 1, x] + grey[y, x - 1] + grey[y, x + 1] - 4 * grey[y, x]
            for y in range(1, 8)
            for x in range(1, 6)
        ]
    )
    data = image_bytes(np.repeat(pixels[..., None], 3, axis=2))
    assert media_rules.sharpness(data, MediaInfo(width=7, height=9)) == pytest.approx(wanted, rel=1e-5)


def test_clips() -> None:
    time = np.arange(8000) / 8000
    tone = 0.5 * np.sin(2 * np.pi * 440 * time)
    half = np.where(time < 0.5, tone, 0)
    loud = np.clip(4 * tone, -1, 1)
    clips = {
        name: ENCODER.encode("audio", clip_bytes(x)) for name, x in {"tone": tone, "half": half, "loud": loud}.items()
    }
    silence, clipped = media_rules.silence_and_clipping(clips["half"].data or b"", clips["half"].info)
    assert (silence, clipped) == (0.5, 0)
    rules = {"audio_max_silence_share": 0.4, "audio_max_clipped_share": 0.1}
    assert refusal(document("x", clips["tone"]), **rules) == ""
    assert refusal(document("x", clips["half"]), **rules) == "audio_max_silence_share: above 0.4"
    assert refusal(document("x", clips["loud"]), **rules) == "audio_max_clipped_share: above 0.1"
    assert refusal(document("x", clips["tone"]), audio_min_ms=1001) == "audio_min_ms: below 1001"
    assert refusal(document("x", clips["tone"]), audio_max_ms=999) == "audio_max_ms: above 999"


def test_a_presets_values_can_be_changed(tmp_path: Path) -> None:
    path = tmp_path / "filters.yaml"
    path.write_text("max_words: 7\nlanguages: [en, de]\n", encoding="utf-8")
    options = filter_options(["gopher", "min_words=5", "drop_opt_out=false", "max_bullet_line_share=null"], path)
    assert (options.min_words, options.max_words) == (5, PRESETS["gopher"]["max_words"])
    assert (options.languages, options.drop_opt_out, options.max_bullet_line_share) == (("en", "de"), False, None)
    assert refusal(document(PROSE, labels={"language": "en"}), **PRESETS["gopher"]) == ""
    for name in PRESETS:
        filter_options([name])


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ("goffer", "one of the presets gopher"),
        ("min_word=3", "did you mean filter.min_words"),
        ("min_words=few", "must be a whole number"),
        ("min_words=-1", "at least 0"),
        ("max_bullet_line_share=2", "is a share"),
        ("drop_opt_out=perhaps", "true or false"),
        ("audio_max_ms=nan", "finite"),
    ],
)
def test_wrong_filters_are_one_line(asked: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=says):
        filter_options([asked])
    arguments = [
        "build",
        "--source",
        "folder",
        "--input",
        str(tmp_path),
        "--out",
        str(tmp_path / "o"),
        "--filter",
        asked,
    ]
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line


def test_a_build_says_which_rule_refused_a_row_and_other_filters_are_another_build(
    tmp_path: Path, picture: Media
) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for name, text in {"long": PROSE, "short": "An owl."}.items():
        (corpus / f"{name}.txt").write_text(text, encoding="utf-8")
        (corpus / f"{name}.png").write_bytes(picture(len(name)))
    options = BuildOptions(filters=FilterOptions(min_words=10))
    manifest = build(FolderSource(root=corpus), tmp_path / "shards", options)
    rows = {row["id"]: (row["status"], row["reason"]) for row in read_ledger(manifest.ledger_path).to_pylist()}
    assert rows == {"long": ("kept", ""), "short": ("filtered", "min_words: below 10")}
    assert manifest.build["filters"] == {"min_words": 10}
    assert "filters" not in build(FolderSource(root=corpus), tmp_path / "all", BuildOptions()).build
    with pytest.raises(BuildError, match="filters"):
        build(FolderSource(root=corpus), tmp_path / "shards", BuildOptions())


def test_every_threshold_is_in_the_documentation() -> None:
    text = (Path(__file__).parents[2] / "docs" / "corpora.md").read_text(encoding="utf-8")
    assert [item.name for item in fields(FilterOptions) if f"`{item.name}`" not in text] == []
