"""The table of sources: what `triweave build --source` takes."""

from __future__ import annotations

from collections.abc import Callable

from triweave.data_pipeline.sources.asterisk import AsteriskSource
from triweave.data_pipeline.sources.base import Source
from triweave.data_pipeline.sources.captions import CocoSource, Flickr30kSource
from triweave.data_pipeline.sources.chat import ChatSource
from triweave.data_pipeline.sources.emoji import EmojiSource
from triweave.data_pipeline.sources.energon import EnergonSource
from triweave.data_pipeline.sources.fillets import FilletsSource
from triweave.data_pipeline.sources.folder import FolderSource
from triweave.data_pipeline.sources.hf_datasets import HfDatasetsSource
from triweave.data_pipeline.sources.html import HtmlSource
from triweave.data_pipeline.sources.interleaved import InterleavedSource
from triweave.data_pipeline.sources.manifest import ManifestSource
from triweave.data_pipeline.sources.speech import CommonVoiceSource, LibriSpeechSource
from triweave.data_pipeline.sources.tuxpaint import TuxPaintSource
from triweave.data_pipeline.sources.video import VideoSource
from triweave.data_pipeline.sources.vqa import VqaSource
from triweave.data_pipeline.sources.webdataset import WebDatasetSource
from triweave.data_pipeline.sources.wids import WidsSource

SOURCES: dict[str, Callable[..., Source]] = {
    "tuxpaint": TuxPaintSource,
    "asterisk": AsteriskSource,
    "emoji": EmojiSource,
    "fillets": FilletsSource,
    "html": HtmlSource,
    "interleaved": InterleavedSource,
    "chat": ChatSource,
    "coco": CocoSource,
    "flickr30k": Flickr30kSource,
    "vqa": VqaSource,
    "librispeech": LibriSpeechSource,
    "common_voice": CommonVoiceSource,
    "folder": FolderSource,
    "video": VideoSource,
    "manifest": ManifestSource,
    "webdataset": WebDatasetSource,
    "wids": WidsSource,
    "energon": EnergonSource,
    "hf_datasets": HfDatasetsSource,
}
"""Name -> class; every class takes `root` and its own options as keywords."""
