"""The work that every loader of a benchmark does on the members of a sample, and the packing of samples as they come.

raw    checksum every member (xxh3)
full   parse the document, tokenise its text, decode its media to payload rows, pack documents in the order they come
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import xxhash

from triweave.data_pipeline.batch import PackedBatch
from triweave.data_pipeline.config import DataConfig
from triweave.data_pipeline.media.geometry import MediaInfo
from triweave.data_pipeline.media.modalities import MODALITIES
from triweave.data_pipeline.shards.schema import TextPart, document_from_json
from triweave.data_pipeline.stream.collate import Row, collate
from triweave.data_pipeline.stream.content import Piece
from triweave.data_pipeline.stream.layout import Run
from triweave.data_pipeline.text.tokenizer import Tokenizer

Members = dict[str, bytes]
"""Name of a member without its key, `json` for the document -> its bytes."""
Part = tuple[str, str | bytes, MediaInfo]


def checksum_members(members: Members) -> None:
    """Hash every member."""
    for content in members.values():
        xxhash.xxh3_64_intdigest(content)


def parts_of(members: Members) -> list[Part]:
    """Return (modality, text or encoded bytes, info) of the parts of a sample."""
    parts: list[Part] = []
    for part in document_from_json(members["json"]).parts:
        if isinstance(part, TextPart):
            parts.append((part.modality, part.text, MediaInfo()))
        else:
            parts.append((part.modality, members[part.member], part.info))
    return parts


def packed(samples: Iterable[Members], tokenizer: Tokenizer, config: DataConfig) -> Iterator[tuple[int, PackedBatch]]:
    """Yield a pack with the number of samples in it whenever the next sample no longer fits, and one of the last."""
    tokens = 0
    held: list[Piece] = []
    media: dict[int, list[Any]] = defaultdict(list)

    def pack() -> tuple[int, PackedBatch]:
        joined = {kind: np.concatenate(items) for kind, items in media.items()}
        length = max(config.sequence_length, tokens)
        return len(held), collate([Row(0, held)], joined, sequence_length=length, pad_id=tokenizer.pad_id)

    for members in samples:
        made, items = _piece(parts_of(members), tokenizer, config)
        if held and tokens + len(made.tokens) > config.sequence_length:
            yield pack()
            held, tokens = [], 0
            media.clear()
        held.append(made)
        for kind, values in items:
            media[kind].append(values)
        tokens += len(made.tokens)
    if held:
        yield pack()


def _piece(parts: list[Part], tokenizer: Tokenizer, config: DataConfig) -> tuple[Piece, list[tuple[int, Any]]]:
    """Return a document as the loader would make it, without a plan, and its decoded media."""
    tokens: list[Any] = [[tokenizer.bos_id]]
    runs: list[Run] = []
    media: list[tuple[int, Any]] = []
    text = 1
    for name, content, info in parts:
        if isinstance(content, str):
            tokens.append(tokenizer.encode(content))
            text += len(tokens[-1])
            continue
        modality, markers = MODALITIES[name], tokenizer.media[name]
        values = modality.decode(content, info, config.geometry)
        tokens += [[markers.start_id], np.full(len(values), markers.placeholder_id)]
        runs += [(0, text + 1, text + 1, 1, 1), (modality.id, len(values), *modality.grid(info, config.geometry))]
        media.append((modality.id, values))
        text = 0
    tokens.append([tokenizer.eos_id])
    runs.append((0, text + 1, text + 1, 1, 1))
    row = np.concatenate(tokens).astype(np.int32)
    return Piece(tokens=row, runs=runs, weight=1.0, sample_id="", sample_hash=0), media
