"""Sequence parallelism: N ranks hold slices of the same packs, and see whole rows where attention needs them.

    [B, S_p, H, K]  every head of a rank's own positions         projections, norms, rotation, feed-forward, loss
         | exchange                                              one all-to-all of q, k and v
    [B, S, H_p, K]  every position of a rank's own heads         attention over the whole rows
         | exchange back                                         one all-to-all of what attention returns
    [B, S_p, H, K]

Nothing is approximated: each number is computed by one rank as one rank alone would compute it. Gradients of weights
are sums over positions, so what the ranks' slices give adds up to the whole in the reduction that ZeRO does anyway.
Neither S nor H nor G has to be a multiple of N: the first ranks hold one position, or one key/value head with its
queries, more. With fewer key/value heads than ranks the query heads are dealt out instead, each rank gets the key/value
heads that its queries read, and autograd sums what comes back.
DeepSpeed's own layer (`deepspeed.sequence.layer`) wants slices of one length, and torch's differentiable all-to-all is
deprecated, so the exchange is ours, over torch's collective; a heartbeat names it.
Source: Jacobs et al. 2023, DeepSpeed Ulysses.

B rows, S packed length, S_p positions of this rank's slice, H query heads, H_p of this rank, G key/value heads, K head
width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from triweave.pretrain.engine.world import World
from triweave.pretrain.health.heartbeat import noted


@dataclass(frozen=True, kw_only=True)
class HeadShare:
    """The heads of one rank: queries `first` to `end` of H, and which of the G key/value heads they read, in order.

    Query `first` + i reads key_values[i // (count / len(key_values))]; a head may be there more than once.
    """

    first: int
    end: int
    key_values: tuple[int, ...]

    @property
    def count(self) -> int:
        """Query heads."""
        return self.end - self.first

    @property
    def width(self) -> int:
        """Heads of q, k and v together."""
        return self.count + 2 * len(self.key_values)


def shares(total: int, ranks: int) -> tuple[int, ...]:
    """Return how many of `total` things, dealt out in runs, each rank gets; the first ones get one more."""
    return tuple(total // ranks + (place < total % ranks) for place in range(ranks))


@cache
def head_shares(heads: int, kv_heads: int, ranks: int) -> tuple[HeadShare, ...]:
    """Return the heads of each rank; heads >= ranks, kv_heads divides heads.

    Key/value heads stay with all their queries where there is one for every rank.
    """
    queries = heads // kv_heads
    counts = [queries * share for share in shares(kv_heads, ranks)] if kv_heads >= ranks else shares(heads, ranks)
    found, first = [], 0
    for count in counts:
        read = [head // queries for head in range(first, first + count)]
        once = sorted(set(read))
        even = all(read.count(head) * len(once) == count for head in once)
        found.append(HeadShare(first=first, end=first + count, key_values=tuple(once if even else read)))
        first += count
    return tuple(found)


@dataclass(frozen=True, kw_only=True)
class SequenceGroup:
    """This rank among the N that hold slices of the same packs: ranks N k to N k + N - 1.

    place: which slice is this rank's. group: the process group.
    """

    size: int
    place: int
    group: Any

    @classmethod
    def of(cls, world: World, size: int) -> SequenceGroup:
        """Return this rank's group of `size` ranks, which divides those of the world; collective."""
        groups = [
            dist.new_group(list(range(first, first + size))) if size > 1 else None
            for first in range(0, world.size, size)
        ]
        number, place = divmod(world.rank, size)
        return cls(size=size, place=place, group=groups[number])

    def to_heads(self, q: Tensor, k: Tensor, v: Tensor, positions: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return q [B, S, H_p, K], k and v [B, S, G_p, K] of this rank's heads; S = `positions`. Collective.

        q: [B, S_p, H, K]; k, v: [B, S_p, G, K] of its own positions, S_p its share of S.
        """
        B, _, H, K = q.shape
        lengths, plan = shares(positions, self.size), head_shares(H, k.shape[2], self.size)
        parts = []
        for share in plan:
            read = list(share.key_values)
            parts.append(torch.cat([q[:, :, share.first : share.end], k[:, :, read], v[:, :, read]], dim=2))
        mine = plan[self.place]
        received = self._exchange(parts, [(B, length, mine.width, K) for length in lengths])
        kept = len(mine.key_values)
        of_q, of_k, of_v = torch.cat(received, dim=1).split((mine.count, kept, kept), dim=2)
        return of_q, of_k, of_v

    def to_positions(self, mixed: Tensor, heads: int, kv_heads: int) -> Tensor:
        """Return [B, S_p, H, K], all heads of this rank's positions, of mixed [B, S, H_p, K]. Collective."""
        B, S, _, K = mixed.shape
        lengths, plan = shares(S, self.size), head_shares(heads, kv_heads, self.size)
        own = lengths[self.place]
        received = self._exchange(mixed.split(lengths, dim=1), [(B, own, share.count, K) for share in plan])
        return torch.cat(received, dim=2)

    def _exchange(self, parts: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Send part r to rank r of the group; return what each rank sent here, of these shapes."""
        sent = [part.numel() for part in parts]
        sizes = [torch.Size(shape).numel() for shape in shapes]
        flat: Tensor = _AllToAll.apply(torch.cat([part.reshape(-1) for part in parts]), sizes, sent, self.group)
        return [piece.view(shape) for piece, shape in zip(flat.split(sizes), shapes, strict=True)]


class _AllToAll(torch.autograd.Function):
    """Runs of a flat tensor to the ranks of a group, and the runs of their gradients back."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, received: list[int], sent: list[int], group: Any) -> Tensor:
        ctx.received, ctx.sent, ctx.group = received, sent, group
        return _all_to_all(flat, received, sent, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _all_to_all(gradients[0].contiguous(), ctx.sent, ctx.received, ctx.group), None, None, None


def _all_to_all(flat: Tensor, received: list[int], sent: list[int], group: Any) -> Tensor:
    result = flat.new_empty(sum(received))
    noted("all_to_all of the heads", dist.all_to_all_single)(result, flat, received, sent, group=group)
    return result
