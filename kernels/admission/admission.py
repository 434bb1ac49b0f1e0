"""Whether a Triton kernel may serve on a chip: a numeric self-check at its first use there, remembered on disk.

A verdict holds for one op, dtype and shape class on one chip (name and capability) with one version of Triton, of torch
and of the ops' own files; anything else is checked anew. The check (self_check.py) runs the op forward and
backward on the device and compares it with the reference in fp64. Its inputs are small, so on a GPU compiling the
kernels should be most of what it takes (1 to 4 s a variant ahead of time; nobody has measured it on one). A refusal is
remembered like an admission, unless the device had no memory left for the check or had failed before it.

Verdicts are JSON files, one each, below `triweave/kernels` in the user's cache folder: TRIWEAVE_CACHE, else
XDG_CACHE_HOME, else ~/.cache. They are written whole or not at all; ranks that start together each check for
themselves. A kernel that takes the process down with it leaves no verdict.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

CACHE_VARIABLE = "TRIWEAVE_CACHE"

HEAD_LIMITS = (16, 32, 48, 64, 72, 80, 96, 128, 144, 160, 192, 256)
ROW_LIMITS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
LIMITS: dict[str, tuple[int, ...]] = {
    "attention": HEAD_LIMITS,
    "cross_attention": HEAD_LIMITS,
    "mmca": HEAD_LIMITS,
    "qk_norm_rope": HEAD_LIMITS,
    "rms_norm": ROW_LIMITS,
}
"""Op -> the widths that its kernels are pinned or cut for. An op that is not here has one variant for all widths."""
ANY_WIDTH = 0
"""Shape class of an op that is not in LIMITS."""
TOO_WIDE = -1
"""Shape class of a width beyond the last limit, which no kernel is pinned for."""
_BELOW = 2
"""How far below its limit the width lies that stands for all between two limits; even, for heads of pairs."""

logger = logging.getLogger(__name__)
_checking: ContextVar[bool] = ContextVar("triweave_kernel_check", default=False)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What a verdict is about."""

    op: str
    dtype: str
    shape_class: int
    chip: str
    capability: str
    triton: str
    torch: str
    source: str
    """Hash of the files that the kernels, their launches and their check are made of."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """How far one tensor of one case is from the reference in fp64.

    error: largest absolute difference. rms_ratio: root mean square of the difference over that of the reference. NaN or
    infinity where a number is not finite that should be, or the other way round.
    """

    case: str
    tensor: str
    error: float
    allowed_error: float
    rms_ratio: float
    allowed_rms_ratio: float

    @property
    def passed(self) -> bool:
        """Both are within what is allowed; NaN is not."""
        return self.error <= self.allowed_error and self.rms_ratio <= self.allowed_rms_ratio

    @property
    def share_of_allowed(self) -> float:
        """The greater of the two as a share of what is allowed; infinity where that is not a number."""
        pairs = ((self.error, self.allowed_error), (self.rms_ratio, self.allowed_rms_ratio))
        shares = [found / allowed if allowed else found and math.inf for found, allowed in pairs]
        return math.inf if any(map(math.isnan, shares)) else max(shares)

    def __str__(self) -> str:
        return (
            f"{self.tensor} of {self.case}: error {self.error:.2g} against fp64, allowed {self.allowed_error:.2g}; "
            f"RMS ratio {self.rms_ratio:.2g}, allowed {self.allowed_rms_ratio:.2g}"
        )


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Outcome of one self-check.

    failure: why the kernel is refused, None if it is admitted. lasting: it says something about the kernel, and not
    only about a device that had no memory left or had failed before.
    """

    subject: Subject
    failure: str | None
    figures: tuple[Figure, ...]
    seconds: float
    lasting: bool = True

    @property
    def admitted(self) -> bool:
        """The kernel may serve."""
        return self.failure is None


def shape_class(op: str, width: int) -> int:
    """Return the width whose check stands for `width`: a limit for itself, and one number for all between two limits.

    ANY_WIDTH for an op without limits, TOO_WIDE beyond the last. Comparisons alone, so that a width that is symbolic
    under torch.compile gives a constant.
    """
    for limit in LIMITS.get(op, ()):
        if width <= limit:
            return limit if width == limit else limit - _BELOW
    return TOO_WIDE if op in LIMITS else ANY_WIDTH


def shape_classes(op: str) -> tuple[int, ...]:
    """Return all shape classes of an op that has kernels, in ascending order."""
    return tuple(width for limit in LIMITS[op] for width in (limit - _BELOW, limit)) if op in LIMITS else (ANY_WIDTH,)


def described(op: str, dtype: torch.dtype, shape_class: int) -> str:
    """Return dtype and shape class in words."""
    if shape_class == ANY_WIDTH:
        return _name(dtype)
    if shape_class == TOO_WIDE:
        return f"{_name(dtype)}, a width above {LIMITS[op][-1]}"
    if shape_class in LIMITS[op]:
        return f"{_name(dtype)}, width {shape_class}"
    return f"{_name(dtype)}, a width below {shape_class + _BELOW}"


def refusal(op: str, dtype: torch.dtype, shape_class: int, *, device_type: str) -> str | None:
    """Return why the op's Triton kernel may not serve on the current device, None if it may; checks it if need be."""
    if shape_class == TOO_WIDE:
        return f"no kernel is pinned for rows or heads wider than {LIMITS[op][-1]}"
    if device_type == "cuda" and torch.cuda.is_current_stream_capturing():
        return "it is not checked yet, and this is a CUDA graph capture (run triweave kernels selftest before)"
    verdict = verdict_of(current_subject(op, dtype, shape_class, device_type=device_type), device_type)
    if verdict.admitted:
        return None
    return f"its self-check on {verdict.subject.chip} failed: {verdict.failure}"


def checking() -> bool:
    """Return whether a self-check is under way, in which the kernel serves without one."""
    return _checking.get()


def verdict_of(subject: Subject, device_type: str, *, fresh: bool = False) -> Verdict:
    """Return the verdict that is remembered, or the one of a check made now. `fresh`: check in any case."""
    if subject not in _verdicts or fresh:
        stored = None if fresh else load(subject)
        if stored is None:
            stored = _check(subject, device_type)
            if stored.lasting:
                store(stored)
        _verdicts[subject] = stored
    return _verdicts[subject]


_verdicts: dict[Subject, Verdict] = {}


def _check(subject: Subject, device_type: str) -> Verdict:
    from triweave.kernels.admission.self_check import figures_of

    logger.info("%s: checking the Triton kernel on %s", subject.op, subject.chip)
    start = time.perf_counter()
    token = _checking.set(True)
    figures: tuple[Figure, ...] = ()
    lasting = True
    try:
        figures = figures_of(subject.op, getattr(torch, subject.dtype), subject.shape_class, torch.device(device_type))
        failure = _failure(figures)
    except Exception as error:  # whatever a compiler, a driver or a launcher raises: the kernel does not serve here
        failure = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        lasting = not isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError))
    finally:
        _checking.reset(token)
    seconds = time.perf_counter() - start
    return Verdict(subject=subject, failure=failure, figures=figures, seconds=seconds, lasting=lasting)


def _failure(figures: tuple[Figure, ...]) -> str | None:
    """Return the first figure that is off and how many are, None if all are within what is allowed."""
    off = [figure for figure in figures if not figure.passed]
    return f"{off[0]} ({len(off)} of {len(figures)} results are off)" if off else None


# What is judged


def current_subject(op: str, dtype: torch.dtype, shape_class: int, *, device_type: str) -> Subject:
    """Return the subject of a check of `op` here and now."""
    chip, capability = _chip(device_type)
    return Subject(
        op=op,
        dtype=_name(dtype),
        shape_class=shape_class,
        chip=chip,
        capability=capability,
        triton=importlib.metadata.version("triton"),
        torch=torch.__version__,
        source=_source_hash(),
    )


def _chip(device_type: str) -> tuple[str, str]:
    """Return name and capability of the current device."""
    if device_type != "cuda":
        return device_type, "interpreter"
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return properties.name, f"{properties.major}.{properties.minor}"


@functools.cache
def _source_hash() -> str:
    """Return a hash of all that a kernel, its launch and its check are made of: Python files and pinned configs."""
    folder = Path(__file__).parents[1]
    digest = hashlib.sha256()
    patterns = ("*.py", "admission/*.py", "tuning/pinned.py", "configs/*.json")
    for path in sorted(path for pattern in patterns for path in folder.glob(pattern)):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# The files


def cache_folder() -> Path:
    """Return where verdicts lie; TRIWEAVE_CACHE, XDG_CACHE_HOME and the home folder are asked in this order."""
    chosen = os.environ.get(CACHE_VARIABLE) or os.environ.get("XDG_CACHE_HOME")
    return (Path(chosen) if chosen else Path.home() / ".cache") / "triweave" / "kernels"


def verdict_file(subject: Subject) -> Path:
    """Return the file of a verdict: readable names, and a hash of the whole subject."""
    key = hashlib.sha256(json.dumps(asdict(subject), sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder() / f"{subject.op}-{subject.dtype}-{subject.shape_class}-{key}.json"


def load(subject: Subject) -> Verdict | None:
    """Return the stored verdict, None if there is none that can be read."""
    try:
        stored = json.loads(verdict_file(subject).read_text(encoding="utf-8"))
        if stored["subject"] != asdict(subject):
            return None
        figures = tuple(Figure(**figure) for figure in stored["figures"])
        return Verdict(subject=subject, failure=stored["failure"], figures=figures, seconds=stored["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def store(verdict: Verdict) -> None:
    """Write a verdict whole or not at all; a folder that cannot be written costs a check in every process."""
    path = verdict_file(verdict.subject)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _replaced(path) as file:
            file.write(json.dumps(asdict(verdict), indent=1).encode())
    except OSError as error:
        logger.warning(
            "kernels: cannot remember a self-check: %s: %s; set %s to a folder that can be written",
            path.parent, error.strerror, CACHE_VARIABLE,
        )  # fmt: skip


@contextlib.contextmanager
def _replaced(path: Path) -> Iterator[tempfile._TemporaryFileWrapper[bytes]]:
    """Open a temporary file beside `path` that takes its place at the end, and goes away on an error."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, suffix=".writing", delete=False) as file:
        try:
            yield file
            file.close()
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
