"""What cross-attention and MMCA read of a micro-batch: the same rows, arranged anew. numpy only, for loader workers.

    sequence   bos  a  b  <img>  i  i  i  c  eos        every token stands in the text
    cross      bos  a  b  <img>        i  c  eos        one tag a medium, its last token, stays in the text ...
               media axis        i  i  i                ... and the media tokens of a row are keys of their own
    mmca       as sequence; the interval of a media token begins at its own item

What the tag predicts is what the medium's last token predicted, so the supervised positions are the same ones, and an
interval of keys is one in either arrangement: `cross` counts kept tokens instead of tokens.

B rows, S packed length, R longest row of text and tags, T media tokens and L latents of the row with most, at least 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Generic, NamedTuple, TypeVar, cast

import numpy as np
import numpy.typing as npt

from triweave.data_pipeline.batch import PADDING_ID, TEXT_ID, PackedBatch, Payload
from triweave.kernels.mmca_tiles import own_spans
from triweave.pretrain.fusion.config import FusionConfig

Int = npt.NDArray[np.integer[Any]]
Array = TypeVar("Array")


@dataclass(frozen=True, kw_only=True)
class MediaAxis(Generic[Array]):
    """The media tokens of each row in a line of their own; arrays, or tensors once on a device.

    positions: int32 [B, T, 3] (t, h, w) of a media token, counted from the first of its item.
    latent_lo, latent_hi: int32 [B, L] what each latent of the resampler sees of the joint axis; L = 0 without one.
    joint: int64 [B * (T + L)] the joint axis, in which the latents of an item stand behind its tokens: which place of
        the line [media tokens, latents] of all rows each of its places takes; every place is taken once.
    """

    positions: Array
    latent_lo: Array
    latent_hi: Array
    joint: Array

    @property
    def keys(self) -> int:
        """Keys a row that the text sees: its latents, or its media tokens where there is no resampler."""
        latents, tokens = (cast(Any, part).shape[1] for part in (self.latent_lo, self.positions))
        return int(latents or tokens)


def for_mmca(batch: PackedBatch) -> PackedBatch:
    """Return the batch with the intervals of media tokens cut to their own items."""
    return replace(batch, kv_lo=own_spans(batch.kv_lo, batch.span_ids))


def for_cross(batch: PackedBatch, fusion: FusionConfig) -> tuple[PackedBatch, MediaAxis[Int]]:
    """Return the batch of R positions that the trunk reads, and its media axis.

    In it positions are those of text alone, counted from 0 in every document on all three axes; media_lo, media_hi
    [B, R] are the tokens (or latents) that a position sees, in the fusion's scope; payloads' token_index is the flat
    place in B * T. Tags are text. What is left out has no supervised position; segments keep their kept positions.
    """
    kept = _Kept.of(batch)
    items = _Items.of(batch)
    B, R = kept.rows, kept.width
    kv_lo, kv_hi = (kept.ahead_of(bound) for bound in (batch.kv_lo, batch.kv_hi))
    trunk_lo, trunk_hi = kept.take(kv_lo, 0), kept.take(kv_hi, 0)
    place = np.where(trunk_hi > trunk_lo, np.arange(R) - trunk_lo, 0)
    media_lo, media_hi = (kept.take(items.before(bound), 0) for bound in (batch.kv_lo, batch.kv_hi))
    axis, media_lo, media_hi = items.axis(batch, media_lo, media_hi, fusion)
    arranged = replace(
        batch,
        tokens=kept.take(batch.tokens, 0),
        modality_ids=kept.take(np.minimum(batch.modality_ids, TEXT_ID), PADDING_ID),
        document_ids=kept.take(batch.document_ids, -1),
        span_ids=kept.take(batch.span_ids, -1),
        positions=np.repeat(place[:, :, None], 3, axis=2).astype(np.int32),
        kv_lo=trunk_lo,
        kv_hi=trunk_hi,
        media_lo=media_lo.astype(np.int32),
        media_hi=media_hi.astype(np.int32),
        row_index=kept.flat(batch.row_index),
        segments=kept.segments(batch),
        payloads={name: items.payload(payload) for name, payload in batch.payloads.items()},
    )
    assert arranged.tokens.shape == (B, R)
    return arranged, axis


class _Kept(NamedTuple):
    """Which positions [B, S] stay in the text; `before` [B, S + 1] counts them from the left; `width` is R."""

    mask: npt.NDArray[np.bool_]
    before: Int

    @classmethod
    def of(cls, batch: PackedBatch) -> _Kept:
        span = batch.span_ids
        ends = np.ones(span.shape, np.bool_)
        ends[:, :-1] = span[:, 1:] != span[:, :-1]
        mask = (batch.modality_ids != PADDING_ID) & ((span < 0) | ends)
        return cls(mask, np.pad(np.cumsum(mask, axis=1), ((0, 0), (1, 0))))

    @property
    def rows(self) -> int:
        return len(self.mask)

    @property
    def width(self) -> int:
        return max(1, int(self.before[:, -1].max(initial=0)))

    def ahead_of(self, bound: Int) -> npt.NDArray[np.int32]:
        """Return how many kept positions of its row lie before each bound [B, S]."""
        return np.take_along_axis(self.before, bound.astype(np.int64), axis=1).astype(np.int32)

    def take(self, values: npt.NDArray[Any], empty: int) -> npt.NDArray[Any]:
        """Return the kept ones of values [B, S], [B, R], and `empty` behind a row's last."""
        row, column = np.nonzero(self.mask)
        taken = np.full((self.rows, self.width), empty, values.dtype)
        taken[row, self.before[row, column]] = values[row, column]
        return taken

    def flat(self, index: Int) -> npt.NDArray[np.int64]:
        """Return the flat places in B * R of kept flat places in B * S."""
        row, column = np.divmod(index, self.mask.shape[1])
        assert self.mask[row, column].all()
        return (row * self.width + self.before[row, column]).astype(np.int64)

    def segments(self, batch: PackedBatch) -> Any:
        """Return the one-span segments by their kept positions."""
        segments = batch.segments
        row, column = np.divmod(segments.first, self.mask.shape[1])
        first = self.before[row, column]
        lengths = self.before[row, column + segments.lengths] - first
        return replace(segments, first=(row * self.width + first).astype(np.int64), lengths=lengths.astype(np.int32))


class _Items(NamedTuple):
    """The media tokens of each row, in order.

    media_before: [B, S + 1] counts them from the left. item: [B, T + 1] the number of each one's item in its row, the
    row's items behind its last. first: [B, T] the media token that its item begins with. counts: [B] items of a row.
    place: [B, T] the position of each in B * S, -1 behind a row's last.
    """

    media_before: Int
    item: Int
    first: Int
    counts: Int
    place: Int

    @classmethod
    def of(cls, batch: PackedBatch) -> _Items:
        span = batch.span_ids
        B, S = span.shape
        media_before: Int = np.pad(np.cumsum(span >= 0, axis=1, dtype=np.int64), ((0, 0), (1, 0)))
        T = max(1, int(media_before[:, -1].max(initial=0)))
        begins = span >= 0
        begins[:, 1:] &= span[:, 1:] != span[:, :-1]
        number = np.cumsum(begins, axis=1) - 1
        counts = number[:, -1] + 1 if S else np.zeros(B, np.int64)
        row, column = np.nonzero(span >= 0)
        key = media_before[row, column]
        item = np.repeat(counts[:, None], T + 1, axis=1)
        item[row, key] = number[row, column]
        started = np.zeros((B, T), np.int64)
        started[row, key] = np.where(begins[row, column], key, 0)
        place = np.full((B, T), -1, np.int64)
        place[row, key] = row * S + column
        return cls(media_before, item, np.maximum.accumulate(started, axis=1), counts, place)

    def before(self, bound: Int) -> Int:
        """Return how many media tokens of its row lie before each bound [B, S]."""
        found: Int = np.take_along_axis(self.media_before, bound.astype(np.int64), axis=1)
        return found

    def payload(self, payload: Payload) -> Payload:
        """Return the payload with its tokens' flat places in B * T."""
        S, T = self.media_before.shape[1] - 1, self.first.shape[1]
        row, column = np.divmod(payload.token_index, S)
        return replace(payload, token_index=(row * T + self.media_before[row, column]).astype(np.int64))

    def axis(
        self, batch: PackedBatch, media_lo: Int, media_hi: Int, fusion: FusionConfig
    ) -> tuple[MediaAxis[Int], Int, Int]:
        """Return the media axis, and what each position sees of it: intervals of all media so far, cut to the scope."""
        B = len(self.first)
        sees = media_hi > media_lo
        last = np.where(sees, media_hi - 1, 0)
        if fusion.scope == "immediate":
            media_lo = np.take_along_axis(self.first, last, axis=1)
        flat = batch.positions.reshape(-1, 3)
        since = flat[self.place] - flat[np.take_along_axis(self.place, self.first, axis=1)]
        positions = np.where((self.place >= 0)[:, :, None], since, 0).astype(np.int32)
        latents = fusion.resampler_latents
        if latents is None:
            none = np.zeros((B, 0), np.int32)
            axis = MediaAxis[Int](positions=positions, latent_lo=none, latent_hi=none, joint=np.zeros(0, np.int64))
            return axis, np.where(sees, media_lo, 0), np.where(sees, media_hi, 0)
        latent_lo, latent_hi, joint = self._joint(latents)
        lo = np.take_along_axis(self.item, media_lo.astype(np.int64), axis=1) * latents
        hi = (np.take_along_axis(self.item, last, axis=1) + 1) * latents
        axis = MediaAxis[Int](positions=positions, latent_lo=latent_lo, latent_hi=latent_hi, joint=joint)
        return axis, np.where(sees, lo, 0), np.where(sees, hi, 0)

    def _joint(self, latents: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """Return latent_lo, latent_hi [B, L] and joint [B * (T + L)] for so many latents an item."""
        B, T = self.first.shape
        most = max(1, int(self.counts.max(initial=0)))
        numbers = np.broadcast_to(np.repeat(np.arange(most), latents), (B, most * latents))
        # A stable sort by item puts its latents, which come later in the line, behind its tokens.
        tokens = np.where(self.place >= 0, self.item[:, :T], most)
        order = np.argsort(np.concatenate([tokens, numbers], axis=1), axis=1, kind="stable")
        sizes = np.stack([(tokens == number).sum(axis=1) for number in range(most)], axis=1) + latents
        ends = np.cumsum(sizes, axis=1)
        live = np.arange(most) < self.counts[:, None]
        lo, hi = (np.repeat(np.where(live, bound, 0), latents, axis=1) for bound in (ends - sizes, ends))
        joint = (np.arange(B)[:, None] * order.shape[1] + order).reshape(-1)
        return lo.astype(np.int32), hi.astype(np.int32), joint.astype(np.int64)
