"""Our shards in other tools' hands, and a set that another tool prepared in ours.

webdataset and Hugging Face `datasets` are installed here. Megatron-Energon does not install beside the pinned set (its
multi-storage-client wants older releases of what others want newer), so its test puts it and the few packages that it
needs into a folder of their own; where that cannot be done the test is skipped with pip's last line.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from triweave.data_pipeline.shards.build import BuildOptions, build
from triweave.data_pipeline.shards.index import read_index
from triweave.data_pipeline.shards.manifest import Manifest
from triweave.data_pipeline.sources.energon import EnergonSource
from triweave.data_pipeline.sources.folder import FolderSource

Media = Callable[..., bytes]
ENERGON = (
    *("megatron-energon==7.4.1", "multi-storage-client", "rapidyaml", "mfusepy", "filetype", "xattr", "deprecation"),
    *("opentelemetry-api", "wcmatch", "bracex", "lark", "prettytable", "wcwidth", "pyroute2", "jmespath", "jsonschema"),
    *("six", "python-dateutil<3", "tzdata<2026"),
)
"""What is missed beside the pinned set, installed without what these ask for in turn."""

ENERGON_READS = """
import json, sys
from pathlib import Path
from megatron.energon import Cooker, DefaultTaskEncoder, WorkerConfig, get_loader, get_val_dataset, stateless
from megatron.energon.flavors.webdataset import BaseWebdatasetFactory

folder, dataset = Path(sys.argv[1]), sys.argv[2]
tars = sorted(path.name for path in folder.glob("*.tar"))
ratio = [("train", 0.5), ("val", 0.5)] if len(tars) == 2 else [("train", 1.0)]
BaseWebdatasetFactory.prepare_dataset(folder, tars, split_parts_ratio=ratio, workers=1, shuffle_seed=None)
(folder / ".nv-meta" / "dataset.yaml").write_text(dataset)

@stateless
def cook(sample):
    return sample

class Raw(DefaultTaskEncoder):
    cookers = [Cooker(cook)]

    def batch(self, samples):
        return samples

if "Crude" in dataset:
    Raw.decoder = None

if __name__ == "__main__":
    worker = WorkerConfig(rank=0, world_size=1, num_workers=0)
    found = get_val_dataset(folder, split_part="train", worker_config=worker, batch_size=1, task_encoder=Raw())
    for samples in get_loader(found):
        for sample in samples:
            if isinstance(sample, dict):
                members = {name: len(value) for name, value in sample.items() if isinstance(value, bytes)}
                print(json.dumps([sample["__key__"], members]))
            else:
                print(json.dumps([sample.__key__, {"caption": sample.caption}]))
"""


def expected_members(manifest: Manifest) -> dict[str, dict[str, int]]:
    """Return key -> {member name after the key: bytes}, from the indices."""
    found: dict[str, dict[str, int]] = {}
    for number in range(len(manifest.shards)):
        with open(manifest.tar_path(number), "rb") as tar:
            for row in read_index(manifest, number).to_pylist():
                tar.seek(row["json_offset"])
                parts = json.loads(tar.read(row["json_size"]))["parts"]
                members = {part["member"]: part["bytes"] for part in parts if "member" in part}
                found[row["key"]] = {"json": row["json_size"], **members}
    return found


def sizes(sample: dict[str, Any]) -> dict[str, int]:
    return {name: len(value) for name, value in sample.items() if isinstance(value, bytes)}


def test_webdataset_reads_our_shards(tiny_shards: Manifest) -> None:
    import webdataset

    tars = [str(tiny_shards.tar_path(number)) for number in range(len(tiny_shards.shards))]
    found = {sample["__key__"]: sizes(sample) for sample in webdataset.WebDataset(tars, shardshuffle=False)}
    assert len(found) == 24
    assert found == expected_members(tiny_shards)
    decoded = next(
        iter(webdataset.WebDataset(tars, shardshuffle=False).select(lambda s: "0000.jpg" in s).decode("pil"))
    )
    part = decoded["json"]["parts"][0]
    assert decoded["0000.jpg"].size == (part["w"], part["h"])


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return datasets


def test_hugging_face_datasets_reads_shards_of_one_layout(hub: Any, tmp_path: Path, picture: Media) -> None:
    """Pictures with captions, all members alike: the features are found by themselves and pictures are decoded."""
    for number in range(7):
        (tmp_path / f"corpus{number}.jpg").write_bytes(picture(number, form="JPEG"))
        (tmp_path / f"corpus{number}.txt").write_text(f"Owl {number}.")
    manifest = build(FolderSource(root=tmp_path), tmp_path / "shards", BuildOptions())
    tars = [str(manifest.tar_path(number)) for number in range(len(manifest.shards))]
    rows = list(hub.load_dataset("webdataset", data_files={"train": tars}, split="train", streaming=True))
    assert {row["__key__"] for row in rows} == set(expected_members(manifest))
    assert sorted(row["json"]["parts"][1]["text"] for row in rows) == [f"Owl {number}." for number in range(7)]
    assert {row["0000.jpg"].size for row in rows} == {(48, 40)}


def test_hugging_face_datasets_reads_mixed_shards_with_named_features(hub: Any, tiny_shards: Manifest) -> None:
    names = sorted({name for members in expected_members(tiny_shards).values() for name in members} - {"json"})
    features = {"__key__": hub.Value("string"), "__url__": hub.Value("string"), "json": hub.Json()}
    features |= {name: hub.Value("binary") for name in names}
    tars = [str(tiny_shards.tar_path(number)) for number in range(len(tiny_shards.shards))]
    rows = hub.load_dataset(
        "webdataset", data_files={"train": tars}, split="train", streaming=True, features=hub.Features(features)
    )
    found = {row["__key__"]: {name: len(row[name]) for name in names if row[name] is not None} for row in rows}
    expected = expected_members(tiny_shards)
    assert found == {key: {n: size for n, size in members.items() if n != "json"} for key, members in expected.items()}


@pytest.fixture(scope="module")
def energon(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, str], list[Any]]:
    """Return a function that prepares a folder with Energon and reads its training part, in a process of its own."""
    place = tmp_path_factory.mktemp("energon")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(place), *ENERGON]
    done = subprocess.run(pip, capture_output=True, text=True, check=False, timeout=300)
    if done.returncode:
        pytest.skip(f"Energon cannot be had: {done.stderr.strip().splitlines()[-1]}")

    def read(folder: Path, dataset: str) -> list[Any]:
        environment = os.environ | {"PYTHONPATH": str(place), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", ENERGON_READS, str(folder), dataset]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]

    return read


CRUDE = "__module__: megatron.energon\n__class__: CrudeWebdataset\n"
CAPTIONS = """
sample_type: {__module__: megatron.energon, __class__: CaptioningSample}
field_map: {image: jpg, caption: "json[text]"}
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_energon_reads_our_shards_and_finds_our_index_right(
    energon: Callable[[Path, str], list[Any]], tiny_shards: Manifest, tmp_path: Path
) -> None:
    for path in tiny_shards.root.glob("*.tar"):
        os.link(path, tmp_path / path.name)
    found = dict(energon(tmp_path, CRUDE))
    assert found == expected_members(tiny_shards)
    for number in range(len(tiny_shards.shards)):
        ours = tiny_shards.idx_path(number)
        assert (tmp_path / ours.name).read_bytes() == ours.read_bytes(), "the .tar.idx that Energon itself writes"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_set_that_energon_prepared_is_the_same_set_here(
    energon: Callable[[Path, str], list[Any]], tmp_path: Path, picture: Media
) -> None:
    for shard in range(2):
        with tarfile.open(tmp_path / f"birds-{shard}.tar", "w") as tar:
            for number in range(4):
                caption = json.dumps({"text": f"Owl {shard}{number}."}).encode()
                for name, data in (("jpg", picture(number, form="JPEG")), ("json", caption)):
                    member = tarfile.TarInfo(f"{shard}{number}.{name}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    theirs = {key: sample["caption"] for key, sample in energon(tmp_path, CAPTIONS)}
    manifest = build(EnergonSource(root=tmp_path), tmp_path / "shards", BuildOptions())
    assert manifest.rows == {"kept": 8, "filtered": 0, "failed": 0, "duplicate": 0}
    ours: dict[str, str] = {}
    (tar_path,) = (tmp_path / "shards").glob("*.tar")
    with open(tar_path, "rb") as file:
        for row in read_index(manifest, 0).to_pylist():
            file.seek(row["json_offset"])
            document = json.loads(file.read(row["json_size"]))
            assert document["labels"]["split"] in ("train", "validation")
            if document["labels"]["split"] == "train":
                ours[document["id"].partition("/")[2]] = document["parts"][1]["text"]
    assert len(theirs) == 4
    assert {key.rpartition("/")[2]: text for key, text in theirs.items()} == ours
