"""The plan: which samples make which packs, block by block, as a pure function of metadata.

    plan(manifest hashes, tokenizer hash, geometry hash, mixture, budgets, seed)(block) -> rows of pieces

Nothing here reads a sample. A drawn share of the documents with several modalities also gives an ALONE piece: the first
part of each modality as a one-span segment, all in one row. Blocks are packed best-fit-decreasing as a whole; then the
order of the pieces in each pack is a keyed permutation, and that of the packs one that keeps rare heavy ones together.

Where `data.schedule` changes the plan, the next planner takes over at the row the steps have come to: the rows that are
left of the block there are taken apart and packed again, together with what the new plan's first block draws, and every
source goes on at the sample where that block ended.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from triweave.data_pipeline.config import DataConfig
from triweave.data_pipeline.errors import ConfigError, StateError
from triweave.data_pipeline.shards.manifest import Manifest
from triweave.data_pipeline.stream.catalog import ShardCatalog, modality_names, usable_modalities
from triweave.data_pipeline.stream.metadata import load_catalogs, load_manifests
from triweave.data_pipeline.stream.mixture import Draw, Mixture, SourceShape, keyed_order
from triweave.data_pipeline.stream.pack import best_fit_decreasing
from triweave.data_pipeline.stream.pieces import MORE_COLUMNS, OWNER_COLUMNS, Pieces, drawn_share
from triweave.data_pipeline.stream.row_order import row_order
from triweave.data_pipeline.stream.state import PlanSegment, StreamState
from triweave.data_pipeline.text.tokenizer import Tokenizer

PLAN_VERSION = 4
DOCUMENT, ALONE = 0, 1
"""Kinds of pieces: a span of a document, and the one-span segments of one."""
BLOCKS_KEPT = 2
COUNTED_SHARDS = 64
"""Shards of a source, drawn at random where it has more, that its mean length is taken from for weights by tokens."""


@dataclass(frozen=True, kw_only=True)
class BlockPlan:
    """The packs of one block: R rows, Q pieces sorted by row.

    row_starts: int64 [R + 1] where each row's pieces begin.
    sources, epochs, shards, samples: int32 [Q] source number, its epoch, shard number, number within the shard. From
        the number of sources on they are those of the plan segment before, whose pieces are left over.
    kinds: int8 [Q] DOCUMENT or ALONE.
    first_tokens, end_tokens: int64 [Q] span of the document's tokens; of an ALONE piece 0 and the tokens of all its
        segments.
    segments: int64 [Q] one-span segments of each ALONE piece, 0 for others.
    row_tokens: int64 [R] tokens of each row.
    row_budgets: int64 [R, D] use of each budget by each row, in the order of `Planner.caps`.
    row_costs: float64 [R] estimated work in tokens of the trunk, the sum over pieces of n + e + n^2 /
        `packing.attention_cost_tokens` for n tokens whose media cost the encoders e; the segments of an ALONE piece
        count one by one.
    modality_tokens: modality name -> tokens of the block.
    drawn_samples: samples drawn, those left out included.
    left_out: reason -> parts or documents of the drawn samples.
    """

    block: int
    row_starts: npt.NDArray[np.int64]
    sources: npt.NDArray[np.int32]
    epochs: npt.NDArray[np.int32]
    shards: npt.NDArray[np.int32]
    samples: npt.NDArray[np.int32]
    kinds: npt.NDArray[np.int8]
    first_tokens: npt.NDArray[np.int64]
    end_tokens: npt.NDArray[np.int64]
    segments: npt.NDArray[np.int64]
    row_tokens: npt.NDArray[np.int64]
    row_budgets: npt.NDArray[np.int64]
    row_costs: npt.NDArray[np.float64]
    modality_tokens: dict[str, int]
    drawn_samples: int
    left_out: dict[str, int]

    @property
    def rows(self) -> int:
        """Packs of the block."""
        return len(self.row_starts) - 1


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Where one plan ends and the next one takes over: behind the first `row` rows of a block of `planner`.

    steps: steps taken until then.
    """

    planner: Planner
    block: int
    row: int
    steps: int


class Planner:
    """Makes the block plans of one segment of a config: the first, or the one behind a cut.

    Every process can make its own: equal configs give equal plans. `config` is the config of the segment, `schedule`
    the one with all of them.
    """

    segment: int
    manifests: list[Manifest]

    def __init__(
        self,
        config: DataConfig,
        tokenizer: Tokenizer | None = None,
        *,
        after: Cut | None = None,
        mean_tokens: list[float] | None = None,
    ) -> None:
        """Read the manifests, and for weights by tokens the metadata of up to COUNTED_SHARDS shards of each source.

        after: where the segment before ends; None for the first. mean_tokens: what was found there, if it is known.

        Raises DataError where shards or tokenizer are missing, ConfigError where a source holds no samples.
        """
        self.schedule = config
        self.after = after
        self.segment = after.planner.segment + 1 if after else 0
        self.config = config = config.segments[self.segment]
        self.caps = config.caps
        self.tokenizer = tokenizer or Tokenizer.load(config.tokenizer)
        self.manifests = after.planner.manifests if after else load_manifests(config.sources)
        for source, manifest in zip(config.sources, self.manifests, strict=True):
            if not manifest.samples:
                raise ConfigError(f"data.sources.{source.name}: {source.shards} holds no samples; build it again")
        self._catalogs: dict[tuple[int, int], ShardCatalog] = {}
        self._blocks: dict[int, BlockPlan] = {}
        self.mean_tokens = mean_tokens
        self.mixture = self._mixture()
        self.identity = self._identity()
        canonical = json.dumps(self.identity, sort_keys=True, separators=(",", ":"))
        self.plan_hash = xxhash.xxh3_128_hexdigest(canonical.encode())

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the configs: a process started afresh makes its own plans."""
        return _planner, (self.schedule, self.after, self.mean_tokens)

    def _mixture(self) -> Mixture:
        config = self.config
        sizes = [manifest.samples for manifest in self.manifests]
        weights = [source.weight for source in config.sources]
        pass_samples = None
        if config.weight_unit == "epochs":
            weights = [weight * size for weight, size in zip(weights, sizes, strict=True)]
            pass_samples = max(1, round(sum(weights)))
        elif config.weight_unit == "tokens" and sum(map(bool, weights)) > 1:
            if self.mean_tokens is None:
                self.mean_tokens = self._mean_tokens()
            weights = [weight / mean if mean else 0 for weight, mean in zip(weights, self.mean_tokens, strict=True)]
        shapes = [
            SourceShape(
                name=source.name, weight=weight, shard_samples=tuple(shard.samples for shard in manifest.shards)
            )
            for source, weight, manifest in zip(config.sources, weights, self.manifests, strict=True)
        ]
        starts = self.after.planner.mixture.positions(self.after.block + 1) if self.after else None
        return Mixture(
            shapes, block_samples=config.block_samples, seed=config.seed, starts=starts, pass_samples=pass_samples
        )

    def _mean_tokens(self) -> list[float]:
        """Return the mean tokens of each source's samples as they are packed; those that are left out count 0."""
        chosen = [
            (number, shard)
            for number, (source, manifest) in enumerate(zip(self.config.sources, self.manifests, strict=True))
            if source.weight
            for shard in keyed_order(len(manifest.shards), self.config.seed, "counted", source.name)[
                :COUNTED_SHARDS
            ].tolist()
        ]
        tokens, samples = [0] * len(self.manifests), [0] * len(self.manifests)
        for (number, shard), catalog in zip(chosen, self._load(chosen), strict=True):
            tokens[number] += int(catalog.sample_budgets[:, 0].sum())
            samples[number] += len(catalog.sizes)
            if sum(samples) <= self.config.block_samples:  # no more than the first block needs of them
                self._catalogs[number, shard] = catalog
        for source, total in zip(self.config.sources, tokens, strict=True):
            if source.weight and not total:
                raise ConfigError(
                    f"data.sources.{source.name}: none of its samples can be packed, so data.weight_unit=tokens has no "
                    "meaning; set its weight to 0"
                )
        return [total / count if count else 0 for total, count in zip(tokens, samples, strict=True)]

    def block(self, block: int) -> BlockPlan:
        """Return the plan of one block; the latest BLOCKS_KEPT are kept, with the catalogs they need."""
        if block not in self._blocks:
            while len(self._blocks) >= BLOCKS_KEPT:
                gone = next(iter(self._blocks))
                del self._blocks[gone]
                if self.after and gone == 0:
                    self.after.planner.forget()
            self.load_catalogs(block)
            self._blocks[block] = self._make(block)
            kept = {key for plan in self._blocks.values() for key in _shards_of(plan)}
            self._catalogs = {key: value for key, value in self._catalogs.items() if key in kept}
        return self._blocks[block]

    def forget(self) -> None:
        """Let go of the metadata held, here and in the segments before; what is asked for is read again."""
        self._blocks, self._catalogs = {}, {}
        if self.after:
            self.after.planner.forget()

    def catalog(self, source: int, shard: int) -> ShardCatalog:
        """Return the metadata of one shard of a source, by the numbers that a block plan has."""
        catalog = self._catalogs.get((source, shard))
        if catalog is not None:  # asked several times a sample
            return catalog
        if source >= len(self.config.sources):
            assert self.after is not None
            return self.after.planner.catalog(source - len(self.config.sources), shard)
        [catalog] = self._load([(source, shard)])
        self._catalogs[source, shard] = catalog
        return catalog

    def source_name(self, source: int) -> str:
        """Return the name of a source by the number that a block plan has."""
        return self.config.sources[source % len(self.config.sources)].name

    def _load(self, shards: list[tuple[int, int]]) -> Iterator[ShardCatalog]:
        return load_catalogs(shards, config=self.config, manifests=self.manifests, tokenizer=self.tokenizer)

    def load_catalogs(self, block: int) -> None:
        """Read the metadata that a block needs; `block` does it too, this is for timing the two apart."""
        needed = {
            (draw.source, shard): None
            for draw in self.mixture.draws(block)
            for shard in np.flatnonzero(np.bincount(self.mixture.order(draw)[0])).tolist()
        }
        missing = [key for key in needed if key not in self._catalogs]
        for key, catalog in zip(missing, self._load(missing), strict=True):
            self._catalogs[key] = catalog

    @property
    def last_step(self) -> int | None:
        """Steps of the stream after which the next segment's plan takes over; None for the last segment."""
        entries = self.schedule.schedule[self.segment :]
        return entries[0].after_step if entries else None

    @property
    def first_step(self) -> int:
        """Steps of the stream before this segment."""
        return self.after.steps if self.after else 0

    def following(self, *, block: int, row: int) -> Planner:
        """Return the planner of the next segment, which takes over behind the first `row` rows of `block`."""
        assert self.last_step is not None
        return Planner(
            self.schedule, self.tokenizer, after=Cut(planner=self, block=block, row=row, steps=self.last_step)
        )

    def resumed(self, state: StreamState) -> Planner:
        """Return the planner that a saved stream stands at; this one must be that of the first segment.

        Raises StateError where another plan, or another schedule, made the rows before it.
        """
        planner = self
        for number, segment in enumerate(state.segments):
            state.check_segment(number, planner.plan_hash, planner.identity, planner.first_step)
            if number + 1 < len(state.segments):
                if planner.last_step is None:
                    raise StateError(
                        f"the saved stream has {len(state.segments)} plan segments, data.schedule makes {number + 1}: "
                        f"put back the entry with after_step={state.segments[number + 1].first_step}"
                    )
                planner = planner.following(block=segment.block, row=segment.end_row - segment.block_first_row)
        if planner.last_step is not None and planner.last_step < state.step:
            raise StateError(
                f"data.schedule changes the plan after step {planner.last_step}, and the saved stream has taken "
                f"{state.step} steps without: set after_step={state.step} or later"
            )
        return planner

    def start(self) -> StreamState:
        """Return the state before the first row."""
        return self.state_at(block=0, block_first_row=0, next_row=0, step=0)

    def state_at(
        self, *, block: int, block_first_row: int, next_row: int, step: int, earlier: tuple[PlanSegment, ...] = ()
    ) -> StreamState:
        """Return the state at an absolute row that lies in `block`; `earlier` are the segments of former plans."""
        segment = PlanSegment(
            plan_hash=self.plan_hash,
            first_row=earlier[-1].end_row if earlier else 0,
            end_row=next_row,
            first_step=self.first_step,
            block=block,
            block_first_row=block_first_row,
            identity=self.identity,
        )
        return StreamState(segments=(*earlier, segment), step=step, cursors=self.mixture.cursors(block))

    def rows_per_epoch(self) -> float:
        """Estimate the packs of one epoch from a block's packs per sample; exact where a block is an epoch."""
        plan = self.block(1 if self.after else 0)  # the first one of a later segment packs what was left over as well
        return plan.rows * self.mixture.epoch_samples / max(1, plan.drawn_samples)

    def _identity(self) -> dict[str, Any]:
        config = self.config
        return {
            "version": PLAN_VERSION,
            "sources": {
                source.name: {
                    "manifest": manifest.hash,
                    "weight": source.weight,
                    "split": source.split,
                    "hold_out": source.hold_out,
                    "shuffle_pairs": source.shuffle_pairs,
                }
                for source, manifest in zip(config.sources, self.manifests, strict=True)
                if source.weight
            },
            "weight_unit": config.weight_unit,
            "tokenizer": self.tokenizer.hash,
            "geometry": asdict(config.geometry),
            "modalities": {name: modality.id for name, modality in usable_modalities(self.tokenizer).items()},
            "sequence_length": config.sequence_length,
            "packing": asdict(config.packing),
            "block_samples": config.block_samples,
            "seed": config.seed,
        }

    def _make(self, block: int) -> BlockPlan:
        pieces, config = Pieces(self.caps), self.config
        for draw in self.mixture.draws(block):
            self._collect(draw, pieces)
        if self.after and block == 0:
            self._carry(self.after, pieces)
        table = pieces.table()
        # Pieces of equal size are packed in the order they come in, and by shard they would meet those of their shard.
        table = table[keyed_order(len(table), config.seed, "ties", block)]
        budgets, owners = table[:, OWNER_COLUMNS:-MORE_COLUMNS], table[:, :OWNER_COLUMNS]
        packs = best_fit_decreasing(budgets, tuple(self.caps.values()))
        rows = int(packs.max()) + 1 if len(packs) else 0
        squares, segments = table[:, -MORE_COLUMNS:].T
        uses = np.stack([np.bincount(packs, column, rows) for column in budgets.T], axis=1).astype(np.int64)
        attention: npt.NDArray[np.float64] = np.bincount(packs, squares, rows) / config.packing.attention_cost_tokens
        costs = uses[:, 0] + uses[:, list(self.caps).index("encoder_cost")] + attention
        pack_of_row = row_order(costs, config.seed, "rows", block)
        row_of_pack = np.empty(rows, np.int64)
        row_of_pack[pack_of_row] = np.arange(rows)
        row = row_of_pack[packs]
        within = np.empty(len(row), np.int64)
        within[keyed_order(len(row), config.seed, "pieces", block)] = np.arange(len(row))
        order = np.lexsort((within, row))
        row, owners, segments = row[order], owners[order], segments[order]
        row_budgets = uses[pack_of_row]
        return BlockPlan(
            block=block,
            row_starts=np.searchsorted(row, np.arange(rows + 1)),
            sources=owners[:, 0].astype(np.int32),
            epochs=owners[:, 1].astype(np.int32),
            shards=owners[:, 2].astype(np.int32),
            samples=owners[:, 3].astype(np.int32),
            kinds=np.where(segments > 0, ALONE, DOCUMENT).astype(np.int8),
            first_tokens=owners[:, 4],
            end_tokens=owners[:, 5],
            segments=segments,
            row_tokens=row_budgets[:, 0],
            row_budgets=row_budgets,
            row_costs=costs[pack_of_row],
            modality_tokens=dict(zip(modality_names(), pieces.modality_tokens.tolist(), strict=True)),
            drawn_samples=pieces.drawn,
            left_out=dict(sorted(pieces.left_out.items())),
        )

    def _collect(self, draw: Draw, pieces: Pieces) -> None:
        """Add the pieces of one draw, shard by shard in ascending order (packing does not depend on the order)."""
        share = self.config.packing.contrastive_share
        shards, rows = self.mixture.order(draw)
        order = np.argsort(shards, kind="stable")
        borders = np.flatnonzero(np.diff(shards[order])) + 1
        for chosen in np.split(order, borders):
            shard = int(shards[chosen[0]])
            catalog, owner = self.catalog(draw.source, shard), (draw.source, draw.epoch, shard)
            samples = np.sort(rows[chosen])
            pieces.add(catalog, samples, owner)
            if share:
                key = (self.config.seed, "alone", self.config.sources[draw.source].name, draw.epoch, shard)
                pieces.add_alone(catalog, samples[drawn_share(len(catalog.sizes), share, *key)[samples]], owner)

    def _carry(self, cut: Cut, pieces: Pieces) -> None:
        """Add what the segment before left over of its last block."""
        plan = cut.planner.block(cut.block)
        left = slice(int(plan.row_starts[cut.row]), None)
        spans = np.stack([plan.samples, plan.first_tokens, plan.end_tokens, plan.segments], axis=1)[left].astype(
            np.int64
        )
        owners = np.stack([plan.sources, plan.epochs, plan.shards], axis=1)[left]
        distinct, which = np.unique(owners, axis=0, return_inverse=True)
        for number, (source, epoch, shard) in enumerate(distinct.tolist()):
            owner = (source + len(self.config.sources), epoch, shard)
            pieces.add_carried(cut.planner.catalog(source, shard), spans[which.reshape(-1) == number], owner)


def _planner(config: DataConfig, after: Cut | None, mean_tokens: list[float] | None) -> Planner:
    tokenizer = after.planner.tokenizer if after else None
    return Planner(config, tokenizer, after=after, mean_tokens=mean_tokens)


def _shards_of(plan: BlockPlan) -> set[tuple[int, int]]:
    pairs = np.unique(plan.sources.astype(np.int64) << 32 | plan.shards)
    return {(int(pair) >> 32, int(pair) & 0xFFFFFFFF) for pair in pairs}
