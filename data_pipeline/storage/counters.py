"""What reading from object stores did in this process: for telemetry, benchmarks and tests."""

from __future__ import annotations

import threading
from dataclasses import dataclass, fields


@dataclass(frozen=True, kw_only=True)
class StorageCounts:
    """Sums since the process began; the difference of two is what lies between.

    requests: sent, repeated ones included. retries: requests sent again after a failure.
    read_bytes: received. waited_s: time that readers stood still for bytes.
    cache_hits, cache_misses: pages found in the local cache, and pages asked of the store.
    failed_checks: samples or files whose bytes had another hash than they must have, each time they were read.
    cache_failures: pages that the disk did not take.
    """

    requests: int = 0
    retries: int = 0
    read_bytes: int = 0
    waited_s: float = 0.0
    cache_hits: int = 0
    cache_misses: int = 0
    failed_checks: int = 0
    cache_failures: int = 0

    def __sub__(self, earlier: StorageCounts) -> StorageCounts:
        """Return what was counted since `earlier`."""
        return StorageCounts(**{f.name: getattr(self, f.name) - getattr(earlier, f.name) for f in fields(self)})


_lock = threading.Lock()
_counts: dict[str, float] = {}


def count(name: str, amount: float = 1) -> None:
    """Add to one of the sums, from any thread."""
    with _lock:
        _counts[name] = _counts.get(name, 0) + amount


def storage_counts() -> StorageCounts:
    """Return the sums of this process."""
    with _lock:
        return StorageCounts(**_counts)  # type: ignore[arg-type]  # ints stay ints: they are only added to
