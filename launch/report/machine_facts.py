"""The machine and the versions that a page names."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

PACKAGES = ("triweave", "torch", "deepspeed", "numpy")
_CPU_INFO = Path("/proc/cpuinfo")
_GIB = 1 << 30


def machine_facts() -> dict[str, Any]:
    """Return what the processor is, how many cores this process may use, memory in GiB and the system."""
    return {
        "system": platform.system(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / _GIB:.1f} GiB",
    }


def version_facts() -> dict[str, str]:
    """Return package -> installed version, Python first; importing none of them."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _processor() -> str:
    """Return the model name that Linux on x86 gives; elsewhere what Python knows."""
    try:
        for line in _CPU_INFO.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
