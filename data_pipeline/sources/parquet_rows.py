"""Single rows of a Parquet file for a source: listed by row group, read a group at a time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from triweave.data_pipeline.errors import SourceError


def open_parquet(path: Path, required: Sequence[str]) -> pq.ParquetFile:
    """Return the file at `path`. Raises SourceError unless it is Parquet and has the columns `required`."""
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: names that are not UTF-8
        raise SourceError(f"--input {path}: not a Parquet file ({error})") from None
    missing = [column for column in required if column not in file.schema_arrow.names]
    if missing:
        raise SourceError(f"--input {path}: has no column {missing[0]!r}; it needs {' and '.join(required)}")
    return file


def read_parquet_row(path: Path, group: int, position: int) -> dict[str, Any]:
    """Return row `position` of row group `group`; neighbours are in memory already."""
    row: dict[str, Any] = _row_group(path, group, path.stat().st_mtime_ns).slice(position, 1).to_pylist()[0]
    return row


@lru_cache(maxsize=1)
def _row_group(path: Path, group: int, _changed_ns: int) -> pa.Table:
    """Return one row group; `_changed_ns` keeps the cache from answering for a file that was written anew."""
    return pq.ParquetFile(path).read_row_group(group, use_threads=False)
