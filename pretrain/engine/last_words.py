"""Last words: what a rank that ends alone leaves for peers that wait in a collective it will never join.

    RUN/health/last-words.json     {"start", "error"}

Under ZeRO-3 peers wait for gathers in the middle of a forward pass, so a rank whose pass breaks the contract cannot
meet them to agree on the error. It leaves its message and ends; its sockets close, the peers' collective fails, and
they find the message, whichever rank it was that broke the contract and whichever one's end has freed them. A file
outlives all ranks; the process group's store lives in rank 0 and goes with it. Ranks that do not see rank 0's run_dir
have torch's error about the closed connection alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from pathlib import Path

from triweave.pretrain.engine.world import AGREED, World
from triweave.pretrain.errors import ParticipationError
from triweave.pretrain.health.events import FOLDER

FILE = "last-words.json"


class LastWords:
    """The place of the last words of this start's ranks."""

    def __init__(self, run_dir: str | Path, world: World) -> None:
        """Agree on what tells this start's words from those of one before; collective."""
        self._path = Path(run_dir) / FOLDER / FILE
        self._start = f"{int(world.gather([secrets.randbits(48)])[0, 0]):012x}"

    def leave(self, error: ParticipationError) -> None:
        """Write the error where peers find it; of several ranks' the last stays. Where it cannot be, nothing is."""
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self._path.with_name(f".{FILE}.{os.getpid()}")
            temporary.write_text(json.dumps({"start": self._start, "error": str(error)}), encoding="utf-8")
            temporary.replace(self._path)

    def found(self) -> ParticipationError | None:
        """Return the error of a rank that has ended, as one that all ranks raise; None where there is none."""
        with contextlib.suppress(OSError, ValueError):
            words = json.loads(self._path.read_text(encoding="utf-8"))
            if words["start"] == self._start:
                error = ParticipationError(words["error"])
                error.add_note(AGREED)
                return error
        return None
