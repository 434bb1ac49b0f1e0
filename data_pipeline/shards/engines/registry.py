"""Name on the command line -> engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from triweave.data_pipeline.shards.engines.base import Engine
from triweave.data_pipeline.shards.engines.local import LocalEngine
from triweave.data_pipeline.shards.engines.ray_cluster import RayEngine

EngineName = Literal["local", "ray"]

ENGINES: dict[EngineName, Callable[..., Engine]] = {"local": LocalEngine, "ray": RayEngine}
