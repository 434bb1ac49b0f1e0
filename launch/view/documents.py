"""What the page shows of samples: everything as plain values and texts, nothing that a browser would run.

A shard may hold hostile texts, labels and media. Media are named by their place, never by what the JSON says, and their
type is what their own bytes say; what is no picture or sound that a browser is meant to show comes as a download.
"""

from __future__ import annotations

from collections import Counter
from itertools import islice
from typing import Any

import numpy as np

from triweave.data_pipeline.errors import MediaError, SchemaError, TokenizerError
from triweave.data_pipeline.media import audio
from triweave.data_pipeline.media.modalities import MODALITIES
from triweave.data_pipeline.shards.schema import MediaPart, Part, TextPart
from triweave.data_pipeline.stream.reader import CorruptSampleError
from triweave.data_pipeline.text.tokenizer import Tokenizer
from triweave.launch.errors import ViewError
from triweave.launch.view.search import label_text, parse_labels
from triweave.launch.view.shard_folder import Sample, ShardFolder

SHOWN_CHARACTERS = 20_000
"""Characters of a text part that are shown and tokenised unless the whole is asked for."""
SHOWN_FACTS, FACT_CHARACTERS = 100, 2000
"""Most labels and facts of the source that are shown, and characters of each; the stored JSON has the rest."""
SHOWN_PARTS = 500
"""Parts of a document that are shown unless the whole is asked for."""
SHOWN_MODALITIES = 8
EXCERPT_CHARACTERS = 160
PEAKS = 600
"""Stretches of a waveform; each has its lowest and its highest value."""
DRAWN_AUDIO_SAMPLES = 600 * 48_000
"""Longest clip whose waveform is drawn, ten minutes at 48 kHz."""
SHOWN_TYPES = frozenset(
    ("image/jpeg", "image/png", "image/webp", "image/gif", "image/bmp", "audio/wav", "audio/flac", "audio/ogg")
) | {"audio/mpeg"}
"""Media types a browser is let show or play; no type that holds markup is among them."""
DOWNLOAD = "application/octet-stream"
_DAMAGE = (CorruptSampleError, SchemaError, TypeError, ValueError, LookupError, AttributeError, RecursionError)
"""What a hostile sample raises: a JSON of the right shape may hold values of any type."""


def list_entry(folder: ShardFolder, number: int) -> dict[str, Any]:
    """Return what the list shows of a sample: from the index, and the beginning of its text. Raises DataError."""
    row = folder.row(number)
    modalities = row["part_modality"]
    entry = {
        "number": number,
        "id": row["id"],
        "corpus": row["corpus"],
        "language": label_text(parse_labels(row["labels"]).get("language", "")),
        "modalities": dict(Counter(modalities).most_common(SHOWN_MODALITIES)),
        "picture": modalities.index("image") if "image" in modalities else None,
    }
    try:
        document = folder.sample(number).document
        texts = (part.text if isinstance(part, TextPart) else part.alt or "" for part in document.parts)
        excerpt = " ".join(" ".join(text[:EXCERPT_CHARACTERS] for text in texts)[: 4 * EXCERPT_CHARACTERS].split())
        return entry | {"excerpt": excerpt[:EXCERPT_CHARACTERS], "damage": ""}
    except _DAMAGE as error:
        return entry | {"excerpt": "", "damage": _reason(error)}


def shown_document(
    folder: ShardFolder, number: int, tokenizer: Tokenizer | None, *, whole: bool = False
) -> dict[str, Any]:
    """Return everything the page shows of a sample; a damaged one comes with the reason and without parts.

    whole: show all of long texts. Raises DataError and ViewError.
    """
    row = folder.row(number)
    shard, place = folder.place(number)
    shown: dict[str, Any] = {
        "number": number,
        "samples": folder.samples,
        "id": row["id"],
        "key": row["key"],
        "corpus": row["corpus"],
        "place": f"{folder.manifest.shards[shard].name}.tar, sample {place}, byte {row['offset']}, {row['size']} bytes",
        "labels": _facts(parse_labels(row["labels"])),
        "source": [],
        "parts": [],
        "left_out": 0,
        "json": "",
        "damage": "",
    }
    try:
        sample = folder.sample(number)
        shown["json"] = sample.json_bytes[: 4 * SHOWN_CHARACTERS].decode("utf-8", "replace")
        document = sample.document
        if len(document.parts) != len(row["part_modality"]):
            raise SchemaError(f"its JSON has {len(document.parts)} parts, its index {len(row['part_modality'])}")
        shown["source"] = _facts(document.source)
        shown["labels"] = _facts(document.labels)  # the index has them without the annotations
        limit, parts = (None, document.parts) if whole else (SHOWN_CHARACTERS, document.parts[:SHOWN_PARTS])
        shown["left_out"] = len(document.parts) - len(parts)
        shown["parts"] = [_shown_part(sample, at, part, tokenizer, limit) for at, part in enumerate(parts)]
    except _DAMAGE as error:
        shown["damage"] = _reason(error)
    return shown


def _reason(error: BaseException) -> str:
    if isinstance(error, (CorruptSampleError, SchemaError)):
        return str(error)
    return f"its JSON holds what the schema does not ({type(error).__name__}: {error})"


def _facts(values: dict[str, Any]) -> list[tuple[str, str]]:
    shown = islice(values.items(), SHOWN_FACTS)
    return [(str(name)[:FACT_CHARACTERS], label_text(value)[:FACT_CHARACTERS]) for name, value in shown]


def _shown_part(
    sample: Sample, place: int, part: Part, tokenizer: Tokenizer | None, limit: int | None
) -> dict[str, Any]:
    if isinstance(part, MediaPart):
        return _shown_medium(sample, place, part)
    if not isinstance(part.text, str):
        raise SchemaError(f"part {place} says it is text and holds {type(part.text).__name__}")
    text = part.text[:limit]
    return {
        "modality": "text",
        "part": place,
        "role": part.role,
        "text": text,
        "left_out": len(part.text) - len(text),
        "tokens": _tokens(tokenizer, text),
    }


def _tokens(tokenizer: Tokenizer | None, text: str) -> list[tuple[int, str]] | None:
    """Return the spans of a text; None without a tokenizer, and for a lone surrogate, which none reads."""
    if tokenizer is None:
        return None
    try:
        return token_spans(tokenizer, text)
    except TokenizerError:
        return None


def _shown_medium(sample: Sample, place: int, part: MediaPart) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "modality": str(part.modality),
        "part": place,
        "member": part.member,
        "alt": part.alt,
        "t_ms": part.t_ms,
        "bytes": sample.row["part_size"][place],
        "info": {name: value for name, value in part.info._asdict().items() if value},
        "ms": part.info.ms if part.info.samples and part.info.rate else 0,
        "kind": "other",
        "problem": "",
    }
    try:
        mime = medium_type(sample, place)
        shown["kind"] = mime.partition("/")[0] if mime in SHOWN_TYPES else "other"
    except MediaError as error:
        shown["problem"] = str(error)
    return shown


def medium_type(sample: Sample, place: int) -> str:
    """Return the media type of a part by its own bytes, DOWNLOAD for what is not to be shown.

    Raises MediaError where a picture's or sound's header cannot be read.
    """
    modality = MODALITIES.get(sample.row["part_modality"][place])
    if modality is None:
        return DOWNLOAD
    _, _, mime = modality.probe(sample.medium(place))
    return mime if mime in SHOWN_TYPES else DOWNLOAD


def token_spans(tokenizer: Tokenizer, text: str) -> list[tuple[int, str]]:
    """Return (id, text) of each token of a text; a token that ends inside a character shows its bytes as <E5>.

    Where the bytes of several tokens make a character, the last of them has the character behind its byte.
    Raises TokenizerError for a lone surrogate.
    """
    spans: list[tuple[int, str]] = []
    waiting = b""
    for token in tokenizer.encode(text).tolist():
        data = tokenizer.token_bytes(token)
        if waiting or not _is_text(data):
            waiting += data
            name = "".join(f"<{byte:02X}>" for byte in data)
            whole = _is_text(waiting)
            spans.append((token, name + (waiting.decode() if whole else "")))
            waiting = b"" if whole else waiting
        else:
            spans.append((token, data.decode()))
    return spans


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def waveform(sample: Sample, place: int) -> dict[str, Any]:
    """Return the lowest and highest value of each of at most PEAKS stretches of a clip, in 1/127 of full scale.

    Raises MediaError where it cannot be decoded, ViewError where it is longer than DRAWN_AUDIO_SAMPLES.
    """
    data = sample.medium(place)
    info, _, _ = audio.probe(data)
    if info.samples > DRAWN_AUDIO_SAMPLES:
        raise ViewError(f"a clip of {info.samples} samples is too long to draw: at most {DRAWN_AUDIO_SAMPLES}")
    mono = audio.decode_mono(data, info.rate)
    starts = np.unique(np.linspace(0, len(mono), PEAKS, endpoint=False, dtype=np.int64))
    lowest, highest = np.minimum.reduceat(mono, starts), np.maximum.reduceat(mono, starts)
    scaled = np.clip(np.rint(np.stack([lowest, highest], axis=1) * 127), -127, 127).astype(np.int64)
    return {"peaks": scaled.tolist(), "ms": info.ms}
