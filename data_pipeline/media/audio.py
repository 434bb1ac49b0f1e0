"""Sound: probe from the header, decode to mono at one rate, re-encode to FLAC.

soundfile (libsndfile) reads WAV, FLAC, Ogg (Vorbis, Opus), MP3 and AIFF, chosen by their first bytes; soxr resamples.
A clip is read in blocks and mixed down block by block, so memory is that of the mono signal. Length is bounded before
decoding. Samples that are NaN, infinite or absurdly large are a MediaError, and so is a clip that holds fewer samples
than its header promises.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import soundfile
import soxr

from triweave.data_pipeline.errors import DataError, MediaError
from triweave.data_pipeline.media.geometry import MediaInfo, resampled_length

EXTENSIONS = ("flac", "wav", "ogg", "oga", "opus", "mp3", "aiff", "aif")
MAX_AUDIO_SAMPLES = 3600 * 48_000
"""Most samples of one channel that are decoded or resampled to: an hour at 48 kHz, 659 MiB of float32."""
MAX_AUDIO_RATE_HZ = 384_000
MIN_AUDIO_RATE_HZ = 1_000
MAX_AUDIO_CHANNELS = 32
MAX_AUDIO_AMPLITUDE = 65536.0
"""Largest sample of a float file; those written in 16-bit units reach 32768, and 1e30 would overflow the spectrum."""

Waveform = npt.NDArray[np.float32]
"""float32 [samples], mono, full scale is 1."""

_FORMATS = {
    "WAV": ("wav", "audio/wav"),
    "WAVEX": ("wav", "audio/wav"),
    "FLAC": ("flac", "audio/flac"),
    "OGG": ("ogg", "audio/ogg"),
    "MP3": ("mp3", "audio/mpeg"),
    "AIFF": ("aiff", "audio/aiff"),
}
_BLOCK_VALUES = 1 << 20


def probe(data: bytes) -> tuple[MediaInfo, str, str]:
    """Return (info, extension, mime) of a clip from its header; samples and rate are exact.

    Raises MediaError where the header is damaged, of another kind, or beyond the bounds of length, rate and channels.
    """
    with _one_media_error(data), _open(data) as sound:
        return MediaInfo(samples=sound.frames, rate=sound.samplerate), *_FORMATS[sound.format]


def decode_mono(data: bytes, rate_hz: int, *, expected: MediaInfo | None = None) -> Waveform:
    """Return the clip mixed to mono (mean of the channels) at `rate_hz`: float32 [resampled_length].

    The length is exactly `resampled_length(samples, rate, rate_hz)`. `expected` is what the index promises.

    Raises MediaError where the bytes are damaged, hold NaN, infinity or absurd values, or differ from `expected`.
    """
    with _one_media_error(data):
        with _open(data) as sound:
            samples, rate = sound.frames, sound.samplerate
            if expected is not None and (expected.samples, expected.rate) != (samples, rate):
                raise MediaError(
                    f"audio of {samples} samples at {rate} Hz: the index says {expected.samples} at "
                    f"{expected.rate} Hz; rebuild the shard"
                )
            length = resampled_length(samples, rate, rate_hz)
            if length > MAX_AUDIO_SAMPLES:
                raise MediaError(
                    f"audio of {samples} samples at {rate} Hz: {length} samples at {rate_hz} Hz, allowed are 1 to "
                    f"{MAX_AUDIO_SAMPLES}; cut it before building"
                )
            mono = _read_mono(sound)
        if rate == rate_hz:
            return mono
        return resample(mono, rate, rate_hz)


def reencode_flac(data: bytes, rate_hz: int) -> bytes:
    """Return the clip as 16-bit mono FLAC at `rate_hz`; the same bytes give the same bytes in every process.

    Raises MediaError as decode_mono does.
    """
    return encode_flac(decode_mono(data, rate_hz), rate_hz)


def resample(mono: Waveform, rate: int, target_rate_hz: int) -> Waveform:
    """Return a waveform at another rate: float32 [resampled_length(samples, rate, target_rate_hz)]."""
    length = resampled_length(len(mono), rate, target_rate_hz)
    resampled = soxr.resample(mono, rate, target_rate_hz)
    if len(resampled) < length:
        return np.pad(resampled, (0, length - len(resampled)))
    return np.ascontiguousarray(resampled[:length])


def encode_flac(mono: Waveform, rate_hz: int) -> bytes:
    """Return a waveform as 16-bit mono FLAC; what is beyond full scale is clipped."""
    whole = np.clip(np.rint(mono * 32768.0), -32768, 32767).astype(np.int16)
    target = io.BytesIO()
    soundfile.write(target, whole, rate_hz, format="FLAC", subtype="PCM_16")
    return target.getvalue()


def _read_mono(sound: soundfile.SoundFile) -> Waveform:
    """Read every sample the header promises, in blocks, mixing down as it goes."""
    mono = np.empty(sound.frames, np.float32)
    filled = 0
    while filled < len(mono):
        block = sound.read(max(1, _BLOCK_VALUES // sound.channels), dtype="float32", always_2d=True)
        if not len(block):
            raise MediaError(f"audio of {len(mono)} samples: ends after {filled}; the file is cut or damaged")
        block = block[: len(mono) - filled]
        mixed = mono[filled : filled + len(block)]
        mixed[:] = block[:, 0]
        for channel in range(1, sound.channels):  # ten times as fast as a mean over the short axis
            mixed += block[:, channel]
        mixed /= sound.channels
        filled += len(block)
    # Written so that NaN fails it too.
    if not np.abs(mono).max() <= MAX_AUDIO_AMPLITUDE:
        raise MediaError(
            f"audio of {len(mono)} samples: holds NaN, infinite or absurd values (beyond {MAX_AUDIO_AMPLITUDE:g} where "
            f"full scale is 1); repair it or leave it out"
        )
    return mono


def _open(data: bytes) -> soundfile.SoundFile:
    """Open with libsndfile only what begins like one of the formats named here, and check the bounds."""
    if not _known_beginning(data):
        raise MediaError(
            f"audio of {len(data)} bytes: not a readable WAV, FLAC, Ogg, MP3 or AIFF file (unknown first bytes); "
            f"replace it or leave it out"
        )
    sound = soundfile.SoundFile(_Bytes(data))
    problem = ""
    if sound.format not in _FORMATS:
        problem = f"container {sound.format} is not read, only {', '.join(_FORMATS)}"
    elif not 1 <= sound.frames <= MAX_AUDIO_SAMPLES:
        problem = f"{sound.frames} samples, allowed are 1 to {MAX_AUDIO_SAMPLES}; cut it before building"
    elif not MIN_AUDIO_RATE_HZ <= sound.samplerate <= MAX_AUDIO_RATE_HZ:
        problem = f"{sound.samplerate} Hz, allowed are {MIN_AUDIO_RATE_HZ} to {MAX_AUDIO_RATE_HZ}"
    elif not 1 <= sound.channels <= MAX_AUDIO_CHANNELS:
        problem = f"{sound.channels} channels, allowed are 1 to {MAX_AUDIO_CHANNELS}"
    if problem:
        sound.close()
        raise MediaError(f"audio of {len(data)} bytes: {problem}")
    return sound


class _Bytes(io.BytesIO):
    """Bytes that stay put at an impossible seek.

    libsndfile asks for them in damaged files; an exception in its callback would be printed, not raised.
    """

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move as BytesIO does, or stay."""
        try:
            return super().seek(offset, whence)
        except (ValueError, OverflowError):
            return self.tell()


def _known_beginning(data: bytes) -> bool:
    if data[:4] in (b"RIFF", b"fLaC", b"OggS", b"FORM") or data[:3] == b"ID3":
        return True
    return len(data) > 1 and data[0] == 0xFF and data[1] & 0xE0 == 0xE0  # MPEG audio frame sync


@contextmanager
def _one_media_error(data: bytes) -> Iterator[None]:
    """Turn whatever a codec raises into one MediaError."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise MediaError(
            f"audio of {len(data)} bytes: not a readable WAV, FLAC, Ogg, MP3 or AIFF file ({reason}); "
            f"replace it or leave it out"
        ) from error
