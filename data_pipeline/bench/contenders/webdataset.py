"""webdataset: its own reader of the same tars, in their order. It has no state: resuming reads past what was seen.

It has no `s3://` of its own: from a store it reads signed URLs, as its `pipe:curl` does, without a process for each.
"""

from __future__ import annotations

import urllib.request
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from triweave.data_pipeline.bench.contenders.base import SampleStream, Setting, skipped
from triweave.data_pipeline.bench.work import Members, packed
from triweave.data_pipeline.shards.manifest import Manifest
from triweave.data_pipeline.storage.client import client_of
from triweave.data_pipeline.storage.location import object_location

SIGNED_SECONDS = 600


def tar_samples(setting: Setting) -> Iterator[Members]:
    """Yield the members of every sample through webdataset's tar reader and grouping.

    Its `gopen` refuses even local files once it is locked down, so they are opened here the way it would.
    """
    manifest = Manifest.load(setting.shards)
    return _grouped([str(manifest.tar_path(number)) for number in range(len(manifest.shards))], _open_file)


def _open_file(path: str) -> BinaryIO:
    return open(path, "rb")


def _grouped(tars: list[str], open_tar: Callable[[str], Any]) -> Iterator[Members]:
    from triweave.data_pipeline.stream.loader import webdataset

    def opened() -> Iterator[dict[str, Any]]:
        for tar in tars:
            with open_tar(tar) as stream:
                yield {"url": tar.partition("?")[0], "stream": stream}  # a signature is in no message

    expand, group = webdataset.tariterators.tar_file_expander, webdataset.tariterators.group_by_keys
    for sample in webdataset.DataPipeline(opened, expand, group):
        yield {name: value for name, value in sample.items() if isinstance(value, bytes)}


class WebDataset(SampleStream):
    """The tars as they are."""

    def samples(self, state: Any = None) -> Iterator[Members]:
        """Yield every sample, or those behind the first `state`."""
        return skipped(tar_samples(self.setting), state or 0)

    def prepare_store(self) -> None:
        """Sign a URL for every tar."""
        manifest, target = Manifest.load(self.setting.shards), object_location(self.setting.store)
        keys = [target.child(f"{shard.name}.tar").key for shard in manifest.shards]
        self.urls = [client_of(target.bucket).signed_url(key, SIGNED_SECONDS) for key in keys]

    def first_batch_from_store(self) -> None:
        """Make the first pack of the tars as they come."""
        samples = _grouped(self.urls, urllib.request.urlopen)
        next(packed(samples, self.tokenizer, self.setting.config))

    def state_behind(self, count: int) -> int:
        """Return the number of samples to read past."""
        return count
