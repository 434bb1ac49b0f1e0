"""The row ledger: what became of every row of the input. Its counts add up to the input.

status `kept`: the row is a sample; `shard` and `key` say where, `reason` what of the row is not in it, if anything.
status `filtered`: left out on purpose; `reason` says why.
status `failed`: unreadable, damaged or malformed; `reason` says how.
status `duplicate`: its parts equal those of the row `duplicate_of`, which came earlier in build order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from triweave.data_pipeline.storage.files import read_file

RowStatus = Literal["kept", "filtered", "failed", "duplicate"]
STATUSES: tuple[RowStatus, ...] = get_args(RowStatus)

LEDGER_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("id", pa.string()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("duplicate_of", pa.string()),
        ("shard", pa.string()),
        ("key", pa.string()),
        ("content_xxh3", pa.string()),
        ("input_xxh3", pa.string()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class LedgerRow:
    """One row of input: `row` counts from 0 in listing order, strings that do not apply are empty.

    content_xxh3: hash of the parts (`schema.content_hash`), of kept and duplicate rows.
    input_xxh3: hash of the row as it was listed (`sources.base.row_hash`).
    """

    row: int
    id: str
    status: RowStatus
    reason: str = ""
    duplicate_of: str = ""
    shard: str = ""
    key: str = ""
    content_xxh3: str = ""
    input_xxh3: str = ""


def write_ledger(path: Path, rows: Sequence[LedgerRow]) -> None:
    """Write rows as Parquet; equal rows give equal bytes."""
    pq.write_table(pa.Table.from_pylist([vars(row) for row in rows], schema=LEDGER_SCHEMA), path, compression="zstd")


def read_ledger(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Return a ledger as a table.

    Without threads: those of `pq.read_table` made one process in twenty abort at its exit on a busy machine, after all
    its work (apache/arrow issue 34314).
    """
    file = pq.ParquetFile(pa.BufferReader(read_file(path)))
    return file.read(None if columns is None else list(columns), use_threads=False)


def join_ledgers(pieces: Iterable[Path], path: Path) -> dict[str, int]:
    """Write the rows of all pieces, in order, to one file, a piece at a time; return rows per status."""
    counts: dict[str, int] = dict.fromkeys(STATUSES, 0)
    with pq.ParquetWriter(path, LEDGER_SCHEMA, compression="zstd") as writer:
        for piece in pieces:
            table = read_ledger(piece)
            writer.write_table(table)
            for status, number in count_statuses(table).items():
                counts[status] += number
    return counts


def count_statuses(ledger: pa.Table) -> dict[str, int]:
    """Return rows per status."""
    counts = pc.value_counts(ledger["status"]).to_pylist()
    return {str(item["values"]): int(item["counts"]) for item in counts}


def reason_counts(ledger: pa.Table, limit: int = 20) -> list[dict[str, Any]]:
    """Return the most frequent (status, reason, rows) of rows that were not kept, at most `limit`."""
    left_out = ledger.filter(pc.not_equal(ledger["status"], "kept"))
    grouped = left_out.group_by(["status", "reason"], use_threads=False).aggregate([("row", "count")])
    ordered = grouped.sort_by([("row_count", "descending"), ("status", "ascending"), ("reason", "ascending")])
    return [
        {"status": item["status"], "reason": item["reason"], "rows": item["row_count"]}
        for item in ordered.slice(0, limit).to_pylist()
    ]
