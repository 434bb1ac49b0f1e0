"""What an export says about itself, and the folder it is written to: all or nothing."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from triweave.data_pipeline.errors import ExportError


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


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Yield a new folder beside `out` that takes its place when all went well, and is removed when not.

    Raises ExportError where `out` holds something or cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExportError(f"--out {out}: holds something already; choose a new or an empty folder")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.absolute().parent))
    except OSError as error:
        raise ExportError(f"--out {out}: cannot be written ({error.strerror})") from None
    try:
        work.chmod(0o755)
        yield work
        work.replace(out)  # an empty folder of that name gives way
    except OSError as error:
        raise ExportError(
            f"--out {out}: cannot be written ({error.strerror or error}); nothing is left behind"
        ) from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
