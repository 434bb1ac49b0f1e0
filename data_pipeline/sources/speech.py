"""Speech with transcripts as LibriSpeech and Common Voice lay it out: the clip and then its transcript.

    librispeech:   ROOT/train-clean-100/84/121123/84-121123.trans.txt     84-121123-0000 GO DO YOU HEAR
                   ROOT/train-clean-100/84/121123/84-121123-0000.flac
    common_voice:  ROOT/validated.tsv (or train, dev and test.tsv)        client_id  path  sentence ...  locale
                   ROOT/clips/common_voice_en_1.mp3

Labels: `language`, `speaker`, and `group` and `split` by speaker, so that no voice is on both sides. LibriSpeech has
its transcripts in capitals; they are kept as they are. A speaker of Common Voice is the first 16 characters of the id
that the corpus gives to a person.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from triweave.data_pipeline.errors import SourceError
from triweave.data_pipeline.shards.media_encoder import MediaEncoder
from triweave.data_pipeline.shards.schema import Document, TextPart
from triweave.data_pipeline.sources.base import Row, require_folder, walk_files
from triweave.data_pipeline.sources.collected_parts import file_below, file_size
from triweave.data_pipeline.sources.concepts import own_group_labels

_TRANSCRIPTS = ".trans.txt"
_SPEAKER_CHARACTERS = 16
_COLUMNS = ("client_id", "path", "sentence")


@dataclass(frozen=True, kw_only=True)
class LibriSpeechSource:
    """Every utterance below `root`, whatever subsets are there."""

    root: Path
    name: str = "librispeech"

    @property
    def options(self) -> dict[str, Any]:
        """Return no options."""
        return {}

    def rows(self) -> Iterator[Row]:
        """List one row per line of every transcript file."""
        require_folder(self.root, "a folder of LibriSpeech's subsets")
        files = dict(walk_files(self.root))
        transcripts = [PurePosixPath(path) for path in files if path.endswith(_TRANSCRIPTS)]
        if not transcripts:
            raise SourceError(f"--input {self.root}: no *{_TRANSCRIPTS} below it")
        for path in transcripts:
            text = (self.root / path).read_text(encoding="utf-8")
            for line in filter(str.strip, text.splitlines()):
                utterance, _, transcript = line.strip().partition(" ")
                clip = f"{path.parent}/{utterance}.flac".removeprefix("./")
                subset = path.parts[0] if len(path.parts) > 3 else ""
                labels = {"language": "en", "speaker": utterance.partition("-")[0], "subset": subset}
                yield _speech_row(utterance, clip, files.get(clip, -1), transcript, labels)

    def document(self, row: Row, encoder: MediaEncoder) -> Document:
        """Make the document of one utterance."""
        return _spoken(row, encoder, self.root, {"corpus": "librispeech", "license": "CC-BY-4.0"})


@dataclass(frozen=True, kw_only=True)
class CommonVoiceSource:
    """The clips of one language of Common Voice below `root`.

    Takes validated.tsv, which holds the other three; where it is missing, what there is of train, dev and test.tsv.
    """

    root: Path
    name: str = "common_voice"

    @property
    def options(self) -> dict[str, Any]:
        """Return no options."""
        return {}

    def rows(self) -> Iterator[Row]:
        """List one row per line of the tables."""
        require_folder(self.root, "a folder with validated.tsv and clips/")
        tables = [path for path in (self.root / "validated.tsv",) if path.is_file()]
        tables = tables or [path for name in ("train", "dev", "test") if (path := self.root / f"{name}.tsv").is_file()]
        if not tables:
            raise SourceError(f"--input {self.root}: none of validated.tsv, train.tsv, dev.tsv and test.tsv is in it")
        for table in tables:
            with open(table, encoding="utf-8", newline="") as file:
                lines = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
                missing = [name for name in _COLUMNS if name not in (lines.fieldnames or ())]
                if missing:
                    raise SourceError(f"{table}: has no column {missing[0]!r}; it needs {', '.join(_COLUMNS)}")
                for line in lines:
                    yield self._row(table.stem, line)

    def document(self, row: Row, encoder: MediaEncoder) -> Document:
        """Make the document of one clip."""
        return _spoken(row, encoder, self.root, {"corpus": "common-voice", "license": "CC0-1.0"})

    def _row(self, table: str, line: dict[str, Any]) -> Row:
        name = str(line["path"] or "")
        name = name if PurePosixPath(name).suffix else f"{name}.mp3"
        clip = f"clips/{name}"
        speaker = str(line["client_id"] or "")[:_SPEAKER_CHARACTERS]
        labels = {"language": line.get("locale") or "", "speaker": speaker, "subset": table}
        return _speech_row(name, clip, file_size(self.root, clip), str(line["sentence"] or ""), labels)


def _speech_row(document_id: str, clip: str, size: int, transcript: str, labels: dict[str, str]) -> Row:
    transcript = " ".join(transcript.split())
    if size < 0:
        return Row(id=document_id, failed=f"{clip} is not there")
    if not transcript:
        return Row(id=document_id, filtered="no transcript")
    recipe = {"clip": [clip, size], "transcript": transcript, "labels": {k: v for k, v in labels.items() if v}}
    return Row(id=document_id, recipe=recipe)


def _spoken(row: Row, encoder: MediaEncoder, root: Path, source: dict[str, Any]) -> Document:
    recipe = row.recipe
    path = file_below(root, recipe["clip"][0])
    if path is None:
        raise SourceError(f"{recipe['clip'][0]} is not there")
    speaker = recipe["labels"].get("speaker", row.id)
    return Document(
        id=row.id,
        parts=(encoder.encode_file(path, "audio"), TextPart(text=recipe["transcript"])),
        source=source,
        labels={**recipe["labels"], "kind": "speech", **own_group_labels(f"speaker:{speaker}")},
    )
