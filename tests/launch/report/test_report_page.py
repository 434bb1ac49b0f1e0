"""The page as text: what it says, what it escapes, what it refuses, and that equal inputs give equal bytes."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from triweave.launch.cli import main
from triweave.launch.errors import ReportError
from triweave.launch.report.evaluation_file import parse_evaluation
from triweave.launch.report.plots import MOST_POINTS, Series, curve_plot
from triweave.launch.report.run_files import read_run, short_names
from triweave.launch.report.verdict import judge
from triweave.launch.report.wording import count, duration, number, readable
from triweave.launch.report.write import write_report

MakeRun = Callable[..., Path]
VOID = {"meta", "link", "img", "br", "input", "hr"}


class Page(HTMLParser):
    """Collects the elements and the text of a page, and notes tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.mismatches: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.mismatches.append(tag)

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def render(*folders: Path, out: Path | None = None, told: list[str] | None = None) -> str:
    target = out or folders[0].parent / "page.html"
    write_report(folders, target, tell=(told if told is not None else []).append)
    return target.read_text(encoding="utf-8")


def test_corpus_text_is_escaped_and_shown(page_text: str) -> None:
    text = page_text
    page = Page(text)
    assert "<script" not in text
    assert "<script>alert(1)</script> & \"quoted\" 'text' </style>" in page.text
    assert "generated <script>alert(1)</script>" in page.text
    assert "Processor <b>X</b>" in page.text
    assert {tag for tag, _ in page.elements} & {"script", "iframe", "object", "embed", "base", "form"} == set()
    assert page.mismatches == []
    assert page.open == []


def test_the_policy_allows_this_style_sheet_and_nothing_that_is_not_in_the_page(page_text: str) -> None:
    text = page_text
    page = Page(text)
    policy = next(attributes["content"] for tag, attributes in page.elements if "http-equiv" in attributes)
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert str(policy).split("; ") == [
        *("default-src 'none'", f"style-src 'sha256-{digest}'", "img-src data:", "media-src data:"),
        *("base-uri 'none'", "form-action 'none'"),
    ]
    for tag, attributes in page.elements:
        assert "style" not in attributes, tag  # the policy would block it
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("src", "href", "xlink:href"):
            assert str(attributes.get(name) or "#").startswith(("data:", "#")), (tag, attributes)
    assert "http" not in re.sub(r"http-equiv", "", text)


def test_ids_are_unique_and_every_reference_has_one(make_run: MakeRun) -> None:
    text = render(make_run("a"), make_run("b"))
    ids = [str(attributes["id"]) for _, attributes in Page(text).elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    references = re.findall(r"url\(#([^)]+)\)|href=\"#([^\"]+)\"", text)
    labels = [label for match in re.findall(r"aria-labelledby=\"([^\"]+)\"", text) for label in match.split()]
    assert {first or second for first, second in references} | set(labels) <= set(ids)


def test_plots_take_their_colours_from_the_page(page_text: str) -> None:
    text = page_text
    drawings = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(drawings) >= 10
    for drawing in drawings:
        assert re.search(r"(fill|stroke)=\"(#|rgb|black)", drawing) is None
        assert "<title" in drawing
        assert "font-family" not in drawing
        assert all("f-" in mark for mark in re.findall(r"<text[^>]*>", drawing))


def test_equal_inputs_give_equal_bytes_whatever_matplotlib_is_set_to(make_run: MakeRun, tmp_path: Path) -> None:
    import matplotlib

    folder = make_run()
    first = render(folder, out=tmp_path / "one.html")
    with matplotlib.rc_context({"axes.linewidth": 9, "axes.grid.axis": "x", "svg.fonttype": "path"}):
        assert render(folder, out=tmp_path / "two.html") == first


def test_the_page_says_what_the_figures_are(page_text: str) -> None:
    text = Page(page_text).text
    for words in (
        "Partly. A caption costs 0.200 nats per token more under a wrong picture (95 % interval 0.100 to 0.300)",
        "a wrong sound does not measurably worsen captions (0.010 nats",
        "above chance in 1 of 2 tasks and above the best classical floor in 1 of 2 (below it in 1)",
        "a control trained on shuffled pairs is at chance in 1 of 1",
        "tuxpaint image → caption en 40.0 (35.0 to 45.0) +10.0 (5.0 to 15.0) 11.0 / 1.0 10.0 / 1.0 12.0 / 1.0 "
        "30.0 / 7.5 10.0 33.0, chance 12.5 12.0 120 / 100",
        "by image 3.000 3.200 +0.200 (0.100 to 0.300) 3.150 120",
        "category 120 16 55.0 (50.0 to 60.0) 26.6 51.0",
        "Pack fill 97.7 %",
        "Waiting for data 10.0 %",
        "4.82 M",
    ):
        assert words in text, words


def test_objectives_have_plots_where_a_run_has_several(make_run: MakeRun, page_text: str) -> None:
    folder = make_run()
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    for entry in entries:
        entry["tasks"] = {"language_model": {"loss": 2.0, "weight": 1.0}, "matching": {"loss": 0.6, "accuracy": 0.9}}
    text = "".join(json.dumps(entry) + "\n" for entry in entries)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    write_report([folder], folder / "report.html", tell=lambda _: None)
    page = (folder / "report.html").read_text(encoding="utf-8")
    for title in ("Objectives, loss", "Objectives, accuracy", "Objectives, weight"):
        assert title in page
        assert title not in page_text


def test_verdicts(make_run: MakeRun) -> None:
    folder = make_run()

    def level(change: Callable[[dict[str, Any]], Any]) -> str:
        content = copy.deepcopy(json.loads((folder / "evaluation.json").read_text(encoding="utf-8")))
        change(content)
        (folder / "changed").mkdir(exist_ok=True)
        for name in ("metrics.jsonl", "config.yaml"):
            (folder / "changed" / name).write_bytes((folder / name).read_bytes())
        (folder / "changed" / "evaluation.json").write_text(json.dumps(content), encoding="utf-8")
        return judge(read_run(folder / "changed", "changed")).level

    def sounds_matter(content: dict[str, Any]) -> None:
        content["caption_nll"]["audio"]["ci"] = [0.001, 0.02]

    def only_at_chance(content: dict[str, Any]) -> None:
        content["caption_nll"]["image"]["ci"] = [-0.1, 0.3]
        del content["retrieval"]["tuxpaint image->caption en"]

    def only_one_task_of_three_above_its_floor(content: dict[str, Any]) -> None:
        sounds_matter(content)
        task = copy.deepcopy(content["retrieval"]["tuxpaint image->caption en"])
        task["difference"]["r10"]["ci"] = [-0.1, 0.1]
        content["retrieval"] |= {"second": task, "tuxpaint speech->image": task}

    def one_task_of_three_by_luck(content: dict[str, Any]) -> None:
        content["caption_nll"]["image"]["ci"] = [-0.1, 0.3]
        content["retrieval"]["second"] = content["retrieval"]["tuxpaint speech->image"]

    def a_control_that_finds_as_much(content: dict[str, Any]) -> None:
        sounds_matter(content)
        content["retrieval"]["tuxpaint image->caption en"]["control"]["ci"]["r10"] = [0.3, 0.4]

    assert level(lambda _: None) == "partly"
    assert level(sounds_matter) == "yes"
    assert level(only_one_task_of_three_above_its_floor) == "floor"
    assert level(only_at_chance) == "no"
    assert level(one_task_of_three_by_luck) == "no"
    assert level(a_control_that_finds_as_much) == "partly"
    assert level(lambda content: content.update(retrieval={}, caption_nll={})) == "open"


def test_without_an_evaluation_the_page_says_what_to_run(make_run: MakeRun) -> None:
    folder = make_run("<b>a", evaluated=False)
    text = Page(render(folder)).text
    assert f"run triweave evaluate {folder}" in text
    assert "Not measured." in text


def test_the_unigram_level_is_that_of_the_demo_that_trained_this_run(make_run: MakeRun) -> None:
    folder = make_run()
    first = json.loads((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])["loss"]
    result = {"steps": 40, "loss_first": first, "unigram_by_modality": {"text": 5.25}, "parameters": 7}
    (folder.parent / "result.json").write_text(json.dumps(result), encoding="utf-8")
    assert "best unigram model 5.25" in Page(render(folder)).text
    (folder.parent / "result.json").write_text(json.dumps(result | {"loss_first": 1.0}), encoding="utf-8")
    text = Page(render(folder)).text
    assert "best unigram model 5.25" not in text
    assert "Best unigram model" not in text  # a column of which no row has a figure is left out


def test_several_runs_stand_side_by_side(make_run: MakeRun) -> None:
    other = {"optimizer": {"lr": 0.003}, "train": {"global_batch_rows": 4, "steps": 40}}
    text = Page(render(make_run("a"), make_run("b", config=other))).text
    assert "runs/a and runs/b" in text
    assert "optimizer.lr 0.005 0.003" in text
    assert "generated by runs/a" in text
    assert "generated by runs/b" in text
    assert "Loss after audio" in text


def test_names_are_as_long_as_they_must_be() -> None:
    assert short_names([Path("x/one/train"), Path("x/two/train")]) == ["one/train", "two/train"]
    assert short_names([Path("x/a/demo/train"), Path("x/b/demo/train")]) == ["a/demo/train", "b/demo/train"]
    with pytest.raises(ReportError, match="named twice"):
        short_names([Path("a"), Path("a")])


def test_long_runs_make_no_longer_curves() -> None:
    def points(steps: int) -> int:
        values = [float(step % 7) for step in range(steps)]
        series = Series(label="a", steps=list(range(steps)), values=values, colour=0)
        return len(curve_plot("plot", [series], title="t", unit="u"))

    assert points(40 * MOST_POINTS) < 1.3 * points(MOST_POINTS)


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda run: (run / "metrics.jsonl").unlink(), "no steps in metrics.jsonl"),
        (lambda run: (run / "metrics.jsonl").write_text("{}\n"), "metrics.jsonl: not the metrics of a run"),
        (lambda run: (run / "metrics.jsonl").write_text("nonsense\n"), "metrics.jsonl: not the metrics of a run"),
        (lambda run: (run / "evaluation.json").write_text("{"), "evaluation.json: cannot be read"),
        (lambda run: (run / "evaluation.json").write_text('{"version": 9}'), "version is 9"),
        (lambda run: (run / "evaluation.json").write_text('{"version": 1, "step": 1}'), "no 'parameters'"),
        (lambda run: (run / "evaluation.json").write_text("[]"), "evaluation.json: cannot be read"),
        (lambda run: (run / "config.yaml").write_text("a: [\n"), "config.yaml: not YAML"),
        (lambda run: (run / "config.yaml").write_bytes(b"\xff\xfe\xff"), "config.yaml: cannot be read"),
    ],
)
def test_what_cannot_be_read_is_one_line_that_names_the_file(
    make_run: MakeRun, capsys: pytest.CaptureFixture[str], break_it: Callable[[Path], Any], words: str
) -> None:
    folder = make_run()
    break_it(folder)
    assert main(["report", str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(folder) in error
    assert words in error
    assert not (folder / "report.html").exists()


def test_command_prints_the_verdict_and_where_the_page_is(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run()
    assert main(["report", str(folder)]) == 0
    assert f"{folder}/report.html" in capsys.readouterr().out
    out = tmp_path / "deep" / "page.html"
    assert main(["report", str(folder), "--out", str(out), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["bytes"] == out.stat().st_size
    assert printed["verdicts"]["runs/a"]["level"] == "partly"
    assert main(["report", str(folder), "--samples", "-1"]) == 2
    assert main(["report", str(folder), "--out", str(tmp_path)]) == 2


def test_evaluations_over_folds_have_no_split(make_run: MakeRun) -> None:
    folder = make_run()
    content = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    content |= {"split": None, "folds": 5}
    assert parse_evaluation(content).split is None
    (folder / "evaluation.json").write_text(json.dumps(content), encoding="utf-8")
    assert "on 5 folds" in Page(render(folder)).text


def test_a_schedule_of_lengths_leaves_no_one_size_of_a_step(make_run: MakeRun) -> None:
    run = read_run(make_run(), "run")
    assert run.pack_tokens == 4 * 64
    data = {**run.config["data"], "schedule": [{"after_step": 5, "weights": {"tiny": 1.0}, "sequence_length": None}]}
    assert replace(run, config={**run.config, "data": data}).pack_tokens == 4 * 64
    data["schedule"].append({"after_step": 9, "sequence_length": 128})
    assert replace(run, config={**run.config, "data": data}).pack_tokens is None


def test_wording() -> None:
    assert number(-1.234) == "−1.23"
    assert number(0.5, 1, sign=True) == "+0.5"
    assert number(float("nan")) == number(None) == "–"
    assert count(11_877) == "11,877"
    assert count(4_820_224) == "4.82 M"
    assert duration(147) == "2.5 min"
    assert readable("a\x00b\n c\u202e\ud800") == "a b c ?"
    assert len(readable("x" * 10_000)) == 400


def test_titles_set_languages_apart_and_the_control_is_named_where_there_is_one(make_run: MakeRun) -> None:
    folder = make_run()
    assert "a model trained on shuffled pairs" in Page(render(folder)).text
    content = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    tasks = content["retrieval"]
    content["retrieval"] = {
        "asterisk speech->transcript it": tasks["tuxpaint speech->image"] | {"language": "it"},
        "tuxpaint image->caption other": tasks["tuxpaint speech->image"] | {"language": "other"},
        "tuxpaint speech->image": tasks["tuxpaint speech->image"] | {"language": "all"},
    }
    parsed = parse_evaluation(content).retrieval
    assert [task.title for task in parsed] == [
        "asterisk speech → transcript (it)",
        "tuxpaint image → caption (other languages)",
        "tuxpaint speech → image",
    ]
    (folder / "evaluation.json").write_text(json.dumps(content), encoding="utf-8")
    text = Page(render(folder)).text
    assert "shuffled pairs" not in text
    assert "and above the best classical floor in 0 of 3 (below it in 3)" in text
