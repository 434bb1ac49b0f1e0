"""Rows of a Parquet or JSONL file: `id`, `parts` with paths or bytes, `labels`, `source`.

    {"id": "owl", "parts": [{"modality": "image", "path": "owl.jpg"}, {"modality": "text", "text": "An owl."}],
     "labels": {"language": "en"}, "source": {"corpus": "birds", "license": "CC0-1.0"}}

In Parquet the columns have the same names: `parts` a list of structs (modality, text, path, bytes), `labels` and
`source` structs, maps or JSON strings. In JSONL `bytes` is base64. Paths are relative to the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from triweave.data_pipeline.errors import SourceError
from triweave.data_pipeline.shards.media_encoder import MediaEncoder
from triweave.data_pipeline.shards.schema import Document
from triweave.data_pipeline.sources.base import Row
from triweave.data_pipeline.sources.json_records import json_records, read_json_record
from triweave.data_pipeline.sources.parquet_rows import open_parquet, read_parquet_row
from triweave.data_pipeline.sources.record import record_document

_PARQUET = ".parquet"
_JSONL = ".jsonl"


@dataclass(frozen=True, kw_only=True)
class ManifestSource:
    """The rows of the Parquet or JSONL file `root`."""

    root: Path
    name: str = "manifest"

    @property
    def options(self) -> dict[str, Any]:
        """Return no options."""
        return {}

    def rows(self) -> Iterator[Row]:
        """List the file's rows; a line that is no record is a failed row."""
        if self.root.suffix not in (_PARQUET, _JSONL):
            raise SourceError(f"--input {self.root}: a manifest ends in {_PARQUET} or {_JSONL}")
        if not self.root.is_file():
            raise SourceError(f"--input {self.root}: no such file")
        yield from self._parquet_rows() if self.root.suffix == _PARQUET else self._jsonl_rows()

    def document(self, row: Row, encoder: MediaEncoder) -> Document:
        """Make the document of one record."""
        if self.root.suffix == _PARQUET:
            group, position = row.recipe[:2]
            record = read_parquet_row(self.root, group, position)
            record |= {name: _object(record.get(name)) for name in ("labels", "source")}
        else:
            record = read_json_record(self.root, *row.recipe[:2])
        record["source"] = {"corpus": self.root.stem, **(record.get("source") or {})}
        return record_document(row.id, record, encoder, folder=self.root.parent)

    def _jsonl_rows(self) -> Iterator[Row]:
        for record in json_records(self.root):
            line = record.number + 1
            value = record.value or {}
            if record.value is None:
                yield Row(id=f"line:{line}", failed=f"line {line} {record.problem}")
            elif not isinstance(value.get("id"), str) or not value["id"]:
                yield Row(id=f"line:{line}", failed=f"line {line} has no id (a string)")
            else:
                sizes = _sizes(value.get("parts"), self.root.parent)
                yield Row(id=value["id"], recipe=[record.start, record.size, sizes])

    def _parquet_rows(self) -> Iterator[Row]:
        file = open_parquet(self.root, ("id", "parts"))
        for group in range(file.num_row_groups):
            size = file.metadata.row_group(group).total_byte_size
            try:
                ids = file.read_row_group(group, columns=["id"])["id"].to_pylist()
            except (pa.ArrowException, OSError) as error:
                raise SourceError(f"--input {self.root}: row group {group} is damaged ({error})") from None
            for position, value in enumerate(ids):
                name = f"{group}:{position}"
                if isinstance(value, str) and value:
                    yield Row(id=value, recipe=[group, position, size], group=f"row-group:{group}")
                else:
                    yield Row(id=f"row:{name}", failed=f"row {name} has no id (a string)", group=f"row-group:{group}")


def _object(value: Any) -> Any:
    """Return a struct, a map (list of pairs) or a JSON string as a dictionary without its nulls."""
    if isinstance(value, str):
        value = json.loads(value)
    if isinstance(value, list):
        value = dict(value)
    return {key: item for key, item in value.items() if item is not None} if isinstance(value, dict) else value


def _sizes(parts: Any, folder: Path) -> list[int]:
    """Return the sizes of the files that a record's parts name, -1 for one that is not there."""
    sizes = []
    for part in parts if isinstance(parts, list) else []:
        if isinstance(part, dict) and isinstance(part.get("path"), str):
            try:
                sizes.append((folder / part["path"]).stat().st_size)
            except (OSError, ValueError):
                sizes.append(-1)
    return sizes
