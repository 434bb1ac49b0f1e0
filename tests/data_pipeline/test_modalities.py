"""The registry: tokens promised are tokens decoded, and a new modality is one entry."""

import io
import pickle

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from triweave.data_pipeline.errors import MediaError
from triweave.data_pipeline.media.geometry import MediaGeometry, MediaInfo
from triweave.data_pipeline.media.modalities import MODALITIES, Modality, grids, modality_of_extension
from triweave.data_pipeline.text.tokenizer import RESERVED_MEDIA

SAMPLES = MediaGeometry(audio_features="samples", audio_frames_per_token=3)
SMALL = MediaGeometry(image_patch_px=4, image_max_tokens=12, audio_mel_bins=8)


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def wav(samples, rate):
    file = io.BytesIO()
    soundfile.write(file, np.sin(np.arange(samples, dtype=np.float32)) * 0.3, rate, format="WAV", subtype="PCM_16")
    return file.getvalue()


def test_ids_are_the_published_ones_and_names_agree():
    assert {name: modality.id for name, modality in MODALITIES.items()} == {"image": 1, "audio": 2}
    assert all(name == modality.name for name, modality in MODALITIES.items())
    assert not set(MODALITIES) & set(RESERVED_MEDIA)


@given(st.integers(1, 90), st.integers(1, 90))
@settings(max_examples=60, deadline=None)
def test_an_image_decodes_to_exactly_its_tokens(width, height):
    image = MODALITIES["image"]
    data = png(np.zeros((height, width, 3), np.uint8))
    info, _, _ = image.probe(data)
    patches = image.decode(data, info, SMALL)
    assert patches.shape == (np.prod(image.grid(info, SMALL)), image.features(SMALL))
    assert patches.dtype == image.dtype


@given(st.integers(1, 4_000), st.sampled_from([8_000, 16_000, 22_050, 44_100]))
@settings(max_examples=60, deadline=None)
def test_a_clip_decodes_to_exactly_its_tokens(samples, rate):
    audio = MODALITIES["audio"]
    data = wav(samples, rate)
    info, _, _ = audio.probe(data)
    for geometry in (SMALL, SAMPLES):
        tokens = audio.decode(data, info, geometry)
        assert tokens.shape == (np.prod(audio.grid(info, geometry)), audio.features(geometry))
        assert tokens.dtype == audio.dtype


def test_tokens_of_samples_are_the_clip_and_zeros():
    audio, data = MODALITIES["audio"], wav(1_000, 16_000)
    tokens = audio.decode(data, audio.probe(data)[0], SAMPLES)
    assert tokens.shape == (3, 480)  # a token is 3 hops of 160 samples
    assert np.allclose(tokens.reshape(-1)[:1_000], np.sin(np.arange(1_000)) * 0.3, atol=1e-4)
    assert not tokens.reshape(-1)[1_000:].any()


def test_patches_are_in_raster_order_and_hold_y_x_channel():
    pixels = np.random.default_rng(0).integers(0, 255, (8, 12, 3), np.uint8)
    info = MediaInfo(width=12, height=8)
    patches = MODALITIES["image"].decode(png(pixels), info, SMALL).reshape(2, 3, 4, 4, 3)
    for row in range(2):
        for column in range(3):
            assert np.array_equal(patches[row, column], pixels[4 * row : 4 * row + 4, 4 * column : 4 * column + 4])


@pytest.mark.parametrize("geometry", [SMALL, SAMPLES])
@pytest.mark.parametrize("name", ["image", "audio"])
def test_decoding_in_place_gives_the_same_bytes_and_touches_no_others(geometry, name):
    modality = MODALITIES[name]
    data = (
        png(np.random.default_rng(1).integers(0, 255, (37, 61, 3), np.uint8)) if name == "image" else wav(3_333, 8_000)
    )
    info = modality.probe(data)[0]
    expected = modality.decode(data, info, geometry)
    around = np.full((len(expected) + 2, expected.shape[1]), 77, modality.dtype)
    assert modality.decode_into is not None
    modality.decode_into(data, info, geometry, around[1:-1])
    assert around[1:-1].tobytes() == expected.tobytes()
    assert (around[[0, -1]] == 77).all()
    with pytest.raises(ValueError, match="reshape"):
        modality.decode_into(data, info, geometry, around)


def test_bytes_of_another_item_are_refused():
    with pytest.raises(MediaError, match="the index says"):
        MODALITIES["image"].decode(png(np.zeros((8, 8, 3), np.uint8)), MediaInfo(width=9, height=8), SMALL)
    with pytest.raises(MediaError, match="the index says"):
        MODALITIES["audio"].decode(wav(100, 8_000), MediaInfo(samples=101, rate=8_000), SMALL)


@pytest.mark.parametrize(
    ("extension", "name"), [("jpg", "image"), (".PNG", "image"), ("OGG", "audio"), (".flac", "audio")]
)
def test_files_are_told_by_their_ending(extension, name):
    assert modality_of_extension(extension) is MODALITIES[name]


def test_unknown_endings_have_no_modality():
    assert modality_of_extension("txt") is None


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=20))
@settings(deadline=None)
def test_grids_is_grid_row_by_row(sizes):
    infos = [MediaInfo(width=width, height=height) for width, height in sizes]
    table = grids(MODALITIES["image"], SMALL, np.array(infos))
    assert table.dtype == np.int32
    expected = [MODALITIES["image"].grid(info, SMALL) for info in infos]
    assert table.tolist() == [list(grid) for grid in expected]


def test_grids_of_nothing_is_empty():
    assert grids(MODALITIES["audio"], SMALL, np.zeros((0, 4), np.int64)).shape == (0, 3)


def sensor_probe(data):
    if len(data) % 4 or not data:
        raise MediaError(f"sensor of {len(data)} bytes: must be whole float32 values")
    return MediaInfo(samples=len(data) // 4, rate=10), "f32", "application/x-sensor"


SENSOR = Modality(
    name="sensor",
    id=7,
    extensions=("f32",),
    probe=sensor_probe,
    grid=lambda info, geometry: (-(-info.samples // geometry.extra["sensor_values"]), 1, 1),
    decode=lambda data, info, geometry: np.pad(
        np.frombuffer(data, np.float32), (0, -info.samples % geometry.extra["sensor_values"])
    ).reshape(-1, geometry.extra["sensor_values"]),
    features=lambda geometry: geometry.extra["sensor_values"],
    dtype=np.dtype(np.float32),
)


def test_a_toy_sensor_joins_without_touching_the_core(monkeypatch):
    monkeypatch.setitem(MODALITIES, "sensor", SENSOR)
    geometry = MediaGeometry(extra={"sensor_values": 4})
    modality = modality_of_extension("f32")
    data = np.arange(10, dtype=np.float32).tobytes()
    info, _, _ = modality.probe(data)
    values = modality.decode(data, info, geometry)
    counted = grids(modality, geometry, np.array([info]))
    assert values.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 0]]
    assert counted.tolist() == [[3, 1, 1]]
    assert geometry.hash != MediaGeometry().hash


def test_what_workers_are_sent_can_be_pickled():
    info, geometry = MediaInfo(width=3, height=4), MediaGeometry(extra={"sensor_values": 4})
    assert pickle.loads(pickle.dumps((info, geometry))) == (info, geometry)
