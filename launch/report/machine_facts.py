"""The machine and the versions that a page names."""

from __future__ import annotations

import os
import platform
from typing import Any

from triweave.data_pipeline.machine import installed_versions, processor_name

PACKAGES = ("triweave", "torch", "deepspeed", "numpy")
_GIB = 1 << 30


def machine_facts() -> dict[str, Any]:
    """Return what the processor is, how many cores this process may use, memory in GiB and the system."""
    return {
        "system": platform.system(),
        "processor": processor_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / _GIB:.1f} GiB",
    }


def version_facts() -> dict[str, str]:
    """Return package -> installed version, Python first."""
    return installed_versions(PACKAGES)
