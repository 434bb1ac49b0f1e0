"""webdataset: its own reader of the same tars, in their order. It has no state: resuming reads past what was seen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from triweave.data_pipeline.bench.contenders.base import SampleStream, Setting, skipped
from triweave.data_pipeline.bench.work import Members
from triweave.data_pipeline.shards.manifest import Manifest


def tar_samples(setting: Setting) -> Iterator[Members]:
    """Yield the members of every sample through webdataset's tar reader and grouping.

    Its `gopen` refuses even local files once it is locked down, so they are opened here the way it would.
    """
    from triweave.data_pipeline.stream.loader import webdataset

    manifest = Manifest.load(setting.shards)

    def opened() -> Iterator[dict[str, Any]]:
        for number in range(len(manifest.shards)):
            tar = str(manifest.tar_path(number))
            with open(tar, "rb") as stream:
                yield {"url": tar, "stream": stream}

    expand, group = webdataset.tariterators.tar_file_expander, webdataset.tariterators.group_by_keys
    for sample in webdataset.DataPipeline(opened, expand, group):
        yield {name: value for name, value in sample.items() if isinstance(value, bytes)}


class WebDataset(SampleStream):
    """The tars as they are."""

    def samples(self, state: Any = None) -> Iterator[Members]:
        """Yield every sample, or those behind the first `state`."""
        return skipped(tar_samples(self.setting), state or 0)

    def state_behind(self, count: int) -> int:
        """Return the number of samples to read past."""
        return count
