"""The loaders that can be measured: name -> where its class is, and the package whose version is told."""

from __future__ import annotations

import importlib
from typing import NamedTuple

from triweave.data_pipeline.bench.contenders.base import Contender, Setting


class Entry(NamedTuple):
    """module, class_name: of the contender. package: distribution, "" for our own code."""

    module: str
    class_name: str
    package: str


CONTENDERS = {
    "triweave": Entry("triweave", "Triweave", ""),
    "bare": Entry("triweave", "Bare", ""),
    "webdataset": Entry("webdataset", "WebDataset", "webdataset"),
    "energon": Entry("energon", "Energon", "megatron-energon"),
    "litdata": Entry("litdata", "LitData", "litdata"),
    "streaming": Entry("streaming", "Streaming", "mosaicml-streaming"),
}
OWN = ("triweave", "bare")
"""Measured always."""
FROM_STORE = ("triweave", "webdataset")
"""Those that are also measured from an object store: they are `FromStore`."""
PEERS = tuple(name for name in CONTENDERS if name not in OWN)


def make_contender(name: str, setting: Setting) -> Contender:
    """Return a loader, made. Raises what its import or its preparation raises."""
    entry = CONTENDERS[name]
    module = importlib.import_module(f"triweave.data_pipeline.bench.contenders.{entry.module}")
    contender: Contender = getattr(module, entry.class_name)(setting)
    return contender
