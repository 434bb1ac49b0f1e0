"""Numbers of a run's `train:` section, for commands that read its `data:` section alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from triweave.data_pipeline.config import read_yaml
from triweave.data_pipeline.errors import ConfigError


def train_number(config: str | Path, overrides: Sequence[str], key: str) -> int | None:
    """Return an override of `train.<key>`, or the YAML's; None without either.

    Raises ConfigError unless it is a whole number of at least 1.
    """
    train = read_yaml(config).get("train")
    value = train.get(key) if isinstance(train, dict) else None
    for override in overrides:
        if override.startswith(f"train.{key}="):
            value = override.partition("=")[2]
    return None if value is None else whole_number(key, value)


def whole_number(name: str, value: Any) -> int:
    """Return `value` as a whole number of at least 1. Raises ConfigError."""
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = 0
    if number < 1:
        raise ConfigError(f"{name}={value!r}: must be a whole number of at least 1")
    return number
