"""How this machine reads object stores: environment variables, since disks and links are no property of a run.

TRIWEAVE_CACHE_DIR       folder of the local cache; default $XDG_CACHE_HOME/triweave or ~/.cache/triweave
TRIWEAVE_CACHE_GB        most gigabytes it holds, default 20; 0: no cache
TRIWEAVE_S3_PAGE_KB      what is read and cached at once, default 256; smaller where each machine of many reads few
                         samples of a shard
TRIWEAVE_S3_REQUEST_MB   most that one request asks for, default 8; neighbouring pages are asked for together
TRIWEAVE_S3_CONNECTIONS  requests of a process in flight, default 16
TRIWEAVE_S3_READ_AHEAD   micro-batches whose bytes are asked for before they are needed, default 4
TRIWEAVE_S3_TIMEOUT_S    silence after which a request is given up and sent again, default 20
TRIWEAVE_S3_DEADLINE_S   time after which a read that keeps failing is an error, default 120
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from triweave.data_pipeline.errors import StorageError

_KB, _MB, _GB = 1 << 10, 1 << 20, 1 << 30


@dataclass(frozen=True, kw_only=True)
class StorageSettings:
    """What the variables say; see the module."""

    cache_dir: Path
    cache_bytes: int = 20 * _GB
    page_bytes: int = 256 * _KB
    request_bytes: int = 8 * _MB
    connections: int = 16
    read_ahead: int = 4
    timeout_s: float = 20.0
    deadline_s: float = 120.0

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> StorageSettings:
        """Read the variables. Raises StorageError for one that is no number or out of range."""
        home = environment.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        page_bytes = int(_number(environment, "TRIWEAVE_S3_PAGE_KB", 256, 4, 1 << 20) * _KB)
        return cls(
            cache_dir=Path(environment.get("TRIWEAVE_CACHE_DIR") or Path(home) / "triweave"),
            cache_bytes=int(_number(environment, "TRIWEAVE_CACHE_GB", 20, 0, 1e9) * _GB),
            page_bytes=page_bytes,
            request_bytes=max(page_bytes, int(_number(environment, "TRIWEAVE_S3_REQUEST_MB", 8, 0, 1024) * _MB)),
            connections=int(_number(environment, "TRIWEAVE_S3_CONNECTIONS", 16, 1, 256)),
            read_ahead=int(_number(environment, "TRIWEAVE_S3_READ_AHEAD", 4, 0, 1024)),
            timeout_s=_number(environment, "TRIWEAVE_S3_TIMEOUT_S", 20, 0.1, 3600),
            deadline_s=_number(environment, "TRIWEAVE_S3_DEADLINE_S", 120, 0.1, 86_400),
        )


def _number(environment: Mapping[str, str], name: str, default: float, least: float, most: float) -> float:
    text = environment.get(name) or str(default)
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not least <= value <= most:
        raise StorageError(f"{name}={text}: must be a number from {least:g} to {most:g}")
    return value
