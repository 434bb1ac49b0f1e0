"""Triweave: plan, read by byte range, verify, tokenise, decode, pack; and its functions alone, the reference."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

from triweave.data_pipeline.bench.contenders.base import Setting
from triweave.data_pipeline.bench.contenders.webdataset import tar_samples
from triweave.data_pipeline.bench.work import parts_of
from triweave.data_pipeline.media.modalities import MODALITIES
from triweave.data_pipeline.storage.client import forget_clients
from triweave.data_pipeline.stream.content import PieceMaker
from triweave.data_pipeline.stream.layout import row_pieces
from triweave.data_pipeline.stream.loader import MicroBatch, stream_pipeline
from triweave.data_pipeline.stream.plan import Planner
from triweave.data_pipeline.stream.reader import ShardReader
from triweave.data_pipeline.stream.state import StreamState
from triweave.data_pipeline.stream.windows import StepWalk, WindowShape
from triweave.data_pipeline.text.tokenizer import Tokenizer

ONE_PACK = WindowShape(rank=0, world_size=1, global_batch_rows=1, micro_batch_rows=1)


class Triweave:
    """The stream of one rank, without worker processes."""

    def __init__(self, setting: Setting) -> None:
        self.config = setting.config
        self.folder, self.store = setting.folder, setting.store
        self.state = ""

    def raw(self) -> int:
        """Plan the packs and read every planned sample, checksummed as a whole."""
        planner = Planner(self.config)
        maker = PieceMaker(planner)
        seen = 0
        for block in range(planner.mixture.epoch_blocks):
            plan = planner.block(block)
            for row in range(plan.rows):
                for piece in row_pieces(plan, row):
                    maker.fetch(piece)
                    seen += piece.first == 0
        return seen

    def full(self) -> int:
        """Run the whole pipeline over an epoch."""
        planner = Planner(self.config)
        rows = sum(planner.block(block).rows for block in range(planner.mixture.epoch_blocks))
        stream = islice(self._stream(planner, planner.start()), rows)
        return sum(piece.first == 0 for made in stream for pieces in made.task.pieces for piece in pieces)

    def first_batch(self) -> None:
        """Plan, and make the first pack."""
        planner = Planner(self.config)
        next(self._stream(planner, planner.start()))

    def prepare_store(self) -> None:
        """Begin with an empty cache and new connections."""
        os.environ["TRIWEAVE_CACHE_DIR"] = tempfile.mkdtemp(dir=self.folder)
        forget_clients()

    def first_batch_from_store(self) -> None:
        """Read manifest, indices and token counts, plan, and make the first pack."""
        source = replace(self.config.sources[0], shards=self.store)
        planner = Planner(replace(self.config, sources=[source]))
        next(self._stream(planner, planner.start()))

    def prepare_resume(self, share: float) -> None:
        """Walk the plan to a share of its packs."""
        planner = Planner(self.config)
        rows = sum(planner.block(block).rows for block in range(planner.mixture.epoch_blocks))
        walk = StepWalk(planner, planner.start())
        while walk.next_row < int(rows * share):
            walk.step(1)
        self.state = walk.state().to_json()

    def resume(self) -> None:
        """Read the state, plan its block, and make the next pack."""
        state = StreamState.from_json(self.state)
        next(self._stream(Planner(self.config).resumed(state), state))

    def _stream(self, planner: Planner, state: StreamState) -> Iterator[MicroBatch]:
        return iter(stream_pipeline(planner, ONE_PACK, state, None))


class Bare:
    """The functions alone: slices of mapped tars with their checksum; decoding of bytes that lie in memory, no packing.

    It has no state, so resuming is its first sample.
    """

    def __init__(self, setting: Setting) -> None:
        self.config = setting.config
        self.tokenizer = Tokenizer.load(setting.config.tokenizer)
        planner = Planner(setting.config)
        catalogs = [planner.catalog(0, shard) for shard in range(len(planner.manifests[0].shards))]
        self.ranges = [
            (catalog.tar, *numbers)
            for catalog in catalogs
            for numbers in zip(catalog.offsets.tolist(), catalog.sizes.tolist(), catalog.hashes.tolist(), strict=True)
        ]
        self.in_memory = [parts_of(members) for members in tar_samples(setting)]

    def raw(self) -> int:
        """Slice and checksum every sample in tar order."""
        reader = ShardReader()
        for tar, offset, size, xxh3 in self.ranges:
            reader.read(tar, offset, size, xxh3)
        return len(self.ranges)

    def full(self) -> int:
        """Tokenise and decode every sample."""
        for number in range(len(self.in_memory)):
            self._decode(number)
        return len(self.in_memory)

    def first_batch(self) -> None:
        """Decode one sample."""
        self._decode(0)

    def prepare_resume(self, share: float) -> None:
        """Do nothing."""

    def resume(self) -> None:
        """Decode one sample."""
        self._decode(0)

    def _decode(self, number: int) -> None:
        for modality, content, info in self.in_memory[number]:
            if isinstance(content, str):
                self.tokenizer.encode(content)
            else:
                MODALITIES[modality].decode(content, info, self.config.geometry)
