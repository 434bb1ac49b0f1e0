"""Which implementation of an op runs: a table, one override, and a choice that is logged once with its reason.

    auto       chooses, and says why
    reference  plain torch (reference.py and its kin), on any device
    sdpa       torch's own fused attention on the live segments of the mask, on a CPU
    triton     the kernel of <op>_triton.py, on a CUDA device or, with TRITON_INTERPRET=1 in the environment, on the CPU
               in Triton's interpreter (slow, to try and test)
    flex       torch's FlexAttention with a block mask made from the intervals (flex_attention.py)
    flash      flash-attn 2 or 4 where installed, for packed causal documents only (flash_attention.py)

A name asked for either serves or raises KernelUnavailableError, it never falls back. On a CUDA device a Triton kernel
serves, whoever asks for it, only after its numeric self-check there (admission.py); where that refuses it, `auto` goes
on with the next of AUTO and says so. `auto` never takes flash: whether its mask suffices is written in the intervals,
and reading them would wait for the device at every call.

The one override is the environment variable TRIWEAVE_KERNELS, which wins over the `impl` argument of every op:

    TRIWEAVE_KERNELS=reference                  every op
    TRIWEAVE_KERNELS=attention=reference        one op
    TRIWEAVE_KERNELS=attention=sdpa,swiglu=auto  several

It is read when an op is called in eager mode and when it is traced under torch.compile.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.util
import logging
import os
from types import ModuleType

import torch

from triweave.kernels import flex_attention
from triweave.kernels.admission import admission
from triweave.kernels.errors import KernelUnavailableError

OVERRIDE_VARIABLE = "TRIWEAVE_KERNELS"
INTERPRET_VARIABLE = "TRITON_INTERPRET"
"""Triton's own switch. It counts when the kernels are first asked for; set it before Python starts."""

IMPLEMENTATIONS: dict[str, tuple[str, ...]] = {
    "attention": ("sdpa", "reference", "triton", "flex", "flash"),
    "cross_attention": ("sdpa", "reference", "triton"),
    "mmca": ("sdpa", "reference", "triton"),
    "qk_norm_rope": ("reference", "triton"),
    "rms_norm": ("reference", "triton"),
    "swiglu": ("reference", "triton"),
    "linear_cross_entropy": ("reference", "triton"),
    "low_rank_fusion": ("reference", "triton"),
}
"""Op -> the implementations it has."""

AUTO: dict[str, tuple[str, ...]] = {"cpu": ("sdpa", "reference"), "cuda": ("triton", "flex", "reference")}
"""Device type -> what `auto` tries there, in this order; on any other device it takes the reference."""

NO_FASTER = {"low_rank_fusion"}
"""Ops whose Triton kernel `auto` leaves alone: results/h100.json has 1.34 times torch's time forward, 0.83 backward."""

CHECKED_ON = {"cuda"}
"""Device types where a Triton kernel serves only after its self-check."""

ONLY_ON: dict[str, tuple[str, ...]] = {"sdpa": ("cpu",), "flex": ("cuda", "cpu"), "flash": ("cuda",)}
"""Implementation -> the only device types it serves on."""

UNAVAILABLE: dict[str, str] = {
    "sdpa": "it is torch's fused CPU kernel, for attention only",
    "triton": "this version has no Triton kernel for it",
    "flex": "it is torch's FlexAttention, for attention only, on a CUDA device or a CPU",
    "flash": "it is the flash-attn package, for attention only, on a CUDA device",
}
"""Known implementation -> why it cannot serve an op or a device that is not in its tables."""

REASONS: dict[str, str] = {
    "sdpa": "torch's fused attention on the live segments is the fastest that serves on {device}",
    "reference": "plain torch is the only implementation left that serves on {device}",
    "triton": "its kernels passed their self-check",
    "flex": "torch's FlexAttention takes any such mask",
}
"""Implementation -> why auto chose it."""

logger = logging.getLogger(__name__)
_choices: dict[str, None] = {}


def choose(op: str, impl: str, device_type: str, dtype: torch.dtype, width: int = 0) -> str:
    """Return the implementation that serves `op` on `device_type`: `impl` itself, or what `auto` chose.

    dtype, width: what the op's Triton kernel is judged for: the inputs' dtype, and the head width K or row length D
    that its variant depends on (0 where none does).

    Raises KernelUnavailableError when the name asked for, by argument or by TRIWEAVE_KERNELS, cannot serve.
    """
    return _decided(op, impl, device_type, dtype, admission.shape_class(op, width))


def choices() -> tuple[str, ...]:
    """Return what `auto` chose in this process so far and why, a line each, in the order of the first calls."""
    return tuple(_choices)


def interpreted() -> bool:
    """Return whether Triton kernels are interpreted, on any device: TRITON_INTERPRET is set to a true value."""
    return os.environ.get(INTERPRET_VARIABLE, "").lower() in ("1", "true", "on")


def triton_kernels(op: str) -> ModuleType:
    """Return kernels/<op>_triton.py, imported at the first call: Triton is loaded when a kernel of it is to run."""
    return importlib.import_module(f"triweave.kernels.{op}_triton")


@torch.compiler.assume_constant_result
def _decided(op: str, impl: str, device_type: str, dtype: torch.dtype, shape_class: int) -> str:
    if admission.checking():  # which names what it compares, and judges the kernel that would be judged
        return _choose(op, impl, device_type, "", interpreted(), None)
    subject = (dtype, shape_class) if device_type in CHECKED_ON else None
    return _choose(op, impl, device_type, os.environ.get(OVERRIDE_VARIABLE, ""), interpreted(), subject)


@functools.cache
def _choose(
    op: str,
    impl: str,
    device_type: str,
    override: str,
    interpret: bool,
    subject: tuple[torch.dtype, int] | None,
) -> str:
    """subject: dtype and shape class a Triton kernel must be admitted for, None where it serves unchecked."""
    asked, origin = _asked(op, impl, override)
    if asked == "auto":
        return _automatic(op, device_type, interpret, subject)
    against: str | None = _why_not(asked)
    if asked in IMPLEMENTATIONS[op]:
        against = _why_not_here(asked, device_type, interpret) or _why_not_for(op, asked, device_type, subject)
    if against is None:
        return asked
    serving = [
        name for name in IMPLEMENTATIONS[op] if name != asked and _why_not_here(name, device_type, interpret) is None
    ]
    raise KernelUnavailableError(
        f"{op}: {origin} asks for {asked!r}, which cannot serve on {device_type}: {against}; "
        f"use {' or '.join(['auto', *serving])}"
    )


def _automatic(op: str, device_type: str, interpret: bool, subject: tuple[torch.dtype, int] | None) -> str:
    """Return the first of AUTO that serves, and log it together with what was passed over and why."""
    passed_over = []
    refused = False
    chosen = "reference"
    for name in AUTO.get(device_type, ()):
        if name not in IMPLEMENTATIONS[op] or _why_not_here(name, device_type, interpret):
            continue
        if name == "triton" and op in NO_FASTER:
            passed_over.append("triton is out: it was no faster where it was measured")
            continue
        refusal = _why_not_for(op, name, device_type, subject)
        if refusal is None:
            chosen = name
            break
        refused = True
        passed_over.append(f"{name} is out: {refusal}")
    judged = "" if subject is None else f", {admission.described(op, *subject)}"
    line = f"{op}: auto chose {chosen}: {REASONS[chosen].format(device=device_type)}{judged}"
    if passed_over:
        line += f" ({'; '.join(passed_over)})"
    if line not in _choices:
        _choices[line] = None
        logger.log(logging.WARNING if refused else logging.INFO, "%s", line)
    return chosen


def _why_not_for(op: str, name: str, device_type: str, subject: tuple[torch.dtype, int] | None) -> str | None:
    """Return why an implementation that could serve on the device does not serve this dtype and width there."""
    if subject is None:
        return None
    if name == "triton":
        return admission.refusal(op, *subject, device_type=device_type)
    return flex_attention.why_not(*subject) if name == "flex" else None


def _why_not_here(name: str, device_type: str, interpret: bool) -> str | None:
    """Return why an implementation that an op lists cannot serve on the device, None if it can."""
    if device_type not in ONLY_ON.get(name, (device_type,)):
        return UNAVAILABLE[name]
    if name != "triton" and (name, device_type) != ("flex", "cuda"):
        return None
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton, versions 3.6 to 3.9)"
    if device_type == "cuda" or (device_type == "cpu" and interpret):
        return None
    return (
        "Triton kernels run on a CUDA device, or on the CPU in Triton's interpreter if "
        f"{INTERPRET_VARIABLE}=1 is in the environment before Python starts"
    )


def _asked(op: str, impl: str, override: str) -> tuple[str, str]:
    """Return the implementation asked for and who asked for it."""
    for entry in filter(None, (part.strip() for part in override.split(","))):
        name, separator, value = entry.rpartition("=")
        if separator and name not in IMPLEMENTATIONS:
            known = ", ".join(IMPLEMENTATIONS)
            raise KernelUnavailableError(f"{OVERRIDE_VARIABLE}: there is no op {name!r}; the ops are {known}")
        if name in ("", op):
            return value, f"{OVERRIDE_VARIABLE}={override}"
    return impl, f"impl={impl!r}"


def _why_not(asked: str) -> str:
    if asked in UNAVAILABLE:
        return UNAVAILABLE[asked]
    known = sorted({"auto", "reference", *UNAVAILABLE})
    near = difflib.get_close_matches(asked, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"there is no such implementation{hint} (known: {', '.join(known)})"
