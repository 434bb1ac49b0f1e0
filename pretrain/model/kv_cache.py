"""The keys and values of earlier positions, kept per row so that decoding computes each position once.

B rows, S new positions, C slots, G key/value heads, K head width. A row's slots are its positions: prompts of different
lengths lie at the left, and a row's next token goes into the slot after its own last, over whatever the padding of a
longer neighbour left there. Intervals never reach the slots beyond a row's own length.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROWTH = 2
"""Factor by which the slots grow when they run out, so that a long text is not copied at every token."""
FIRST_SLOTS = 128


class LayerCache:
    """One layer's keys and values, [B, C, G, K] each; which slots the next call fills is `KeyValueCache`'s to say."""

    def __init__(self) -> None:
        self._keys = torch.empty(0)
        self._values = torch.empty(0)
        self._slots: Tensor | int = 0
        self._needed = 0

    def aim(self, slots: Tensor | int, needed: int) -> None:
        """Say where the next call's S positions go: from slot `slots` on in all rows, or int64 [B, S] slots.

        needed: slots that are in use afterwards.
        """
        self._slots, self._needed = slots, needed

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v [B, S, G, K] and return all keys and values in use, [B, T, G, K]."""
        if self._keys.dim() != 4 or self._keys.shape[1] < self._needed:
            capacity = max(self._needed + FIRST_SLOTS, GROWTH * self._keys.shape[1] if self._keys.dim() == 4 else 0)
            self._keys, self._values = (_grown(old, new, capacity) for old, new in ((self._keys, k), (self._values, v)))
        if isinstance(self._slots, int):
            end = self._slots + k.shape[1]
            self._keys[:, self._slots : end], self._values[:, self._slots : end] = k, v
        else:
            rows = torch.arange(k.shape[0], device=k.device).unsqueeze(1)
            self._keys[rows, self._slots], self._values[rows, self._slots] = k, v
        return self._keys[:, : self._needed], self._values[:, : self._needed]

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these, int64 [B']."""
        self._keys, self._values = self._keys[rows], self._values[rows]


class MediaCache:
    """One cross-attention's keys and values of a prompt's media, [B, M, G, K] each; they never grow."""

    def __init__(self) -> None:
        self._held: tuple[Tensor, Tensor] | None = None

    def hold(self, k: Tensor, v: Tensor) -> None:
        """Store k and v."""
        self._held = (k, v)

    def held(self) -> tuple[Tensor, Tensor]:
        """Return what was stored."""
        assert self._held is not None, "the prompt is read first"
        return self._held

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these, int64 [B']."""
        k, v = self.held()
        self._held = (k[rows], v[rows])


class KeyValueCache:
    """What a decoder of `layers` blocks and `cross_layers` cross-attentions has seen of B rows.

    layers: one LayerCache each. media: one MediaCache each. lengths: int64 [B] on the CPU, positions stored of
    each row.
    """

    def __init__(self, layers: int, rows: int, cross_layers: int = 0) -> None:
        self.layers = [LayerCache() for _ in range(layers)]
        self.media = [MediaCache() for _ in range(cross_layers)]
        self.lengths = torch.zeros(rows, dtype=torch.int64)

    def reserve(self, kv_lo: Tensor, kv_hi: Tensor) -> None:
        """Make room for S further positions whose intervals are kv_lo, kv_hi [B, S]; empty ones are padding."""
        positions = kv_lo.shape[1]
        first = int(self.lengths.min())
        last = int(self.lengths.max())
        slots: Tensor | int = first
        if first != last:
            slots = (self.lengths.unsqueeze(1) + torch.arange(positions)).to(kv_lo.device)
        for layer in self.layers:
            layer.aim(slots, last + positions)
        self.lengths = self.lengths + (kv_hi > kv_lo).sum(1).cpu()

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these, int64 [B'] on the CPU."""
        self.lengths = self.lengths[rows]
        for layer in self.layers:
            layer.keep(rows)
        for media in self.media:
            media.keep(rows)


def _grown(old: Tensor, new: Tensor, capacity: int) -> Tensor:
    """Return zeros [B, capacity, G, K] that begin with what `old` held."""
    grown = new.new_zeros(new.shape[0], capacity, *new.shape[2:])
    if old.dim() == 4:
        grown[:, : old.shape[1]] = old
    return grown
