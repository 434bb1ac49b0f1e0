"""Which checkpoints stay."""

from __future__ import annotations

from triweave.pretrain.checkpoints.stores import Store


def kept_steps(steps: list[int], keep: int, keep_every_steps: int = 0) -> list[int]:
    """Return which of the steps retention keeps: the newest `keep`, and multiples of `keep_every_steps`."""
    newest = set(sorted(steps)[-keep:])
    return [step for step in steps if step in newest or (keep_every_steps and step % keep_every_steps == 0)]


def prune(store: Store, keep: int, *, step: int, keep_every_steps: int = 0) -> list[int]:
    """Remove all checkpoints that retention does not keep, and return their steps, ascending.

    Those after `step` go too: they were damaged, and the run has been resumed from before them.
    """
    steps = store.steps()
    kept = kept_steps([known for known in steps if known <= step], keep, keep_every_steps)
    removed = [known for known in steps if known not in kept]
    for known in removed:
        store.discard(known)
    return removed
