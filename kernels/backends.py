"""Which implementation of an op runs: a table, one override, and a choice that is logged once with its reason.

Names: `auto` chooses; `reference` is the plain torch of reference.py; `sdpa` is torch's own fused attention, applied to
the live segments of the mask; `triton` is the kernel of <op>_triton.py, on a CUDA device or, with TRITON_INTERPRET=1 in
the environment, on the CPU in Triton's interpreter (slow, to try and test); `flex` and `flash` are known names that
cannot serve in this version. A name asked for either serves or raises KernelUnavailableError, it never falls back.
`auto` never takes `triton`: the self-check that is to admit a kernel on a chip is not built yet.

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

from triweave.kernels.errors import KernelUnavailableError

OVERRIDE_VARIABLE = "TRIWEAVE_KERNELS"
INTERPRET_VARIABLE = "TRITON_INTERPRET"
"""Triton's own switch. It counts when the kernels are first asked for; set it before Python starts."""

IMPLEMENTATIONS: dict[str, tuple[str, ...]] = {
    "attention": ("sdpa", "reference", "triton"),
    "qk_norm_rope": ("reference", "triton"),
    "rms_norm": ("reference", "triton"),
    "swiglu": ("reference", "triton"),
    "linear_cross_entropy": ("reference",),
}
"""Op -> the implementations that can serve, the one `auto` prefers first."""

ONLY_ON: dict[str, str] = {"sdpa": "cpu"}
"""Implementation -> the only device type it serves on."""

UNAVAILABLE: dict[str, str] = {
    "sdpa": "it is torch's fused CPU kernel, for attention only",
    "triton": "this version has no Triton kernel for it",
    "flex": "the FlexAttention backend is not part of this version",
    "flash": "the flash-attn backend is not part of this version",
}
"""Known implementation -> why it cannot serve an op that does not list it."""

REASONS: dict[str, str] = {
    "sdpa": "torch's fused attention on the live segments is the fastest that serves on {device}",
    "reference": "plain torch is the only implementation that serves on {device}",
}
"""Implementation -> why auto chose it."""

NOT_ADMITTED = (
    "the Triton kernel serves on {device} only when asked for by name, for the self-check that is to admit it is not "
    "built yet; plain torch is the only other implementation"
)
"""Why auto chose the reference where a Triton kernel could serve."""

logger = logging.getLogger(__name__)


@torch.compiler.assume_constant_result
def choose(op: str, impl: str, device_type: str) -> str:
    """Return the implementation that serves `op` on `device_type`: `impl` itself, or what `auto` chose.

    Raises KernelUnavailableError when the name asked for, by argument or by TRIWEAVE_KERNELS, cannot serve.
    """
    return _choose(op, impl, device_type, os.environ.get(OVERRIDE_VARIABLE, ""), interpreted())


def interpreted() -> bool:
    """Return whether Triton kernels are interpreted, on any device: TRITON_INTERPRET is set to a true value."""
    return os.environ.get(INTERPRET_VARIABLE, "").lower() in ("1", "true", "on")


def triton_kernels(op: str) -> ModuleType:
    """Return kernels/<op>_triton.py, imported at the first call: Triton is loaded when a kernel of it is to run."""
    return importlib.import_module(f"triweave.kernels.{op}_triton")


@functools.cache
def _choose(op: str, impl: str, device_type: str, override: str, interpret: bool) -> str:
    asked, origin = _asked(op, impl, override)
    serving = [name for name in IMPLEMENTATIONS[op] if _why_not_here(name, device_type, interpret) is None]
    if asked == "auto":
        chosen = next(name for name in serving if name != "triton")
        reason = NOT_ADMITTED if chosen == "reference" and "triton" in serving else REASONS[chosen]
        logger.info("%s: auto chose %s: %s", op, chosen, reason.format(device=device_type))
        return chosen
    if asked in serving:
        return asked
    listed = _why_not_here(asked, device_type, interpret) if asked in IMPLEMENTATIONS[op] else None
    raise KernelUnavailableError(
        f"{op}: {origin} asks for {asked!r}, which cannot serve on {device_type}: {listed or _why_not(asked)}; "
        f"use auto or {' or '.join(serving)}"
    )


def _why_not_here(name: str, device_type: str, interpret: bool) -> str | None:
    """Return why an implementation that an op lists cannot serve on the device, None if it can."""
    if name != "triton":
        return None if ONLY_ON.get(name, device_type) == device_type else UNAVAILABLE[name]
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
