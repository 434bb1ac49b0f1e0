"""The parts of the demo that can be checked in seconds."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from triweave.data_pipeline.config import load_data_config
from triweave.data_pipeline.errors import FetchError
from triweave.data_pipeline.fetch import registry
from triweave.data_pipeline.fetch.target import Fetched
from triweave.data_pipeline.stream.loader import StepLoader
from triweave.data_pipeline.stream.plan import Planner
from triweave.launch.cli import main
from triweave.launch.demo import corpora, settings
from triweave.launch.demo.corpora import SETS, CorpusChoice
from triweave.launch.demo.evaluation import result_figures
from triweave.launch.demo.short import DemoOptions, run_demo
from triweave.launch.demo.training import kill_rank
from triweave.launch.demo.unigram import entropy, state_after, unigram_losses
from triweave.launch.errors import DemoError
from triweave.launch.metrics import mean_loss_by_modality, newest_metrics
from triweave.pretrain.config import load_config


def test_entropy_of_known_distributions() -> None:
    assert entropy(Counter({1: 7})) == 0
    assert entropy(Counter({1: 2, 2: 2, 3: 2, 4: 2})) == pytest.approx(math.log(4))


def test_unigram_losses_are_those_of_the_supervised_targets(tiny_run: Path) -> None:
    """Texts without a picture count under text, texts behind one under image; placeholders are no targets."""
    data = load_data_config(tiny_run)
    losses, tokens = unigram_losses(data, global_batch_rows=4, steps=3, state=None)
    assert set(losses) == {"text", "image"}
    assert all(0 < loss < math.log(320) for loss in losses.values())
    one_step, fewer_tokens = unigram_losses(data, global_batch_rows=4, steps=1, state=None)
    assert sum(fewer_tokens.values()) < sum(tokens.values())
    # an image document is bos, marker, 4 placeholders, text, eos: 5 positions of the row cannot be supervised
    assert 4 * 64 * 0.7 < sum(fewer_tokens.values()) < 4 * 64
    assert one_step != losses


def test_a_state_can_stand_in_any_epoch(tiny_run: Path) -> None:
    """The stream from there on is that of a loader that came there step by step."""
    data = load_data_config(tiny_run)
    planner = Planner(data)
    rows = planner.block(0).rows + planner.block(1).rows + 2
    loader = StepLoader(data, rank=0, world_size=1, global_batch_rows=rows, micro_batch_rows=8)
    expected = next(iter(loader)).state
    assert state_after(planner, steps=1, global_batch_rows=rows) == expected
    assert state_after(planner, steps=0, global_batch_rows=rows) == planner.start()


def test_mean_losses_weigh_by_tokens() -> None:
    entries = [
        {"loss_by_modality": {"text": 1.0, "image": 4.0}, "supervised_by_modality": {"text": 30.0, "image": 5.0}},
        {"loss_by_modality": {"text": 2.0}, "supervised_by_modality": {"text": 10.0}},
    ]
    assert mean_loss_by_modality(entries) == {"text": 1.25, "image": 4.0}


def test_the_newest_metrics_are_those_of_the_last_whole_line(tmp_path: Path) -> None:
    assert newest_metrics(tmp_path) is None
    lines = [json.dumps({"step": step, "words": "x" * 900}) + "\n" for step in range(1, 101)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + '{"step": 101, "wo', encoding="utf-8")
    newest = newest_metrics(tmp_path)
    assert newest is not None
    assert newest["step"] == 100


@pytest.mark.parametrize("template", [settings.SHORT_TEMPLATE, settings.LONG_TEMPLATE], ids=["short", "long"])
@pytest.mark.parametrize("name", list(SETS))
def test_the_configs_point_into_the_folder_of_the_demo(name: str, template: Path, tmp_path: Path) -> None:
    """Both corpora keep the weights of the shipped file; a corpus it does not name is taken whole."""
    tree = settings.demo_config(
        template,
        SETS[name],
        shards=tmp_path / "shards",
        tokenizer=tmp_path / "tokenizer.model",
        run_dir=tmp_path / "run",
        steps=77,
    )
    config = load_config(settings.write_config(tree, tmp_path / "config.yaml"))
    assert config.train.steps == 77
    assert [source.name for source in config.data.sources] == list(SETS[name].sources)
    assert {source.split for source in config.data.sources} == {"train"}
    assert sum(source.weight for source in config.data.sources) == pytest.approx(1.0)
    places = [config.run_dir, config.data.tokenizer, *(source.shards for source in config.data.sources)]
    assert all(Path(place).is_relative_to(tmp_path) for place in places)


def test_kill_rank_kills_the_rank_and_not_its_reader() -> None:
    """Two processes with the environment of rank 1, one the child of the other, beside a rank 0."""
    script = """
export RANK=0; sleep 60 & zero=$!
export RANK=1; bash -c 'sleep 60 & echo $!; wait' & one=$!
echo $zero $one; wait $one; echo ended $?; kill $zero; wait
"""
    process = subprocess.Popen(
        ["bash", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    )
    assert process.stdout is not None
    process.stdout.readline(), process.stdout.readline()
    assert not kill_rank(process.pid, 5)
    deadline = time.monotonic() + 10
    while not kill_rank(process.pid, 1):
        assert time.monotonic() < deadline
    assert process.stdout.readline() == "ended 137\n"
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=10)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--steps", "3"), "at least 30"),
        (("--long", "--steps", "3"), "at least 10"),
        (("--corpus", "emoji", "--tuxpaint", "x.deb"), "--tuxpaint goes with --corpus debian"),
    ],
)
def test_options_that_cannot_be_are_one_line(
    arguments: tuple[str, ...], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--out", str(tmp_path), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


class Corpora:
    """Stands in for the fetches: those that are named fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *broken: str) -> None:
        self.fetched: list[tuple[str, Path | None]] = []
        self.lines: list[str] = []

        def fetch(name: str, given: Path | None) -> Fetched:
            self.fetched.append((name, given))
            if name in broken:
                raise FetchError(f"no {name}: give a copy with --from FOLDER")
            return Fetched(corpus=name, origin=f"origin of {name}", files=1, total_bytes=1)

        for name in registry.CORPORA:
            monkeypatch.setitem(
                registry.CORPORA,
                name,
                lambda _, given, __, name=name: fetch(name, given),  # type: ignore[misc]
            )

    def get(self, choice: CorpusChoice, folder: Path) -> Any:
        choice.check()
        return corpora.fetch(choice, folder, update=lambda *_: None, note=self.lines.append)


@pytest.mark.parametrize("broken", ["tuxpaint", "asterisk"])
def test_without_debian_packages_it_goes_on_with_emoji_and_says_so(
    broken: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fetches = Corpora(monkeypatch, broken)
    facts = fetches.get(CorpusChoice(), tmp_path)
    assert facts["corpus_set"] == "emoji"
    assert facts["origins"] == {"emoji": "origin of emoji"}
    (line,) = fetches.lines
    assert "emoji" in line
    assert "synthetic speech" in line
    assert f"(no {broken})" in line


def test_with_debian_packages_both_corpora_are_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fetches = Corpora(monkeypatch)
    facts = fetches.get(CorpusChoice(given={"asterisk": tmp_path}), tmp_path)
    assert facts["corpus_set"] == "debian"
    assert facts["fallback_reason"] is None
    assert fetches.fetched == [("tuxpaint", None), ("asterisk", tmp_path)]
    assert fetches.lines == []


@pytest.mark.parametrize("choice", [CorpusChoice(corpus="debian"), CorpusChoice(given={"tuxpaint": Path("x.deb")})])
def test_what_was_asked_for_is_not_exchanged(
    choice: CorpusChoice, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(FetchError, match="no tuxpaint"):
        Corpora(monkeypatch, "tuxpaint").get(choice, tmp_path)


def test_no_corpus_at_all_names_both_reasons(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(DemoError, match=r"no asterisk.*no emoji"):
        Corpora(monkeypatch, "asterisk", "emoji").get(CorpusChoice(), tmp_path)


def test_too_few_steps_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(DemoError, match="at least"):
        run_demo(DemoOptions(out=tmp_path / "demo", steps=3))
    assert not (tmp_path / "demo").exists()


def test_the_result_takes_the_best_floor_of_every_task() -> None:
    recalls = {"r1": 0.2, "r10": 0.6, "ci": {"r1": [0.1, 0.3], "r10": [0.5, 0.7]}}
    floors = {"ridge": {"r1": 0.1, "r10": 0.5}, "length": {"r1": 0.3, "r10": 0.4}}
    task = {**recalls, "floors": floors, "difference": {"floor": "ridge"}, "chance": {"r1": 0.01, "r10": 0.1}, "n": 80}
    picture = {"true": 2.0, "shuffled": 2.5, "gap": 0.5, "ci": [0.4, 0.6], "n": 9, "tokens": 90, "corpora": {}}
    facts = result_figures({"retrieval": {"a->b": task}, "caption_nll": {"image": picture}})
    assert facts["retrieval"]["a->b"] == {**recalls, "floor": floors["ridge"], "chance": task["chance"], "n": 80}
    assert (facts["caption_nll_true"], facts["caption_nll_shuffled"]) == (2.0, 2.5)
    without = result_figures({"retrieval": {}, "caption_nll": {}})
    assert without["caption_nll_true"] is None
