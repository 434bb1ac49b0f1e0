"""Folders that Hugging Face `datasets` writes, read without it; the package itself writes them here."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from triweave.data_pipeline.errors import MediaError, SourceError
from triweave.data_pipeline.shards.build import BuildOptions, build
from triweave.data_pipeline.shards.ledger import read_ledger
from triweave.data_pipeline.shards.media_encoder import MediaEncoder, MediaOptions
from triweave.data_pipeline.shards.schema import Document, TextPart
from triweave.data_pipeline.sources.base import FilteredError
from triweave.data_pipeline.sources.hf_datasets import HfDatasetsSource

datasets = pytest.importorskip("datasets")

Media = Callable[..., bytes]
ROWS = 5


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf-cache"))


def outcomes(source: HfDatasetsSource) -> dict[str, Document | str]:
    encoder = MediaEncoder(MediaOptions())
    result: dict[str, Document | str] = {}
    for row in source.rows():
        try:
            result[row.id] = source.document(row, encoder)
        except (FilteredError, SourceError, MediaError, ValueError) as error:
            result[row.id] = str(error)
    return result


def shape(document: Document | str) -> list[str]:
    assert isinstance(document, Document), document
    return [
        f"{part.role or ''}:{part.text}" if isinstance(part, TextPart) else f"{part.modality}.{part.extension}"
        for part in document.parts
    ]


@pytest.fixture
def birds(picture: Media, clip: Media) -> Any:
    """Five rows: a picture (of row 4 damaged), 0 to 2 clips, caption, question, class, number."""
    features = datasets.Features(
        {
            "number": datasets.Value("int32"),
            "clips": datasets.List(datasets.Audio()),
            "image": datasets.Image(),
            "caption": datasets.Value("string"),
            "question": datasets.Value("string"),
            "kind": datasets.ClassLabel(names=["owl", "jay"]),
        }
    )
    images = [{"bytes": picture(number), "path": f"{number}.png"} for number in range(4)]
    images.append({"bytes": picture(4)[:40], "path": None})
    columns = {
        "number": list(range(ROWS)),
        "clips": [[{"bytes": clip(9 * row + n), "path": None} for n in range(row % 3)] for row in range(ROWS)],
        "image": images,
        "caption": [f"Bird {row}." for row in range(ROWS)],
        "question": ["Which?"] * ROWS,
        "kind": [row % 2 for row in range(ROWS)],
    }
    table = pa.Table.from_pydict(columns, schema=features.arrow_schema)  # encoding audio wants torchcodec
    return datasets.Dataset(table, info=datasets.DatasetInfo(features=features))


def save(birds: Any, root: Path, form: str) -> dict[str, str]:
    """Write the data set in one of the forms; return file -> split."""
    if form == "dict":
        datasets.DatasetDict(train=birds, validation=birds).save_to_disk(root)
        return {f"{split}/data-00000-of-00001.arrow": split for split in ("train", "validation")}
    if form == "shards":
        birds.save_to_disk(root, num_shards=2)
        return {f"data-{number:05d}-of-00002.arrow": "" for number in range(2)}
    birds.to_parquet(root / "data/valid-00000-of-00001.parquet", batch_size=2)
    return {"data/valid-00000-of-00001.parquet": "validation"}


@pytest.mark.parametrize("form", ["dict", "shards", "parquet"])
def test_a_saved_data_set(birds: Any, tmp_path: Path, form: str) -> None:
    root = tmp_path / "birds"
    files = save(birds, root, form)
    found = outcomes(HfDatasetsSource(root=root))
    assert sorted({name.partition(":")[0] for name in found}) == sorted(files)
    assert len(found) == ROWS * (2 if form == "dict" else 1)
    documents = list(found.values())[:ROWS]
    assert [shape(document) for document in documents[:4]] == [
        ["image.png", ":Bird 0."],
        ["audio.flac", "image.png", ":Bird 1."],
        ["audio.flac", "audio.flac", "image.png", ":Bird 2."],
        ["image.png", ":Bird 3."],
    ]
    assert "not a readable" in str(documents[4])
    assert isinstance(documents[1], Document)
    split = next(iter(files.values()))
    labels = {"number": 1, "question": "Which?", "kind": "jay"}
    assert documents[1].labels == labels | ({"split": split} if split else {})
    assert documents[1].source == {"corpus": "birds"}


def test_columns_name_the_parts_their_order_and_roles(birds: Any, tmp_path: Path) -> None:
    birds.save_to_disk(tmp_path / "birds")
    source = HfDatasetsSource(root=tmp_path / "birds", columns=("user=question", "image", "assistant=caption"))
    (second, *_) = list(outcomes(source).values())[1:]
    assert shape(second) == ["user:Which?", "image.png", "assistant:Bird 1."]
    with pytest.raises(SourceError, match="--columns number: no column of media or text; there are clips, image, cap"):
        outcomes(HfDatasetsSource(root=tmp_path / "birds", columns=("number",)))


def test_a_path_is_followed_inside_of_the_folder_only(birds: Any, tmp_path: Path, picture: Media) -> None:
    root = tmp_path / "birds"
    (root / "pictures").mkdir(parents=True)
    (root / "pictures/0.png").write_bytes(picture(0))
    (tmp_path / "1.png").write_bytes(picture(1))
    (root / "out").symlink_to(tmp_path)
    schema = birds.features.arrow_schema
    rows = birds.data.table.to_pylist()[:4]
    for row, path in zip(rows, ("pictures/0.png", "../1.png", "out/1.png", str(tmp_path / "1.png")), strict=True):
        row["image"] = {"bytes": None, "path": path}
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), root / "train.parquet")
    manifest = build(HfDatasetsSource(root=root), tmp_path / "shards", BuildOptions())
    assert manifest.rows == {"kept": 1, "filtered": 0, "failed": 3, "duplicate": 0}


@pytest.mark.parametrize("damage", ["cut", "text", "offsets"])
def test_what_is_damaged_of_an_arrow_file_fails_and_the_rest_is_kept(birds: Any, tmp_path: Path, damage: str) -> None:
    birds.save_to_disk(tmp_path / "birds")
    (file,) = (tmp_path / "birds").glob("*.arrow")
    whole = file.read_bytes()
    source = HfDatasetsSource(root=tmp_path / "birds")
    if damage == "cut":
        birds.save_to_disk(tmp_path / "birds", num_shards=2)
        file = tmp_path / "birds/data-00000-of-00002.arrow"
        file.write_bytes(file.read_bytes()[:-1000])
        manifest = build(source, tmp_path / "out", BuildOptions())
        assert manifest.rows == {"kept": 1, "filtered": 0, "failed": 2, "duplicate": 0}, "the second file's two rows"
        rows = {row["id"]: row for row in read_ledger(manifest.ledger_path).to_pylist()}
        assert "no whole Arrow stream" in rows[f"file:{file.name}"]["reason"]
        return
    if damage == "text":  # no UTF-8 any more
        file.write_bytes(whole.replace(b"Bird 0.", b"\xff" * 7))
        good = [False, True, True, True, False]
    else:  # the caption of row 0 ends, and that of row 1 begins, beyond the file
        offsets = struct.pack("<6i", *range(0, 42, 7))
        assert whole.count(offsets) == 1
        file.write_bytes(whole.replace(offsets, offsets[:4] + struct.pack("<i", 1 << 30) + offsets[8:]))
        good = [False, False, True, True, False]
    assert [isinstance(document, Document) for document in outcomes(source).values()] == good


def test_folders_that_are_no_data_set(birds: Any, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(SourceError, match=r"no state\.json"):
        outcomes(HfDatasetsSource(root=tmp_path / "a"))
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "a/train.parquet")
    with pytest.raises(SourceError, match="names no features"):
        outcomes(HfDatasetsSource(root=tmp_path / "a"))
    birds.remove_columns(["image", "clips", "caption"]).save_to_disk(tmp_path / "b")
    with pytest.raises(SourceError, match="choose among number, question, kind with --columns"):
        outcomes(HfDatasetsSource(root=tmp_path / "b"))
    (tmp_path / "b/state.json").write_text(json.dumps({"_data_files": [{"filename": "../a/train.parquet"}]}))
    with pytest.raises(SourceError, match=r"lists .*train.parquet.*, which is not there"):
        outcomes(HfDatasetsSource(root=tmp_path / "b"))
