"""A transformers folder on disk: config.json and safetensors. Nothing in it is ever run and no pickle is read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from triweave.pretrain.errors import OpenModelError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


class OpenFolder:
    """The config and the named tensors of a transformers folder."""

    def __init__(self, path: str | Path) -> None:
        """Read the config and the names of the tensors; raises OpenModelError naming what is missing or damaged."""
        self.path = Path(path)
        self.config = self._json(CONFIG)
        if "auto_map" in self.config:
            raise OpenModelError(
                f"{self.path}: config.json asks for code of its own (auto_map), which is never run; use a folder of a "
                "model that transformers has built in"
            )
        self._file_of = self._find_tensors()
        self._open: dict[str, Any] = {}

    @property
    def names(self) -> frozenset[str]:
        """Names of all tensors."""
        return frozenset(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it."""
        with self._reading(name) as file:
            return tuple(file.get_slice(name).get_shape())

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor as it is stored; raises OpenModelError where it cannot be read."""
        with self._reading(name) as file:
            tensor: torch.Tensor = file.get_tensor(name)
            return tensor

    @contextmanager
    def _reading(self, name: str) -> Iterator[Any]:
        file = self._file_of[name]
        try:
            if file not in self._open:
                self._open[file] = safe_open(self.path / file, framework="pt")
            yield self._open[file]
        except (SafetensorError, OSError) as error:
            raise OpenModelError(f"{self.path / file} cannot give {name}: {error}; copy the folder again") from error

    def _find_tensors(self) -> dict[str, str]:
        if (self.path / INDEX).is_file():
            table = self._json(INDEX).get("weight_map")
            if not isinstance(table, dict):
                raise OpenModelError(f"{self.path / INDEX} has no weight_map; copy the folder again")
            return {str(name): str(file) for name, file in table.items()}
        if not (self.path / WEIGHTS).is_file():
            pickled = sorted(path.name for path in self.path.glob("*.bin"))
            found = f"; {pickled[0]} is a pickle, which is never read" if pickled else ""
            raise OpenModelError(f"{self.path}: has no {WEIGHTS}{found}; save the model with safetensors")
        try:
            with safe_open(self.path / WEIGHTS, framework="pt") as file:
                return dict.fromkeys(file.keys(), WEIGHTS)
        except (SafetensorError, OSError) as error:
            raise OpenModelError(f"{self.path / WEIGHTS} is damaged: {error}; copy the folder again") from error

    def _json(self, name: str) -> dict[str, Any]:
        try:
            tree = json.loads((self.path / name).read_text(encoding="utf-8"))
        except OSError as error:
            raise OpenModelError(
                f"{self.path / name} cannot be read ({error.strerror}); name a local transformers folder"
            ) from None
        except ValueError as error:
            raise OpenModelError(f"{self.path / name} is not JSON: {error}") from None
        if not isinstance(tree, dict):
            raise OpenModelError(f"{self.path / name} holds no mapping")
        return tree
