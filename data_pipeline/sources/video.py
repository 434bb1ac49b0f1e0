"""A folder of videos: each a document of pictures and pieces of sound on one clock, with the text beside the file.

    lesson.mp4  lesson.txt                 -> picture at 0 s, sound 0-10 s, picture at 1 s, ..., text
    lesson.webm lesson.json                   {"text": ..., "labels": {..}, "source": {..}}

A part's `t_ms` is its time: a picture's until the next one, a piece of sound's until its end. Parts are in the order in
which they begin, pictures first. A picture that stays on the screen comes once. Where `frame_every_ms` would give more
than `max_frames`, pictures are taken further apart. Needs PyAV: the extra `video`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from triweave.data_pipeline.errors import SourceError
from triweave.data_pipeline.media import audio, images, video
from triweave.data_pipeline.shards.media_encoder import MediaEncoder
from triweave.data_pipeline.shards.schema import Document, MediaPart, Part, TextPart
from triweave.data_pipeline.sources.base import Row, require_folder, walk_files
from triweave.data_pipeline.sources.folder import SIDECAR_ENDINGS, read_sidecars


@dataclass(frozen=True, kw_only=True)
class VideoSource:
    """The videos below `root`.

    frame_every_ms: distance of the pictures. max_frames: most pictures of a document. max_ms: longest video, others
    fail. sound_ms: length of a piece of sound.
    """

    root: Path
    frame_every_ms: int = 1000
    max_frames: int = 64
    max_ms: int = 600_000
    sound_ms: int = 10_000
    name: str = "video"

    def __post_init__(self) -> None:
        """Refuse values below 1."""
        for option, value in self.options.items():
            if value < 1:
                raise SourceError(f"--{option.replace('_', '-')} {value}: must be at least 1")

    @property
    def options(self) -> dict[str, Any]:
        """Return what decides which pictures and sounds there are."""
        return {
            "frame_every_ms": self.frame_every_ms,
            "max_frames": self.max_frames,
            "max_ms": self.max_ms,
            "sound_ms": self.sound_ms,
        }

    def rows(self) -> Iterator[Row]:
        """List one row per video, with its sidecars, and one filtered row per file of another kind."""
        require_folder(self.root, "a folder of videos with .txt or .json beside them")
        files = dict(walk_files(self.root))
        videos = [path for path in files if PurePosixPath(path).suffix.lower().lstrip(".") in video.EXTENSIONS]
        stems = {str(PurePosixPath(path).with_suffix("")) for path in videos}
        for path in videos:
            beside = [str(PurePosixPath(path).with_suffix(ending)) for ending in SIDECAR_ENDINGS]
            yield Row(id=path, recipe=[[name, files[name]] for name in (path, *beside) if name in files])
        for path, size in files.items():
            file = PurePosixPath(path)
            if path not in videos and not (file.suffix in SIDECAR_ENDINGS and str(file.with_suffix("")) in stems):
                yield Row(id=f"file:{path}", recipe=[path, size], filtered="neither a video nor the text of one")

    def document(self, row: Row, encoder: MediaEncoder) -> Document:
        """Make the document of one video."""
        (name, _), *beside = row.recipe
        path = self.root / name
        info = video.probe_video(path, self.max_ms)
        timed = [*self._pictures(path, info.ms, encoder), *self._sound(path, encoder)]
        timed.sort(key=lambda part: (part.t_ms or (0, 0))[0])  # stable: pictures before the sound of their moment
        parts: list[Part] = list(timed)
        text, labels, source = read_sidecars(self.root, [PurePosixPath(file) for file, _ in beside])
        return Document(
            id=row.id,
            parts=(*parts, *([TextPart(text=text)] if text else [])),
            source={"corpus": self.root.name, **source},
            labels=labels,
        )

    def _pictures(self, path: Path, end_ms: int, encoder: MediaEncoder) -> list[MediaPart]:
        every_ms = max(self.frame_every_ms, -(-end_ms // self.max_frames))
        found: list[MediaPart] = []
        for start_ms, pixels in video.frames_on_screen(path, every_ms, end_ms):
            data = images.encode_jpeg(pixels, encoder.options.image_max_side_px)
            found.append(replace(encoder.encode("image", data), t_ms=(start_ms, end_ms)))
        starts = [part.t_ms[0] for part in found[1:] if part.t_ms]
        return [
            replace(part, t_ms=(part.t_ms[0], stop))
            for part, stop in zip(found, [*starts, end_ms], strict=True)
            if part.t_ms
        ]

    def _sound(self, path: Path, encoder: MediaEncoder) -> Iterator[MediaPart]:
        waveform, rate = video.decode_sound(path)
        if not rate:
            return
        target = encoder.options.audio_rate_hz or rate
        waveform = waveform if target == rate else audio.resample(waveform, rate, target)
        length = max(1, self.sound_ms * target // 1000)
        for start in range(0, len(waveform), length):
            piece = waveform[start : start + length]
            part = encoder.encode("audio", audio.encode_flac(piece, target))
            yield replace(part, t_ms=(start * 1000 // target, (start + len(piece)) * 1000 // target))
