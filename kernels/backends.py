"""Which implementation of an op runs: a table, one override, and a choice that is logged once with its reason.

Names: `auto` chooses; `reference` is the plain torch of reference.py; `sdpa` is torch's own fused attention, applied to
the live segments of the mask; `triton`, `flex` and `flash` are known names that cannot serve in this version. A name
asked for either serves or raises KernelUnavailableError, it never falls back.

The one override is the environment variable TRIWEAVE_KERNELS, which wins over the `impl` argument of every op:

    TRIWEAVE_KERNELS=reference                  every op
    TRIWEAVE_KERNELS=attention=reference        one op
    TRIWEAVE_KERNELS=attention=sdpa,swiglu=auto  several

It is read when an op is called in eager mode and when it is traced under torch.compile.
"""

from __future__ import annotations

import difflib
import functools
import logging
import os

import torch

from triweave.kernels.errors import KernelUnavailableError

OVERRIDE_VARIABLE = "TRIWEAVE_KERNELS"

IMPLEMENTATIONS: dict[str, tuple[str, ...]] = {
    "attention": ("sdpa", "reference"),
    "qk_norm_rope": ("reference",),
    "rms_norm": ("reference",),
    "swiglu": ("reference",),
    "linear_cross_entropy": ("reference",),
}
"""Op -> the implementations that can serve, the one `auto` prefers first."""

ONLY_ON: dict[str, str] = {"sdpa": "cpu"}
"""Implementation -> the only device type it serves on."""

UNAVAILABLE: dict[str, str] = {
    "sdpa": "it is torch's fused CPU kernel, for attention only",
    "triton": "this version ships no Triton kernels",
    "flex": "the FlexAttention backend is not part of this version",
    "flash": "the flash-attn backend is not part of this version",
}
"""Known implementation -> why it cannot serve an op that does not list it."""

REASONS: dict[str, str] = {
    "sdpa": "torch's fused attention on the live segments is the fastest that serves on {device}",
    "reference": "plain torch is the only implementation that serves on {device}",
}

logger = logging.getLogger(__name__)


@torch.compiler.assume_constant_result
def choose(op: str, impl: str, device_type: str) -> str:
    """Return the implementation that serves `op` on `device_type`: `impl` itself, or what `auto` chose.

    Raises KernelUnavailableError when the name asked for, by argument or by TRIWEAVE_KERNELS, cannot serve.
    """
    return _choose(op, impl, device_type, os.environ.get(OVERRIDE_VARIABLE, ""))


@functools.cache
def _choose(op: str, impl: str, device_type: str, override: str) -> str:
    asked, origin = _asked(op, impl, override)
    serving = [name for name in IMPLEMENTATIONS[op] if ONLY_ON.get(name, device_type) == device_type]
    if asked == "auto":
        chosen = serving[0]
        logger.info("%s: auto chose %s: %s", op, chosen, REASONS[chosen].format(device=device_type))
        return chosen
    if asked in serving:
        return asked
    raise KernelUnavailableError(
        f"{op}: {origin} asks for {asked!r}, which cannot serve on {device_type}: {_why_not(asked)}; "
        f"use auto or {' or '.join(serving)}"
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
