"""The masks figures are quoted for, and the figures of their tiles."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from triweave.kernels import tiles
from triweave.kernels.errors import KernelInputError
from triweave.kernels.roofline import tile_figures
from triweave.kernels.roofline.tile_figures import DISTRIBUTIONS, mask_intervals, packs
from triweave.launch.cli import main


def test_the_command_shows_that_the_reference_distribution_is_within_its_goals(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Issue: within 1.2x of the exact area and at least 70 % of live tiles full, S=8192, 128-wide; others reported."""
    assert main(["kernels", "tiles", "--json"]) == 0
    rows = {row["distribution"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows) == ["reference", "short", "tiny"]
    assert rows["reference"]["work_to_area"] < 1.2
    assert rows["reference"]["full_share"] > 0.7
    assert rows["short"]["work_to_area"] == pytest.approx(1.30, abs=0.01)
    assert rows["tiny"]["work_to_area"] > 4
    assert rows["tiny"]["full_share"] < 0.01


def test_smaller_tiles_waste_less(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", "tiles", "--tile", "128x128,32x64", "--packs", "4", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["tile"] for row in rows] == ["128x128"] * 3 + ["32x64"] * 3
    for wide, narrow in zip(rows[:3], rows[3:], strict=True):
        assert narrow["work_to_area"] < wide["work_to_area"]


def test_lengths_of_a_file_are_a_further_distribution(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "lengths.txt"
    path.write_text("128\n128\n")
    size = ["--sequence-length", "256", "--packs", "2"]
    assert main(["kernels", "tiles", "--lengths", str(path), *size, "--json"]) == 0
    row = json.loads(capsys.readouterr().out)[-1]
    assert row["distribution"] == "lengths"
    assert row["live_tiles"] == 4, "documents of one tile each"
    assert row["work_to_area"] == pytest.approx(128 * 128 / (128 * 129 / 2))


@pytest.mark.parametrize("text", ["", "12 x", "0\n3", "1.5"])
def test_a_file_that_holds_no_lengths_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "lengths.txt"
    path.write_text(text)
    with pytest.raises(KernelInputError, match="document lengths"):
        tile_figures.read_lengths(path)


@pytest.mark.parametrize("text", ["128", "128x", "0x128", "128x128;64x64"])
def test_a_tile_that_is_none_is_one_line(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", "tiles", "--tile", text]) == 2
    assert "is not like 128x128" in capsys.readouterr().err


def test_masks_are_what_they_are_called() -> None:
    index = np.arange(256)
    lo, hi = mask_intervals("full", 2, 256)
    assert (lo.min(), lo.max(), hi.min(), hi.max()) == (0, 0, 256, 256)
    lo, hi = mask_intervals("causal", 2, 256)
    np.testing.assert_array_equal(hi[1], index + 1)
    lo, hi = mask_intervals("interleaved", 2, 4096)
    assert (hi > np.arange(4096) + 1).any(), "spans look ahead"
    lo, hi = mask_intervals("documents", 2, 4096)
    np.testing.assert_array_equal(hi, np.broadcast_to(np.arange(4096) + 1, (2, 4096)))
    assert len(np.unique(lo)) > 2
    with pytest.raises(KernelInputError, match="no mask 'sliding'"):
        mask_intervals("sliding", 1, 256)


def test_given_lengths_are_repeated_and_cut_where_packs_end() -> None:
    lo, hi = mask_intervals("documents", 2, 10, lengths=np.array([3, 4]))
    assert lo.tolist() == [[0, 0, 0, 3, 3, 3, 3, 7, 7, 7], [0, 0, 0, 0, 4, 4, 4, 7, 7, 7]]
    np.testing.assert_array_equal(hi, np.broadcast_to(np.arange(1, 11), (2, 10)))


def test_tiny_documents_are_about_as_long_as_those_of_the_demo() -> None:
    lengths = np.concatenate([np.diff(np.unique(lo), append=8192) for lo, _ in packs(DISTRIBUTIONS["tiny"], 8, 8192)])
    low, middle, high = np.percentile(lengths, [5, 50, 95])
    assert middle == pytest.approx(23, abs=1.5)
    assert low == pytest.approx(10, abs=2)
    assert high == pytest.approx(63, abs=6)


def test_figures_are_counted_over_all_masks() -> None:
    one = np.stack(mask_intervals("causal", 1, 256))
    other = np.stack(mask_intervals("full", 1, 256))
    figures = tile_figures.tile_figures(iter([one, other]), query_tile=128, key_tile=128)
    area = 256 * 257 // 2 + 256 * 256
    assert figures.live_tiles == 3 + 4
    assert figures.full_share == (1 + 4) / 7
    assert figures.work_to_area == 7 * 128 * 128 / area
    assert tiles.mask_area(*one) + tiles.mask_area(*other) == area
