"""The Asterisk source on a small tree of the same layout."""

from __future__ import annotations

import gzip
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest

from triweave.data_pipeline.errors import SourceError
from triweave.data_pipeline.shards.media_encoder import MediaEncoder, MediaOptions
from triweave.data_pipeline.shards.schema import Document, TextPart
from triweave.data_pipeline.sources.asterisk import AsteriskSource
from triweave.data_pipeline.splits import normalise_text, split_of

ENGLISH = """; Core Asterisk Sounds in English

hello: Hello,  World.
letters/at: at [@]
beep: [this is a simple beep tone]
join: <beep>
intro: Leave a message. (simple tone sound plays)
silence/1: (1 second of silence)
gone: There is no clip.
empty:
twice: One.
twice: Two.
again: Again.
again: Again.
time: It is: five: past
"""
ITALIAN = "\ufeff; Italiano\nhello: hello world!\nletters/a: à\nsame: Uguale.\nother: Diverso.\n"


def write(root: Path, texts: dict[str, str], clips: dict[str, bytes]) -> Path:
    for language, text in texts.items():
        path = root / "transcripts" / f"core-sounds-{language}.txt.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(text.encode()))
    for name, content in clips.items():
        path = root / "sounds" / f"{name}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


@pytest.fixture
def root(tmp_path: Path, clip: Callable[..., bytes]) -> Path:
    prompts = ("hello", "letters/at", "beep", "join", "intro", "silence/1", "empty", "twice", "again", "time", "new")
    names = [f"en_US_f_Allison/{prompt}" for prompt in prompts]
    names += [f"it_IT_m_Carlo/{prompt}" for prompt in ("hello", "letters/a", "same")]
    clips = {name: clip(number, ms=60, form="WAV", rate_hz=8000) for number, name in enumerate(names)}
    clips["it_IT_m_Carlo/other"] = clips["it_IT_m_Carlo/same"]
    return write(tmp_path, {"en": ENGLISH, "it": ITALIAN}, clips)


def documents(source: AsteriskSource) -> dict[str, Document]:
    encoder = MediaEncoder(MediaOptions())
    return {row.id: source.document(row, encoder) for row in source.rows() if not row.is_decided}


def test_one_document_per_prompt(root: Path) -> None:
    found = documents(AsteriskSource(root=root, part_order="canonical"))
    texts = {name: document.parts[1].text for name, document in found.items()}  # type: ignore[union-attr]
    assert texts == {
        "en/hello": "Hello, World.",
        "en/letters/at": "at",
        "en/again": "Again.",
        "en/time": "It is: five: past",
        "it/hello": "hello world!",
        "it/letters/a": "à",
        "it/same": "Uguale.",
        "it/other": "Diverso.",
    }
    at = found["en/letters/at"]
    assert [part.modality for part in at.parts] == ["audio", "text"]
    group = at.labels["group"]
    assert at.labels == {
        "language": "en",
        "prompt": "letters/at",
        "kind": "speech",
        "group": group,
        "split": split_of(group),
    }
    assert at.source == {"corpus": "asterisk-core-sounds", "license": "CC-BY-SA-3.0"}
    assert found["it/same"].source["license"] == "CC-BY-3.0"


def test_every_other_line_and_clip_is_accounted_for(root: Path) -> None:
    assert {row.id: row.filtered for row in AsteriskSource(root=root).rows() if row.is_decided} == {
        "en/beep": "the transcript is a remark in brackets",
        "en/join": "the transcript is a remark in brackets",
        "en/silence/1": "the transcript is a remark in brackets",
        "en/intro": "a transcript with a remark in brackets",
        "en/gone": "no clip",
        "en/empty": "no transcript",
        "en/twice": "two transcripts",
        "file:sounds/en_US_f_Allison/new.wav": "a clip without a transcript",
    }


def test_concepts_cross_languages_and_do_not_depend_on_them(root: Path) -> None:
    groups = {name: document.labels["group"] for name, document in documents(AsteriskSource(root=root)).items()}
    assert groups["en/hello"] == groups["it/hello"], "one transcript"
    assert groups["it/same"] == groups["it/other"], "one clip"
    assert len(set(groups.values())) == len(groups) - 2
    italian = documents(AsteriskSource(root=root, languages=("it",)))
    assert {name: document.labels["group"] for name, document in italian.items()} == {
        name: group for name, group in groups.items() if name.startswith("it/")
    }


def test_no_transcript_and_no_clip_crosses_a_split(tmp_path: Path, clip: Callable[..., bytes]) -> None:
    texts = {
        "en": "".join(f"p{number}: Prompt {number % 61}.\n" for number in range(90)),
        "fr": "".join(f"p{number}: {'PROMPT' if number % 5 == 0 else 'Annonce'} {number}\n" for number in range(90)),
    }
    clips = {f"en_US/p{number}": clip(number % 71, ms=20, form="WAV") for number in range(90)}
    clips |= {f"fr_CA/p{number}": clip(100 + number % 83, ms=20, form="WAV") for number in range(90)}
    splits = defaultdict(set)
    for document in documents(AsteriskSource(root=write(tmp_path, texts, clips))).values():
        for part in document.parts:
            key = normalise_text(part.text) if isinstance(part, TextPart) else part.xxh3
            splits[key].add(document.labels["split"])
    assert {len(found) for found in splits.values()} == {1}
    assert set.union(*splits.values()) == {"train", "validation", "test"}


def test_most_texts_come_after_their_sound(tmp_path: Path, clip: Callable[..., bytes]) -> None:
    sound = clip(1, ms=20, form="WAV")
    texts = {"es": "".join(f"p{number}: frase {number}\n" for number in range(200))}
    root = write(tmp_path, texts, {f"es_MX/p{number}": sound for number in range(200)})
    orders = Counter(
        tuple(part.modality for part in document.parts) for document in documents(AsteriskSource(root=root)).values()
    )
    assert set(orders) == {("audio", "text"), ("text", "audio")}
    assert 130 < orders["audio", "text"] < 170
    assert documents(AsteriskSource(root=root)) == documents(AsteriskSource(root=root))


def test_wrong_use(tmp_path: Path, root: Path) -> None:
    with pytest.raises(SourceError, match="asterisk has en, es, fr, it, ru"):
        AsteriskSource(root=root, languages=("de",))
    with pytest.raises(SourceError, match="allowed are mixed, canonical"):
        AsteriskSource(root=root, part_order="random")  # type: ignore[arg-type]
    with pytest.raises(SourceError, match="triweave fetch asterisk"):
        list(AsteriskSource(root=tmp_path / "gone").rows())
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="no sounds/ or transcripts/"):
        list(AsteriskSource(root=tmp_path / "empty").rows())
    (root / "transcripts" / "core-sounds-it.txt.gz").write_bytes(b"no gzip")
    with pytest.raises(SourceError, match=r"core-sounds-it.txt.gz: cannot be read .*fetch the corpus again"):
        list(AsteriskSource(root=root).rows())
