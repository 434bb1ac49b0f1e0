"""StreamState: where a stream of packs stands, in a few hundred bytes that are the same on every rank.

A stream is a sequence of absolute plan rows 0, 1, 2, ... produced block by block by a plan that is a pure function of
metadata. So the next row, the block that holds it and the first row of that block are all a resume needs, on any
number of ranks and workers; the segments say which plan made which rows.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from triweave.data_pipeline.errors import StateError

STATE_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class PlanSegment:
    """Rows [first_row, end_row) were made by the plan `plan_hash`; `identity` is what that hash covers."""

    plan_hash: str
    first_row: int
    end_row: int
    identity: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class SourceCursor:
    """Position of a source at the start of the state's block: samples before (epoch, sample) are in earlier blocks."""

    epoch: int
    sample: int


@dataclass(frozen=True, kw_only=True)
class StreamState:
    """Everything that continues the stream.

    segments: what has been read so far, oldest first; the last one ends at `next_row`.
    next_row: the absolute plan row that comes next.
    block, block_first_row: the block that holds `next_row` (or ends just before it), and the block's first row.
    cursors: source name -> position at the start of that block.
    """

    segments: tuple[PlanSegment, ...]
    next_row: int
    block: int
    block_first_row: int
    cursors: dict[str, SourceCursor]

    def to_json(self) -> str:
        """Return the state as one line of JSON with sorted keys."""
        return json.dumps({"v": STATE_VERSION, **asdict(self)}, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> StreamState:
        """Return the state that `to_json` wrote. Raises StateError where it is none."""
        try:
            fields = json.loads(text)
            if fields["v"] != STATE_VERSION:
                raise StateError(f"stream state has version {fields['v']}; this triweave reads version {STATE_VERSION}")
            return cls(
                segments=tuple(PlanSegment(**segment) for segment in fields["segments"]),
                next_row=int(fields["next_row"]),
                block=int(fields["block"]),
                block_first_row=int(fields["block_first_row"]),
                cursors={name: SourceCursor(**cursor) for name, cursor in fields["cursors"].items()},
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StateError(
                f"stream state is damaged ({type(error).__name__}: {error}); use another checkpoint"
            ) from None

    def check_plan(self, plan_hash: str, identity: dict[str, Any]) -> None:
        """Raise StateError, naming what changed, unless the plan `plan_hash` made the rows before `next_row`.

        A block is packed as a whole, so no plan can take over another one's rows without losing or repeating samples.
        """
        last = self.segments[-1]
        if last.plan_hash == plan_hash:
            return
        changed = [key for key in identity if last.identity.get(key) != identity[key]]
        changed += [key for key in last.identity if key not in identity]
        listing = "; ".join(f"{key} was {last.identity.get(key)}, is {identity.get(key)}" for key in changed[:3])
        raise StateError(
            f"the saved stream stands at row {self.next_row} of another plan ({listing}): "
            "set these back to resume, or start a new run folder"
        )
