from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from triweave.launch.demo.stage_display import SUMMARY, StageDisplay
from triweave.launch.demo.stages import StageChain

STAGES = ("first", "second", "third")


class Work:
    """Counts how often each stage worked; `fail` makes one of them stop in the middle."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.done: list[str] = []
        self.fail = ""

    def run(self, *, options: dict[str, Any] | None = None) -> dict[str, Any]:
        """Run the chain; return the facts of all stages."""
        facts: dict[str, Any] = {}
        with StageDisplay(STAGES) as display:
            chain = StageChain(self.folder / "stages", display, key=1)
            for name in STAGES:
                output = self.folder / name
                facts |= chain.run(
                    name,
                    (options or {}).get(name),
                    lambda name=name: self.work(name),
                    outputs=(output,),
                    discard=output,
                )
        return facts

    def work(self, name: str) -> dict[str, Any]:
        output = self.folder / name
        output.mkdir(exist_ok=True)
        (output / f"try-{len(list(output.iterdir()))}").touch()
        if name == self.fail:
            raise KeyboardInterrupt
        self.done.append(name)
        return {name: len(list(output.iterdir())), SUMMARY: name}


@pytest.fixture
def work(tmp_path: Path) -> Work:
    return Work(tmp_path)


def test_a_second_run_repeats_nothing_and_knows_the_facts(work: Work, capsys: pytest.CaptureFixture[str]) -> None:
    first = work.run()
    work.done.clear()
    assert work.run() == first
    assert work.done == []
    assert capsys.readouterr().err.count("reused") >= len(STAGES)


def test_an_interrupted_stage_continues_in_its_folder(work: Work) -> None:
    work.fail = "second"
    with pytest.raises(KeyboardInterrupt):
        work.run()
    work.fail = ""
    assert work.run()["second"] == 2  # the file of the first try is still there
    assert work.done == ["first", "second", "third"]


def test_other_options_redo_a_stage_and_all_after_it_from_scratch(work: Work) -> None:
    work.run()
    work.done.clear()
    assert work.run(options={"second": "other"})["second"] == 1  # its folder was emptied
    assert work.done == ["second", "third"]


def test_a_lost_output_redoes_what_was_made_from_it(work: Work) -> None:
    work.run()
    work.done.clear()
    for file in (work.folder / "first").iterdir():
        file.unlink()
    (work.folder / "first").rmdir()
    work.run()
    assert work.done == ["first", "second", "third"]


def test_a_damaged_marker_counts_as_none(work: Work) -> None:
    work.run()
    work.done.clear()
    (work.folder / "stages" / "third.json").write_text("{", encoding="utf-8")
    work.run()
    assert work.done == ["third"]


def test_outputs_may_follow_from_the_facts(tmp_path: Path) -> None:
    """A stage that chose what to make is redone when that is gone, and not when something else is."""
    done: list[str] = []

    def run() -> None:
        with StageDisplay(("choose",)) as display:
            chain = StageChain(tmp_path / "stages", display, key=1)
            chain.run("choose", None, choose, outputs=lambda facts: (tmp_path / facts["chosen"],))

    def choose() -> dict[str, Any]:
        done.append("choose")
        (tmp_path / "made").touch()
        return {"chosen": "made", SUMMARY: ""}

    run()
    run()
    assert len(done) == 1
    (tmp_path / "made").unlink()
    run()
    assert len(done) == 2


def test_a_chain_that_goes_on_from_another_depends_on_it(tmp_path: Path) -> None:
    keys = []
    for options in ("a", "a", "b"):
        with StageDisplay(("only",)) as display:
            chain = StageChain(tmp_path / "stages", display, key=1)
            chain.run("only", options, lambda: {SUMMARY: ""})
            keys.append(chain.key)
    assert keys[0] == keys[1] != keys[2]
