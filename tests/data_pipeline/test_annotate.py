"""Annotators: languages, Chinese words, entities; where labels go, the language filter, and what is not installed."""

from __future__ import annotations

import importlib.util
import json
import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from triweave.data_pipeline.annotate.language import LanguageStep, detect
from triweave.data_pipeline.annotate.registry import ANNOTATORS, annotation_steps
from triweave.data_pipeline.annotate.words import WordsStep
from triweave.data_pipeline.errors import ConfigError
from triweave.data_pipeline.filters.apply import filtered
from triweave.data_pipeline.filters.options import FilterOptions
from triweave.data_pipeline.scrub.step import scrub_step
from triweave.data_pipeline.shards.index import read_index
from triweave.data_pipeline.shards.ledger import read_ledger
from triweave.data_pipeline.shards.manifest import Manifest
from triweave.data_pipeline.shards.media_encoder import MediaEncoder, MediaOptions
from triweave.data_pipeline.shards.schema import Document, TextPart, document_from_json
from triweave.data_pipeline.shards.verify import verify
from triweave.data_pipeline.sources.base import FilteredError
from triweave.launch.cli import main

CHINESE = "小鸟在树枝上唱歌。"
needs_spacy = pytest.mark.skipif(importlib.util.find_spec("spacy") is None, reason="needs spaCy (extra entities)")


def document(*texts: str, **labels: Any) -> Document:
    return Document(id="d", parts=tuple(TextPart(text=text) for text in texts), labels=labels)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("A small bird sits on a branch and sings.", "en"),
        ("Ein kleiner Vogel sitzt auf einem Ast und singt.", "de"),
        ("Маленькая птица сидит на ветке и поёт.", "ru"),
        ("小さな鳥が枝にとまって歌っている。", "ja"),
        (CHINESE, "zh"),
        ("12345, 67890 !!", "und"),
        ("Xq", "und"),
    ],
)
def test_languages(text: str, code: str) -> None:
    assert detect(text) == code


def test_what_the_corpus_says_goes_before_what_is_detected() -> None:
    step = LanguageStep()
    english = "A small bird sits on a branch and sings."
    assert step.apply(document(english)).labels == {"language": "en", "detected_language": "en"}
    assert step.apply(document(english, language="de")).labels == {"language": "de", "detected_language": "en"}
    assert step.apply(document("123")).labels == {"detected_language": "und"}
    silent = document()
    assert step.apply(silent) is silent


def test_a_licence_is_stated_where_there_is_none() -> None:
    (step,) = annotation_steps(["license=GFDL-1.3-or-later OR GPL-2.0+"])
    silent = document("text")
    stated = replace(silent, source={"corpus": "birds", "license": "CC0-1.0"})
    assert step.apply(silent).source == {"license": "GFDL-1.3-or-later OR GPL-2.0+"}
    assert step.apply(stated).source == stated.source
    assert step.before_filters
    rules = FilterOptions(licenses=("GFDL-1.3-or-later OR GPL-2.0+",))
    with pytest.raises(FilteredError, match="licens"):
        filtered(silent, rules)
    assert filtered(step.apply(silent), rules).source["license"] == "GFDL-1.3-or-later OR GPL-2.0+"


def test_words_point_into_their_text() -> None:
    found = WordsStep().apply(document(CHINESE, "", f"第二行 GIMP\n{CHINESE}"))
    words = found.labels["annotations"]["words"]
    assert list(words) == ["0", "2"]
    first = [(CHINESE[start:end], tag) for start, end, tag in words["0"]]
    assert first[:3] == [("小鸟", "n"), ("在", "p"), ("树枝", "n")]
    second = found.parts[2]
    assert isinstance(second, TextPart)
    assert "".join(second.text[start:end] for start, end, _ in words["2"]) == second.text.replace(" ", "").replace(
        "\n", ""
    )
    assert json.loads(json.dumps(found.labels)) == found.labels


def test_only_chinese_has_these_words() -> None:
    step = WordsStep()
    for other in (document("A bird."), document("鳥が歌う。"), document(CHINESE, language="ja")):
        assert step.apply(other) is other
    assert step.apply(document("漢字", language="zh_TW")).labels["annotations"]


def test_jieba_reads_nothing_that_another_user_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own cache is a marshal file in the shared temporary folder."""
    from triweave.data_pipeline.annotate import words

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "jieba.cache").write_bytes(b"planted")
    words._tagger.cache_clear()
    assert next(words.words_in(CHINESE)) == (0, 2, "n")
    assert [path.name for path in tmp_path.iterdir()] == ["jieba.cache"]
    assert (tmp_path / "jieba.cache").read_bytes() == b"planted"


@needs_spacy
def test_entities_by_an_installed_pipeline(tmp_path: Path) -> None:
    import spacy

    pipeline = spacy.blank("en")
    pipeline.add_pipe("entity_ruler").add_patterns([{"label": "BIRD", "pattern": [{"LOWER": "owl"}]}])  # type: ignore[attr-defined]
    pipeline.to_disk(tmp_path / "owls")
    (step,) = annotation_steps([f"entities={tmp_path / 'owls'}"])
    found = step.apply(document("An owl and an Owl."))
    assert found.labels["annotations"] == {"entities": {"0": [[3, 6, "BIRD"], [14, 17, "BIRD"]]}}
    german = document("Eine Owl.", language="de_AT")
    assert step.apply(german) is german
    long = "no bird\n" * 10_000 + "an owl"
    assert step.apply(document(long)).labels["annotations"]["entities"]["0"] == [[len(long) - 3, len(long), "BIRD"]]
    assert step.options["model"] == "en_pipeline 0.0.0"
    before = step.options["xxh3"]
    (tmp_path / "owls" / "more").write_text("x")
    assert step.options["xxh3"] != before
    spacy.blank("en").to_disk(tmp_path / "none")
    with pytest.raises(ConfigError, match="tags no entities"):
        annotation_steps([f"entities={tmp_path / 'none'}"])


@needs_spacy
def test_a_model_that_is_not_there_is_one_line() -> None:
    with pytest.raises(ConfigError, match="no such model") as error:
        annotation_steps(["entities=no_such_model"])
    assert "\n" not in str(error.value)


def test_a_library_that_is_not_there_says_what_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from triweave.data_pipeline.annotate import registry

    monkeypatch.setattr(registry, "find_spec", lambda name: None if name == "jieba" else name)
    with pytest.raises(ConfigError, match=re.escape("needs jieba; pip install 'triweave[annotate]'")):
        annotation_steps(["words"])
    assert len(annotation_steps(["language"])) == 1


@pytest.mark.parametrize("asked", ["verbs", "words=x", "entities", "entities=a,entities=b"])
def test_wrong_use_is_one_line(asked: str) -> None:
    with pytest.raises(ConfigError, match="--annotate ") as error:
        annotation_steps([asked])
    assert "\n" not in str(error.value)


def test_steps_have_the_names_of_the_registry() -> None:
    assert [step.name for step in annotation_steps(["words,language"])] == ["language", "words"]
    assert set(ANNOTATORS) == {"license", "language", "words", "entities"}


def test_annotations_go_when_the_text_or_the_parts_change(picture: Any) -> None:
    step = scrub_step(["email"])
    assert step is not None
    stored = document("to a@site.org", annotations={"words": {}}, group="g")
    assert step.apply(stored).labels == {"group": "g", "scrubbed": {"email": 1}}
    encoder = MediaEncoder(MediaOptions())
    images = tuple(encoder.encode("image", picture(side, width=side, height=side)) for side in (8, 32))
    pair = Document(id="d", parts=(*images, TextPart(text="x")), labels={"annotations": {"words": {"2": []}}, "a": 1})
    assert filtered(pair, FilterOptions(image_min_side_px=10)).labels == {"a": 1}
    assert filtered(pair, FilterOptions()).labels == pair.labels


def test_a_build_filters_by_the_language_it_detects(tmp_path: Path) -> None:
    texts = {
        "en": "A small bird sits on a branch and sings.",
        "de": "Ein Vogel sitzt auf einem Ast.",
        "zh": CHINESE * 3,
    }
    lines = [json.dumps({"id": name, "parts": [{"modality": "text", "text": text}]}) for name, text in texts.items()]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    command = ["build", "--source", "manifest", "--input", str(tmp_path / "rows.jsonl"), "--keep-order"]
    asked = ["--annotate", "words,language", "--filter", "languages=en,zh"]
    for out, workers in (("one", "1"), ("two", "2")):
        assert main([*command, *asked, "--out", str(tmp_path / out), "--workers", workers]) == 0
    one, two = (Manifest.load(tmp_path / name) for name in ("one", "two"))
    assert one.hash == two.hash
    reasons = {row["id"]: row["reason"] for row in read_ledger(one.ledger_path).to_pylist()}
    assert reasons == {"en": "", "de": "languages: de", "zh": ""}
    rows = read_index(one, 0).to_pylist()
    assert [json.loads(row["labels"]) for row in rows] == [
        {"detected_language": code, "language": code} for code in ("en", "zh")
    ]
    data = one.tar_path(0).read_bytes()
    chinese = document_from_json(data[rows[1]["json_offset"] :][: rows[1]["json_size"]])
    assert chinese.labels["annotations"]["words"]["0"][0] == [0, 2, "n"]
    assert not verify(one.root).damage
    assert list(one.build["steps"]) == ["language", "words"]
