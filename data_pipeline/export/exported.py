"""What an export says about itself."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written. left_out: what the layout has no place for -> how many."""

    documents: int
    media: int
    total_bytes: int
    left_out: dict[str, int]


@dataclass(kw_only=True)
class Exporting:
    """Counts while an export is under way."""

    documents: int = 0
    media: int = 0
    _left_out: Counter[str] = field(default_factory=Counter)

    def leave_out(self, what: str) -> None:
        """Count one thing that is not written."""
        self._left_out[what] += 1

    def done(self, out: Path) -> Exported:
        """Return the counts, with the bytes below `out`."""
        total = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        return Exported(documents=self.documents, media=self.media, total_bytes=total, left_out=dict(self._left_out))
