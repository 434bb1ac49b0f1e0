"""Python packages as material: from where they are installed, from a folder, or from `pip download`.

Nothing is installed. What pip downloads and what is unpacked lies below a folder of ours, which is removed.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from triweave.data_pipeline.errors import FetchError

MAX_UNPACKED_BYTES = 512 << 20
"""What is unpacked from one wheel at most."""
_PIP_SECONDS = 1800


def installed_folder(module: str) -> Path | None:
    """Return the folder of an installed package, without importing it; None where it is not installed."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def pip_download(requirements: Sequence[str], folder: Path, help_line: str) -> None:
    """Download wheels into `folder`, without what they depend on; pip checks them against the index's hashes.

    help_line: what to do without a network; the end of every error.

    Raises FetchError.
    """
    if importlib.util.find_spec("pip") is None:
        raise FetchError(f"not installed, and this Python has no pip: {help_line}")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--no-input", "--quiet", "--dest", str(folder), *requirements]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PIP_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise FetchError(f"pip download took over {_PIP_SECONDS} s: {help_line}") from None
    if done.returncode != 0:
        reasons = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")]
        reason = reasons[-1].removeprefix("ERROR: ") if reasons else "no reason given"
        raise FetchError(f"pip download failed ({reason}): {help_line}")


def module_folder(folder: Path, module: str, aside: Path, help_line: str) -> Path:
    """Return the folder of `module` below `folder`; a wheel of it is unpacked below `aside`.

    Raises FetchError when there is neither, or the wheel is damaged.
    """
    if (folder / module).is_dir():
        return folder / module
    wheels = sorted(folder.glob(f"{module}-*.whl"))
    if not wheels:
        raise FetchError(f"--from {folder}: holds neither {module}/ nor {module}-*.whl; {help_line}")
    try:
        _unpack_wheel(wheels[-1], module, aside)
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, ValueError) as error:
        raise FetchError(f"{wheels[-1]}: damaged or no wheel ({error}): download it again") from None
    return aside / module


def _unpack_wheel(wheel: Path, module: str, target: Path) -> None:
    """Unpack what lies below `module/`; nothing can land outside `target`, which holds no links and gets none."""
    with zipfile.ZipFile(wheel) as archive:
        wanted = [member for member in archive.infolist() if member.filename.startswith(f"{module}/")]
        if not wanted:
            raise ValueError(f"holds no {module}/")
        total_bytes = sum(member.file_size for member in wanted)
        if total_bytes > MAX_UNPACKED_BYTES:
            raise ValueError(f"{total_bytes} bytes unpacked, more than {MAX_UNPACKED_BYTES}")
        for member in wanted:
            name = PurePosixPath(member.filename)
            if ".." in name.parts or "\\" in member.filename:
                raise ValueError(f"member {member.filename!r} points outside")
            if not member.is_dir():
                path = target / name
                path.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as reader, open(path, "wb") as file:
                    shutil.copyfileobj(reader, file)
