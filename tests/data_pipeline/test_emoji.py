"""The emoji source on a small corpus of the same layout."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from triweave.data_pipeline.errors import SourceError
from triweave.data_pipeline.shards.build import BuildOptions, build
from triweave.data_pipeline.shards.ledger import read_ledger
from triweave.data_pipeline.shards.media_encoder import MediaEncoder, MediaOptions
from triweave.data_pipeline.shards.schema import Document, TextPart
from triweave.data_pipeline.sources.emoji import EmojiSource
from triweave.data_pipeline.splits import split_of

NAMES = {"1F600": "grinning face", "1F400": "rat", "1F401": "Rat!", "1F402": "ox", "1F403": "water buffalo"}


@pytest.fixture
def root(tmp_path: Path, picture: Callable[..., bytes], clip: Callable[..., bytes]) -> Path:
    """Five emoji: two of one name, and two others of one picture."""
    (tmp_path / "pictures").mkdir()
    (tmp_path / "speech").mkdir()
    lines = []
    for number, (code, name) in enumerate(NAMES.items()):
        (tmp_path / "pictures" / f"{code}.png").write_bytes(picture(min(number, 3), width=16, height=16))
        (tmp_path / "speech" / f"{code}.flac").write_bytes(clip(number, ms=40))
        lines.append(json.dumps({"code": code, "name": name, "category": "animals", "voice": "en-us"}))
    (tmp_path / "emoji.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def documents(source: EmojiSource) -> dict[str, Document]:
    encoder = MediaEncoder(MediaOptions())
    return {row.id: source.document(row, encoder) for row in source.rows() if not row.is_decided}


def test_one_document_per_emoji(root: Path) -> None:
    found = documents(EmojiSource(root=root, part_order="canonical"))
    assert list(found) == list(NAMES)
    face = found["1F600"]
    assert [part.modality for part in face.parts] == ["image", "text", "audio"]
    assert face.parts[1] == TextPart(text="grinning face")
    group = face.labels["group"]
    assert face.labels == {
        "category": "animals",
        "language": "en",
        "stem": "1F600",
        "kind": "speech",
        "voice": "en-us",
        "synthetic": True,
        "group": group,
        "split": split_of(group),
    }
    assert face.source == {"corpus": "emoji", "license": "CC-BY-SA-4.0", "synthetic": True}
    silent = documents(EmojiSource(root=root, speech=False, part_order="canonical"))
    assert [part.modality for part in silent["1F600"].parts] == ["image", "text"]
    assert silent["1F600"].labels["kind"] == "caption"
    assert silent["1F600"].labels["group"] == group


def test_equal_names_and_equal_pictures_are_one_concept(root: Path) -> None:
    groups = {name: document.labels["group"] for name, document in documents(EmojiSource(root=root)).items()}
    assert groups["1F400"] == groups["1F401"]
    assert groups["1F402"] == groups["1F403"]
    assert len(set(groups.values())) == 3
    for code in NAMES:
        with open(root / "pictures" / f"{code}.png", "ab") as file:
            file.write(b"a note of another release")
        (root / "speech" / f"{code}.flac").write_bytes((root / "speech" / "1F400.flac").read_bytes())
    again = {name: document.labels["group"] for name, document in documents(EmojiSource(root=root)).items()}
    assert again == groups


def test_mixed_order_deals_speech_and_silent_orders(root: Path) -> None:
    index = root / "emoji.jsonl"
    line = json.loads(index.read_text().splitlines()[0])
    lines = []
    for number in range(90):
        code = f"{0x1F600 + number:X}"
        lines.append(json.dumps(line | {"code": code, "name": f"name {number}"}))
        for path, first in (
            (f"pictures/{code}.png", "pictures/1F600.png"),
            (f"speech/{code}.flac", "speech/1F600.flac"),
        ):
            (root / path).write_bytes((root / first).read_bytes())
    index.write_text("\n".join(lines))
    orders = Counter(
        tuple(part.modality for part in document.parts) for document in documents(EmojiSource(root=root)).values()
    )
    assert set(orders) == {("image", "audio", "text"), ("audio", "text", "image"), ("image", "text", "audio")}
    assert min(orders.values()) > 15


def test_missing_files_and_damaged_lines_fail_alone(root: Path) -> None:
    (root / "speech" / "1F600.flac").unlink()
    bad = ["{", "[]", '{"code": "1F404"}', '{"code": "../x", "name": "a", "category": "b", "voice": "c"}']
    with open(root / "emoji.jsonl", "a") as file:
        file.write("\n".join(bad) + "\n")
    manifest = build(EmojiSource(root=root), root / "shards", BuildOptions())
    assert manifest.rows == {"kept": 4, "filtered": 0, "failed": 5, "duplicate": 0}
    reasons = {row["id"]: row["reason"] for row in read_ledger(manifest.ledger_path).to_pylist() if row["reason"]}
    assert reasons == {
        "1F600": "speech/1F600.flac is missing",
        **{f"line:{number}": f"line {number} of emoji.jsonl is damaged" for number in (6, 7, 8, 9)},
    }
    assert "1F600" in documents(EmojiSource(root=root, speech=False))


def test_wrong_use(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"has no emoji\.jsonl; run `triweave fetch emoji`"):
        list(EmojiSource(root=tmp_path).rows())
    with pytest.raises(SourceError, match="no such folder"):
        list(EmojiSource(root=tmp_path / "gone").rows())
    with pytest.raises(SourceError, match="allowed are mixed, canonical"):
        EmojiSource(root=tmp_path, part_order="random")  # type: ignore[arg-type]
