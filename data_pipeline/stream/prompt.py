"""Prompts: media files and texts, interleaved, as the batch a model sees; laid out like the documents it learned from.

    prompt     [bos] part part ...            the model goes on after the last part
    document   [bos] part part ... [eos]      with `end`
    alone      [bos] part [eos] of each part  one-span segments, for embeddings

A file of prompts is a JSON or YAML list of parts, or a list of such lists:

    [{"image": "cat.png"}, {"text": "A small"}]
    [[{"audio": "meow.ogg"}], [{"text": "It is a "}, {"image": "cat.png"}, {"text": "called"}]]
"""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from triweave.data_pipeline.batch import TEXT_ID, PackedBatch
from triweave.data_pipeline.errors import MediaError, PromptError
from triweave.data_pipeline.media.geometry import MediaGeometry, MediaInfo
from triweave.data_pipeline.media.modalities import MODALITIES, modality_of_extension
from triweave.data_pipeline.stream.collate import Row, collate
from triweave.data_pipeline.stream.content import AloneSpan, Piece, text_key
from triweave.data_pipeline.stream.layout import Run
from triweave.data_pipeline.text.tokenizer import Tokenizer

MAX_MEDIA_FILE_BYTES = 1 << 30
"""Largest media file that is read; what it decodes to has bounds of its own, checked against the header."""
MAX_PROMPT_FILE_BYTES = 1 << 24
"""Largest file of prompts that is read."""


@dataclass(frozen=True, kw_only=True)
class PromptMedia:
    """A picture or a clip of a prompt, not decoded yet.

    modality: name in the registry. content: the file's bytes. info: what its header says.
    name: what errors call it.
    """

    modality: str
    content: bytes
    info: MediaInfo
    name: str = "prompt"


PromptPart = str | PromptMedia
Decode = Callable[[PromptMedia, MediaGeometry], npt.NDArray[Any]]


def read_media(path: str | Path, modality: str | None = None) -> PromptMedia:
    """Return the picture or clip in a file, its header checked; without `modality` the file's ending tells it.

    Raises MediaError, naming the file, where it cannot be read, is too large, or is not of that modality.
    """
    path = Path(path)
    if modality is None:
        known = modality_of_extension(path.suffix)
        if known is None:
            endings = ", ".join(ending for entry in MODALITIES.values() for ending in entry.extensions)
            raise MediaError(f"{path}: no picture or sound by its ending; known endings: {endings}")
        modality = known.name
    try:
        content = _read_at_most(path, MAX_MEDIA_FILE_BYTES)
    except (OSError, ValueError) as error:
        raise MediaError(f"{path}: cannot be read: {_reason(error)}; pass an existing {modality} file") from None
    if content is None:
        raise MediaError(f"{path}: more than {MAX_MEDIA_FILE_BYTES} bytes, which is all that is read; cut or shrink it")
    return probe_media(modality, content, name=str(path))


def probe_media(modality: str, content: bytes, *, name: str) -> PromptMedia:
    """Return a picture or clip from its bytes, the header checked; `name` is what errors call it.

    Raises MediaError where the bytes are not of that modality, PromptError where there is no such modality.
    """
    if modality not in MODALITIES:
        raise PromptError(f"{name}: there is no modality {modality!r}; known: {', '.join(MODALITIES)}")
    try:
        info, _, _ = MODALITIES[modality].probe(content)
    except MediaError as error:
        raise MediaError(f"{name}: {error}") from error
    return PromptMedia(modality=modality, content=content, info=info, name=name)


def read_prompts(path: str | Path) -> list[list[PromptPart]]:
    """Return the prompts of a JSON or YAML file, its media read; their paths are relative to the file's folder.

    Raises PromptError for a file that cannot be read or has another shape, MediaError for its media.
    """
    path = Path(path)
    tree = _parse(path)
    if not isinstance(tree, list) or not tree:
        raise PromptError(f"{path}: holds no prompt; write a list of parts, such as {_example()}, or a list of lists")
    several = isinstance(tree[0], list)
    prompts = []
    for number, parts in enumerate(tree if several else [tree]):
        where = f"{path}: prompt {number}" if several else str(path)
        if not isinstance(parts, list) or not parts:
            raise PromptError(f"{where} is {_short(parts)}; a prompt is a list of parts, such as {_example()}")
        prompts.append([_part(part, f"{where}, part {place}", path.parent) for place, part in enumerate(parts)])
    return prompts


def prompt_batch(
    prompts: Sequence[Sequence[PromptPart]],
    *,
    tokenizer: Tokenizer,
    geometry: MediaGeometry,
    end: bool = False,
    alone: bool = False,
    decode: Decode | None = None,
) -> PackedBatch:
    """Return B prompts as B rows, padded on the right to the longest.

    end: close each prompt with eos, as a document. alone: make every part a one-span segment, as contrastive losses
        see it; `segments` then lists them, item 0 of each row.
    decode: what stands in for `decode_media`; who asks for the same media often passes one that remembers.
    Raises MediaError, naming it, for a medium that cannot be decoded, PromptError for one the tokenizer has no markers
        for, TokenizerError for a text that is none.
    """
    pieces = [
        [_Draft([part], tokenizer, geometry, end=True) for part in prompt]
        if alone
        else [_Draft(prompt, tokenizer, geometry, end=end)]
        for prompt in prompts
    ]
    media: dict[int, list[Any]] = {}
    for item in (item for row in pieces for draft in row for item in draft.media):
        media.setdefault(MODALITIES[item.modality].id, []).append((decode or decode_media)(item, geometry))
    rows = [
        Row(number, [draft.piece(f"prompt:{number}:{place}", alone=alone) for place, draft in enumerate(row)])
        for number, row in enumerate(pieces)
    ]
    longest = max((sum(len(piece.tokens) for piece in row.pieces) for row in rows), default=0)
    values = {kind: np.concatenate(items) for kind, items in media.items()}
    return collate(rows, values, sequence_length=longest, pad_id=tokenizer.pad_id)


class _Draft:
    """The tokens and runs of one piece; its media are still to be decoded."""

    def __init__(
        self, parts: Sequence[PromptPart], tokenizer: Tokenizer, geometry: MediaGeometry, *, end: bool
    ) -> None:
        self.parts = parts
        self.media = [part for part in parts if isinstance(part, PromptMedia)]
        self.tokens: list[int] = [tokenizer.bos_id]
        self.runs: list[Run] = []
        run_start = 0
        for part in parts:
            if isinstance(part, str):
                self.tokens += tokenizer.encode(part).tolist()
                continue
            if part.modality not in tokenizer.media:
                raise PromptError(f"{part.name}: the tokenizer has no markers for {part.modality}; train a new one")
            markers, modality = tokenizer.media[part.modality], MODALITIES[part.modality]
            t, h, w = modality.grid(part.info, geometry)
            self.tokens.append(markers.start_id)
            text = len(self.tokens) - run_start
            self.tokens += [markers.placeholder_id] * (t * h * w)
            self.runs += [(TEXT_ID, text, text, 1, 1), (modality.id, t * h * w, t, h, w)]
            run_start = len(self.tokens)
        self.tokens += [tokenizer.eos_id] * end
        if text := len(self.tokens) - run_start:
            self.runs.append((TEXT_ID, text, text, 1, 1))

    def piece(self, name: str, *, alone: bool) -> Piece:
        """Return the piece; its only part is a one-span segment where `alone` is set."""
        tokens = np.asarray(self.tokens, np.int32)
        return Piece(
            tokens=tokens,
            runs=self.runs,
            weight=1.0,
            sample_id=f"{name}:alone" if alone else name,
            sample_hash=xxhash.xxh3_64_intdigest(tokens.data),
            alone=_alone(self.parts[0]) if alone else None,
        )


def _alone(part: PromptPart) -> AloneSpan:
    if isinstance(part, str):
        return AloneSpan(item=0, modality=TEXT_ID, content_key=text_key(part), group_key=0)
    key = xxhash.xxh3_64_intdigest(part.content)
    return AloneSpan(item=0, modality=MODALITIES[part.modality].id, content_key=key, group_key=0)


def decode_media(media: PromptMedia, geometry: MediaGeometry) -> npt.NDArray[Any]:
    """Return what the registry makes of a medium's bytes; raises MediaError, naming it, where they are damaged."""
    try:
        return MODALITIES[media.modality].decode(media.content, media.info, geometry)
    except MediaError as error:
        raise MediaError(f"{media.name}: {error}") from error


def _read_at_most(path: Path, limit_bytes: int) -> bytes | None:
    """Return a file's bytes, None where they are more; the limit holds for pipes and devices, which have no size.

    Raises OSError, and ValueError for a path that cannot be one.
    """
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size > limit_bytes:
            return None
        content = file.read(limit_bytes + 1)
    return content if len(content) <= limit_bytes else None


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)


def _parse(path: Path) -> Any:
    import yaml

    try:
        content = _read_at_most(path, MAX_PROMPT_FILE_BYTES)
    except (OSError, ValueError) as error:
        raise PromptError(f"{path}: cannot be read: {_reason(error)}; pass a JSON or YAML file") from None
    if content is None:
        raise PromptError(f"{path}: more than {MAX_PROMPT_FILE_BYTES} bytes, which is all that is read; split it")
    try:
        text = str(content, "utf-8")
        return json.loads(text) if path.suffix.lower() == ".json" else yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise PromptError(f"{path}: neither JSON nor YAML ({reason}); write a list such as {_example()}") from None


def _part(part: Any, where: str, folder: Path) -> PromptPart:
    """Return one part of a prompt file, its medium read."""
    known = ["text", *MODALITIES]
    if not isinstance(part, dict) or len(part) != 1 or next(iter(part)) not in known:
        raise PromptError(f"{where} is {_short(part)}; a part has one key, {' or '.join(known)}, as in {_example()}")
    ((kind, value),) = part.items()
    if not isinstance(value, str):
        raise PromptError(f"{where}: its {kind} is {_short(value)}; it must be a string")
    return value if kind == "text" else read_media(folder / value, kind)


def _example() -> str:
    return '[{"image": "cat.png"}, {"text": "A small"}]'


def _short(value: Any) -> str:
    text = reprlib.repr(value)  # bounded before it is made: YAML's anchors can stand for more than memory holds
    return text if len(text) <= 60 else f"{text[:57]}..."
