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
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from triweave.data_pipeline.errors import SourceError
from triweave.data_pipeline.shards.media_encoder import MediaEncoder
from triweave.data_pipeline.shards.schema import Document
from triweave.data_pipeline.sources.base import Row
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
            record = _row_group(self.root, group, self.root.stat().st_mtime_ns).slice(position, 1).to_pylist()[0]
            record |= {name: _object(record.get(name)) for name in ("labels", "source")}
        else:
            start, size = row.recipe[:2]
            with open(self.root, "rb") as file:
                file.seek(start)
                record = json.loads(file.read(size))
        record["source"] = {"corpus": self.root.stem, **(record.get("source") or {})}
        return record_document(row.id, record, encoder, folder=self.root.parent)

    def _jsonl_rows(self) -> Iterator[Row]:
        start = 0
        with open(self.root, "rb") as file:
            for number, line in enumerate(file):
                if line.strip():
                    yield self._jsonl_row(number, start, line)
                start += len(line)

    def _jsonl_row(self, number: int, start: int, line: bytes) -> Row:
        unnamed = f"line:{number + 1}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            return Row(id=unnamed, failed=f"line {number + 1} is not JSON: {error}")
        if not isinstance(record, dict) or not isinstance(record.get("id"), str) or not record["id"]:
            return Row(id=unnamed, failed=f"line {number + 1} has no id (a string)")
        return Row(id=record["id"], recipe=[start, len(line), _sizes(record.get("parts"), self.root.parent)])

    def _parquet_rows(self) -> Iterator[Row]:
        try:
            file = pq.ParquetFile(self.root)
        except (pa.ArrowInvalid, OSError) as error:
            raise SourceError(f"--input {self.root}: not a Parquet file ({error})") from None
        missing = {"id", "parts"} - set(file.schema_arrow.names)
        if missing:
            raise SourceError(f"--input {self.root}: has no column {sorted(missing)[0]!r}; it needs id and parts")
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


@lru_cache(maxsize=1)
def _row_group(path: Path, group: int, _changed_ns: int) -> pa.Table:
    """Return one row group; `_changed_ns` keeps the cache from answering for a file that was written anew."""
    return pq.ParquetFile(path).read_row_group(group)


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
