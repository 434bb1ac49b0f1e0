"""The table of layouts: what `triweave export --to` takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from triweave.data_pipeline.export.exported import Exported
from triweave.data_pipeline.export.llava import export_llava
from triweave.data_pipeline.export.obelics import export_obelics
from triweave.data_pipeline.shards.schema import Document

LAYOUTS: dict[str, Callable[[Iterator[tuple[str, Document]], Path], Exported]] = {
    "obelics": export_obelics,
    "llava": export_llava,
}
"""Name -> function of (documents with their keys, new folder)."""
