"""Log-mel: parity with Kaldi's native fbank, and frames that are a pure function of the length."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triweave.data_pipeline.media import mel
from triweave.data_pipeline.media.geometry import MediaGeometry, MediaInfo, audio_frames, audio_grid
from triweave.data_pipeline.media.mel import LOG_MEL_FLOOR, log_mel, log_mel_tokens


def kaldi_fbank(waveform, rate_hz, bins):
    knf = pytest.importorskip("kaldi_native_fbank")
    options = knf.FbankOptions()
    options.frame_opts.dither = 0.0
    options.frame_opts.samp_freq = rate_hz
    options.mel_opts.num_bins = bins
    bank = knf.OnlineFbank(options)
    bank.accept_waveform(rate_hz, waveform.tolist())
    bank.input_finished()
    return np.stack([bank.get_frame(number) for number in range(bank.num_frames_ready)])


@pytest.mark.parametrize(("rate_hz", "bins"), [(16_000, 80), (16_000, 40), (8_000, 64), (24_000, 80)])
@pytest.mark.parametrize("kind", ["noise", "tone", "quiet"])
def test_parity_with_kaldi(rate_hz, bins, kind):
    time = np.arange(rate_hz) / rate_hz
    waveform = {
        "noise": np.random.default_rng(0).normal(0.1, 0.2, rate_hz),
        "tone": 0.5 * np.sin(2 * np.pi * 300 * time) + 0.1 * np.sin(2 * np.pi * 3_100 * time),
        "quiet": np.random.default_rng(1).normal(0, 1e-4, rate_hz),
    }[kind].astype(np.float32)
    ours = log_mel(waveform, MediaGeometry(audio_rate_hz=rate_hz, audio_mel_bins=bins))
    theirs = kaldi_fbank(waveform, rate_hz, bins)
    assert ours.shape == theirs.shape
    # Bands 70 dB below the loudest carry float32 rounding noise of the transform, in both implementations.
    heard = theirs > theirs.max(axis=1, keepdims=True) - 16
    assert np.abs(ours - theirs)[heard].max() < 1e-3


def test_silence_is_the_floor():
    assert log_mel(np.zeros(4_000, np.float32), MediaGeometry()) == pytest.approx(LOG_MEL_FLOOR)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 6_000), st.integers(1, 20))
def test_tokens_are_exactly_those_of_the_grid(samples, frames_per_token):
    geometry = MediaGeometry(audio_frames_per_token=frames_per_token, audio_mel_bins=8)
    info = MediaInfo(samples=samples, rate=geometry.audio_rate_hz)
    waveform = np.full(samples, 0.1, np.float32)
    assert log_mel(waveform, geometry).shape == (audio_frames(info, geometry), 8)
    assert log_mel_tokens(waveform, geometry).shape == (audio_grid(info, geometry)[0], frames_per_token * 8)


def test_the_last_token_is_filled_with_the_floor():
    geometry = MediaGeometry(audio_frames_per_token=8)
    waveform = np.random.default_rng(0).normal(0, 0.2, 400 + 9 * 160).astype(np.float32)  # 10 frames
    frames, tokens = log_mel(waveform, geometry), log_mel_tokens(waveform, geometry)
    assert tokens.dtype == np.float32
    assert np.array_equal(tokens.reshape(16, 80)[:10], frames)
    assert (tokens.reshape(16, 80)[10:] == np.float32(LOG_MEL_FLOOR)).all()
    assert (frames > LOG_MEL_FLOOR).all()


def test_blocks_do_not_show(monkeypatch):
    waveform = np.random.default_rng(0).normal(0, 0.2, 16_000).astype(np.float32)
    whole = log_mel(waveform, MediaGeometry())
    monkeypatch.setattr(mel, "_BLOCK_FRAMES", 7)
    assert np.abs(log_mel(waveform, MediaGeometry()) - whole).max() < 1e-4
