"""Pieces: what documents become before they are packed, with the use of each budget, as rows of one table.

A document that fits into a pack is one piece. A longer one is split: text at token boundaries, documents at part
boundaries, media spans never, and a part that fits into a pack of its own is never cut. The first piece carries the bos
token, the last one the eos token; a text is cut so that no lone token, which could not be trained on, is left at its
end.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import numpy.typing as npt
import xxhash

from triweave.data_pipeline.media.modalities import MODALITIES
from triweave.data_pipeline.stream.catalog import SEGMENT_OVERHEAD_TOKENS, ShardCatalog, modality_names

UNFIT_SEGMENTS = "one-span segments of a document that together pass a pack"
UNFIT_LATER = "part left over from the plan segment before that no pack of this one holds"
OWNER_COLUMNS = 6
"""Columns of a piece before its budgets: source, epoch, shard, sample, first token, end token."""
MORE_COLUMNS = 2
"""Columns after them: sum of the squared lengths of what attends to itself, one-span segments."""
Owner = tuple[int, int, int]
"""Source number, its epoch, shard number."""


def drawn_share(count: int, share: float, *key: object) -> npt.NDArray[np.bool_]:
    """Return which of `count` items `key` draws, each with probability `share`, bool [count].

    A larger share draws the same ones and more.
    """
    digest = xxhash.xxh3_128_intdigest("\x1f".join(map(str, key)).encode())
    draws = np.random.Philox(key=digest).random_raw(count)
    return draws <= np.uint64(max(0, min(int(share * 2**64), 2**64) - 1)) if share > 0 else np.zeros(count, bool)


class Pieces:
    """Collects the pieces of one block: int64 rows of OWNER_COLUMNS, use of each budget, MORE_COLUMNS."""

    def __init__(self, caps: dict[str, int]) -> None:
        self.caps = np.asarray(list(caps.values()), np.int64)
        self.tables: list[npt.NDArray[np.int64]] = []
        self.modality_tokens = np.zeros(len(modality_names()), np.int64)
        self.drawn = 0
        self.left_out: Counter[str] = Counter()

    def add(self, catalog: ShardCatalog, samples: npt.NDArray[np.int32], owner: Owner) -> None:
        """Add the documents `samples` of one shard: whole where they fit, as pieces where they do not."""
        budgets = catalog.sample_budgets[samples]
        self.drawn += len(samples)
        self.modality_tokens += catalog.sample_modality_tokens[samples].sum(axis=0)
        for reason, counts in catalog.left_out.items():
            if count := int(counts[samples].sum()):
                self.left_out[reason] += count
        fits = (budgets <= self.caps).all(axis=1)
        whole = fits & (budgets[:, 0] > 0)
        self._append(owner, samples[whole], budgets[whole], budgets[whole, 0] ** 2, 0)
        for sample in samples[~fits].tolist():
            self._append_spans(owner, sample, split_span(catalog, sample, (0, None), self.caps.tolist())[0])

    def add_alone(self, catalog: ShardCatalog, samples: npt.NDArray[np.int32], owner: Owner) -> None:
        """Add the one-span segments of the documents `samples` of one shard that have two modalities or more."""
        budgets = catalog.alone_budgets[samples]
        several = budgets[:, 0] > 0
        fits = several & (budgets <= self.caps).all(axis=1)
        if unfit := int((several & ~fits).sum()):
            self.left_out[UNFIT_SEGMENTS] += unfit
        self._append_alone(catalog, samples[fits], owner)

    def add_carried(self, catalog: ShardCatalog, spans: npt.NDArray[np.int64], owner: Owner) -> None:
        """Add what the plan before left over of the documents of one shard.

        spans: int64 [Q, 4] sample, first token, end token, segments (0: a span of the document).
        """
        for sample, first, end in spans[spans[:, 3] == 0, :3].tolist():
            pieces, unfit = split_span(catalog, sample, (first, end), self.caps.tolist())
            self._append_spans(owner, sample, pieces)
            if unfit:
                self.left_out[UNFIT_LATER] += unfit
            for first_token, end_token, *_ in pieces:
                self.modality_tokens += span_modality_tokens(catalog, sample, first_token, end_token)
        alone = spans[spans[:, 3] > 0, 0].astype(np.int32)
        fits = (catalog.alone_budgets[alone] <= self.caps).all(axis=1)
        if unfit := int((~fits).sum()):
            self.left_out[UNFIT_SEGMENTS] += unfit
        self._append_alone(catalog, alone[fits], owner)

    def _append_alone(self, catalog: ShardCatalog, samples: npt.NDArray[np.int32], owner: Owner) -> None:
        budgets = catalog.alone_budgets[samples]
        places = catalog.alone_parts[samples]
        held = places >= 0
        lengths = np.where(held, catalog.part_lengths[places] + SEGMENT_OVERHEAD_TOKENS, 0)
        media = np.where(held, catalog.part_tokens[places], 0)
        media[:, 0] = 0
        tokens = media.sum(axis=0)
        tokens[0] = int(budgets[:, 0].sum()) - int(tokens.sum())
        self.modality_tokens += tokens
        self._append(owner, samples, budgets, (lengths**2).sum(axis=1), held.sum(axis=1))

    def _append_spans(self, owner: Owner, sample: int, pieces: list[tuple[int, ...]]) -> None:
        rows = [(*owner, sample, *piece, (piece[1] - piece[0]) ** 2, 0) for piece in pieces]
        if rows:
            self.tables.append(np.asarray(rows, np.int64))

    def _append(
        self,
        owner: Owner,
        samples: npt.NDArray[np.int32],
        budgets: npt.NDArray[np.int64],
        squares: npt.NDArray[np.int64],
        segments: npt.NDArray[np.int64] | int,
    ) -> None:
        table = np.zeros((len(samples), OWNER_COLUMNS + len(self.caps) + MORE_COLUMNS), np.int64)
        table[:, :3] = owner
        table[:, 3] = samples
        table[:, 5] = budgets[:, 0]
        table[:, OWNER_COLUMNS:-MORE_COLUMNS] = budgets
        table[:, -2], table[:, -1] = squares, segments
        self.tables.append(table)

    def table(self) -> npt.NDArray[np.int64]:
        """Return all pieces, int64 [Q, OWNER_COLUMNS + budgets + MORE_COLUMNS]."""
        columns = OWNER_COLUMNS + len(self.caps) + MORE_COLUMNS
        return np.concatenate([np.zeros((0, columns), np.int64), *self.tables])


def split_span(
    catalog: ShardCatalog, sample: int, span: tuple[int, int | None], caps: list[int]
) -> tuple[list[tuple[int, ...]], int]:
    """Split the tokens [first, end) of a document, None for its end, into pieces that fit into packs of `caps`.

    Return the pieces, (first token, end token, use of each budget), and how many media parts no pack holds; these are
    between the pieces. bos counts to the first part and eos to the last.
    """
    parts = slice(int(catalog.part_starts[sample]), int(catalog.part_starts[sample + 1]))
    lengths = catalog.part_lengths[parts]
    borders = 1 + np.r_[0, np.cumsum(lengths)]
    first, end = span[0], int(borders[-1]) + 1 if span[1] is None else span[1]
    held = np.minimum(borders[1:], end) - np.maximum(borders[:-1], first)
    chosen = np.flatnonzero(held > 0)
    uses = catalog.part_budgets[parts][chosen]
    uses[:, 0] = held[chosen]
    uses[0, 0] += first == 0
    uses[-1, 0] += end > borders[-1]
    window = caps[0]
    pieces: list[tuple[int, ...]] = []
    used = [0] * len(caps)
    unfit = 0

    def close() -> None:
        nonlocal first, used
        if used[0]:
            pieces.append((first, first + used[0], *used))
            first += used[0]
            used = [0] * len(used)

    for use, is_media in zip(uses.tolist(), (catalog.part_kinds[parts][chosen] != 0).tolist(), strict=True):
        if is_media and any(need > cap for need, cap in zip(use, caps, strict=True)):
            close()
            first += use[0]
            unfit += 1
            continue
        if any(have + need > cap for have, need, cap in zip(used, use, caps, strict=True)):
            if use[0] <= window:
                close()
            else:
                while use[0] > (room := window - used[0]):
                    used[0] += room - 1 if use[0] - room == 1 else room
                    use[0] -= room - 1 if use[0] - room == 1 else room
                    close()
        used = [have + need for have, need in zip(used, use, strict=True)]
    close()
    return pieces, unfit


def span_modality_tokens(catalog: ShardCatalog, sample: int, first: int, end: int) -> npt.NDArray[np.int64]:
    """Return the tokens of [first, end) of a document by modality, in the order of `modality_names`."""
    parts = slice(int(catalog.part_starts[sample]), int(catalog.part_starts[sample + 1]))
    begins = 1 + np.cumsum(catalog.part_lengths[parts]) - catalog.part_lengths[parts]
    inside = (begins >= first) & (begins < end)
    ids = [modality.id for modality in MODALITIES.values()]
    media = [int(catalog.part_tokens[parts][inside & (catalog.part_kinds[parts] == number)].sum()) for number in ids]
    return np.asarray([end - first - sum(media), *media], np.int64)
