"""What `triweave import` writes for a transformers folder: a run config that starts from it, and a tokenizer folder.

    OUT/config.yaml       `triweave train` with it continues the model; data.sources is for the user to fill in
    OUT/tokenizer/        tokenizer.json as it was, triweave.json with the ids that have a meaning here

The weights stay where they are: `init_from` in the config names the folder.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from triweave.data_pipeline.errors import DataError
from triweave.data_pipeline.media.modalities import MODALITIES
from triweave.data_pipeline.text.hugging_face import MEANINGS, VOCABULARY, HuggingFaceTokenizer, read_vocabulary
from triweave.pretrain.config import to_plain
from triweave.pretrain.errors import OpenModelError
from triweave.pretrain.open_models.folder import CONFIG, OpenFolder
from triweave.pretrain.open_models.initial import check_tower, entries_of, ignored_tensors
from triweave.pretrain.open_models.mapping import check_names
from triweave.pretrain.open_models.settings import OpenModel, read_settings, read_tower
from triweave.pretrain.open_models.tower_mapping import canonical

RUN_CONFIG = "config.yaml"
TOKENIZER = "tokenizer"
TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "added_tokens.json")
"""Files beside tokenizer.json that go along, for the export."""
LEARNING_RATE = 2e-5
"""Peak rate written for a model that goes on; from scratch it would be far higher."""
SEQUENCE_LENGTH = 4096


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What was found and written; tensors: that the model is made of, unused: that it does not compute with."""

    family: str
    config: str
    tokenizer: str
    tensors: int
    unused: int
    vocab_size: int
    media: dict[str, dict[str, int]]


def prepare(
    path: Path,
    out: Path,
    *,
    out_name: Path,
    modalities: Sequence[str] = (),
    towers: Mapping[str, Path] = MappingProxyType({}),
) -> Prepared:
    """Check a transformers folder tensor by tensor and write config and tokenizer into the folder `out`.

    out_name: what `out` will be called in the config. modalities: to read beside those that the model reads itself;
        their towers start anew. towers: modality -> folder of a CLIP or SigLIP (image), or a Whisper (audio), whose
        encoder the decoder gets. Raises OpenModelError or TokenizerError naming the key, tensor or file in the way.
    """
    folder = OpenFolder(path)
    opened = read_settings(folder.config, f"{folder.path / CONFIG}")
    from_decoder = opened.model_config()
    for modality, tower in towers.items():
        opened = _with_tower(opened, modality, tower)
    ignored = ignored_tensors(opened)
    names = partial(canonical, opened.family)
    stored = check_names(folder, entries_of(opened.family, from_decoder), canonical=names, ignored=ignored)
    wanted = [name for name in MODALITIES if name in {*opened.encoders, *modalities}]
    if unknown := sorted(set(modalities) - set(MODALITIES)):
        raise OpenModelError(f"--modality {unknown[0]}: known: {', '.join(MODALITIES)}")
    meanings = _write_tokenizer(folder, opened, out / TOKENIZER, wanted)
    text = "# Written by `triweave import`; fill in data.sources, then run `triweave tokenize` on the shards.\n"
    text += yaml.safe_dump(_run_config(opened, path, out_name, towers), sort_keys=False, allow_unicode=True)
    (out / RUN_CONFIG).write_text(text, encoding="utf-8")
    return Prepared(
        family=opened.family,
        config=str(out_name / RUN_CONFIG),
        tokenizer=str(out_name / TOKENIZER),
        tensors=len(stored),
        unused=len(folder.names) - len(stored),
        vocab_size=meanings["vocab_size"],
        media=meanings["media"],
    )


def _with_tower(opened: OpenModel, modality: str, path: Path) -> OpenModel:
    """Return the settings of a decoder with a tower from another folder, whose tensors are checked."""
    if modality in opened.encoders:
        raise OpenModelError(f"{path}: a {opened.family} has a tower of its own for {modality}; leave the folder out")
    folder = OpenFolder(path)
    encoder = read_tower(folder.config, f"{folder.path / CONFIG}", modality)
    check_tower(folder, encoder)
    largest = encoder.positions**2 if modality == "image" else opened.image_max_tokens
    return replace(opened, encoders={**opened.encoders, modality: encoder}, image_max_tokens=largest)


def _run_config(opened: OpenModel, path: Path, out: Path, towers: Mapping[str, Path]) -> dict[str, Any]:
    geometry: dict[str, Any] = {}
    for encoder in opened.encoders.values():
        geometry |= encoder.geometry
    if opened.image_max_tokens is not None:
        geometry["image_max_tokens"] = opened.image_max_tokens
    return {
        "run_dir": f"runs/{out.name}",
        "init_from": {"model": str(path), **{modality: str(tower) for modality, tower in towers.items()}},
        "data": {
            "sources": [{"name": "corpus", "shards": "corpora/shards"}],
            "tokenizer": str(out / TOKENIZER),
            "sequence_length": SEQUENCE_LENGTH,
            "geometry": geometry,
        },
        "model": to_plain({**opened.model, "open_encoders": opened.encoders}),
        "optimizer": {"lr": LEARNING_RATE},
    }


def _write_tokenizer(folder: OpenFolder, opened: OpenModel, out: Path, modalities: Sequence[str]) -> dict[str, Any]:
    """Write the tokenizer folder and return what stands in triweave.json; the tokenizer is loaded once to prove it."""
    try:
        vocabulary = (folder.path / VOCABULARY).read_bytes()
    except OSError as error:
        raise OpenModelError(
            f"{folder.path / VOCABULARY} cannot be read ({error.strerror}); save the model's fast tokenizer there"
        ) from None
    tokenizer = read_vocabulary(vocabulary, str(folder.path))
    ends = _ends(folder, tokenizer)
    free = _free_ids(tokenizer, opened)
    media = {}
    for name in modalities:
        start, placeholder = opened.placeholders.get(name, (None, None))
        media[name] = {
            "start": next(free) if start is None else start,
            "placeholder": next(free) if placeholder is None else placeholder,
        }
    largest = max([*ends.values(), *(number for pair in media.values() for number in pair.values())])
    meanings = {"vocab_size": max(opened.vocab_size, largest + 1), **ends, "media": media}
    out.mkdir()
    (out / VOCABULARY).write_bytes(vocabulary)
    (out / MEANINGS).write_text(json.dumps(meanings, indent=1) + "\n", encoding="utf-8")
    for name in TOKENIZER_FILES:
        if (folder.path / name).is_file():
            shutil.copy(folder.path / name, out / name)
    HuggingFaceTokenizer.read(out)
    return meanings


def _ends(folder: OpenFolder, tokenizer: Any) -> dict[str, int]:
    """Return the ids of pad, bos and eos; a model without one of the first two uses eos in its place."""
    path = folder.path / "tokenizer_config.json"
    try:
        named: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from None
    config = {**folder.config, **folder.config.get("text_config", {})}
    found: dict[str, int] = {}
    for end in ("eos", "bos", "pad"):
        token = named.get(f"{end}_token")
        content = token.get("content") if isinstance(token, dict) else token
        number = tokenizer.token_to_id(content) if content is not None else None
        if number is None:
            number = config.get(f"{end}_token_id")
        if isinstance(number, list):
            number = number[0]
        if number is None:
            number = found.get("eos")
        if number is None:
            raise OpenModelError(
                f"{path}: names no eos_token, and neither does {CONFIG}; add the one documents end with"
            )
        found[end] = int(number)
    return found


def _free_ids(tokenizer: Any, opened: OpenModel) -> Iterator[int]:
    """Yield ids that no text has: reserved special tokens, rows behind the vocabulary, then new rows."""
    taken = {number for pair in opened.placeholders.values() for number in pair if number is not None}
    reserved = [
        number
        for number, token in sorted(tokenizer.get_added_tokens_decoder().items())
        if token.special and "reserved" in token.content
    ]
    yield from (number for number in reserved if number not in taken)
    number = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    while True:
        if number not in taken:
            yield number
        number += 1
