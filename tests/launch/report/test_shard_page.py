"""The page about shards: every input row is on it, its figures are those of the documents, and foreign text is text."""

from __future__ import annotations

import html
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from triweave.data_pipeline.filters.options import FilterOptions
from triweave.data_pipeline.shards.build import BuildOptions, build
from triweave.data_pipeline.shards.manifest import Manifest
from triweave.data_pipeline.shards.quality import ShardQuality, effective_number, shard_quality
from triweave.data_pipeline.sources.folder import FolderSource
from triweave.launch.cli import main
from triweave.launch.report.histograms import BINS, bin_edges, histogram_plot

HOSTILE = "<script>alert('x')</script>"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """48 documents, a third of them hostile, with a failed, a filtered and a duplicate row of each kind."""
    import io

    import soundfile
    from PIL import Image

    corpus = tmp_path_factory.mktemp("corpus")
    generator = np.random.default_rng(0)
    for number in range(48):
        stem = corpus / f"item{number:02d}"
        source = {"license": HOSTILE if number % 3 == 0 else "CC0-1.0", "url": f"https://site{number % 2}.example/x"}
        labels = {"language": "en" if number % 4 else "de", "category": HOSTILE if number % 2 else "birds"}
        words = " ".join(f"word{at}" for at in range(3 + number))
        stem.with_suffix(".json").write_text(
            json.dumps({"text": f"{number} {words}.", "labels": labels, "source": source}), encoding="utf-8"
        )
        if number % 2:
            pixels = generator.integers(0, 255, (40, 60 + number, 3), np.uint8)
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG")
            stem.with_suffix(".png").write_bytes(file.getvalue())
        if number % 3 == 0:
            tone = np.full(16_000, 0.1, np.float32)
            soundfile.write(stem.with_suffix(".flac"), tone, 16_000)
    (corpus / "broken.png").write_bytes(b"no picture")
    (corpus / "copy.json").write_bytes((corpus / "item02.json").read_bytes())
    out = tmp_path_factory.mktemp("out") / "shards"
    return build(FolderSource(root=corpus), out, BuildOptions(filters=FilterOptions(min_words=6)))


@pytest.fixture(scope="module")
def page(shards: Manifest, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("page") / "deep" / "page.html"
    assert main(["stats", str(shards.root), "--html", str(out)]) == 0
    return out.read_text(encoding="utf-8")


def test_every_input_row_is_on_the_page(shards: Manifest, page: str) -> None:
    assert shards.rows == {"kept": 46, "filtered": 2, "failed": 1, "duplicate": 1}
    assert "50 input rows = 46 kept + 2 filtered + 1 failed + 1 duplicate." in page
    for reason in ("min_words: below 6", "same parts", "MediaError: image of 10 bytes"):
        assert reason in page


def test_figures_are_those_of_the_documents(shards: Manifest) -> None:
    quality = shard_quality(shards.root)
    assert (quality.documents, quality.decoded, quality.damaged) == (46, 46, 0)
    assert sorted(quality.figures["min_words"]) == [6, *range(7, 52)]
    assert sorted(quality.figures["width_px"]) == [60 + number for number in range(3, 48, 2)]
    assert set(quality.figures["height_px"]) == {40}
    assert quality.figures["audio_min_ms"] == [1000] * 15
    assert quality.figures["level_db"] == pytest.approx([-20.0] * 15, abs=0.01)
    assert quality.limits("min_words") == {"min_words": 6}
    assert quality.origins["site"] == {"site0.example": 23, "site1.example": 23}
    assert quality.origins["licence"][HOSTILE] == 15


def test_a_share_of_the_documents_is_the_same_share_every_time(shards: Manifest) -> None:
    some, again = (shard_quality(shards.root, documents=15, media_documents=5) for _ in range(2))
    assert some == again
    assert 5 < some.documents < 30
    assert some.decoded < some.documents
    assert len(some.figures["min_words"]) == some.documents
    assert "level_db" not in shard_quality(shards.root, media_documents=0).figures


def test_damaged_samples_are_counted(shards: Manifest, tmp_path: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(shards.root, tmp_path / "copy"))
    tar = copy / "shard-000000.tar"
    data = bytearray(tar.read_bytes())
    data[600] ^= 1
    tar.write_bytes(data)
    quality = shard_quality(copy)
    assert (quality.documents, quality.damaged) == (45, 1)


def test_the_page_says_how_even_and_how_fast(page: str) -> None:
    assert re.search(r'<th scope="row" class="name">filtered</th><td>\d+</td><td>[\d.]+ %</td><td class="words">', page)
    for words in ("Who and what is represented", "effective number", "label language", "site0.example", "Throughput"):
        assert words in page
    assert "Level of the clips" in page
    assert re.search(r"by 1 worker of the engine local\.", page)


def test_foreign_text_stays_text_and_nothing_is_loaded(page: str) -> None:
    assert "<script" not in page.lower()
    assert "&lt;script&gt;" in page
    assert "default-src 'none'" in html.unescape(page)
    assert not re.search(r"(src|href)=\"(?!#|data:)", page)


def test_equal_shards_give_equal_pages(shards: Manifest, page: str, tmp_path: Path) -> None:
    assert main(["stats", str(shards.root), "--html", str(tmp_path / "again.html")]) == 0
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == page


def test_wrong_use_is_one_line(shards: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stats", str(shards.root), "--html", str(tmp_path)]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert main(["stats", str(shards.root), "--html", str(tmp_path / "x.html"), "--documents", "-1"]) == 2
    assert capsys.readouterr().err.strip() == "triweave stats: --documents -1: must be 0 or more"


@pytest.mark.parametrize(
    ("counts", "expected"), [({}, 0.0), ({"a": 7}, 1.0), ({"a": 5, "b": 5, "c": 5}, 3.0), ({"a": 9, "b": 1}, 1.384)]
)
def test_the_effective_number(counts: dict[str, int], expected: float) -> None:
    assert effective_number(counts) == pytest.approx(expected, abs=1e-3)


def test_the_pair_of_a_rule_has_one_figure() -> None:
    quality = ShardQuality(thresholds={"min_words": 5, "max_words": 90, "image_max_aspect": 4})
    assert quality.limits("min_words") == {"min_words": 5, "max_words": 90}
    assert quality.limits("image_max_aspect") == {"image_max_aspect": 4}


def test_bins_hold_whole_numbers_and_single_values() -> None:
    assert bin_edges(3, 3) == [2.5, 3.5]
    assert bin_edges(1, 9, whole=True) == list(range(1, 11))
    edges = bin_edges(0, 1000, whole=True)
    assert len(edges) <= BINS + 1
    assert edges[-1] > 1000
    ratios = np.diff(np.log(bin_edges(1, 1e6, logarithmic=True)))
    assert ratios == pytest.approx([math.log(1e6) / BINS] * BINS)


@pytest.mark.parametrize(
    ("values", "limit", "shown"),
    [([10.0, 20.0], 5, True), ([10.0, 20.0], 500, False), ([1.0, 900.0], 2000, True), ([0.0, 1.0], 0.3, True)],
)
def test_a_threshold_is_shown_where_it_is_near(values: list[float], limit: float, shown: bool) -> None:
    svg = histogram_plot("plot-x", values, title="x", unit="px", limits={"some_rule": limit})
    assert ("some_rule" in svg) == shown


def test_the_page_needs_no_torch(page: str) -> None:
    import subprocess
    import sys

    assert page
    program = "import sys, triweave.launch.report.shard_page; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
