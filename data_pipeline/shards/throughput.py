"""How fast a build was, per stage: `OUT/throughput.json`, the one file of a finished folder that no hash covers.

It adds up over the runs of a build that was interrupted. A stage's seconds are wall-clock time inside the stage,
summed over all processes, so what a busy machine or a slow disk costs is in them:

    read     the source: files, archives, parsing, decompression of rows
    encode   decoding, resizing and encoding again of media, where that is asked for
    decode   reading the headers of media, and decoding once those that keep their bytes
    filter   the filters; then a stage for every document step under its name
    dedup    signatures of near duplicates
    write    hashing and packing samples, copying them into shards, looking for duplicates
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from triweave.data_pipeline.storage.files import read_file

THROUGHPUT_NAME = "throughput.json"


@dataclass(kw_only=True)
class Throughput:
    """Totals of a build so far.

    chunks: chunks that are counted; the next to count has this number. rows: rows that a worker looked at.
    wall_s: time of the runs, from the first chunk on. stage_s: stage -> seconds over all processes.
    """

    engine: str
    workers: int
    chunks: int = 0
    rows: int = 0
    tar_bytes: int = 0
    wall_s: float = 0.0
    stage_s: dict[str, float] = field(default_factory=dict)

    @property
    def rows_per_s(self) -> float:
        """Return rows over wall-clock seconds; 0 before there is one."""
        return self.rows / self.wall_s if self.wall_s else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the totals with rates as JSON values; a stage's rate is that of one process in that stage alone."""
        return {
            "engine": self.engine,
            "workers": self.workers,
            "rows": self.rows,
            "tar_bytes": self.tar_bytes,
            "wall_s": round(self.wall_s, 3),
            "rows_per_s": round(self.rows_per_s, 2),
            "tar_bytes_per_s": round(self.tar_bytes / self.wall_s) if self.wall_s else 0,
            "stages": {
                stage: {"seconds": round(seconds, 3), "rows_per_s": round(self.rows / seconds, 1) if seconds else 0}
                for stage, seconds in self.stage_s.items()
            },
        }


class ThroughputMeter:
    """Count a build's chunks, and keep the count in its work folder so that it goes on after an interrupt."""

    def __init__(self, work: Path, engine: str, workers: int) -> None:
        self._path = work / THROUGHPUT_NAME
        self.totals = Throughput(engine=engine, workers=workers)
        try:
            before = json.loads(self._path.read_bytes())
            for name in ("chunks", "rows", "wall_s"):
                setattr(self.totals, name, before[name])
            self.totals.stage_s |= before["stage_s"]
        except (OSError, ValueError, KeyError):  # the first run, or a power cut while it was written
            pass
        self._since = time.perf_counter()

    def chunk_done(self, number: int, rows: int, seconds: dict[str, float], write_s: float) -> None:
        """Count a chunk unless an earlier run has; seconds: its stages, write_s: copying it into shards."""
        now = time.perf_counter()
        self.totals.wall_s, self._since = self.totals.wall_s + now - self._since, now
        if number < self.totals.chunks:
            return
        self.totals.chunks = number + 1
        self.totals.rows += rows
        for stage, spent_s in (*seconds.items(), ("write", write_s)):
            self.totals.stage_s[stage] = self.totals.stage_s.get(stage, 0.0) + spent_s
        temporary = self._path.with_name(f"{THROUGHPUT_NAME}.tmp")
        temporary.write_text(json.dumps(vars(self.totals)), encoding="utf-8")
        temporary.replace(self._path)


def write_throughput(out: Path, totals: Throughput) -> None:
    """Write the finished build's throughput into its folder."""
    (out / THROUGHPUT_NAME).write_text(json.dumps(totals.to_json(), indent=1) + "\n", encoding="utf-8")


def read_throughput(folder: Path) -> dict[str, Any] | None:
    """Return what `write_throughput` wrote, None where that is not there."""
    try:
        content = json.loads(bytes(read_file(folder / THROUGHPUT_NAME)))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
