"""Token grids are pure functions of the header: bounds, exactness, hash."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triweave.data_pipeline.errors import DataError
from triweave.data_pipeline.media.geometry import (
    MediaGeometry,
    MediaInfo,
    audio_frames,
    audio_grid,
    audio_grids,
    image_grid,
    image_grids,
    resampled_length,
)

sides = st.integers(1, 70_000)


@given(sides, sides, st.integers(1, 64), st.integers(1, 1024))
@settings(deadline=None)
def test_image_grid_never_passes_the_cap_and_never_has_an_empty_side(width, height, patch, most):
    geometry = MediaGeometry(image_patch_px=patch, image_max_tokens=most)
    frames, rows, columns = image_grid(MediaInfo(width=width, height=height), geometry)
    assert frames == 1
    assert min(rows, columns) >= 1
    assert rows * columns <= most


@given(st.integers(1, 500), st.integers(1, 500))
@settings(deadline=None)
def test_an_image_below_the_cap_is_not_scaled(width, height):
    _, rows, columns = image_grid(MediaInfo(width=width, height=height), MediaGeometry(image_max_tokens=256))
    assert abs(rows * 32 - max(height, 32)) <= 16
    assert abs(columns * 32 - max(width, 32)) <= 16


@pytest.mark.parametrize(
    ("width", "height", "grid"),
    [
        (512, 512, (1, 16, 16)),
        (1024, 512, (1, 11, 23)),
        (5120, 5120, (1, 16, 16)),
        (10, 10, (1, 1, 1)),
        (48, 80, (1, 3, 2)),  # 1.5 rounds up, 2.5 rounds up: no banker's rounding
        (65_500, 1, (1, 1, 256)),
        (1, 65_500, (1, 256, 1)),
    ],
)
def test_image_grid_values(width, height, grid):
    assert image_grid(MediaInfo(width=width, height=height), MediaGeometry()) == grid


@pytest.mark.parametrize(
    ("samples", "rate", "frames"),
    [(1, 16_000, 1), (400, 16_000, 1), (559, 16_000, 1), (560, 16_000, 2), (44_100, 44_100, 98), (1, 384_000, 1)],
)
def test_audio_frames_values(samples, rate, frames):
    assert audio_frames(MediaInfo(samples=samples, rate=rate), MediaGeometry()) == frames


def test_audio_grid_rounds_up_to_whole_tokens():
    info = MediaInfo(samples=16_000, rate=16_000)
    assert audio_grid(info, MediaGeometry(audio_frames_per_token=8)) == (13, 1, 1)
    assert audio_grid(info, MediaGeometry(audio_frames_per_token=49)) == (2, 1, 1)


@given(st.integers(1, 10**9), st.integers(1_000, 400_000), st.integers(8_000, 48_000))
@settings(deadline=None)
def test_resampled_length_is_the_rounded_quotient(samples, rate, target):
    length = resampled_length(samples, rate, target)
    assert length >= 1
    assert length == 1 or abs(length * rate - samples * target) * 2 <= rate


def test_ms_is_for_people():
    assert MediaInfo(samples=24_000, rate=16_000).ms == 1500
    assert MediaInfo(width=3, height=4).ms == 0


def test_hash_depends_on_every_field():
    changed = [
        dataclasses.replace(MediaGeometry(), **{field.name: {"sensor": 1} if field.name == "extra" else 4000})
        for field in dataclasses.fields(MediaGeometry)
    ]
    assert len({geometry.hash for geometry in [MediaGeometry(), *changed]}) == 1 + len(changed)
    assert MediaGeometry().hash == MediaGeometry(image_patch_px=32).hash


@pytest.mark.parametrize("wrong", [{"image_patch_px": 0}, {"audio_hop_ms": -1}, {"audio_rate_hz": 50}])
def test_impossible_sizes_are_refused(wrong):
    with pytest.raises(DataError, match=next(iter(wrong))):
        MediaGeometry(**wrong)


@pytest.mark.parametrize("features", ["log_mel", "samples"])
@pytest.mark.parametrize(("patch", "most", "rate_hz"), [(32, 256, 16_000), (7, 13, 8_000), (8, 1, 22_050)])
def test_grids_of_many_items_are_those_of_each(features, patch, most, rate_hz):
    geometry = MediaGeometry(
        image_patch_px=patch, image_max_tokens=most, audio_rate_hz=rate_hz, audio_features=features
    )
    draws = np.random.default_rng(most)
    infos = np.stack([draws.integers(1, high, 2000) for high in (4_000, 4_000, 10**7, 384_000)], axis=1)
    infos[:500, :3] = draws.integers(1, 700, (500, 3))  # below a patch and below a window
    infos[500:600, 0] = 65_500  # cut back to one row
    infos[600:700, 1] = 65_500
    items = [MediaInfo(*info) for info in infos.tolist()]
    assert image_grids(infos, geometry).tolist() == [list(image_grid(item, geometry)) for item in items]
    assert audio_grids(infos, geometry).tolist() == [list(audio_grid(item, geometry)) for item in items]
    assert image_grids(infos[:0], geometry).shape == audio_grids(infos[:0], geometry).shape == (0, 3)
