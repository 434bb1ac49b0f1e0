"""The metadata of a source's shards as columns: what planning and reading need to know about every sample and part.

A document is laid out as tokens:

    [bos] part part ... [eos]     text part: its tokens     media part: start marker, then t * h * w placeholders

Media parts that no pack can hold are left out of their document, with a reason; so are parts of modalities that are not
registered or have no marker in the tokenizer. A document with nothing left is left out itself, and so are samples
outside of the source's split or in its held-out fold.

Contrastive losses need parts alone: of a document with two or more modalities, the first part of each as a segment of
its own, `[bos] part [eos]`, all of them in one row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from triweave.data_pipeline.config import SourceConfig
from triweave.data_pipeline.errors import DataError
from triweave.data_pipeline.media.geometry import MediaGeometry
from triweave.data_pipeline.media.modalities import MODALITIES, Modality, grids
from triweave.data_pipeline.shards.index import read_index
from triweave.data_pipeline.shards.manifest import Manifest
from triweave.data_pipeline.storage.location import shown
from triweave.data_pipeline.stream.selection import Selected, select, selecting_columns
from triweave.data_pipeline.text.token_counts import read_token_counts
from triweave.data_pipeline.text.tokenizer import Tokenizer

MEDIA_OVERHEAD_TOKENS = 3
"""Tokens beside the placeholders that a piece with one media item may need: its start marker, bos and eos."""
SEGMENT_OVERHEAD_TOKENS = 2
"""Tokens beside its part that a one-span segment needs: bos and eos."""
EMPTY_DOCUMENT = "document without tokens"
UNKNOWN_MODALITY = "part of a modality that is not registered or that the tokenizer has no marker for"
_UNKNOWN = -1
_MIX = np.asarray([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x27D4EB2F165667C5], np.uint64).view(
    np.int64
)
_SAMPLE_COLUMNS = ("key", "offset", "size", "xxh3", "json_offset", "json_size")
_PART_COLUMNS = ("part_offset", "part_size", "part_width", "part_height", "part_samples", "part_rate")


@dataclass(frozen=True, kw_only=True)
class ShardCatalog:
    """One shard: n samples, P parts.

    tar: path of the shard's tar.
    keys: [n] KEY of each sample.
    offsets, sizes, hashes: [n] byte range of each sample in the tar and its xxh3_64.
    json_offsets, json_sizes: [n] byte range of its document.
    part_starts: [n + 1] where each sample's parts begin in the part columns.
    part_kinds: [P] modality id, 0 text.
    part_offsets, part_sizes: [P] byte range of a media part.
    part_owners: [P] number of the sample whose bytes hold each part; None where all parts are in their own sample.
    part_infos: [P, 4] width, height, samples, rate.
    part_grids: [P, 3] token grid of a media part, zeros for text.
    part_tokens: [P] text tokens, or placeholders; 0 for parts that are left out.
    part_lengths: [P] tokens in the document: part_tokens, and the start marker of media.
    part_budgets: [P, D] use of each budget of a pack, tokens first.
    sample_budgets: [n, D] the same for whole documents with bos and eos; all zero where nothing is left.
    sample_modality_tokens: [n, M] tokens by modality, in the order of `modality_names`.
    left_out: reason -> [n] how many parts of each sample (or the sample itself) are left out for it.
    """

    tar: str
    keys: pa.ChunkedArray
    offsets: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    hashes: npt.NDArray[np.uint64]
    json_offsets: npt.NDArray[np.int64]
    json_sizes: npt.NDArray[np.int64]
    part_starts: npt.NDArray[np.int64]
    part_kinds: npt.NDArray[np.int8]
    part_offsets: npt.NDArray[np.int64]
    part_sizes: npt.NDArray[np.int64]
    part_owners: npt.NDArray[np.int64] | None
    part_infos: npt.NDArray[np.int64]
    part_grids: npt.NDArray[np.int32]
    part_tokens: npt.NDArray[np.int64]
    part_lengths: npt.NDArray[np.int64]
    part_budgets: npt.NDArray[np.int64]
    sample_budgets: npt.NDArray[np.int64]
    sample_modality_tokens: npt.NDArray[np.int64]
    left_out: dict[str, npt.NDArray[np.int64]]

    @cached_property
    def key_list(self) -> list[str]:
        """The keys as Python strings."""
        keys: list[str] = self.keys.to_pylist()
        return keys

    @cached_property
    def layout_columns(self) -> npt.NDArray[np.int64]:
        """[P, 5] kind, length in the document and token grid of each part: what laying out asks for, in one place."""
        return np.column_stack([self.part_kinds, self.part_lengths, self.part_grids]).astype(np.int64, copy=False)

    @cached_property
    def alone_parts(self) -> npt.NDArray[np.int64]:
        """[n, M] the first part of each modality in each sample, by its place in the part columns; -1 without.

        All -1 for samples with parts of fewer than two modalities. In the order of `modality_names`.
        """
        owners = np.repeat(np.arange(len(self.sizes)), np.diff(self.part_starts))
        ids = [0, *(modality.id for modality in MODALITIES.values())]
        result = np.full((len(self.sizes), len(ids)), -1, np.int64)
        for column, modality_id in enumerate(ids):
            places = np.flatnonzero((self.part_kinds == modality_id) & (self.part_lengths > 0))
            samples, first = np.unique(owners[places], return_index=True)
            result[samples, column] = places[first]
        result[(result >= 0).sum(axis=1) < 2] = -1
        return result

    @cached_property
    def alone_budgets(self) -> npt.NDArray[np.int64]:
        """[n, D] use of each budget by a sample's segments together; zeros without any."""
        chosen = self.alone_parts >= 0
        uses = np.where(chosen[:, :, None], self.part_budgets[np.where(chosen, self.alone_parts, 0)], 0)
        budgets: npt.NDArray[np.int64] = uses.sum(axis=1)
        budgets[:, 0] += SEGMENT_OVERHEAD_TOKENS * chosen.sum(axis=1)
        return budgets


def modality_names() -> list[str]:
    """Return text and the registered modalities, the order of every per-modality column."""
    return ["text", *MODALITIES]


def usable_modalities(tokenizer: Tokenizer) -> dict[str, Modality]:
    """Return the registered modalities whose markers the tokenizer has."""
    return {name: modality for name, modality in MODALITIES.items() if name in tokenizer.media}


def shard_tables(
    manifest: Manifest, shard: int, *, source: SourceConfig, tokenizer: Tokenizer
) -> tuple[Callable[[], pa.Table], Callable[[], pa.Table]]:
    """Return what reads the index and the token counts that `shard_catalogs` takes, as much as `source` needs of them.

    The two do not need each other. They raise DataError where a file is missing or damaged.
    """
    columns = [*_SAMPLE_COLUMNS, "part_modality", *_PART_COLUMNS, *selecting_columns(source)]
    return partial(read_index, manifest, shard, columns), partial(read_token_counts, manifest, shard, tokenizer.hash)


def shard_catalogs(
    manifest: Manifest,
    shards: Sequence[int],
    tables: Sequence[tuple[pa.Table, pa.Table]],
    *,
    source: SourceConfig,
    tokenizer: Tokenizer,
    geometry: MediaGeometry,
    caps: dict[str, int],
    encoder_weights: Mapping[str, float],
) -> list[ShardCatalog]:
    """Make the catalogs of shards of one source from their `shard_tables`, and select what `source` asks for.

    All are made at once: a numpy call costs the same for a shard of a hundred samples as for ten of them. Their columns
    are slices of common arrays, which live as long as one of the catalogs.

    Raises DataError where two tables do not fit together, and where samples have no label to select by.
    """
    index = pa.concat_tables([own for own, _ in tables])
    part_starts, text_tokens = _ragged(pa.chunked_array([c for _, own in tables for c in own["part_tokens"].chunks]))
    usable = usable_modalities(tokenizer)
    index_starts, kinds = _kinds(index["part_modality"], usable)
    if not np.array_equal(index_starts, part_starts):
        raise _misfit(manifest, shards, tables)
    columns = {name: _ragged(index[name])[1] for name in _PART_COLUMNS}
    first = np.cumsum([0, *(own.num_rows for own, _ in tables)])
    selected = select(source, manifest, shards, [own for own, _ in tables], kinds, part_starts, first)
    if selected.taken is not None:
        columns = {name: column[selected.taken] for name, column in columns.items()}
    infos = np.stack([columns[f"part_{name}"] for name in ("width", "height", "samples", "rate")], axis=1)
    part_grids = _part_grids(kinds, infos, usable, geometry)
    placeholders = part_grids[:, 0].astype(np.int64) * part_grids[:, 1] * part_grids[:, 2]
    tokens = np.where(kinds == 0, text_tokens, placeholders)
    budgets = _budgets(kinds, tokens, infos, list(caps), encoder_weights)
    sample_budgets, left_out = _leave_out(kinds, tokens, budgets, part_starts, caps, selected)
    modality_tokens = _modality_tokens(kinds, tokens, part_starts, sample_budgets[:, 0])
    numbers = {name: index[name].to_numpy() for name in _SAMPLE_COLUMNS[1:]}
    catalogs = []
    for shard, start, end in zip(shards, first[:-1].tolist(), first[1:].tolist(), strict=True):
        own = slice(start, end)
        parts = slice(int(part_starts[start]), int(part_starts[end]))
        catalogs.append(
            ShardCatalog(
                tar=shown(manifest.tar_path(shard)),
                keys=index["key"].slice(start, end - start),
                offsets=numbers["offset"][own],
                sizes=numbers["size"][own],
                hashes=numbers["xxh3"][own],
                json_offsets=numbers["json_offset"][own],
                json_sizes=numbers["json_size"][own],
                part_starts=part_starts[start : end + 1] - parts.start,
                part_kinds=kinds[parts],
                part_offsets=columns["part_offset"][parts],
                part_sizes=columns["part_size"][parts],
                part_owners=None if selected.owners is None else selected.owners[parts] - start,
                part_infos=infos[parts],
                part_grids=part_grids[parts],
                part_tokens=tokens[parts],
                part_lengths=budgets[parts, 0],
                part_budgets=budgets[parts],
                sample_budgets=sample_budgets[own],
                sample_modality_tokens=modality_tokens[own],
                left_out={reason: counts[own] for reason, counts in left_out.items()},
            )
        )
    return catalogs


def _misfit(manifest: Manifest, shards: Sequence[int], tables: Sequence[tuple[pa.Table, pa.Table]]) -> DataError:
    fits = (np.array_equal(_ragged(i["part_size"])[0], _ragged(c["part_tokens"])[0]) for i, c in tables)
    name = next(manifest.shards[shard].name for shard, fit in zip(shards, fits, strict=True) if not fit)
    return DataError(
        f"{manifest.location}: the token counts of {name} do not fit its index; run `triweave tokenize` again"
    )


def _ragged(column: pa.ChunkedArray) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the row starts [n + 1] and the values of a list column."""
    combined = _combined(column)
    offsets = combined.offsets.to_numpy().astype(np.int64)
    values = combined.values.to_numpy().astype(np.int64)[offsets[0] : offsets[-1]]
    return offsets - offsets[0], values


def _combined(column: pa.ChunkedArray) -> pa.ListArray:
    combined = column.combine_chunks()
    if isinstance(combined, pa.ChunkedArray):
        return combined.chunk(0) if combined.num_chunks else pa.array([], column.type)
    return combined


def _kinds(column: pa.ChunkedArray, usable: dict[str, Modality]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int8]]:
    """Return the row starts and the modality id of each part; _UNKNOWN for names that cannot be used."""
    combined = _combined(column)
    offsets = combined.offsets.to_numpy().astype(np.int64)
    names = combined.values.slice(offsets[0], offsets[-1] - offsets[0]).dictionary_encode()
    ids = {"text": 0} | {name: modality.id for name, modality in usable.items()}
    table = np.asarray([ids.get(name, _UNKNOWN) for name in names.dictionary.to_pylist()], np.int8)
    indices = names.indices.to_numpy()
    return offsets - offsets[0], table[indices] if len(indices) else np.empty(0, np.int8)


def _part_grids(
    kinds: npt.NDArray[np.int8], infos: npt.NDArray[np.int64], usable: dict[str, Modality], geometry: MediaGeometry
) -> npt.NDArray[np.int32]:
    """Return [P, 3] the token grid of each media part, zeros elsewhere."""
    result = np.zeros((len(kinds), 3), np.int32)
    for modality in usable.values():
        chosen = np.flatnonzero(kinds == modality.id)
        if modality.grids is not None:
            result[chosen] = modality.grids(infos[chosen], geometry)
        elif len(chosen):
            first, inverse = _distinct(infos[chosen])
            result[chosen] = grids(modality, geometry, infos[chosen[first]])[inverse]
    return result


def _distinct(infos: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return one row number for each distinct row of `infos`, and for each row which of these it equals.

    Sorts one mixed number per row, five times faster than sorting rows; a collision only falls back to no sharing.
    """
    _, first, inverse = np.unique(infos @ _MIX, return_index=True, return_inverse=True)
    if np.array_equal(infos[first[inverse]], infos):
        return first, inverse
    return np.arange(len(infos)), np.arange(len(infos))


def _modality_tokens(
    kinds: npt.NDArray[np.int8],
    tokens: npt.NDArray[np.int64],
    part_starts: npt.NDArray[np.int64],
    totals: npt.NDArray[np.int64],
) -> npt.NDArray[np.int64]:
    """Return [n, M] the tokens of each sample by modality; text is what its media leave of `totals`."""
    media = np.stack([np.where(kinds == modality.id, tokens, 0) for modality in MODALITIES.values()], axis=1)
    sums = _sum_by(media, part_starts)
    return np.concatenate([(totals - sums.sum(axis=1))[:, None], sums], axis=1)


def _budgets(
    kinds: npt.NDArray[np.int8],
    tokens: npt.NDArray[np.int64],
    infos: npt.NDArray[np.int64],
    names: list[str],
    encoder_weights: Mapping[str, float],
) -> npt.NDArray[np.int64]:
    """Return [P, D] what each part uses of the budgets `names`; encoder costs are rounded up."""
    image = kinds == MODALITIES["image"].id
    audio = kinds == MODALITIES["audio"].id
    rate = np.maximum(infos[:, 3], 1)
    weight = np.zeros(len(kinds))
    for name, modality in MODALITIES.items():
        weight[kinds == modality.id] = encoder_weights.get(name, 1.0)
    columns = {
        "tokens": tokens + (kinds != 0),
        "image_tokens": np.where(image, tokens, 0),
        "images": image.astype(np.int64),
        "audio_ms": np.where(audio, -(-infos[:, 2] * 1000 // rate), 0),
        "encoder_cost": np.ceil(tokens * weight).astype(np.int64),
    }
    return np.stack([columns[name] for name in names], axis=1).astype(np.int64)


def _leave_out(
    kinds: npt.NDArray[np.int8],
    tokens: npt.NDArray[np.int64],
    budgets: npt.NDArray[np.int64],
    part_starts: npt.NDArray[np.int64],
    caps: dict[str, int],
    selected: Selected,
) -> tuple[npt.NDArray[np.int64], dict[str, npt.NDArray[np.int64]]]:
    """Zero `tokens` and `budgets` of what is left out; return the samples' budgets and, by reason, their counts."""
    owner = np.repeat(np.arange(len(part_starts) - 1), np.diff(part_starts))
    reason_of_part, reasons = _reasons(kinds, budgets, caps)
    dropped = reason_of_part >= 0
    if selected.outside is not None:
        reason_of_part[selected.outside[owner]] = -1
        dropped |= selected.outside[owner]
    tokens[dropped] = 0
    budgets[dropped] = 0
    sample_budgets = _sum_by(budgets, part_starts)
    empty = sample_budgets[:, 0] == 0
    sample_budgets[~empty, 0] += 2
    left_out = {
        reason: np.bincount(owner[reason_of_part == number], minlength=len(empty))
        for number, reason in enumerate(reasons)
    }
    if selected.outside is not None:
        empty &= ~selected.outside
        left_out[selected.reason] = selected.outside.astype(np.int64)
    left_out[EMPTY_DOCUMENT] = empty.astype(np.int64)
    return sample_budgets, left_out


def _reasons(
    kinds: npt.NDArray[np.int8], budgets: npt.NDArray[np.int64], caps: dict[str, int]
) -> tuple[npt.NDArray[np.int64], list[str]]:
    """Return the number of the reason why each part is left out (-1: it stays) and the reasons."""
    names = {0: "text"} | {modality.id: name for name, modality in MODALITIES.items()}
    reason = np.full(len(kinds), -1, np.int64)
    reasons: list[str] = []

    def leave_out(chosen: npt.NDArray[np.bool_], text: str) -> None:
        chosen = chosen & (reason < 0)
        if chosen.any():
            reason[chosen] = len(reasons)
            reasons.append(text)

    leave_out(kinds == _UNKNOWN, UNKNOWN_MODALITY)
    for modality_id, name in names.items():
        if modality_id:
            too_long = (kinds == modality_id) & (budgets[:, 0] - 1 + MEDIA_OVERHEAD_TOKENS > caps["tokens"])
            leave_out(too_long, f"{name} longer than sequence_length={caps['tokens']} holds")
            for column, (budget, cap) in enumerate(caps.items()):
                if column:
                    over = (kinds == modality_id) & (budgets[:, column] > cap)
                    leave_out(over, f"{name} over packing.{budget}={cap}")
    return reason, reasons


def _sum_by(values: npt.NDArray[np.int64], starts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the sums of the rows of `values` [P, D] between consecutive `starts`, [n, D]."""
    running = np.zeros((len(values) + 1, values.shape[1]), np.int64)
    np.cumsum(values, axis=0, out=running[1:])
    return running[starts[1:]] - running[starts[:-1]]
