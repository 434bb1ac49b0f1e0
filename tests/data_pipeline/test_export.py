"""Shards written as OBELICS and LLaVA: what comes back through our own sources is what went out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from triweave.data_pipeline.shards.build import BuildOptions, build
from triweave.data_pipeline.shards.manifest import Manifest
from triweave.data_pipeline.shards.media_encoder import MediaEncoder, MediaOptions
from triweave.data_pipeline.shards.schema import MediaPart, TextPart
from triweave.data_pipeline.sources.base import Source
from triweave.data_pipeline.sources.chat import ChatSource
from triweave.data_pipeline.sources.interleaved import InterleavedSource
from triweave.data_pipeline.sources.manifest import ManifestSource
from triweave.launch.cli import main

Media = Callable[..., bytes]


@pytest.fixture
def shards(tmp_path: Path, picture: Media, clip: Media) -> Manifest:
    """Three documents: interleaved, a conversation with a clip, a clip alone."""
    for name, content in {"a.png": picture(1), "b.jpg": picture(2, form="JPEG"), "c.flac": clip(3)}.items():
        (tmp_path / name).write_bytes(content)

    def text(content: str, role: str | None = None) -> dict[str, Any]:
        return {"modality": "text", "text": content, "role": role}

    def media(modality: str, path: str) -> dict[str, Any]:
        return {"modality": modality, "path": path, "alt": f"alt of {path}"}

    rows = [
        {"id": "page", "parts": [text("Owls – 1"), media("image", "a.png"), text("2"), media("image", "b.jpg")],
         "labels": {"language": "en"}, "source": {"url": "https://example.org/p"}},
        {"id": "chat", "parts": [media("image", "a.png"), text("What?", "user"), media("audio", "c.flac"),
                                 text("An owl.", "assistant")]},
        {"id": "clip", "parts": [media("audio", "c.flac")]},
    ]  # fmt: skip
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return build(ManifestSource(root=path), tmp_path / "shards", BuildOptions(shuffle_seed=None))


def read_back(source: Source) -> list[list[Any]]:
    """Return the parts of every document: a text with its role, or the bytes of a medium."""
    encoder = MediaEncoder(MediaOptions())
    documents = [source.document(row, encoder) for row in source.rows()]
    assert not any(document.left_out for document in documents)
    return [[(p.role, p.text) if isinstance(p, TextPart) else p.data for p in d.parts] for d in documents]


def test_obelics(shards: Manifest, tmp_path: Path, picture: Media, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "obelics"
    assert main(["export", str(shards.root), "--to", "obelics", "--out", str(out), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["documents"], said["media"], said["damaged"]) == (2, 3, 0)
    assert said["left_out"] == {"audio parts": 2, "documents without text and picture": 1}
    found = read_back(InterleavedSource(root=out, media=out / "media"))
    owl, jay = picture(1), picture(2, form="JPEG")
    assert found[0] == [(None, "Owls – 1"), owl, (None, "2"), jay]
    assert found[1] == [owl, (None, "What?\n\nAn owl.")]
    page = pq.read_table(out / "part-00000.parquet").to_pylist()[0]
    assert json.loads(page["general_metadata"])["url"] == "https://example.org/p"
    assert json.loads(page["metadata"])[1]["alt_text"] == "alt of a.png"
    assert page["language"] == "en"


def test_llava(shards: Manifest, tmp_path: Path, picture: Media, clip: Media) -> None:
    out = tmp_path / "llava"
    assert main(["export", str(shards.root), "--to", "llava", "--out", str(out)]) == 0
    found = read_back(ChatSource(root=out / "conversations.json"))
    owl, jay, tone = picture(1), picture(2, form="JPEG"), clip(3)
    assert found == [
        [("assistant", "Owls – 1"), owl, ("assistant", "2"), jay],
        [owl, ("user", "What?"), tone, ("assistant", "An owl.")],
    ]
    records = json.loads((out / "conversations.json").read_text(encoding="utf-8"))
    assert records[1]["conversations"][0] == {"from": "human", "value": "<image>\nWhat?"}
    assert isinstance(records[0]["image"], list)


def test_a_damaged_sample_is_named_and_the_others_are_written(
    shards: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tar = shards.tar_path(0)
    content = bytearray(tar.read_bytes())
    content[700] ^= 1
    tar.write_bytes(content)
    out = tmp_path / "llava"
    assert main(["export", str(shards.root), "--to", "llava", "--out", str(out)]) == 1
    assert "left out, damaged" in capsys.readouterr().err
    assert len(json.loads((out / "conversations.json").read_text(encoding="utf-8"))) == 1


def test_a_folder_in_use_is_refused_and_a_failed_export_leaves_nothing(
    shards: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["export", str(shards.root), "--to", "llava", "--out", str(shards.root)]) == 2
    assert "holds something else; choose a new or an empty folder" in capsys.readouterr().err
    before = sorted(tmp_path.iterdir())

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert main(["export", str(shards.root), "--to", "obelics", "--out", str(tmp_path / "new")]) == 2
    assert "No space left on device; nothing is left behind" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_media_keep_their_bytes_and_alt(shards: Manifest) -> None:
    from triweave.data_pipeline.export.documents import read_documents

    (_, page), *_ = read_documents(shards, damaged=pytest.fail)
    assert [part.alt for part in page.parts if isinstance(part, MediaPart)] == ["alt of a.png", "alt of b.jpg"]
