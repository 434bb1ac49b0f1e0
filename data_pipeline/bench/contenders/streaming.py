"""MosaicML streaming: samples as MDS shards, read in order through its loader without worker processes.

A sample is one field of bytes (`containers.py`), as for litdata. Its shards have no checksums on local reads.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from itertools import islice
from typing import Any

from triweave.data_pipeline.bench.contenders.base import SampleStream, Setting
from triweave.data_pipeline.bench.contenders.containers import from_bytes, to_bytes
from triweave.data_pipeline.bench.contenders.webdataset import tar_samples
from triweave.data_pipeline.bench.work import Members

MOST_OPERATORS = 64


class Streaming(SampleStream):
    """MDS shards of 64 MB, written before anything is measured."""

    def __init__(self, setting: Setting) -> None:
        self.streaming = _import_streaming()
        super().__init__(setting)
        out = str(setting.folder)
        with self.streaming.MDSWriter(out=out, columns={"sample": "bytes"}, size_limit=1 << 26) as writer:
            for members in tar_samples(setting):
                writer.write({"sample": to_bytes(members)})

    def samples(self, state: Any = None) -> Iterator[Members]:
        """Yield every sample, or those behind a state of the loader."""
        for batch in self._loader(state):
            for sample in batch["sample"]:
                yield from_bytes(sample)

    def state_behind(self, count: int) -> Any:
        """Return the loader's own state."""
        loader = self._loader(None)
        for _ in islice(iter(loader), count):
            pass
        return loader.state_dict()

    def _loader(self, state: Any) -> Any:
        self.streaming.base.util.clean_stale_shared_memory()
        dataset = self.streaming.StreamingDataset(local=str(self.setting.folder), shuffle=False, batch_size=1)
        loader = self.streaming.StreamingDataLoader(dataset, batch_size=1, num_workers=0, collate_fn=_columns)
        if state:
            loader.load_state_dict(state)
        return loader


def _import_streaming() -> Any:
    """Import streaming, which imports torchvision, which wants its compiled operators registered.

    Those of a CUDA build are not, beside a CPU torch. Nothing here calls one, so their names are registered.
    """
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for _ in range(MOST_OPERATORS):
        try:
            import streaming

            return streaming
        except RuntimeError as error:
            missing = re.fullmatch(r"operator torchvision::(\w+) does not exist", str(error))
            if not missing:
                raise
            library.define(f"{missing[1]}(Tensor a) -> Tensor")
            for name in [name for name in sys.modules if name.split(".")[0] in ("torchvision", "streaming")]:
                del sys.modules[name]
    raise ImportError("torchvision cannot be imported")


def _columns(items: list[Any]) -> dict[str, list[bytes]]:
    """Return a batch the way streaming counts it: by the length of its first column."""
    return {"sample": [item["sample"] for item in items]}
