"""A folder that a command writes whole or not at all: made beside its place, then renamed into it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from triweave.data_pipeline.errors import DataError
from triweave.data_pipeline.storage.location import require_local


@contextmanager
def new_folder(out: Path, error: type[DataError]) -> Iterator[tuple[Path, Path]]:
    """Yield (folder that takes the place of `out` when all went well, folder for anything else), both new and absolute.

    Both are gone when it did not go well, and the second always. Raises `error` where `out` is a URL, holds
    something, is a link or the current folder, or cannot be written.
    """
    require_local("--out", out, error, "copy the folder there when it is written")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise error(f"--out {out}: holds something else; choose a new or an empty folder")
    if out.is_symlink() or out.resolve() == Path.cwd():  # no rename takes their place, as would show after all the work
        raise error(f"--out {out}: is a link or the current folder; name the folder itself, or a new one in it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.absolute().parent))  # apt wants it absolute
    except OSError as reason:
        raise error(f"--out {out}: cannot be written ({reason.strerror})") from None
    try:
        made, aside = work / "made", work / "aside"
        made.mkdir()
        aside.mkdir()
        yield made, aside
        made.replace(out)  # an empty folder of that name gives way
    except OSError as reason:
        raise error(f"--out {out}: {_in_words(reason)}; nothing is left behind") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _in_words(error: OSError) -> str:
    """Return what went wrong with which file, in one line; of the many failures of a copied tree the first."""
    if isinstance(error, shutil.Error):
        reasons = sorted(reason for _, _, reason in error.args[0])
        return reasons[0] + (f" and {len(reasons) - 1} more" if len(reasons) > 1 else "")
    return f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
