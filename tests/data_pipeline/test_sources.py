"""Folder, manifest and WebDataset sources: what becomes a document, what is filtered, what fails and why."""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from triweave.data_pipeline.errors import MediaError, SourceError
from triweave.data_pipeline.shards.build import BuildOptions, build
from triweave.data_pipeline.shards.index import read_index
from triweave.data_pipeline.shards.ledger import read_ledger
from triweave.data_pipeline.shards.manifest import Manifest
from triweave.data_pipeline.shards.media_encoder import MediaEncoder, MediaOptions
from triweave.data_pipeline.shards.schema import Document, MediaPart, TextPart
from triweave.data_pipeline.sources.base import FilteredError, Source, listing_hash
from triweave.data_pipeline.sources.folder import FolderSource
from triweave.data_pipeline.sources.manifest import ManifestSource
from triweave.data_pipeline.sources.registry import SOURCES
from triweave.data_pipeline.sources.webdataset import WebDatasetSource

Media = Callable[..., bytes]


def outcomes(source: Source) -> dict[str, Document | str]:
    """Return row id -> document, or why there is none."""
    encoder = MediaEncoder(MediaOptions())
    result: dict[str, Document | str] = {}
    for row in source.rows():
        try:
            result[row.id] = row.filtered or row.failed or source.document(row, encoder)
        except (FilteredError, SourceError, MediaError, ValueError, OSError) as error:
            result[row.id] = str(error)
    return result


def shape(document: Document | str) -> list[str]:
    assert isinstance(document, Document), document
    return [part.text if isinstance(part, TextPart) else f"{part.modality}.{part.extension}" for part in document.parts]


def test_registry_names_are_the_sources_own(tmp_path: Path) -> None:
    assert {name: make(root=tmp_path).name for name, make in SOURCES.items()} == {name: name for name in SOURCES}


def test_folder_joins_files_of_one_stem(tmp_path: Path, picture: Media, clip: Media) -> None:
    (tmp_path / "birds").mkdir()
    for name, content in {
        "birds/owl.jpg": picture(1, form="JPEG"),
        "birds/owl.flac": clip(1),
        "birds/owl.txt": "\ufeff An owl. \n".encode(),
        "birds/jay.png": picture(2),
        "birds/jay.json": b'{"text": "A jay.", "labels": {"n": 1}, "source": {"license": "CC0-1.0"}}',
        "birds/wren.wav": clip(3, form="WAV"),
        "birds/wrong.png": picture(4, form="JPEG"),
        "birds/blank.txt": b"  ",
        "birds/odd.json": b'{"txt": "?"}',
        "birds/notes.docx": b"?",
        "birds/cut.png": picture(5)[:20],
        ".hidden.png": b"?",
    }.items():
        (tmp_path / name).write_bytes(content)
    found = outcomes(FolderSource(root=tmp_path))
    assert shape(found["birds/owl"]) == ["image.jpg", "audio.flac", "An owl."]
    jay = found["birds/jay"]
    assert isinstance(jay, Document)
    assert (jay.labels, jay.source) == ({"n": 1}, {"corpus": tmp_path.name, "license": "CC0-1.0"})
    assert shape(found["birds/wren"]) == ["audio.wav"]
    assert shape(found["birds/wrong"]) == ["image.jpg"], "the extension is the real codec's"
    assert found["birds/blank"] == "no media and no text"
    assert "unknown field 'txt'; allowed are text, labels, source" in str(found["birds/odd"])
    assert found["file:birds/notes.docx"] == "no modality takes .docx"
    assert isinstance(found["birds/cut"], str)
    assert len(found) == 8


def test_listing_hash_notices_a_changed_file_but_not_a_moved_folder(tiny_corpus: Path, tmp_path: Path) -> None:
    import shutil

    moved = Path(shutil.copytree(tiny_corpus, tmp_path / "moved"))
    before = listing_hash(list(FolderSource(root=tiny_corpus).rows()))
    assert listing_hash(list(FolderSource(root=moved).rows())) == before
    (moved / "en" / "item000.txt").write_text("longer or shorter")
    assert listing_hash(list(FolderSource(root=moved).rows())) != before


@pytest.fixture
def records(tmp_path: Path, picture: Media, clip: Media) -> list[dict[str, Any]]:
    """Two records; the picture `a.png` that the first names lies in tmp_path."""
    (tmp_path / "a.png").write_bytes(picture(1))
    texts = [{"modality": "text", "text": text, "role": role} for text, role in (("before", "user"), ("after", "user"))]
    parts = [texts[0], {"modality": "image", "path": "a.png"}, texts[1]]
    return [
        {"id": "a", "parts": parts, "labels": {"language": "en"}, "source": {"corpus": "mine", "license": "MIT"}},
        {"id": "b", "parts": [{"modality": "audio", "bytes": clip(2), "alt": "a tone", "t_ms": [0, 400]}]},
    ]


def check_records(found: dict[str, Document | str], audio: bytes) -> None:
    a, b = found["a"], found["b"]
    assert shape(a) == ["before", "image.png", "after"]
    assert isinstance(a, Document)
    assert isinstance(b, Document)
    assert isinstance(a.parts[0], TextPart)
    assert a.parts[0].role == "user"
    assert (a.labels, a.source) == ({"language": "en"}, {"corpus": "mine", "license": "MIT"})
    sound = b.parts[0]
    assert isinstance(sound, MediaPart)
    assert (sound.data, sound.alt, sound.t_ms) == (audio, "a tone", (0, 400))
    assert b.source == {"corpus": "rows"}


def test_manifest_of_json_lines(tmp_path: Path, records: list[dict[str, Any]], clip: Media) -> None:
    encoded = json.loads(json.dumps(records, default=lambda data: base64.b64encode(data).decode()))
    lines = [json.dumps(record) for record in encoded]
    lines += ["", "{broken", '{"parts": []}', '{"id": "c", "parts": [{"modality": "image", "path": "gone.png"}]}']
    lines += ['{"id": "d", "parts": []}', '{"id": "e", "parts": [{"modality": "smell", "bytes": "AAAA"}]}']
    lines += [
        '{"id": "f", "parts": [{"modality": "image"}]}',
        '{"id": "g", "parts": [{"modality": "text", "text": 3}]}',
    ]
    lines += ['{"id": "h", "parts": [{"modality": "image", "path": 3}]}', '{"id": "i", "parts": 7}']
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    found = outcomes(ManifestSource(root=tmp_path / "rows.jsonl"))
    check_records(found, clip(2))
    assert "line 4 is not JSON" in str(found["line:4"])
    assert found["line:5"] == "line 5 has no id (a string)"
    assert "gone.png" in str(found["c"])
    assert found["d"] == "parts: must be a list of at least one part"
    assert "unknown modality 'smell': known are image, audio" in str(found["e"])
    assert found["f"] == "parts[0]: needs exactly one of path and bytes, has neither"
    assert found["g"] == "parts[0].text: must be a string"
    assert found["h"] == "parts[0].path: not available in this source"
    assert found["i"] == "parts: must be a list of at least one part"
    assert len(found) == 11


@pytest.mark.parametrize("labels_as_text", [False, True])
def test_manifest_of_parquet(tmp_path: Path, records: list[dict[str, Any]], clip: Media, labels_as_text: bool) -> None:
    rows = [dict(record) for record in records] + [{"id": None, "parts": []}]
    if labels_as_text:
        rows = [row | {name: json.dumps(row[name]) for name in ("labels", "source") if name in row} for row in rows]
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / "rows.parquet", row_group_size=1)
    found = outcomes(ManifestSource(root=tmp_path / "rows.parquet"))
    check_records(found, clip(2))
    assert found["row:2:0"] == "row 2:0 has no id (a string)"


def test_manifest_wrong_use(tmp_path: Path) -> None:
    for path, message in (("rows.csv", "ends in .parquet or .jsonl"), ("rows.jsonl", "no such file")):
        with pytest.raises(SourceError, match=message):
            list(ManifestSource(root=tmp_path / path).rows())
    (tmp_path / "bad.parquet").write_bytes(b"?")
    with pytest.raises(SourceError, match="not a Parquet file"):
        list(ManifestSource(root=tmp_path / "bad.parquet").rows())
    pq.write_table(pa.table({"id": ["a"]}), tmp_path / "columns.parquet")
    with pytest.raises(SourceError, match="no column 'parts'"):
        list(ManifestSource(root=tmp_path / "columns.parquet").rows())


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


@pytest.fixture
def samples(picture: Media, clip: Media) -> dict[str, bytes]:
    """The members of a foreign tar."""
    return {
        "x/one.jpg": picture(1, form="JPEG"),
        "x/one.txt": b"first",
        "x/two.json": b'{"caption": "second", "width": 9, "nested": {}}',
        "x/two.seg.png": picture(2),
        "x/two.cls": b"7",
        "x/three.flac": clip(3),
        "x/three.txt": b"third",
    }


def test_foreign_tars(tmp_path: Path, samples: dict[str, bytes]) -> None:
    write_tar(tmp_path / "a.tar", samples)
    found = outcomes(WebDatasetSource(root=tmp_path))
    assert shape(found["a/x/one"]) == ["image.jpg", "first"]
    assert shape(found["a/x/two"]) == ["image.png", "second"]
    two = found["a/x/two"]
    assert isinstance(two, Document)
    assert two.labels == {"width": 9, "cls": "7"}
    assert shape(found["a/x/three"]) == ["audio.flac", "third"]
    assert len(found) == 3


def test_pickles_are_refused_and_never_loaded(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (Path(tmp_path / "ran").touch, ())

    for ending in ("pyd", "pkl"):
        write_tar(tmp_path / "a.tar", {f"one.{ending}": pickle.dumps(Bomb()), "one.txt": b"text", "two.txt": b"fine"})
        found = outcomes(WebDatasetSource(root=tmp_path / "a.tar"))
        assert "reading it would run code" in str(found["a/one"])
        assert shape(found["a/two"]) == ["fine"]
        assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("cut", ["boundary", "header", "data"])
def test_a_cut_tar_is_a_failed_row(tmp_path: Path, samples: dict[str, bytes], cut: str) -> None:
    write_tar(tmp_path / "a.tar", samples)
    with tarfile.open(tmp_path / "a.tar") as archive:
        last = archive.getmember("x/three.flac")
    size = {"boundary": last.offset_data - (-last.size // 512) * 512, "header": last.offset + 100,
            "data": last.offset_data + 50}[cut]  # fmt: skip
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:size])
    found = outcomes(WebDatasetSource(root=tmp_path))
    assert "the tar is cut or damaged" in str(found["file:a.tar"])
    assert shape(found["a/x/one"]) == ["image.jpg", "first"]
    suspect = "a/x/three" if cut == "boundary" else "a/x/two"
    assert "may lack members" in str(found[suspect])


def test_compressed_empty_and_missing_tars(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz"):
        pass
    (tmp_path / "b.tar").write_bytes(b"")
    found = outcomes(WebDatasetSource(root=tmp_path))
    assert "unpack it" in str(found["file:a.tar.gz"])
    assert "cut or damaged" in str(found["file:b.tar"])
    with pytest.raises(SourceError, match="no such file or folder"):
        list(WebDatasetSource(root=tmp_path / "nothing").rows())
    (tmp_path / "c").mkdir()
    with pytest.raises(SourceError, match=r"no \.tar file"):
        list(WebDatasetSource(root=tmp_path / "c").rows())


def test_our_own_shards_come_back_whole(tiny_shards: Manifest, tmp_path: Path) -> None:
    again = build(WebDatasetSource(root=tiny_shards.root), tmp_path / "again", BuildOptions())
    assert again.rows == {"kept": 24, "filtered": 0, "failed": 0, "duplicate": 0}
    hashes = [
        read_ledger(folder.ledger_path, ["content_xxh3"])["content_xxh3"].to_pylist() for folder in (tiny_shards, again)
    ]
    assert sorted(hashes[0]) == sorted(hashes[1])
    labels = [
        sorted(
            label
            for n in range(len(folder.shards))
            for label in read_index(folder, n, ["labels"])["labels"].to_pylist()
        )
        for folder in (tiny_shards, again)
    ]
    assert labels[0] == labels[1]


def test_an_endless_nesting_is_one_failed_line(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    good = json.dumps({"id": "good", "parts": [{"modality": "text", "text": "whole"}]})
    file.write_text("[" * 200_000 + "\n" + good + "\n")
    found = outcomes(ManifestSource(root=file))
    assert "line 1 is not JSON" in str(found["line:1"])
    assert shape(found["good"]) == ["whole"]


def test_a_parquet_file_written_anew_is_read_anew(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    for second, text in enumerate(("first", "other")):
        pq.write_table(pa.Table.from_pylist([{"id": "a", "parts": [{"modality": "text", "text": text}]}]), file)
        os.utime(file, (second, second))
        assert shape(outcomes(ManifestSource(root=file))["a"]) == [text]


def test_a_member_ending_that_is_not_utf8_is_left_out(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "odd.tar", "w", encoding="utf-8", errors="surrogateescape") as archive:
        for name, content in (("a.txt", b"An owl."), ("a.j\udcffg", b"?")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    manifest = build(WebDatasetSource(root=tmp_path / "odd.tar"), tmp_path / "out", BuildOptions())
    assert manifest.rows["kept"] == 1


def test_a_member_of_negative_size_is_no_endless_loop(tmp_path: Path) -> None:
    header = bytearray(tarfile.TarInfo("a.txt").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\xff" + (-512).to_bytes(11, "big", signed=True)
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    (tmp_path / "loop.tar").write_bytes(bytes(header) + bytes(10240 - 512))
    found = outcomes(WebDatasetSource(root=tmp_path / "loop.tar"))
    assert "a.txt has a size of -512 bytes" in str(found["file:loop.tar"])


def test_a_sparse_member_is_refused_because_its_bytes_are_not_together(tmp_path: Path) -> None:
    member = tarfile.TarInfo("a.txt")
    member.type, member.size = tarfile.GNUTYPE_SPARSE, 512
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    header[386:410] = b"00000001000\x0000000001000\0"  # 512 bytes of data, to be placed at byte 512
    header[483:495] = b"00000002000\0"
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    (tmp_path / "sparse.tar").write_bytes(bytes(header) + b"x" * 512 + bytes(1024))
    found = outcomes(WebDatasetSource(root=tmp_path / "sparse.tar"))
    assert "a.txt is stored sparse" in str(found["file:sparse.tar"])


def test_a_damaged_parquet_page_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    rows = [{"id": f"row{number}", "parts": [{"modality": "text", "text": "x"}]} for number in range(3000)]
    pq.write_table(pa.Table.from_pylist(rows), file)
    data = file.read_bytes()
    file.write_bytes(data[:40] + bytes(360) + data[400:])
    with pytest.raises(SourceError, match="row group 0 is damaged"):
        list(ManifestSource(root=file).rows())
