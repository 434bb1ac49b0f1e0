"""Sound: exact lengths from the header, mono at one rate, damage as MediaError, reproducible FLAC."""

import contextlib
import hashlib
import io
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from triweave.data_pipeline.errors import MediaError
from triweave.data_pipeline.media import audio
from triweave.data_pipeline.media.geometry import MediaInfo, resampled_length

CODECS = {
    "WAV": ("PCM_16", "wav", "audio/wav"),
    "FLAC": ("PCM_16", "flac", "audio/flac"),
    "OGG": ("VORBIS", "ogg", "audio/ogg"),
    "MP3": ("MPEG_LAYER_III", "mp3", "audio/mpeg"),
    "AIFF": ("PCM_16", "aiff", "audio/aiff"),
}


def tone(samples, rate=16_000, hertz=440.0, channels=1):
    wave = 0.5 * np.sin(2 * np.pi * hertz * np.arange(samples) / rate)
    return np.repeat(wave[:, None], channels, axis=1).astype(np.float32)


def encoded(wave, rate=16_000, form="FLAC", subtype="PCM_16"):
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format=form, subtype=subtype)
    return file.getvalue()


@pytest.mark.parametrize("form", CODECS)
@pytest.mark.parametrize(("samples", "rate", "channels"), [(1, 16_000, 1), (3_333, 22_050, 2), (50_001, 44_100, 1)])
def test_probe_is_exact_and_decode_gives_that_many_samples(form, samples, rate, channels):
    subtype, extension, mime = CODECS[form]
    data = encoded(tone(samples, rate, channels=channels), rate, form, subtype)
    info, real_extension, real_mime = audio.probe(data)
    assert (real_extension, real_mime, info.rate) == (extension, mime, rate)
    assert extension in audio.EXTENSIONS
    if form != "MP3":  # MP3 pads to whole frames
        assert info.samples == samples
    assert len(audio.decode_mono(data, rate, expected=info)) == info.samples
    assert len(audio.decode_mono(data, 16_000)) == resampled_length(info.samples, rate, 16_000)


def test_opus_in_ogg_is_read():
    data = encoded(tone(48_000, 48_000), 48_000, "OGG", "OPUS")
    info, extension, _ = audio.probe(data)
    assert (info.samples, info.rate, extension) == (48_000, 48_000, "ogg")
    assert len(audio.decode_mono(data, 16_000, expected=info)) == 16_000


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5_000), st.sampled_from([8_000, 11_025, 16_000, 22_050, 44_100, 48_000]))
def test_resampling_gives_exactly_the_promised_length(samples, rate):
    mono = audio.decode_mono(encoded(tone(samples, rate), rate, "WAV"), 16_000)
    assert len(mono) == resampled_length(samples, rate, 16_000)


def test_resampling_keeps_the_tone():
    mono = audio.decode_mono(encoded(tone(44_100, 44_100), 44_100, "WAV"), 16_000)
    assert np.abs(mono - tone(16_000)[:, 0])[500:-500].max() < 0.01


def test_channels_are_averaged():
    wave = np.stack([np.full(100, 0.5), np.full(100, -0.25)], axis=1)
    assert audio.decode_mono(encoded(wave, form="WAV"), 16_000) == pytest.approx(np.full(100, 0.125), abs=1e-4)


def test_a_clip_longer_than_a_block_is_read_whole(monkeypatch):
    data = encoded(tone(10_000, channels=2), form="WAV")
    whole = audio.decode_mono(data, 16_000)
    monkeypatch.setattr(audio, "_BLOCK_VALUES", 1_000)
    assert np.array_equal(audio.decode_mono(data, 16_000), whole)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
def test_samples_that_are_no_numbers_are_refused(value):
    wave = tone(1_000)
    wave[500] = value
    with pytest.raises(MediaError, match="NaN, infinite or absurd"):
        audio.decode_mono(encoded(wave, form="WAV", subtype="FLOAT"), 16_000)


@pytest.mark.parametrize(
    ("name", "bound", "complaint"),
    [
        ("MAX_AUDIO_SAMPLES", 999, "1000 samples, allowed are 1 to 999"),
        ("MAX_AUDIO_RATE_HZ", 8_000, "16000 Hz"),
        ("MAX_AUDIO_CHANNELS", 1, "2 channels"),
    ],
)
@pytest.mark.parametrize("action", [audio.probe, lambda data: audio.decode_mono(data, 16_000)])
def test_bounds_are_checked_before_decoding(name, bound, complaint, action, monkeypatch):
    data = encoded(tone(1_000, channels=2))
    monkeypatch.setattr(audio, name, bound)
    monkeypatch.setattr(audio, "_read_mono", lambda _: pytest.fail("decoded"))
    with pytest.raises(MediaError, match=complaint):
        action(data)


def test_a_clip_without_samples_is_refused():
    with pytest.raises(MediaError, match="0 samples"):
        audio.probe(encoded(np.zeros((0, 1), np.float32), form="WAV"))


def test_another_length_or_rate_than_the_index_says_is_refused():
    data = encoded(tone(1_000))
    for promised in (MediaInfo(samples=999, rate=16_000), MediaInfo(samples=1_000, rate=8_000)):
        with pytest.raises(MediaError, match="the index says"):
            audio.decode_mono(data, 16_000, expected=promised)


SAMPLES = {form: encoded(tone(6_000), form=form, subtype=codec[0]) for form, codec in CODECS.items()}


@pytest.mark.parametrize("form", SAMPLES)
def test_a_truncated_file_never_passes_for_the_whole_one(form):
    data = SAMPLES[form]
    info, _, _ = audio.probe(data)
    for cut in (0, 1, 4, 11, 40, len(data) // 2, len(data) * 3 // 4):
        with pytest.raises(MediaError):
            audio.decode_mono(data[:cut], 16_000, expected=info)


HEADS = (b"", b"RIFF\x40\0\0\0WAVEfmt ", b"fLaC\0\0\0\x22", b"OggS\0\2", b"FORM\0\0\1\0AIFF", b"ID3\4", b"\xff\xfb\x90")


def assert_only_media_errors(data):
    with contextlib.suppress(MediaError):
        audio.probe(data)
    with contextlib.suppress(MediaError):
        audio.reencode_flac(data, 8_000)


@given(st.binary(max_size=400), st.sampled_from(HEADS))
@settings(max_examples=150, deadline=None)
def test_random_bytes_give_media_errors(tail, head):
    assert_only_media_errors(head + tail)


@given(
    st.sampled_from(sorted(SAMPLES)),
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=8),
)
@settings(max_examples=150, deadline=None)
def test_flipped_bytes_give_sound_or_a_media_error(form, flips):
    data = bytearray(SAMPLES[form])
    for position, value in flips:
        data[position % min(len(data), 2_000)] = value
    assert_only_media_errors(bytes(data))


def test_flac_reencode_has_the_rate_and_the_sound():
    data = audio.reencode_flac(encoded(tone(44_100, 44_100, channels=2), 44_100, "WAV"), 16_000)
    info, extension, _ = audio.probe(data)
    assert (info.samples, info.rate, extension) == (16_000, 16_000, "flac")
    assert np.abs(audio.decode_mono(data, 16_000) - tone(16_000)[:, 0])[500:-500].max() < 0.01


def test_flac_reencode_clips_instead_of_wrapping_round():
    data = audio.reencode_flac(encoded(np.full((100, 1), 1.5, np.float32), form="WAV", subtype="FLOAT"), 16_000)
    assert audio.decode_mono(data, 16_000) == pytest.approx(np.ones(100), abs=1e-3)


def test_flac_reencode_gives_the_same_bytes_in_another_process(tmp_path):
    path = tmp_path / "clip.ogg"
    path.write_bytes(encoded(tone(30_000, 44_100), 44_100, "OGG", "VORBIS"))
    program = (
        "import sys, hashlib; from triweave.data_pipeline.media.audio import reencode_flac;"
        "print(hashlib.sha256(reencode_flac(open(sys.argv[1], 'rb').read(), 16000)).hexdigest())"
    )
    other = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == hashlib.sha256(audio.reencode_flac(path.read_bytes(), 16_000)).hexdigest()


def test_a_clip_is_bounded_at_the_rate_it_is_resampled_to(monkeypatch):
    monkeypatch.setattr(audio, "MAX_AUDIO_SAMPLES", 10_000)
    target = io.BytesIO()
    soundfile.write(target, tone(5_000, rate=8_000), 8_000, format="FLAC", subtype="PCM_16")
    assert len(audio.decode_mono(target.getvalue(), 16_000)) == 10_000
    with pytest.raises(MediaError, match="30000 samples at 48000 Hz, allowed are 1 to 10000"):
        audio.decode_mono(target.getvalue(), 48_000)
