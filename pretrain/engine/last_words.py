"""Last words: what a rank that ends alone leaves for peers that wait in a collective it will never join.

Under ZeRO-3 peers wait for gathers in the middle of a forward pass, so a rank whose pass breaks the contract cannot
meet them to agree on the error. It leaves its message in the process group's store and ends; its sockets close, the
peers' collective fails, and they find the message. The store lives in rank 0 and goes with it: where rank 0 is at
fault, and where a peer is freed only by rank 0's end, torch's error about the closed connection is all that this peer
has. The line of the rank at fault is on standard error in every case.
"""

from __future__ import annotations

import contextlib

import torch.distributed as dist

from triweave.pretrain.engine.world import AGREED
from triweave.pretrain.errors import ParticipationError

KEY = "triweave/last-words"


def leave_words(error: ParticipationError) -> None:
    """Write the error where peers find it; the first rank's stays."""
    _store().compare_set(KEY, "", str(error))


def last_words() -> ParticipationError | None:
    """Return the error of a rank that has ended, as one that all ranks raise; None where there is none to be read."""
    with contextlib.suppress(RuntimeError):  # the store went with rank 0
        store = _store()
        if store.check([KEY]):
            error = ParticipationError(store.get(KEY).decode())
            error.add_note(AGREED)
            return error
    return None


def _store() -> dist.Store:
    store: dist.Store = dist.distributed_c10d._get_default_store()
    return store
