"""The plan: which samples make which packs, block by block, as a pure function of metadata.

    plan(manifest hashes, tokenizer hash, geometry hash, mixture, budgets, seed)(block) -> rows of pieces

Nothing here reads a sample. Documents longer than a pack are split into pieces: text at token boundaries, documents at
part boundaries, media spans never, and a part that fits into a pack of its own is never cut. The first piece carries
the bos token, the last one the eos token. A drawn share of the documents with several modalities also gives an ALONE
piece: the first part of each modality as a one-span segment, all in one row. Blocks are packed best-fit-decreasing as a
whole; then the order of the packs, and of the pieces in each, is a keyed permutation.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from triweave.data_pipeline.config import DataConfig
from triweave.data_pipeline.errors import ConfigError
from triweave.data_pipeline.shards.manifest import Manifest
from triweave.data_pipeline.stream.catalog import (
    SEGMENT_OVERHEAD_TOKENS,
    ShardCatalog,
    load_shard_catalog,
    modality_names,
    usable_modalities,
)
from triweave.data_pipeline.stream.mixture import Draw, Mixture, SourceShape, keyed_order
from triweave.data_pipeline.stream.pack import best_fit_decreasing
from triweave.data_pipeline.stream.state import PlanSegment, StreamState
from triweave.data_pipeline.text.tokenizer import Tokenizer

PLAN_VERSION = 2
DOCUMENT, ALONE = 0, 1
"""Kinds of pieces: a span of a document, and the one-span segments of one."""
UNFIT_SEGMENTS = "one-span segments of a document that together pass a pack"
ATTENTION_COST_TOKENS = 2048
"""Length of a piece at which its attention is estimated to cost as much as everything else in the trunk."""
BLOCKS_KEPT = 2


@dataclass(frozen=True, kw_only=True)
class BlockPlan:
    """The packs of one block: R rows, Q pieces sorted by row.

    row_starts: int64 [R + 1] where each row's pieces begin.
    sources, epochs, shards, samples: int32 [Q] source number, its epoch, shard number, number within the shard.
    kinds: int8 [Q] DOCUMENT or ALONE.
    first_tokens, end_tokens: int64 [Q] span of the document's tokens; of an ALONE piece 0 and the tokens of all its
        segments.
    segments: int64 [Q] one-span segments of each ALONE piece, 0 for others.
    row_tokens: int64 [R] tokens of each row.
    row_costs: float64 [R] estimated work, the sum over pieces of n + m + n^2 / ATTENTION_COST_TOKENS for n tokens, of
        which m are media; the segments of an ALONE piece count one by one.
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
    row_costs: npt.NDArray[np.float64]
    modality_tokens: dict[str, int]
    drawn_samples: int
    left_out: dict[str, int]

    @property
    def rows(self) -> int:
        """Packs of the block."""
        return len(self.row_starts) - 1


class Planner:
    """Makes the block plans of a config. Every process can make its own: equal configs give equal plans."""

    def __init__(self, config: DataConfig, tokenizer: Tokenizer | None = None) -> None:
        """Read the manifests.

        Raises DataError where shards or tokenizer are missing, ConfigError where a source holds no samples.
        """
        self.config = config
        self.caps = config.caps
        self.tokenizer = tokenizer or Tokenizer.load(config.tokenizer)
        self.manifests = [Manifest.load(source.shards) for source in config.sources]
        for source, manifest in zip(config.sources, self.manifests, strict=True):
            if not manifest.samples:
                raise ConfigError(f"data.sources.{source.name}: {source.shards} holds no samples; build it again")
        shapes = [
            SourceShape(name=source.name, weight=source.weight, shard_samples=tuple(s.samples for s in manifest.shards))
            for source, manifest in zip(config.sources, self.manifests, strict=True)
        ]
        self.mixture = Mixture(shapes, block_samples=config.block_samples, seed=config.seed)
        self.identity = self._identity()
        canonical = json.dumps(self.identity, sort_keys=True, separators=(",", ":"))
        self.plan_hash = xxhash.xxh3_128_hexdigest(canonical.encode())
        self._catalogs: dict[tuple[int, int], ShardCatalog] = {}
        self._blocks: dict[int, BlockPlan] = {}

    def __reduce__(self) -> tuple[type[Planner], tuple[DataConfig]]:
        """Pickle as the config: a process started afresh makes its own plans."""
        return Planner, (self.config,)

    def block(self, block: int) -> BlockPlan:
        """Return the plan of one block; the latest BLOCKS_KEPT are kept, with the catalogs they need."""
        if block not in self._blocks:
            while len(self._blocks) >= BLOCKS_KEPT:
                del self._blocks[next(iter(self._blocks))]
            self._blocks[block] = self._make(block)
            kept = {key for plan in self._blocks.values() for key in _shards_of(plan)}
            self._catalogs = {key: value for key, value in self._catalogs.items() if key in kept}
        return self._blocks[block]

    def catalog(self, source: int, shard: int) -> ShardCatalog:
        """Return the metadata of one shard of a source, by their numbers."""
        catalog = self._catalogs.get((source, shard))
        if catalog is None:
            catalog = self._catalogs[source, shard] = load_shard_catalog(
                self.manifests[source],
                shard,
                source=self.config.sources[source],
                tokenizer=self.tokenizer,
                geometry=self.config.geometry,
                caps=self.caps,
            )
        return catalog

    def load_catalogs(self, block: int) -> None:
        """Read the metadata that a block needs; `block` does it too, this is for timing the two apart."""
        for draw in self.mixture.draws(block):
            for shard in np.unique(self.mixture.order(draw)[0]).tolist():
                self.catalog(draw.source, shard)

    def start(self) -> StreamState:
        """Return the state before the first row."""
        return self.state_at(block=0, block_first_row=0, next_row=0, earlier=())

    def state_at(
        self, *, block: int, block_first_row: int, next_row: int, earlier: tuple[PlanSegment, ...]
    ) -> StreamState:
        """Return the state at an absolute row that lies in `block`; `earlier` are the segments of former plans."""
        first_row = earlier[-1].end_row if earlier else 0
        segment = PlanSegment(plan_hash=self.plan_hash, first_row=first_row, end_row=next_row, identity=self.identity)
        return StreamState(
            segments=(*earlier, segment),
            next_row=next_row,
            block=block,
            block_first_row=block_first_row,
            cursors=self.mixture.cursors(block),
        )

    def rows_per_epoch(self) -> float:
        """Estimate the packs of one epoch from the first block's packs per sample; exact where a block is an epoch."""
        plan = self.block(0)
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
            },
            "tokenizer": self.tokenizer.hash,
            "geometry": asdict(config.geometry),
            "modalities": {name: modality.id for name, modality in usable_modalities(self.tokenizer).items()},
            "sequence_length": config.sequence_length,
            "packing": asdict(config.packing),
            "block_samples": config.block_samples,
            "seed": config.seed,
        }

    def _make(self, block: int) -> BlockPlan:
        pieces = _Pieces(self.caps)
        for draw in self.mixture.draws(block):
            self._collect(draw, pieces)
        table = pieces.table()
        budgets, owners = table[:, _OWNER:-_MORE], table[:, :_OWNER]
        packs = best_fit_decreasing(budgets, tuple(self.caps.values()))
        rows = int(packs.max()) + 1 if len(packs) else 0
        row_of_pack = np.empty(rows, np.int64)
        row_of_pack[keyed_order(rows, self.config.seed, "rows", block)] = np.arange(rows)
        row = row_of_pack[packs]
        within = np.empty(len(row), np.int64)
        within[keyed_order(len(row), self.config.seed, "pieces", block)] = np.arange(len(row))
        order = np.lexsort((within, row))
        row, owners, tokens = row[order], owners[order], budgets[order, 0]
        media, squares, segments = table[order, -_MORE:].T
        cost: npt.NDArray[np.float64] = tokens + media + squares / ATTENTION_COST_TOKENS
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
            row_tokens=np.bincount(row, tokens, rows).astype(np.int64),
            row_costs=np.bincount(row, cost, rows).astype(np.float64),
            modality_tokens=dict(zip(modality_names(), pieces.modality_tokens.tolist(), strict=True)),
            drawn_samples=pieces.drawn,
            left_out=dict(sorted(pieces.left_out.items())),
        )

    def _collect(self, draw: Draw, pieces: _Pieces) -> None:
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


def drawn_share(count: int, share: float, *key: object) -> npt.NDArray[np.bool_]:
    """Return which of `count` items `key` draws, each with probability `share`, bool [count].

    A larger share draws the same ones and more.
    """
    digest = xxhash.xxh3_128_intdigest("\x1f".join(map(str, key)).encode())
    draws = np.random.Philox(key=digest).random_raw(count)
    return draws <= np.uint64(max(0, min(int(share * 2**64), 2**64) - 1)) if share > 0 else np.zeros(count, bool)


_OWNER, _MORE = 6, 3


class _Pieces:
    """Pieces of one block: int64 rows of source, epoch, shard, sample, first, end (_OWNER columns), use of each budget,
    media tokens, sum of the squared lengths of what attends to itself, one-span segments (_MORE columns)."""

    def __init__(self, caps: dict[str, int]) -> None:
        self.caps = np.asarray(list(caps.values()), np.int64)
        self.tables: list[npt.NDArray[np.int64]] = []
        self.modality_tokens = np.zeros(len(modality_names()), np.int64)
        self.drawn = 0
        self.left_out: Counter[str] = Counter()

    def add(self, catalog: ShardCatalog, samples: npt.NDArray[np.int32], owner: tuple[int, int, int]) -> None:
        """Add the documents `samples` of one shard: whole where they fit, as pieces where they do not."""
        budgets = catalog.sample_budgets[samples]
        self.drawn += len(samples)
        self.modality_tokens += catalog.sample_modality_tokens[samples].sum(axis=0)
        for reason, counts in catalog.left_out.items():
            if count := int(counts[samples].sum()):
                self.left_out[reason] += count
        fits = (budgets <= self.caps).all(axis=1)
        whole = fits & (budgets[:, 0] > 0)
        media = catalog.sample_modality_tokens[samples, 1:].sum(axis=1)
        self._append(owner, samples[whole], budgets[whole], media[whole], budgets[whole, 0] ** 2, 0)
        split = [
            (*owner, sample, *piece, (piece[1] - piece[0]) ** 2, 0)
            for sample in samples[~fits].tolist()
            for piece in split_document(catalog, sample, self.caps.tolist())
        ]
        if split:
            self.tables.append(np.asarray(split, np.int64))

    def add_alone(self, catalog: ShardCatalog, samples: npt.NDArray[np.int32], owner: tuple[int, int, int]) -> None:
        """Add the one-span segments of the documents `samples` of one shard that have two modalities or more."""
        budgets = catalog.alone_budgets[samples]
        several = budgets[:, 0] > 0
        fits = several & (budgets <= self.caps).all(axis=1)
        if unfit := int((several & ~fits).sum()):
            self.left_out[UNFIT_SEGMENTS] += unfit
        samples, budgets = samples[fits], budgets[fits]
        places = catalog.alone_parts[samples]
        held = places >= 0
        lengths = np.where(held, catalog.part_lengths[places] + SEGMENT_OVERHEAD_TOKENS, 0)
        media = np.where(held, catalog.part_tokens[places], 0)
        media[:, 0] = 0
        tokens = media.sum(axis=0)
        tokens[0] = int(budgets[:, 0].sum()) - int(tokens.sum())
        self.modality_tokens += tokens
        self._append(owner, samples, budgets, media.sum(axis=1), (lengths**2).sum(axis=1), held.sum(axis=1))

    def _append(
        self,
        owner: tuple[int, int, int],
        samples: npt.NDArray[np.int32],
        budgets: npt.NDArray[np.int64],
        media: npt.NDArray[np.int64],
        squares: npt.NDArray[np.int64],
        segments: npt.NDArray[np.int64] | int,
    ) -> None:
        table = np.zeros((len(samples), _OWNER + len(self.caps) + _MORE), np.int64)
        table[:, :3] = owner
        table[:, 3] = samples
        table[:, 5] = budgets[:, 0]
        table[:, _OWNER:-_MORE] = budgets
        table[:, -3], table[:, -2], table[:, -1] = media, squares, segments
        self.tables.append(table)

    def table(self) -> npt.NDArray[np.int64]:
        """Return all pieces, int64 [Q, _OWNER + budgets + _MORE]."""
        return np.concatenate([np.zeros((0, _OWNER + len(self.caps) + _MORE), np.int64), *self.tables])


def split_document(catalog: ShardCatalog, sample: int, caps: list[int]) -> list[tuple[int, ...]]:
    """Return the pieces of a document that no pack holds: (first token, end token, use of each budget, media tokens).

    bos counts to the first part and eos to the last; a text is cut so that no lone token, which could not be trained
    on, is left at its end.
    """
    parts = slice(int(catalog.part_starts[sample]), int(catalog.part_starts[sample + 1]))
    budgets = catalog.part_budgets[parts]
    chosen = np.flatnonzero(budgets[:, 0])
    media = catalog.part_kinds[parts][chosen] != 0
    uses = budgets[chosen]
    uses[0, 0] += 1
    uses[-1, 0] += 1
    window = caps[0]
    pieces: list[tuple[int, ...]] = []
    used = [0] * (len(caps) + 1)
    first = 0

    def close() -> None:
        nonlocal first, used
        if used[0]:
            pieces.append((first, first + used[0], *used))
            first += used[0]
            used = [0] * len(used)

    for use, is_media in zip(uses.tolist(), media.tolist(), strict=True):
        if any(have + need > cap for have, need, cap in zip(used, use, caps, strict=False)):
            if use[0] <= window:
                close()
            else:
                while use[0] > (room := window - used[0]):
                    used[0] += room - 1 if use[0] - room == 1 else room
                    use[0] -= room - 1 if use[0] - room == 1 else room
                    close()
        used = [have + need for have, need in zip(used, [*use, use[0] - 1 if is_media else 0], strict=True)]
    close()
    return pieces


def _shards_of(plan: BlockPlan) -> set[tuple[int, int]]:
    pairs = np.unique(plan.sources.astype(np.int64) << 32 | plan.shards)
    return {(int(pair) >> 32, int(pair) & 0xFFFFFFFF) for pair in pairs}
