"""Tars that come with an index of their own: wids and Megatron-Energon; samples of their layouts, made here."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from triweave.data_pipeline.errors import MediaError, SourceError
from triweave.data_pipeline.shards.build import BuildOptions, build
from triweave.data_pipeline.shards.manifest import Manifest
from triweave.data_pipeline.shards.media_encoder import MediaEncoder, MediaOptions
from triweave.data_pipeline.shards.schema import Document, TextPart
from triweave.data_pipeline.sources.base import FilteredError, Source
from triweave.data_pipeline.sources.energon import EnergonSource, expand_braces, field_value
from triweave.data_pipeline.sources.wids import WidsSource

Media = Callable[..., bytes]


def outcomes(source: Source) -> dict[str, Document | str]:
    """Return row id -> document, or why there is none."""
    encoder = MediaEncoder(MediaOptions())
    result: dict[str, Document | str] = {}
    for row in source.rows():
        assert row.id not in result
        try:
            result[row.id] = row.filtered or row.failed or source.document(row, encoder)
        except (FilteredError, SourceError, MediaError, ValueError, OSError) as error:
            result[row.id] = str(error)
    return result


def shape(document: Document | str) -> list[str]:
    assert isinstance(document, Document), document
    return [
        f"{part.role or ''}:{part.text}" if isinstance(part, TextPart) else f"{part.modality}.{part.extension}"
        for part in document.parts
    ]


def labels(document: Document | str) -> dict[str, Any]:
    assert isinstance(document, Document), document
    return document.labels


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def wids(tmp_path: Path, shards: list[Any]) -> WidsSource:
    index = tmp_path / "index.json"
    index.write_text(json.dumps({"wids_version": 1, "name": "birds", "shardlist": shards}))
    return WidsSource(root=index)


def test_the_samples_of_a_wids_index(tmp_path: Path, picture: Media) -> None:
    for number in range(2):
        write_tar(tmp_path / f"t/{number}.tar", {"a.jpg": picture(number, form="JPEG"), "a.txt": b"An owl."})
    size, md5 = ((tmp_path / "t/0.tar").stat().st_size, hashlib.md5((tmp_path / "t/0.tar").read_bytes()).hexdigest())
    shards = [{"url": "t/0.tar", "nsamples": 1, "filesize": size, "md5sum": md5}, {"url": "./t/1.tar", "nsamples": 1}]
    found = outcomes(wids(tmp_path, shards))
    assert list(found) == ["t/0/a", "t/1/a"]
    assert shape(found["t/0/a"]) == ["image.jpg", ":An owl."]


def test_shards_that_are_not_what_a_wids_index_says_are_failed_rows(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"a.txt": b"whole"})
    outside = write_tar(tmp_path.parent / f"{tmp_path.name}-outside.tar", {"a.txt": b"not mine"})
    mine = {"url": "a.tar", "nsamples": 2}
    shards: list[Any] = [mine, mine, {"url": "pipe:touch ran"}, {"url": f"../{outside.name}"}, {"nsamples": 1}, 7]
    found = outcomes(wids(tmp_path, shards))
    assert shape(found["a/a"]) == [":whole"]
    assert found["count:a.tar"] == "the index promises 2 samples, the tar has 1"
    assert found["shard:1"] == "a.tar is in the shardlist twice"
    assert "no file beside the index" in str(found["file:pipe:touch ran"])
    assert not (tmp_path / "ran").exists()
    assert "no file beside the index" in str(found[f"file:../{outside.name}"])
    assert found["shard:4"] == found["shard:5"].replace("5", "4") == "entry 4 of the shardlist has no url"  # type: ignore[union-attr]
    assert "the index says 3: fetch it again" in str(outcomes(wids(tmp_path, [mine | {"filesize": 3}]))["file:a.tar"])
    assert "the index says 00: fetch it again" in str(outcomes(wids(tmp_path, [mine | {"md5sum": "00"}]))["file:a.tar"])


@pytest.mark.parametrize(
    ("content", "says"), [("{}", "no shardlist"), ("[" * 100_000, "is not JSON"), ("7", "no shard")]
)
def test_a_file_that_is_no_wids_index(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(SourceError, match=says):
        list(WidsSource(root=tmp_path / "index.json").rows())


def energon(root: Path, dataset: str, *, split: str = "split_parts: {train: [a.tar], val: [b.tar]}") -> EnergonSource:
    meta = root / ".nv-meta"
    meta.mkdir(parents=True, exist_ok=True)
    (meta / ".info.json").write_text(json.dumps({"shard_counts": {"a.tar": 2, "b.tar": 1}}))
    (meta / "split.yaml").write_text(split)
    (meta / "dataset.yaml").write_text(dataset)
    return EnergonSource(root=root)


CAPTIONS = """
sample_type: {__module__: megatron.energon, __class__: CaptioningSample}
field_map: {image: "png,jpg", caption: "json[texts][1]"}
"""


@pytest.fixture
def captions(tmp_path: Path, picture: Media) -> Path:
    texts = [json.dumps({"texts": ["?", f"Owl {number}."]}).encode() for number in range(3)]
    write_tar(tmp_path / "a.tar", {"x/0.jpg": picture(0, form="JPEG"), "x/0.json": texts[0],
                                   "1.png": picture(1), "1.json": texts[1]})  # fmt: skip
    write_tar(tmp_path / "b.tar", {"2.jpg": picture(2, form="JPEG"), "2.json": texts[2], "2.npy": b"?"})
    return tmp_path


@pytest.mark.parametrize("dataset", [CAPTIONS, CAPTIONS.replace("CaptioningSample", "CaptioningWebdataset")])
def test_captions_by_field_map(captions: Path, dataset: str) -> None:
    found = outcomes(energon(captions, dataset))
    assert list(found) == ["a/x/0", "a/1", "b/2"]
    assert shape(found["a/x/0"]) == ["image.jpg", ":Owl 0."]
    assert shape(found["a/1"]) == ["image.png", ":Owl 1."]
    assert [labels(document)["split"] for document in found.values()] == ["train", "train", "validation"]


def test_a_configuration_of_the_older_form(captions: Path) -> None:
    dataset = "__class__: CaptioningWebdataset\nfield_map: {image: 'png,jpg', caption: 'json[texts][1]'}"
    assert shape(outcomes(energon(captions, dataset))["b/2"]) == ["image.jpg", ":Owl 2."]


def test_crude_samples_are_those_of_a_foreign_tar(captions: Path) -> None:
    write_tar(captions / "b.tar", {"2.txt": b"Only text."})
    found = outcomes(energon(captions, "__module__: megatron.energon\n__class__: CrudeWebdataset"))
    assert shape(found["a/1"]) == ["image.png"]
    assert shape(found["b/2"]) == [":Only text."]
    assert labels(found["b/2"])["split"] == "validation"


def test_our_own_shards_prepared_for_energon_come_back_whole(tiny_shards: Manifest, tmp_path: Path) -> None:
    tars = [manifest.name for manifest in sorted(tiny_shards.root.glob("*.tar"))]
    for name in tars:
        write_tar(tmp_path / name, {}).write_bytes((tiny_shards.root / name).read_bytes())
    source = energon(tmp_path, "__class__: CrudeWebdataset", split=json.dumps({"split_parts": {"train": tars}}))
    manifest = build(source, tmp_path / "out", BuildOptions())
    assert manifest.rows == {"kept": 24, "filtered": 0, "failed": 0, "duplicate": 0}


QUESTIONS = """
sample_type: {__class__: VQASample}
field_map: {image: jpg, context: 'json[q]', answers: 'json[a]', answer_weights: 'json[w]'}
"""
CHOICES = """
sample_type: {__class__: MultiChoiceVQASample}
field_map: {image: jpg, context: 'json[q]', choices: 'json[a]', correct_choice_idx: 'json[i]'}
"""


@pytest.mark.parametrize(("dataset", "answer"), [(QUESTIONS, "jay"), (CHOICES, "owl")])
def test_questions_and_choices(tmp_path: Path, picture: Media, dataset: str, answer: str) -> None:
    record = {"q": "Which?", "a": ["owl", "jay", "tit"], "w": [0.1, 0.8, 0.8], "i": 0}
    members = {"0.jpg": picture(0, form="JPEG"), "0.json": json.dumps(record).encode()}
    write_tar(tmp_path / "a.tar", members)
    write_tar(tmp_path / "b.tar", {"1.jpg": b"?", "1.json": b"{}"})
    found = outcomes(energon(tmp_path, dataset))
    assert shape(found["a/0"]) == ["image.jpg", "user:Which?", f"assistant:{answer}"]
    assert labels(found["a/0"]).get("answers", labels(found["a/0"]).get("choices")) == record["a"]
    assert "not a readable" in str(found["b/1"])
    assert found["count:a.tar"] == ".nv-meta promises 2 samples, the tar has 1"


def test_what_the_split_excludes_is_filtered(captions: Path) -> None:
    outside = write_tar(captions.parent / f"{captions.name}-outside.tar", {"a.txt": b"not mine"})
    split = f"split_parts: {{train: ['{{a,b,c}}.tar', a.tar, ../{outside.name}]}}\nexclude: [b.tar, a.tar/x/0]"
    write_tar(captions / "b.tar", {"2.txt": b"?"})
    source = energon(captions, CAPTIONS, split=split)
    found = outcomes(source)
    assert found["a/x/0"] == found["file:b.tar"] == "excluded by the split"
    assert shape(found["a/1"]) == ["image.png", ":Owl 1."]
    assert found["file:c.tar"] == "c.tar of the split is not below " + captions.name
    assert "is not below" in str(found[f"file:../{outside.name}"])


@pytest.mark.parametrize(
    ("dataset", "says"),
    [
        ("sample_type: {__class__: TextSample}\nsample_loader: sample_loader.py:load", "Python code that is not run"),
        ("sample_type: {__class__: AnySample}\nfield_map: {}", "sample type AnySample: read are Captioning"),
        ("sample_type: {__class__: TextSample}", "no field_map"),
        ("sample_type: {__class__: CaptioningSample}\nfield_map: {image: jpg}", "lacks 'caption'"),
        ("!!python/object/apply:os.system ['touch ran']", "cannot be read"),
    ],
)
def test_a_data_set_that_is_refused(captions: Path, dataset: str, says: str) -> None:
    source = energon(captions, dataset)
    with pytest.raises(SourceError, match=says):
        source.document(next(source.rows()), MediaEncoder(MediaOptions()))
    with pytest.raises(SourceError, match=says):
        build(source, captions / "out", BuildOptions())
    assert not (captions / "out").exists()


def test_braces_without_end_are_counted_not_stored(captions: Path) -> None:
    assert list(expand_braces("{a,b}-{8..10}{}")) == [f"{x}-{n}{{}}" for x in "ab" for n in (8, 9, 10)]
    assert list(expand_braces("{010..008}")) == ["010", "009", "008"]
    assert len(list(itertools.islice(expand_braces("{0..9999999999}{0..9999999999}"), 5))) == 5
    with pytest.raises(SourceError, match="stands for more than"):
        list(energon(captions, CAPTIONS, split="split_parts: {train: ['{0..9999999999}.tar']}").rows())


def test_field_map_values() -> None:
    contents = {"json": b'{"a": [{"b": "c"}], "n": null}', "txt": b"t", "cls": b"7"}
    wanted = {
        "txt": "t",
        "cls": 7,
        "json[a][0][b]": "c",
        "json[n],txt": "t",
        "json[a][9],json[x],npy": None,
        "a]": None,
    }
    assert {name: field_value(contents, name) for name in wanted} == wanted
