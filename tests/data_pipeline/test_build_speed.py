"""`triweave bench build`: the same pictures every time, processor time of real processes, a peer that must be there."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import pytest

from triweave.data_pipeline.bench import build_speed
from triweave.data_pipeline.errors import BuildError
from triweave.data_pipeline.media import images
from triweave.data_pipeline.shards.manifest import Manifest
from triweave.data_pipeline.shards.stats import shard_stats
from triweave.launch.cli import main


def test_pictures_are_the_same_every_time_and_listed_with_their_captions(tmp_path: Path) -> None:
    for name in ("a", "b"):
        build_speed.write_pictures(tmp_path / name, 3)
    with open(tmp_path / "a.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    paths = [Path(url2pathname(urlsplit(row["url"]).path)) for row in rows]
    assert [path.with_suffix(".txt").read_text() for path in paths] == [row["caption"] for row in rows]
    data = [path.read_bytes() for path in paths]
    assert data == [(tmp_path / "b" / path.name).read_bytes() for path in paths]
    assert len(set(data)) == 3
    info, _, mime = images.probe(data[0])
    assert (info.width, info.height, mime) == (1024, 768, "image/jpeg")


def test_our_side_builds_every_picture_and_costs_processor_time(tmp_path: Path) -> None:
    build_speed.write_pictures(tmp_path / "pictures", 4)
    asked = {"folder": str(tmp_path / "pictures"), "out": str(tmp_path / "out"), "max_side_px": 64}
    seconds = build_speed._cpu_seconds(Path(sys.executable), build_speed._OURS, asked, 4)
    assert 0.05 < seconds < 60
    assert shard_stats(tmp_path / "out").modalities["image"].pixels == 4 * 64 * 48
    assert Manifest.load(tmp_path / "out").samples == 4
    with pytest.raises(BuildError, match=r"5 pictures did not come through \(4\)"):
        build_speed._cpu_seconds(Path(sys.executable), build_speed._OURS, asked, 5)


def test_a_peer_that_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = {"urls": "x", "out": str(tmp_path / "out"), "max_side_px": 64}
    with pytest.raises(BuildError, match=r"No module named 'img2dataset'\); `pip install img2dataset` there"):
        build_speed._cpu_seconds(Path(sys.executable), build_speed._IMG2DATASET, asked, 1)
    with pytest.raises(BuildError, match="cannot be started"):
        build_speed._cpu_seconds(tmp_path / "python", build_speed._IMG2DATASET, asked, 1)
    assert main(["bench", "build", "--python", "x", "--pictures", "3"]) == 2
    assert "--pictures 3: must be at least 20" in capsys.readouterr().err
