"""The table of sources: what `triweave build --source` takes."""

from __future__ import annotations

from collections.abc import Callable

from triweave.data_pipeline.sources.asterisk import AsteriskSource
from triweave.data_pipeline.sources.base import Source
from triweave.data_pipeline.sources.emoji import EmojiSource
from triweave.data_pipeline.sources.folder import FolderSource
from triweave.data_pipeline.sources.manifest import ManifestSource
from triweave.data_pipeline.sources.tuxpaint import TuxPaintSource
from triweave.data_pipeline.sources.webdataset import WebDatasetSource

SOURCES: dict[str, Callable[..., Source]] = {
    "tuxpaint": TuxPaintSource,
    "asterisk": AsteriskSource,
    "emoji": EmojiSource,
    "folder": FolderSource,
    "manifest": ManifestSource,
    "webdataset": WebDatasetSource,
}
"""Name -> class; every class takes `root` and its own options as keywords."""
