"""litdata: samples in its optimised chunks, read in order through its loader without worker processes.

A sample is one field of bytes (`containers.py`): litdata wants the same fields everywhere, documents differ. It has no
checksums, so the work checks none of its reads; the xxh3 of the raw work is computed all the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from triweave.data_pipeline.bench.contenders.base import SampleStream, Setting
from triweave.data_pipeline.bench.contenders.containers import from_bytes, to_bytes
from triweave.data_pipeline.bench.contenders.webdataset import tar_samples
from triweave.data_pipeline.bench.work import Members


class LitData(SampleStream):
    """Chunks of 64 MB, written before anything is measured."""

    def __init__(self, setting: Setting) -> None:
        import litdata
        from litdata.streaming import Cache

        super().__init__(setting)
        self.litdata = litdata
        cache = Cache(input_dir=str(setting.folder), chunk_bytes="64MB")
        for number, members in enumerate(tar_samples(setting)):
            cache[number] = {"sample": to_bytes(members)}
        cache.done()
        cache.merge()

    def samples(self, state: Any = None) -> Iterator[Members]:
        """Yield every sample, or those behind a state of the loader."""
        for item in self._loader(state):
            yield from_bytes(item["sample"])

    def state_behind(self, count: int) -> Any:
        """Return the loader's own state."""
        loader = self._loader(None)
        for _ in islice(iter(loader), count):
            pass
        return loader.state_dict()

    def _loader(self, state: Any) -> Any:
        dataset = self.litdata.StreamingDataset(str(self.setting.folder), shuffle=False, drop_last=False)
        loader = self.litdata.StreamingDataLoader(dataset, batch_size=1, num_workers=0, collate_fn=_only)
        if state:
            loader.load_state_dict(state)
        return loader


def _only(items: list[Any]) -> Any:
    return items[0]
