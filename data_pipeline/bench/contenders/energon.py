"""Megatron-Energon: the same tars, prepared as a crude data set, read through its savable loader without workers."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from triweave.data_pipeline.bench.contenders.base import SampleStream, Setting
from triweave.data_pipeline.bench.work import Members
from triweave.data_pipeline.shards.manifest import Manifest

DATASET_YAML = "__module__: megatron.energon\n__class__: CrudeWebdataset\n"


class Energon(SampleStream):
    """Links to the tars, with the metadata that `energon prepare` writes; samples stay undecoded until the work."""

    def __init__(self, setting: Setting) -> None:
        from megatron import energon
        from megatron.energon.flavors import BaseWebdatasetFactory

        super().__init__(setting)
        self.energon = energon
        manifest = Manifest.load(setting.shards)
        names = [f"{shard.name}.tar" for shard in manifest.shards]
        for number, name in enumerate(names):
            os.link(manifest.tar_path(number), setting.folder / name)
        BaseWebdatasetFactory.prepare_dataset(setting.folder, names, split_parts_ratio=[("train", 1.0)], workers=1)
        (setting.folder / ".nv-meta" / "dataset.yaml").write_text(DATASET_YAML)
        self.encoder = _task_encoder(energon)

    def samples(self, state: Any = None) -> Iterator[Members]:
        """Yield every sample, or those behind a state of the loader."""
        for sample in self._loader(state):
            yield sample.members

    def state_behind(self, count: int) -> Any:
        """Return the loader's own state."""
        loader = self._loader(None)
        for _ in islice(iter(loader), count):
            pass
        return loader.save_state_rank()

    def _loader(self, state: Any) -> Any:
        dataset = self.energon.get_train_dataset(
            self.setting.folder,
            worker_config=self.energon.WorkerConfig(rank=0, world_size=1, num_workers=0),
            batch_size=None,
            shuffle_buffer_size=None,
            max_samples_per_sequence=None,
            task_encoder=self.encoder,
            repeat=False,
        )
        loader = self.energon.get_savable_loader(dataset)
        if state:
            loader.restore_state_rank(copy.deepcopy(state))  # restoring uses it up
        return loader


def _task_encoder(energon: Any) -> Any:
    """Return an encoder that hands samples on as their undecoded members."""

    @dataclass
    class CrudeMembers(energon.Sample):
        members: Members

    def cook(sample: dict[str, Any]) -> Any:
        members = {name: value for name, value in sample.items() if isinstance(value, bytes)}
        return CrudeMembers(__key__=sample["__key__"], __restore_key__=sample["__restore_key__"], members=members)

    class Encoder(energon.DefaultTaskEncoder):
        decoder = None
        cookers = [energon.Cooker(energon.stateless(cook))]  # noqa: RUF012

    return Encoder()
