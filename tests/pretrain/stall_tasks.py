"""What a rank waits for, told to the others inside rank processes."""

from __future__ import annotations

from typing import Any

from triweave.data_pipeline.stream.stalls import START_STEPS, STEPS_KEPT, StallMeter, StepLoad


def compared(world: Any) -> list[str | None]:
    """Return the news of each step of a rank that waits as many seconds as its number, beside a second of work."""
    meter = StallMeter(workers=0, remote=False)
    load = StepLoad(wait_s=float(world.rank), queue_depth=0, stages_ms=[{"fetch": 1.0, "decode": 9.0}])
    told = []
    for _ in range(START_STEPS + 2 * STEPS_KEPT):
        meter.add(load, 1.0)
        told.append(meter.news(world.texts))
    return told
