"""A prepared Megatron-Energon data set: tars with `.nv-meta/` beside them, which says what the members mean.

    .nv-meta/.info.json     {"shard_counts": {"birds-0.tar": 50}}       (or .info.yaml)
    .nv-meta/split.yaml     split_parts: {train: ["birds-{0..9}.tar"]}, exclude: ["birds-3.tar", "birds-0.tar/owl"]
    .nv-meta/dataset.yaml   sample_type: {__module__: megatron.energon, __class__: CaptioningSample}
                            field_map: {image: "jpg,png", caption: "json[text]"}

The field maps of the sample types in SAMPLE_TYPES are followed; the samples of `CrudeWebdataset`, whose meaning is in
user code, become documents as those of the source `webdataset` do. A `sample_loader` is Python code of the data set: it
is not run, and such a set is refused. The part of the split is the label `split`. What is excluded is filtered.
Written after Energon 7.4 (field_access.py, metadata.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from triweave.data_pipeline.config import read_yaml
from triweave.data_pipeline.errors import ConfigError, SourceError
from triweave.data_pipeline.media.modalities import modality_of_extension
from triweave.data_pipeline.shards.media_encoder import MAX_TEXT_BYTES, MediaEncoder
from triweave.data_pipeline.shards.schema import Document, Part, TextPart
from triweave.data_pipeline.sources.base import Row, require_folder
from triweave.data_pipeline.sources.collected_parts import file_below
from triweave.data_pipeline.sources.tar_samples import is_scalar, read_members, sample_document, tar_rows

META = ".nv-meta"
MAX_SHARDS = 1_000_000
"""Most names that the braces of one pattern stand for."""
SAMPLE_TYPES = {
    "CaptioningSample": ("image", "caption"),
    "ImageClassificationSample": ("image",),
    "MultiChoiceVQASample": ("image", "context", "choices"),
    "OCRSample": ("image", "text"),
    "TextSample": ("text",),
    "VQASample": ("image", "context", "answers"),
}
"""Sample type -> its fields that become parts, in their order; `context` is the user's turn, the answer the other's."""
CRUDE = "CrudeWebdataset"
_LABELS = ("label", "label_name", "answers", "choices", "correct_choice_idx")
_SPLITS = {"val": "validation"}
_FIELD = re.compile(r"([^\[\]]+)((?:\[[^\[\]]+\])*)")
_Contents = dict[str, bytes]


@dataclass(frozen=True, kw_only=True)
class EnergonSource:
    """The samples of a prepared data set, the folder `root`."""

    root: Path
    name: str = "energon"

    @property
    def options(self) -> dict[str, Any]:
        """Return what dataset.yaml says: other fields make other documents."""
        return {"dataset": self._dataset}

    def rows(self) -> Iterator[Row]:
        """List the samples of every shard of every part of the split, in its order."""
        counts = self._mapping(".info.json", ".info.yaml").get("shard_counts")
        split = self._mapping("split.yaml", "split.json")
        parts = split.get("split_parts")
        if not isinstance(parts, dict) or not isinstance(counts, dict):
            raise SourceError(f"--input {self.root}: {META} lacks split_parts or shard_counts; run `energon prepare`")
        excluded = set(self._expanded(split.get("exclude") or []))
        seen: set[str] = set()
        for part, patterns in parts.items():
            for shard in self._expanded(patterns or []):
                if shard not in seen:
                    seen.add(shard)
                    yield from self._shard_rows(shard, str(part), counts.get(shard), excluded)

    def document(self, row: Row, encoder: MediaEncoder) -> Document:
        """Make the document of one sample."""
        path, _, part = row.recipe
        field_map = self._dataset["field_map"]
        if field_map is None:
            document = sample_document(row.id, self.root, row.recipe, encoder)
            document.labels.setdefault("split", _SPLITS.get(part, part))
            return document
        contents = read_members(self.root, row.recipe)
        fields = {name: field_value(contents, wanted) for name, wanted in field_map.items()}
        labels = {name: fields[name] for name in _LABELS if fields.get(name) is not None and name in fields}
        return Document(
            id=row.id,
            parts=tuple(self._parts(fields, encoder)),
            source={"corpus": PurePosixPath(path).stem},
            labels={**labels, "split": _SPLITS.get(part, part)},
        )

    @cached_property
    def _dataset(self) -> dict[str, Any]:
        """Return {"type", "field_map"} of dataset.yaml; a field_map of None means that the samples are crude."""
        require_folder(self.root, f"a prepared Energon data set, with a folder {META}")
        content = self._mapping("dataset.yaml")
        nested = content.get("sample_type")
        named = nested.get("__class__") if isinstance(nested, dict) else content.get("__class__")
        kind = str(named).replace("Webdataset", "Sample") if named != CRUDE else CRUDE
        place = f"--input {self.root}: {META}/dataset.yaml"
        if content.get("sample_loader") is not None:
            raise SourceError(
                f"{place} names a sample_loader, Python code that is not run: read the tars with --source webdataset"
            )
        if kind == CRUDE:
            return {"type": kind, "field_map": None}
        if kind not in SAMPLE_TYPES:
            raise SourceError(f"{place} has the sample type {named}: read are {', '.join([*SAMPLE_TYPES, CRUDE])}")
        field_map = content.get("field_map")
        if not isinstance(field_map, dict) or not all(isinstance(value, str) for value in field_map.values()):
            raise SourceError(f"{place} has no field_map of names to members")
        missing = [name for name in SAMPLE_TYPES[kind] if name not in field_map and name not in ("answers", "choices")]
        if missing:
            raise SourceError(f"{place}: the field_map lacks {missing[0]!r}, which {kind} has")
        return {"type": kind, "field_map": field_map}

    def _shard_rows(self, shard: str, part: str, promised: Any, excluded: set[str]) -> Iterator[Row]:
        """Yield the samples of one shard; excluded ones are filtered."""
        if shard in excluded:
            yield Row(id=f"file:{shard}", filtered="excluded by the split")
        elif file_below(self.root, shard) is None:
            yield Row(id=f"file:{shard}", failed=f"{shard} of the split is not below {self.root.name}")
        else:
            samples = 0
            for row in tar_rows(self.root, shard):
                samples += row.recipe is not None
                recipe = row.recipe and [*row.recipe, part]
                out = f"{shard}/{row.id.removeprefix(shard.removesuffix('.tar') + '/')}" in excluded
                yield Row(
                    id=row.id, recipe=recipe, failed=row.failed, filtered="excluded by the split" if out else None
                )
            if promised is not None and promised != samples:
                yield Row(id=f"count:{shard}", failed=f"{META} promises {promised} samples, the tar has {samples}")

    def _parts(self, fields: dict[str, Any], encoder: MediaEncoder) -> Iterator[Part]:
        for name in SAMPLE_TYPES[self._dataset["type"]]:
            value = fields.get(name)
            if name == "image":
                if not isinstance(value, _Medium):
                    raise SourceError(f"field {name}: is no picture but {type(value).__name__}")
                yield encoder.encode(value.modality, value.data)
            elif name in ("answers", "choices"):
                answer = _answer(value, fields)
                if answer:
                    yield TextPart(text=answer, role="assistant")
            elif isinstance(value, str) and value.strip():
                yield TextPart(text=value.strip(), role="user" if name == "context" else None)
            else:
                raise SourceError(f"field {name}: is no text")

    def _mapping(self, *names: str) -> dict[str, Any]:
        """Return the mapping in the first of these files of META that is there."""
        for name in names:
            path = self.root / META / name
            if path.is_file():
                if path.stat().st_size > MAX_TEXT_BYTES:
                    raise SourceError(f"--input {self.root}: {META}/{name} is larger than {MAX_TEXT_BYTES} bytes")
                try:
                    content = json.loads(path.read_bytes()) if path.suffix == ".json" else read_yaml(path)
                except (ConfigError, ValueError, RecursionError) as error:
                    raise SourceError(f"--input {self.root}: {META}/{name} cannot be read ({error})") from None
                if isinstance(content, dict):
                    return content
        raise SourceError(f"--input {self.root}: has no {META}/{names[0]}; run `energon prepare` on it")

    def _expanded(self, patterns: Any) -> Iterator[str]:
        for pattern in patterns if isinstance(patterns, list) else [patterns]:
            names = list(islice(expand_braces(str(pattern)), MAX_SHARDS + 1))
            if len(names) > MAX_SHARDS:
                raise SourceError(f"--input {self.root}: {pattern!r} stands for more than {MAX_SHARDS} names")
            yield from names


@dataclass(frozen=True)
class _Medium:
    """The bytes of a member that is a medium."""

    modality: str
    data: bytes


def field_value(contents: _Contents, wanted: str) -> Any:
    """Return what a field map's value stands for: the first there of `jpg,png`, or what `json[a][0]` holds, or None.

    contents: extension -> bytes. Texts are UTF-8; a medium keeps its bytes.
    """
    for option in wanted.split(","):
        match = _FIELD.fullmatch(option.strip())
        if match is None or match[1] not in contents:
            continue
        value = _decoded(match[1], contents[match[1]])
        for step in re.findall(r"\[([^\[\]]+)\]", match[2]):
            value = _entry(value, step)
        if value is not None:
            return value
    return None


def _decoded(extension: str, data: bytes) -> Any:
    modality = modality_of_extension(extension.rpartition(".")[2])
    if modality is not None:
        return _Medium(modality.name, data)
    if extension.endswith("json"):
        return json.loads(data)
    text = data.decode("utf-8-sig").strip()
    return int(text) if extension == "cls" and text.lstrip("-").isdigit() else text


def _entry(value: Any, step: str) -> Any:
    if isinstance(value, dict):
        return value.get(step)
    if isinstance(value, list) and step.isdigit() and int(step) < len(value):
        return value[int(step)]
    return None


def _answer(value: Any, fields: dict[str, Any]) -> str:
    """Return the right choice, or the answer of the largest weight, the first of equals; empty where there is none."""
    if isinstance(value, str):
        return value.strip()
    answers = [str(item).strip() for item in value if is_scalar(item)] if isinstance(value, list) else []
    weights, choice = fields.get("answer_weights"), fields.get("correct_choice_idx")
    if "choices" in fields and isinstance(choice, int):
        return answers[choice] if 0 <= choice < len(answers) else ""
    if isinstance(weights, list) and len(weights) == len(answers) and answers:
        return answers[max(range(len(answers)), key=lambda number: (float(weights[number]), -number))]
    return answers[0] if answers else ""


def expand_braces(pattern: str) -> Iterator[str]:
    """Yield what bash makes of `{a,b}` and `{08..11}`, one at a time: `{0..9999999999}` must not fill the memory.

    >>> list(expand_braces("birds-{08..10}.tar"))
    ['birds-08.tar', 'birds-09.tar', 'birds-10.tar']
    """
    match = re.search(r"\{([^{}]*,[^{}]*|-?\d+\.\.-?\d+)\}", pattern)
    if match is None:
        yield pattern
        return
    before, after = pattern[: match.start()], pattern[match.end() :]
    for choice in _choices(match[1]):
        yield from expand_braces(f"{before}{choice}{after}")


def _choices(body: str) -> Iterator[str]:
    if "," in body:
        yield from body.split(",")
        return
    first, last = body.split("..")
    padded = any(len(end.lstrip("-")) > 1 and end.lstrip("-").startswith("0") for end in (first, last))
    width = max(len(first), len(last)) if padded else 0
    step = 1 if int(first) <= int(last) else -1
    for number in range(int(first), int(last) + step, step):
        yield f"{number:0{width}d}"
