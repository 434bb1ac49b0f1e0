"""Video files: the pictures on the screen at even times and the sound, on one clock that starts with the first frame.

PyAV (FFmpeg, extra `video`) decodes. The container is told by the first bytes and the codec must be one named here, so
that FFmpeg guesses nothing: its play lists, for one, would open further files and addresses. Size, duration, packets,
pixels and samples are bounded; whatever is wrong with the bytes is a MediaError. Memory is one picture and the sound.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from triweave.data_pipeline.errors import DataError, MediaError
from triweave.data_pipeline.media.audio import (
    MAX_AUDIO_CHANNELS,
    MAX_AUDIO_RATE_HZ,
    MAX_AUDIO_SAMPLES,
    MIN_AUDIO_RATE_HZ,
    Waveform,
)
from triweave.data_pipeline.media.images import Pixels

EXTENSIONS = ("mp4", "m4v", "mov", "webm", "mkv", "ogv", "avi")
MAX_VIDEO_BYTES = 8 << 30
MAX_VIDEO_PACKETS = 1_000_000
"""Most packets of sound and pictures: an hour at 200 pictures and 70 blocks of sound a second."""
MAX_FRAME_PIXELS = 7680 * 4320
VIDEO_CODECS = ("h264", "hevc", "vp8", "vp9", "av1", "mpeg4", "mpeg1video", "mpeg2video", "mjpeg", "theora", "ffv1")
AUDIO_CODECS = (
    "aac",
    "mp2",
    "mp3",
    "opus",
    "vorbis",
    "flac",
    "alac",
    "ac3",
    "eac3",
    "pcm_s16le",
    "pcm_s24le",
    "pcm_u8",
)
_CUT_MS = 1000
"""A file whose last packet ends this long before the duration in its header is cut."""
_GAP_MS = 100
"""Sound that begins this long after the end of what came before is set apart by silence."""


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """What the packets of a video say: its duration, the size of its pictures, the rate of its sound (0 for none)."""

    ms: int
    width: int
    height: int
    audio_rate_hz: int


def probe_video(path: Path, max_ms: int) -> VideoInfo:
    """Return what a video holds, from all its packets, nothing decoded.

    Raises MediaError where it is damaged, cut, longer than `max_ms`, too large, or of a container or codec that is not
    read; DataError where the extra `video` is not installed.
    """
    with _opened(path) as container:
        video, audio = _streams(container)
        end_ms = 0
        for packets, packet in enumerate(container.demux([video, *([audio] if audio else [])])):
            if packet.pts is not None:
                end_ms = max(end_ms, _ms(packet.pts + (packet.duration or 0), packet.time_base, video))
            if packets > MAX_VIDEO_PACKETS or end_ms > max_ms:
                raise MediaError(
                    f"video of more than {min(end_ms, max_ms)} ms in {packets} packets: allowed are {max_ms} ms and "
                    f"{MAX_VIDEO_PACKETS} packets; cut it, or allow more"
                )
        promised_ms = (container.duration or 0) // 1000
        if promised_ms - end_ms > _CUT_MS:
            raise MediaError(f"video of {promised_ms} ms: ends after {end_ms}; the file is cut")
        if end_ms < 1:
            raise MediaError("video without a picture that has a time")
        width, height = video.codec_context.width, video.codec_context.height
        rate = audio.codec_context.sample_rate if audio else 0
        return VideoInfo(ms=end_ms, width=width, height=height, audio_rate_hz=rate)


def frames_on_screen(path: Path, every_ms: int, end_ms: int) -> Iterator[tuple[int, Pixels]]:
    """Yield (ms, picture) of what is on the screen at 0, every_ms, 2 * every_ms, ... < end_ms; what stays comes once.

    Pictures are upright RGB, uint8 [height, width, 3]. Raises MediaError where one is damaged.
    """
    with _opened(path) as container:
        video, _ = _streams(container)
        due_ms = 0
        shown: Any = None
        for frame in container.decode(video):
            if frame.pts is None:
                continue
            if frame.is_corrupt:
                raise MediaError(f"video: the picture at {_ms(frame.pts, frame.time_base, video)} ms is damaged")
            now_ms = max(0, _ms(frame.pts, frame.time_base, video))
            if shown is not None and now_ms > due_ms:
                yield due_ms, _upright(shown)
                due_ms = math.ceil(now_ms / every_ms) * every_ms
            shown = frame
        if shown is None:
            raise MediaError("video without a picture")
        lasts_ms = _ms(shown.pts + shown.duration, shown.time_base, video) if shown.duration else end_ms
        if due_ms < min(lasts_ms, end_ms):
            yield due_ms, _upright(shown)


def decode_sound(path: Path) -> tuple[Waveform, int]:
    """Return (float32 [samples], rate in Hz) of the first sound track, mixed to mono, from the clock's zero.

    Times without sound, before, within and between, are zeros. An empty waveform where there is no track. Raises
    MediaError.
    """
    with _opened(path) as container:
        video, audio = _streams(container)
        if audio is None:
            return np.empty(0, np.float32), 0
        rate = audio.codec_context.sample_rate
        blocks: list[Waveform] = []
        length = 0
        for frame in container.decode(audio):
            start = _ms(frame.pts, frame.time_base, video) * rate // 1000 if frame.pts is not None else length
            mono = _mono(frame)
            if start + len(mono) <= 0:  # before the first picture
                continue
            if start - length > _GAP_MS * rate // 1000:
                blocks.append(np.zeros(start - length, np.float32))
                length = start
            mono = mono[max(0, -start) :] if length == 0 else mono
            blocks.append(mono)
            length += len(mono)
            if length > MAX_AUDIO_SAMPLES:
                raise MediaError(f"video with more than {MAX_AUDIO_SAMPLES} samples of sound; cut it")
    if not blocks:
        return np.empty(0, np.float32), 0
    waveform = np.concatenate(blocks)
    if not np.isfinite(waveform).all():
        raise MediaError("video whose sound holds NaN or infinite values")
    return waveform, rate


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a file by what it begins with, and turn whatever FFmpeg raises into one MediaError."""
    try:
        import av
    except ImportError:
        raise DataError("video needs the package av: install it with `pip install 'triweave[video]'`") from None
    av.logging.set_level(av.logging.PANIC)
    size = path.stat().st_size
    if size > MAX_VIDEO_BYTES:
        raise MediaError(f"video of {size} bytes: allowed are {MAX_VIDEO_BYTES}; cut it")
    with open(path, "rb") as file:
        container_format = _format(file.read(12))
        file.seek(0)
        try:
            with av.open(file, format=container_format) as container:
                yield container
        except DataError:
            raise
        except (av.error.FFmpegError, ValueError, OverflowError, MemoryError, ArithmeticError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise MediaError(f"video of {size} bytes: cannot be read ({reason}); leave it out") from error


def _format(beginning: bytes) -> str:
    if beginning[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
        return "mov"
    if beginning[:4] == b"\x1aE\xdf\xa3":
        return "matroska"
    if beginning[:4] == b"OggS":
        return "ogg"
    if beginning[:4] == b"RIFF" and beginning[8:12] == b"AVI ":
        return "avi"
    raise MediaError("video: not a readable MP4, MOV, Matroska, WebM, Ogg or AVI file (unknown first bytes)")


def _streams(container: Any) -> tuple[Any, Any]:
    """Return the first video stream and the first audio stream, or None, checked and ready to decode in one thread."""
    videos, sounds = container.streams.video, container.streams.audio
    if not videos:
        raise MediaError("video without a picture track")
    chosen = [(videos[0], VIDEO_CODECS), *((sound, AUDIO_CODECS) for sound in sounds[:1])]
    for stream, codecs in chosen:
        name = stream.codec_context.codec.canonical_name if stream.codec_context else "unknown"
        if name not in codecs:
            raise MediaError(f"video with the codec {name}: read are {', '.join(codecs)}")
        stream.thread_type = "NONE"
        stream.codec_context.thread_count = 1
    picture = videos[0].codec_context
    if not 1 <= picture.width * picture.height <= MAX_FRAME_PIXELS:
        raise MediaError(f"video of {picture.width} x {picture.height} px: allowed are 1 to {MAX_FRAME_PIXELS} px")
    picture.options = {"max_pixels": str(MAX_FRAME_PIXELS)}
    if sounds:
        sound = sounds[0].codec_context
        if not (
            1 <= sound.channels <= MAX_AUDIO_CHANNELS and MIN_AUDIO_RATE_HZ <= sound.sample_rate <= MAX_AUDIO_RATE_HZ
        ):
            raise MediaError(f"video with {sound.channels} channels of sound at {sound.sample_rate} Hz")
    return videos[0], sounds[0] if sounds else None


def _ms(time: int, base: Any, video: Any) -> int:
    """Return a time stamp in ms after the first picture."""
    zero = (video.start_time or 0) * video.time_base
    return round((time * base - zero) * 1000)


def _upright(frame: Any) -> Pixels:
    pixels: Pixels = frame.to_ndarray(format="rgb24")
    return np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90) % 4))


def _mono(frame: Any) -> Waveform:
    """Return the mean of the channels of one block of sound, full scale 1."""
    values = frame.to_ndarray()
    if not frame.format.is_planar:
        values = values.reshape(-1, frame.layout.nb_channels).T
    scale = {"u8": 128.0, "s16": 32768.0, "s32": 2147483648.0}.get(frame.format.name.removesuffix("p"), 1.0)
    floats = values.astype(np.float32)
    if frame.format.name.startswith("u8"):
        floats -= 128.0
    mono: Waveform = floats.mean(axis=0) / np.float32(scale)
    return mono
