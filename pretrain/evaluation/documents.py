"""The documents a run has not seen, and those it has, read from its shards with every byte checked.

What was held out follows from the config alone: `split: train` leaves the split `test`, `hold_out: k/N` leaves fold k
of N by group. Sources that trained on everything hold nothing out and are left aside. So are held-out documents whose
text or a medium is also in a training document: groups do not join captions that nobody spoke, nor files that only
became equal when they were decoded, nor different corpora.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from triweave.data_pipeline.config import DataConfig, SourceConfig
from triweave.data_pipeline.errors import ShardDamagedError
from triweave.data_pipeline.media.geometry import MediaInfo
from triweave.data_pipeline.media.modalities import MODALITIES
from triweave.data_pipeline.shards.index import read_index
from triweave.data_pipeline.shards.manifest import Manifest
from triweave.data_pipeline.shards.schema import TEXT, TextPart, document_from_json
from triweave.data_pipeline.splits import fold_of, normalise_text
from triweave.data_pipeline.stream.prompt import PromptMedia, PromptPart
from triweave.data_pipeline.stream.reader import CorruptSampleError, ShardReader
from triweave.pretrain.errors import PretrainError

HELD_OUT_SPLIT = "test"
EFFECT = "effect"
"""The label `kind` of documents whose caption does not say what is heard."""
SPEECH = "speech"
SHORT_NAMES = {"tuxpaint-stamps": "tuxpaint", "asterisk-core-sounds": "asterisk"}
"""Corpus name -> how tasks call it; others keep theirs."""


@dataclass(frozen=True, kw_only=True)
class MediaRef:
    """Where the bytes of a medium lie: a byte range of a tar and its xxh3_64."""

    modality: str
    tar: str
    offset: int
    size: int
    xxh3: int
    info: MediaInfo


@dataclass(frozen=True, kw_only=True)
class EvaluationDocument:
    """What the evaluation knows of a document: its first text and the first medium of each modality."""

    id: str
    corpus: str
    kind: str
    language: str
    category: str
    group: str
    text: str
    media: dict[str, MediaRef] = field(default_factory=dict)

    def key(self, modality: str) -> str:
        """Return what makes two parts of a modality the same answer: the normalised text, or the bytes' xxh3."""
        if modality == TEXT:
            return normalise_text(self.text) or self.text
        return f"{self.media[modality].xxh3:016x}"

    def part_keys(self) -> set[tuple[str, str]]:
        """Return (modality, key) of every part; none for an empty text."""
        return {(name, self.key(name)) for name in (TEXT, *self.media) if name != TEXT or self.text}

    def has(self, *modalities: str) -> bool:
        """Tell whether the document has a part of each modality."""
        return all(bool(self.text) if name == TEXT else name in self.media for name in modalities)


@dataclass(frozen=True, kw_only=True)
class EvaluationDocuments:
    """Held-out and training documents of the sources that hold something out, ordered by id.

    split: the split that is held out; None where a fold is.
    fold: `k/N`, or None.
    left_out: number of held-out documents that share a text or a medium with a training document, and so are not asked.
    """

    held_out: tuple[EvaluationDocument, ...]
    training: tuple[EvaluationDocument, ...]
    split: str | None
    fold: str | None
    left_out: int
    reader: ShardReader

    def part(self, document: EvaluationDocument, modality: str) -> PromptPart:
        """Return a part as prompts take it: text, or a medium with its bytes.

        Raises ShardDamagedError where the bytes are not those that were built.
        """
        if modality == TEXT:
            return document.text
        ref = document.media[modality]
        return PromptMedia(modality=modality, content=self.read(ref), info=ref.info, name=f"{document.id} ({modality})")

    def read(self, ref: MediaRef) -> bytes:
        """Return the bytes of a medium. Raises ShardDamagedError where they are not those that were built."""
        return bytes(_read(self.reader, ref.tar, ref.offset, ref.size, ref.xxh3))


def read_documents(
    data: DataConfig,
    *,
    asked_split: str = HELD_OUT_SPLIT,
    locate: Callable[[str], str | Path] = Path,
    tell: Callable[[str], object] = lambda _: None,
) -> EvaluationDocuments:
    """Read what the sources of a run hold out, and what they trained on; without media that no pack of it can hold.

    asked_split: the split that is asked about, of sources that trained on another one.
    locate: where a shard folder of the config is now.

    Raises PretrainError where nothing is held out, or the shards have no group labels, and DataError where shards
    cannot be read.
    """
    reader = ShardReader()
    held_out: list[EvaluationDocument] = []
    training: list[EvaluationDocument] = []
    held_names: set[tuple[str | None, str | None]] = set()
    for source in data.sources:
        if not _holds_out(source, asked_split):
            tell(f"source {source.name} trained on everything; nothing of it is evaluated")
            continue
        held_names.add((None, source.hold_out) if source.hold_out else (asked_split, None))
        for place, document in _source_documents(source, asked_split, locate(source.shards), reader, data):
            (held_out if place else training).append(document)
    if not held_names:
        raise PretrainError(_nothing_held_out(data, asked_split))
    if len(held_names) > 1:
        raise PretrainError(
            "data.sources hold out different things (split, hold_out); give all of them the same setting to evaluate"
        )
    if not held_out:
        names = ", ".join(source.name for source in data.sources)
        raise PretrainError(f"the shards of {names} have no held-out document; build them from more of the corpus")
    asked = _unseen(held_out, training)
    if not asked:
        raise PretrainError("every held-out document shares its text or a medium with a training document")
    if len(asked) < len(held_out):
        tell(f"{len(held_out) - len(asked)} held-out documents share a text or a medium with training; left out")
    split, fold = held_names.pop()
    return EvaluationDocuments(
        held_out=tuple(sorted(asked, key=lambda document: (document.corpus, document.id))),
        training=tuple(sorted(training, key=lambda document: (document.corpus, document.id))),
        split=split,
        fold=fold,
        left_out=len(held_out) - len(asked),
        reader=reader,
    )


def _unseen(held_out: list[EvaluationDocument], training: list[EvaluationDocument]) -> list[EvaluationDocument]:
    """Return the held-out documents of which no part is in a training document, of whatever corpus and language."""
    seen = {key for document in training for key in document.part_keys()}
    return [document for document in held_out if seen.isdisjoint(document.part_keys())]


def sample(documents: list[EvaluationDocument], most: int, *, seed: int, purpose: str) -> list[EvaluationDocument]:
    """Return at most `most` documents, those with the smallest keyed hash of their id, in the given order."""
    if len(documents) <= most:
        return documents
    keyed = sorted(documents, key=lambda document: keyed_hash(seed, purpose, document.corpus, document.id))
    chosen = {(document.corpus, document.id) for document in keyed[:most]}
    return [document for document in documents if (document.corpus, document.id) in chosen]


def keyed_hash(seed: int, *words: str) -> int:
    """Return xxh3_64 of some words under a seed; orders by it are the same everywhere."""
    return xxhash.xxh3_64_intdigest("\0".join(words).encode(), seed)


def _holds_out(source: SourceConfig, asked_split: str) -> bool:
    return source.hold_out is not None or source.split not in (None, asked_split)


def _nothing_held_out(data: DataConfig, asked_split: str) -> str:
    first = data.sources[0]
    if first.split == asked_split:
        return (
            f"data.sources.{first.name}.split is {asked_split!r}: the run trained on what is evaluated; "
            "train with split: train"
        )
    return (
        f"the run trained on everything (data.sources.{first.name}.split is null), so nothing is held out to evaluate; "
        "train with split: train, or with hold_out: 0/5"
    )


def _source_documents(
    source: SourceConfig, asked_split: str, shards: str | Path, reader: ShardReader, data: DataConfig
) -> Iterator[tuple[bool, EvaluationDocument]]:
    """Yield (held out?, document) of those that are held out or were trained on."""
    manifest = Manifest.load(shards)
    for shard in range(len(manifest.shards)):
        tar = str(manifest.tar_path(shard))
        for row in read_index(manifest, shard).to_pylist():
            labels = json.loads(row["labels"])
            if "group" not in labels or "split" not in labels:
                raise PretrainError(
                    f"{manifest.location}: document {row['id']!r} has no label `group` or `split`; build the shards "
                    "again, with a source that writes them"
                )
            held_out = _is_held_out(source, asked_split, labels)
            if held_out is not None:
                yield held_out, _document(row, labels, tar, reader, data)


def _is_held_out(source: SourceConfig, asked_split: str, labels: dict[str, Any]) -> bool | None:
    """Return True for what is held out, False for what was trained on, None for neither."""
    if source.fold is not None:
        number, folds = source.fold
        return fold_of(str(labels["group"]), folds) == number
    if labels["split"] == source.split:
        return False
    return True if labels["split"] == asked_split else None


def _document(
    row: dict[str, Any], labels: dict[str, Any], tar: str, reader: ShardReader, data: DataConfig
) -> EvaluationDocument:
    whole = _read(reader, tar, row["offset"], row["size"], row["xxh3"])
    start = row["json_offset"] - row["offset"]
    document = document_from_json(bytes(whole[start : start + row["json_size"]]))
    text = next((part.text for part in document.parts if isinstance(part, TextPart)), "")
    media: dict[str, MediaRef] = {}
    for number, modality in enumerate(row["part_modality"]):
        if modality == TEXT or modality in media:
            continue
        info = MediaInfo(
            width=row["part_width"][number],
            height=row["part_height"][number],
            samples=row["part_samples"][number],
            rate=row["part_rate"][number],
        )
        ref = MediaRef(
            modality=modality,
            tar=tar,
            offset=row["part_offset"][number],
            size=row["part_size"][number],
            xxh3=row["part_xxh3"][number],
            info=info,
        )
        if _fits(ref, data):
            media[modality] = ref
    return EvaluationDocument(
        id=row["id"],
        corpus=SHORT_NAMES.get(row["corpus"], row["corpus"]),
        kind=str(labels.get("kind", "")),
        language=str(labels.get("language", "")),
        category=str(labels.get("category", "")),
        group=str(labels["group"]),
        text=text,
        media=media,
    )


def _fits(ref: MediaRef, data: DataConfig) -> bool:
    """Tell whether a pack of the run holds the medium, alone with its marker, bos and eos."""
    if ref.modality not in MODALITIES:
        return False
    t, h, w = MODALITIES[ref.modality].grid(ref.info, data.geometry)
    return t * h * w + 3 <= data.sequence_length


def _read(reader: ShardReader, tar: str, offset: int, size: int, xxh3: int) -> memoryview:
    try:
        return reader.read(tar, offset, size, xxh3)
    except CorruptSampleError as error:
        raise ShardDamagedError(f"{tar} is damaged: {error}; run `triweave verify` on its folder") from None
