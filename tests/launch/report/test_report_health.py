"""The health section of a report: what happened, escaped; a step without a finite loss does not break the page."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from triweave.launch.errors import ReportError
from triweave.launch.report.write import write_report
from triweave.pretrain.health.events import record_event

MakeRun = Callable[..., Path]


def render(*folders: Path) -> str:
    out = folders[0] / "report.html"
    write_report(list(folders), out, tell=lambda _: None)
    return out.read_text(encoding="utf-8")


def test_events_are_told_and_escaped(make_run: MakeRun) -> None:
    folder = make_run()
    assert 'id="health"' not in render(folder)
    record_event(folder, "skip", step=7, text="the loss of step 7 is not finite; rank 1 held <script>alert(1)</script>")
    record_event(folder, "roll_back", step=9, text="the weights of step 4 are back", to=4)
    metrics = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    lines[6] |= {"loss": None, "loss_by_modality": {"text": None}, "skipped": "the loss of step 7 is not finite"}
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = render(folder)
    section = page[page.index('id="health"') :].partition("</section>")[0]
    assert "step left out" in section
    assert "roll-back" in section
    assert "the weights of step 4 are back" in section
    assert "&lt;script&gt;alert(1)" in section
    assert "<script" not in page


def test_events_that_cannot_be_read_are_one_line(make_run: MakeRun) -> None:
    folder = make_run()
    (folder / "health").mkdir()
    (folder / "health" / "events.jsonl").write_text("{}\n")
    with pytest.raises(ReportError, match="not the events of a run"):
        render(folder)
