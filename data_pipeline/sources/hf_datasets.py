"""A folder that Hugging Face `datasets` wrote: `save_to_disk` (Arrow) or Parquet, read by pyarrow alone.

    birds/dataset_dict.json  birds/train/state.json  birds/train/data-00000-of-00002.arrow      DatasetDict.save_to_disk
    birds/state.json  birds/data-00000-of-00001.arrow                                           Dataset.save_to_disk
    birds/data/train-00000-of-00001.parquet                                                     to_parquet, and the Hub

What a column is, its files say (the schema's metadata `huggingface`): Image and Audio columns, and lists of them, are
media, held as bytes or as a path below the folder. Without `columns` a document is all media columns in their order,
then the first of TEXT_COLUMNS; `columns` names the parts and their order, `user=question` with a role. Further numbers,
strings and class names become labels, and the split the label `split`. A row whose medium is gone or damaged fails.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import pyarrow as pa

from triweave.data_pipeline.errors import SourceError
from triweave.data_pipeline.shards.media_encoder import MediaEncoder
from triweave.data_pipeline.shards.schema import Document, Part, TextPart
from triweave.data_pipeline.sources.base import FilteredError, Row, require_folder, walk_files
from triweave.data_pipeline.sources.collected_parts import file_below
from triweave.data_pipeline.sources.parquet_rows import open_parquet, read_parquet_row
from triweave.data_pipeline.sources.tar_samples import is_scalar
from triweave.data_pipeline.splits import SPLITS

TEXT_COLUMNS = ("text", "caption", "captions", "sentence", "transcription", "transcript", "normalized_text")
"""Columns of text that are looked for, the first one that is there."""
_MEDIA = {"Image": "image", "Audio": "audio"}
_LISTS = ("List", "LargeList", "Sequence")
_STRINGS = ("string", "large_string")
_SPLIT_NAMES = {"valid": "validation", "val": "validation", "dev": "validation", "eval": "test"}
_ARROW = ".arrow"
_PARQUET = ".parquet"


@dataclass(frozen=True, kw_only=True)
class HfDatasetsSource:
    """The rows of the data set in the folder `root`.

    columns: the columns that become parts, in order, each `NAME` or `ROLE=NAME`; empty: see above.
    """

    root: Path
    columns: tuple[str, ...] = ()
    name: str = "hf_datasets"

    @property
    def options(self) -> dict[str, Any]:
        """Return the columns asked for."""
        return {"columns": list(self.columns)}

    def rows(self) -> Iterator[Row]:
        """List the rows of every file, by split and file."""
        for file, size in self._files():
            path = self.root / file
            counts, problem = _row_counts(path, size)
            if problem:
                yield Row(id=f"file:{file}", recipe=[file, size], failed=problem)
            if counts:
                _chosen(_features(path), self.columns, path)
            for batch, count in enumerate(counts):
                for position in range(count):
                    recipe = [file, batch, position, size]
                    yield Row(id=f"{file}:{batch}:{position}", recipe=recipe, group=f"{file}:{batch}")

    def document(self, row: Row, encoder: MediaEncoder) -> Document:
        """Make the document of one row."""
        file, batch, position = row.recipe[:3]
        path = self.root / file
        features = _features(path)
        record = _read_row(path, batch, position)
        chosen = _chosen(features, self.columns, path)
        parts = [part for role, name in chosen for part in self._parts(record[name], features[name], role, encoder)]
        if not parts:
            raise FilteredError("no media and no text")
        columns = {name for _, name in chosen}
        labels = {
            name: _label(value, features.get(name))
            for name, value in record.items()
            if name not in columns and is_scalar(value)
        }
        split = _split_of(file)
        return Document(
            id=row.id,
            parts=tuple(parts),
            source={"corpus": self.root.name},
            labels=labels | ({"split": split} if split else {}),
        )

    def _files(self) -> Iterator[tuple[str, int]]:
        """Yield (path below the root, bytes) of the data files, those of a saved data set as its state lists them."""
        require_folder(self.root, "a folder that Hugging Face datasets wrote with save_to_disk or to_parquet")
        found = dict(walk_files(self.root))
        states = [name for name in found if PurePosixPath(name).name == "state.json"]
        for name in states:
            folder = PurePosixPath(name).parent
            state = _read_json(self.root / name)
            if state.get("_indices_data_files"):
                raise SourceError(f"--input {self.root}: {name} selects rows: call flatten_indices() and save it again")
            for item in state.get("_data_files") or []:
                file = (folder / str(item.get("filename"))).as_posix() if isinstance(item, dict) else ""
                if file not in found or not file.endswith(_ARROW):
                    raise SourceError(f"--input {self.root}: {name} lists {file or item!r}, which is not there")
                yield file, found[file]
        parquet = [name for name in found if name.endswith(_PARQUET)]
        if states and parquet:
            raise SourceError(f"--input {self.root}: holds Arrow and Parquet files: give the folder of one of them")
        for name in parquet:
            yield name, found[name]
        if not states and not parquet:
            raise SourceError(f"--input {self.root}: no state.json of save_to_disk and no {_PARQUET} file in it")

    def _parts(self, value: Any, feature: Any, role: str | None, encoder: MediaEncoder) -> Iterator[Part]:
        if value is None:
            return
        inner = _item_feature(feature)
        if inner is not None:
            for item in value:
                yield from self._parts(item, inner, role, encoder)
        elif feature["_type"] in _MEDIA:
            yield self._medium(value, _MEDIA[feature["_type"]], encoder)
        elif str(value).strip():
            yield TextPart(text=str(value).strip(), role=role)

    def _medium(self, value: dict[str, Any], modality: str, encoder: MediaEncoder) -> Part:
        if isinstance(value.get("bytes"), bytes):
            return encoder.encode(modality, value["bytes"])
        reference = str(value.get("path") or "")
        path = file_below(self.root, reference)
        if path is None:
            raise SourceError(f"the {modality} {reference!r} has no bytes and is no file below {self.root.name}")
        return encoder.encode_file(path, modality)


def _chosen(features: dict[str, Any], columns: tuple[str, ...], path: Path) -> list[tuple[str | None, str]]:
    """Return (role, column) of what becomes parts."""
    if columns:
        pairs = [(role or None, name) for role, _, name in (item.rpartition("=") for item in columns)]
    else:
        text = next((name for name in TEXT_COLUMNS if _kind(features.get(name)) == "text"), None)
        names = [name for name, feature in features.items() if _kind(feature) == "media"]
        pairs = [(None, name) for name in [*names, *([text] if text else [])]]
        if not text and not names:
            raise SourceError(
                f"{path}: no Image or Audio column and none of {', '.join(TEXT_COLUMNS)}: choose among "
                f"{', '.join(features)} with --columns"
            )
    for _, name in pairs:
        if _kind(features.get(name)) is None:
            usable = [known for known, feature in features.items() if _kind(feature)]
            raise SourceError(f"{path}: --columns {name}: no column of media or text; there are {', '.join(usable)}")
    return pairs


def _kind(feature: Any) -> str | None:
    """Return `media` or `text` for a column of that, or of lists of that, else None."""
    feature = _item_feature(feature) or feature
    if not isinstance(feature, dict) or not isinstance(feature.get("_type"), str):
        return None
    if feature["_type"] in _MEDIA:
        return "media"
    return "text" if feature["_type"] == "Value" and feature.get("dtype") in _STRINGS else None


def _item_feature(feature: Any) -> Any:
    """Return the feature of a list's items, None for what is no list."""
    if isinstance(feature, list) and feature:
        return feature[0]
    if isinstance(feature, dict) and feature.get("_type") in _LISTS:
        return feature.get("feature")
    return None


def _label(value: Any, feature: Any) -> Any:
    names = feature.get("names") if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" else None
    if isinstance(names, list) and isinstance(value, int) and 0 <= value < len(names):
        return names[value]
    return value


def _split_of(file: str) -> str | None:
    """Return the split that a file's folder or name begins with, as `train/data-0.arrow` and `train-0.parquet` do."""
    for name in reversed(PurePosixPath(file).parts):
        word = name.partition("-")[0].partition(".")[0]
        word = _SPLIT_NAMES.get(word, word)
        if word in SPLITS:
            return word
    return None


def _features(path: Path) -> dict[str, Any]:
    return _features_of(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=64)
def _features_of(path: Path, changed_ns: int) -> dict[str, Any]:
    """Return column -> feature from a file's schema, in the columns' order."""
    schema = open_parquet(path, ()).schema_arrow if path.suffix == _PARQUET else _stream(path, changed_ns).schema
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: features[name] for name in schema.names}
    except (KeyError, TypeError, ValueError, RecursionError):
        raise SourceError(
            f"--input {path}: its schema names no features, so it is not of Hugging Face datasets; read Parquet of "
            "other origin with --source manifest or interleaved"
        ) from None


def _row_counts(path: Path, size_bytes: int) -> tuple[list[int], str]:
    """Return the rows of each record batch or row group, and what is wrong with the file behind them, if anything."""
    if path.suffix == _PARQUET:
        try:
            metadata = open_parquet(path, ()).metadata
        except SourceError:
            return [], "is no whole Parquet file; fetch it again"
        return [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)], ""
    stream = _stream(path, path.stat().st_mtime_ns)
    counts = [batch.num_rows for batch in stream.batches]
    if sum(counts) > size_bytes:
        return [], f"claims {sum(counts)} rows in {size_bytes} bytes; it is damaged"
    return counts, "is no whole Arrow stream; save or fetch it again" if stream.cut else ""


def _read_row(path: Path, batch: int, position: int) -> dict[str, Any]:
    if path.suffix == _PARQUET:
        return read_parquet_row(path, batch, position)
    row = _stream(path, path.stat().st_mtime_ns).batches[batch].slice(position, 1)
    row.validate(full=True)  # Arrow's own reader trusts the offsets in a file
    values: dict[str, Any] = row.to_pylist()[0]
    return values


class _Stream(NamedTuple):
    """The schema and the record batches of an Arrow file, mapped, not read; cut: whether the file ends too early."""

    schema: Any
    batches: list[pa.RecordBatch]
    cut: bool


@lru_cache(maxsize=2)
def _stream(path: Path, _changed_ns: int) -> _Stream:
    """Return what can be read of an Arrow file, up to the first damage."""
    batches: list[pa.RecordBatch] = []
    schema = None
    try:
        with pa.ipc.open_stream(pa.memory_map(str(path))) as reader:
            schema = reader.schema
            batches.extend(reader)
    except (pa.ArrowException, OSError, ValueError):
        return _Stream(schema, batches, cut=True)
    return _Stream(schema, batches, cut=False)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise SourceError(f"--input {path}: is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise SourceError(f"--input {path}: must hold a JSON object")
    return content
