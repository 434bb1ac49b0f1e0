"""Load modules of this folder by their path, once in a process, as rank processes and the fixtures do."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def load_sibling(name: str) -> ModuleType:
    """Return the module of this folder with that name, under the key by which the fixtures know it."""
    key = f"triweave_test_{name}"
    if key not in sys.modules:
        specification = importlib.util.spec_from_file_location(key, Path(__file__).with_name(f"{name}.py"))
        assert specification is not None
        assert specification.loader is not None
        sys.modules[key] = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(sys.modules[key])
    return sys.modules[key]
