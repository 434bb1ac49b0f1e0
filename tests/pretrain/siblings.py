"""Load modules of the tests by their path, once in a process, as rank processes and the fixtures do."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def load_path(path: str | Path, key: str | None = None) -> ModuleType:
    """Return the module of a file; `key`, by default made of its name, is what tells it from others in sys.modules."""
    key = key or f"triweave_test_{Path(path).stem}"
    if key not in sys.modules:
        specification = importlib.util.spec_from_file_location(key, path)
        assert specification is not None
        assert specification.loader is not None
        module = importlib.util.module_from_spec(specification)
        sys.modules[key] = module  # dataclasses look their module up here
        try:
            specification.loader.exec_module(module)
        except BaseException:
            del sys.modules[key]
            raise
    return sys.modules[key]


def load_sibling(name: str) -> ModuleType:
    """Return the module of this folder with that name."""
    return load_path(Path(__file__).with_name(f"{name}.py"))
