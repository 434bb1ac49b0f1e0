"""StreamState: where a stream of packs stands, in a few hundred bytes that are the same on every rank.

A stream is a sequence of absolute plan rows 0, 1, 2, ... in plan segments, one for each stretch of steps between two
changes of `data.schedule`. A segment's rows come block by block from a plan that is a pure function of metadata; what a
plan had left over of its last block is packed again in the first block of the next one. So for each segment the block
it stands in, that block's first row and the row after its last one are all a resume needs, on any number of ranks and
workers.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from triweave.data_pipeline.errors import StateError

STATE_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class PlanSegment:
    """Rows [first_row, end_row) were made by the plan `plan_hash`; `identity` is what that hash covers.

    first_step: steps taken before it. block, block_first_row: the block that holds row `end_row` (or ends just before
    it), counted from the segment's start, and that block's first row.
    """

    plan_hash: str
    first_row: int
    end_row: int
    first_step: int
    block: int
    block_first_row: int
    identity: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class SourceCursor:
    """Position of a source at the start of the state's block: samples before (epoch, sample) are in earlier blocks."""

    epoch: int
    sample: int


@dataclass(frozen=True, kw_only=True)
class StreamState:
    """Everything that continues the stream.

    segments: what has been read so far, oldest first.
    step: the steps taken.
    cursors: source name -> position at the start of the last segment's block.
    """

    segments: tuple[PlanSegment, ...]
    step: int
    cursors: dict[str, SourceCursor]

    @property
    def next_row(self) -> int:
        """The absolute plan row that comes next."""
        return self.segments[-1].end_row

    @property
    def block(self) -> int:
        """The block of the last segment that holds `next_row`, or ends just before it."""
        return self.segments[-1].block

    @property
    def block_first_row(self) -> int:
        """The absolute row that `block` begins with."""
        return self.segments[-1].block_first_row

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
                step=int(fields["step"]),
                cursors={name: SourceCursor(**cursor) for name, cursor in fields["cursors"].items()},
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StateError(
                f"stream state is damaged ({type(error).__name__}: {error}); use another checkpoint"
            ) from None

    def check_segment(self, number: int, plan_hash: str, identity: dict[str, Any], first_step: int) -> None:
        """Raise StateError, naming what changed, unless the plan `plan_hash` made segment `number` from that step on.

        A block is packed as a whole, so no plan can take over another one's rows without losing or repeating samples.
        """
        made = self.segments[number]
        changed = [f"schedule was after_step={made.first_step}, is {first_step}"] * (made.first_step != first_step)
        if made.plan_hash != plan_hash:
            keys = [key for key in identity if made.identity.get(key) != identity[key]]
            keys += [key for key in made.identity if key not in identity]
            changed += [f"{key} was {made.identity.get(key)}, is {identity.get(key)}" for key in keys[:3]]
        if changed:
            raise StateError(
                f"the saved stream stands at row {self.next_row} of another plan ({'; '.join(changed)}): set these "
                f"back to resume, start a new run folder, or change weights, length and caps by an entry of "
                f"data.schedule with after_step={self.step}"
            )
