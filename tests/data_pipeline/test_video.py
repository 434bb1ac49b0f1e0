"""Videos made here by PyAV: what is on the screen when, the sound beside it, and files that are refused."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from triweave.data_pipeline.errors import MediaError, SourceError
from triweave.data_pipeline.media import video
from triweave.data_pipeline.shards.build import BuildOptions, build
from triweave.data_pipeline.shards.ledger import read_ledger
from triweave.data_pipeline.shards.media_encoder import MediaEncoder, MediaOptions
from triweave.data_pipeline.shards.schema import Document, MediaPart, TextPart
from triweave.data_pipeline.sources.video import VideoSource

av = pytest.importorskip("av")

RATE = 16_000
FPS = 10
FORMS = {
    "mp4": ("mpeg4", "aac"),
    "mov": ("libx264", "aac"),
    "webm": ("libvpx-vp9", "libopus"),
    "mkv": ("ffv1", "flac"),
    "avi": ("mpeg4", "mp3"),
}


def write_video(
    path: Path,
    *,
    seconds: float = 3,
    sound: bool = True,
    times: list[int] | None = None,
    white_left: bool = False,
    late_ms: int = 0,
) -> Path:
    """Write frames of 64 x 48 px whose grey is 40 + 60 * second, and a tone in the second second alone.

    late_ms: how much later than the pictures the sound begins.
    """
    codec, sound_codec = FORMS[path.suffix[1:]]
    rate = 48_000 if sound_codec == "libopus" else RATE
    with av.open(str(path), "w") as container:
        picture = container.add_stream(codec, rate=FPS)
        picture.width, picture.height = 64, 48
        picture.pix_fmt = "yuv420p"
        picture.codec_context.time_base = Fraction(1, FPS)
        track = container.add_stream(sound_codec, rate=rate, layout="mono") if sound else None
        for number in times if times is not None else range(round(seconds * FPS)):
            grey = np.full((48, 64, 3), min(250, 40 + 60 * (number // FPS)), np.uint8)
            grey[:, : 32 * white_left] = 255
            frame = av.VideoFrame.from_ndarray(grey, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            container.mux(picture.encode(frame))
        container.mux(picture.encode(None))
        if track is not None:
            time = np.arange(round(seconds * rate)) / rate
            tone = 0.5 * np.sin(2 * np.pi * 440 * time) * ((time >= 1) & (time < 2))
            block = av.AudioFrame.from_ndarray((tone * 32767).astype(np.int16)[None], format="s16", layout="mono")
            block.sample_rate, block.pts = rate, late_ms * rate // 1000
            container.mux(track.encode(block))
            container.mux(track.encode(None))
    return path


def media(document: Document, modality: str) -> list[MediaPart]:
    return [part for part in document.parts if isinstance(part, MediaPart) and part.modality == modality]


def grey(part: MediaPart) -> int:
    assert part.data is not None
    return round(float(np.asarray(Image.open(io.BytesIO(part.data)).convert("L")).mean()))


def document_of(source: VideoSource, options: MediaOptions | None = None) -> Document:
    (row,) = source.rows()
    return source.document(row, MediaEncoder(options or MediaOptions()))


@pytest.mark.parametrize("ending", [form for form in FORMS if form != "avi"])
def test_pictures_and_sound_are_on_one_clock(tmp_path: Path, ending: str) -> None:
    write_video(tmp_path / f"lesson.{ending}")
    (tmp_path / "lesson.txt").write_text("Three greys.")
    (tmp_path / "lesson.json").write_text('{"labels": {"language": "en"}}')
    document = document_of(VideoSource(root=tmp_path, sound_ms=1000), MediaOptions(audio_rate_hz=RATE))
    pictures, sounds = media(document, "image"), media(document, "audio")
    assert [part.t_ms and part.t_ms[0] for part in pictures] == [0, 1000, 2000]
    assert [part.t_ms and part.t_ms[1] for part in pictures][:2] == [1000, 2000]
    assert [grey(part) for part in pictures] == pytest.approx([40, 100, 160], abs=4)
    loud = []
    for part in sounds[:3]:
        values, rate = soundfile.read(io.BytesIO(part.data or b""))
        assert rate == RATE
        loud.append(float(np.sqrt(np.mean(values[1600:-1600] ** 2))))
    assert [part.t_ms for part in sounds[:2]] == [(0, 1000), (1000, 2000)]
    assert loud[1] == pytest.approx(0.5 / np.sqrt(2), rel=0.1)
    assert max(loud[0], loud[2]) < 0.02
    starts = [part.t_ms[0] for part in document.parts if isinstance(part, MediaPart) and part.t_ms]
    assert starts == sorted(starts)
    assert [part.modality for part in document.parts][:2] == ["image", "audio"]
    assert isinstance(document.parts[-1], TextPart)
    assert document.parts[-1].text == "Three greys."
    assert document.labels == {"language": "en"}


def test_an_avi_whose_writer_set_its_pictures_a_frame_late(tmp_path: Path) -> None:
    """FFmpeg's AVI writer leaves slot 1 empty, so the third second begins at 2.1 s."""
    write_video(tmp_path / "a.avi")
    document = document_of(VideoSource(root=tmp_path, frame_every_ms=1500))
    assert [grey(part) for part in media(document, "image")] == pytest.approx([40, 100, 160], abs=4)
    assert len(media(document, "audio")) == 1


def test_most_pictures_and_their_side(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", sound=False)
    every = document_of(VideoSource(root=tmp_path, frame_every_ms=100))
    assert len(media(every, "image")) == 3 * FPS
    few = document_of(VideoSource(root=tmp_path, frame_every_ms=100, max_frames=2), MediaOptions(image_max_side_px=32))
    assert [part.t_ms and part.t_ms[0] for part in media(few, "image")] == [0, 1500]
    assert {(part.info.width, part.info.height) for part in media(few, "image")} == {(32, 24)}
    assert not media(few, "audio")


def test_a_picture_that_stays_comes_once_until_the_next(tmp_path: Path) -> None:
    """Frames at 0, 1.2 and 5 s only, as in a recording of slides."""
    write_video(tmp_path / "a.mkv", sound=False, times=[0, 12, 50])
    pictures = media(document_of(VideoSource(root=tmp_path)), "image")
    assert [part.t_ms for part in pictures] == [(0, 2000), (2000, 5000), (5000, 5100)]
    assert [grey(part) for part in pictures][:2] == pytest.approx([40, 100], abs=2)


def test_bytes_do_not_depend_on_workers_and_bad_files_fail_alone(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    whole = write_video(corpus / "a.mkv").read_bytes()
    for number, ending in enumerate(("mp4", "webm")):
        write_video(corpus / f"b{number}.{ending}", seconds=1.5)
    (corpus / "cut.mkv").write_bytes(whole[: len(whole) // 2])
    (corpus / "list.mp4").write_text("#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n")
    (corpus / "long.mkv").write_bytes(write_video(tmp_path / "long.mkv", times=[0, 90]).read_bytes())
    (corpus / "notes.doc").write_text("?")
    source = VideoSource(root=corpus, max_ms=5000)
    one, two = (build(source, tmp_path / str(n), BuildOptions(workers=n)) for n in (1, 2))
    assert one.hash == two.hash
    assert one.rows == {"kept": 3, "filtered": 1, "failed": 3, "duplicate": 0}
    why = {row["id"]: row["reason"] for row in read_ledger(one.ledger_path).to_pylist() if row["status"] == "failed"}
    assert "the file is cut" in why["cut.mkv"] or "cannot be read" in why["cut.mkv"]
    assert "unknown first bytes" in why["list.mp4"]
    assert "allowed are 5000 ms" in why["long.mkv"]


def test_a_codec_that_is_not_named_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "a.mp4")
    monkeypatch.setattr(video, "VIDEO_CODECS", ("h264",))
    with pytest.raises(MediaError, match="codec mpeg4: read are h264"):
        video.probe_video(tmp_path / "a.mp4", 10_000)


def test_pictures_larger_than_allowed_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "a.mp4")
    monkeypatch.setattr(video, "MAX_FRAME_PIXELS", 64 * 47)
    with pytest.raises(MediaError, match="64 x 48 px"):
        video.probe_video(tmp_path / "a.mp4", 10_000)


def test_options_below_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="--max-frames 0: must be at least 1"):
        VideoSource(root=tmp_path, max_frames=0)


def test_without_the_extra_the_row_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    write_video(tmp_path / "a.mp4")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(Exception, match=r"triweave\[video\]"):
        video.probe_video(tmp_path / "a.mp4", 10_000)


def test_a_phone_s_turned_picture_comes_upright(tmp_path: Path) -> None:
    """The display matrix of an MP4 says how to turn; here a quarter, on a picture whose left half is white."""
    path = write_video(tmp_path / "a.mp4", sound=False, white_left=True)
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 4 + 40  # version 0: the matrix is 40 bytes into the box's content
    one = 0x10000
    turned: list[Any] = [0, one, 0, -one, 0, 0, 48 * one, 0, 0x40000000]
    data[start : start + 36] = b"".join(int(value).to_bytes(4, "big", signed=True) for value in turned)
    path.write_bytes(bytes(data))
    picture = media(document_of(VideoSource(root=tmp_path)), "image")[0]
    assert (picture.info.width, picture.info.height) == (48, 64)
    pixels = np.asarray(Image.open(io.BytesIO(picture.data or b"")).convert("L"), np.float64)
    assert pixels[:24].mean() > 240 > 60 > pixels[40:].mean(), "clockwise: the left half is now the upper one"


def test_sound_that_begins_late_stays_at_its_time(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mkv", seconds=2, late_ms=700)
    waveform, rate = video.decode_sound(tmp_path / "a.mkv")
    loud = np.flatnonzero(np.abs(waveform) > 0.1)
    assert rate == RATE
    assert loud[0] / rate == pytest.approx(1.7, abs=0.01)
    assert loud[-1] / rate == pytest.approx(2.7, abs=0.01)
