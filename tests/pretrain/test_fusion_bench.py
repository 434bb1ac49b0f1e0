"""`triweave bench fusion`: what it trains on, what its figures are made of, and that no query sees its answer."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from triweave.launch.cli import main
from triweave.pretrain.bench.fusion.bench import markdown, select_contenders, summarise
from triweave.pretrain.bench.fusion.model import Contender, FusionModel, InputMaker, contenders
from triweave.pretrain.bench.fusion.task import FusionTask, RememberingDecoder, read_task
from triweave.pretrain.bench.fusion.training import Answers, document_table
from triweave.pretrain.errors import PretrainError
from triweave.pretrain.evaluation.documents import EvaluationDocument
from triweave.pretrain.objectives.contrastive import pair_blocks

ZOO = Path(__file__).with_name("test_evaluation_documents.py")
LANGUAGES = ("fr", "ru")


def document(number: int, **changes: Any) -> EvaluationDocument:
    known = {"id": f"d{number}", "corpus": "tuxpaint", "kind": "speech", "language": LANGUAGES[number % 2],
             "category": "animals", "group": f"g{number}", "text": f"text {number}"}  # fmt: skip
    return EvaluationDocument(**(known | changes))


@pytest.fixture
def task() -> FusionTask:
    """Seven French and seven Russian documents without media, and as many held out."""
    documents = tuple(document(number) for number in range(14))
    held_out = tuple(document(number, group=f"h{number // 2}") for number in range(100, 114))
    return FusionTask(
        documents=None,  # type: ignore[arg-type]
        training=documents,
        held_out=held_out,
        categories=("animals", "food"),
        tokenizer=None,  # type: ignore[arg-type]
    )


def test_batches_hold_one_language_and_every_document_at_most_once_an_epoch(task: FusionTask) -> None:
    batches = list(task.batches(3, steps=8, seed=1))
    assert [len({one.language for one in batch}) for batch in batches] == [1] * 8
    for epoch in (batches[:4], batches[4:]):
        seen = Counter(one.id for batch in epoch for one in batch)
        assert len(seen) == 12
        assert set(seen.values()) == {1}
    assert [[one.id for one in batch] for batch in task.batches(3, steps=8, seed=1)] == [
        [one.id for one in batch] for batch in batches
    ]
    assert list(task.batches(3, steps=8, seed=2)) != batches
    assert batches[:4] != batches[4:]


def test_documents_that_share_a_text_or_a_concept_are_no_negatives() -> None:
    chosen = [document(0), document(2, text="Text  0"), document(4, group="g6"), document(6)]
    (block,) = pair_blocks(document_table(chosen))
    order = np.argsort(block.rows), np.argsort(block.columns)
    candidate, positive = (mask[np.ix_(*order)] for mask in (block.candidate, block.positive))
    if block.rows.min() > block.columns.min():  # the captions are the rows
        candidate, positive = candidate.T, positive.T
    assert positive.tolist() == np.eye(4, dtype=bool).tolist()
    expected = ~np.eye(4, dtype=bool)
    expected[[0, 1, 2, 3], [1, 0, 3, 2]] = False
    assert candidate.tolist() == (expected | positive).tolist()


def answers(right: list[int], ranks: list[int] | None) -> Answers:
    return Answers(
        right=np.asarray(right, np.float64),
        ranks=None if ranks is None else np.asarray(ranks, np.int64),
        parameters=7,
        losses=(2.0, 1.0),
        cpu_s=0.5,
    )


def test_a_fusion_is_compared_with_the_best_single_modality_of_each_figure(task: FusionTask, monkeypatch) -> None:
    pool = type("Pool", (), {"queries": task.held_out, "candidates": task.held_out})()
    monkeypatch.setitem(task.__dict__, "pools", [(np.arange(14), pool)])
    chosen = select_contenders(["late vote"])
    none, half, most = [0] * 14, [1, 0] * 7, [1] * 12 + [0, 0]
    found = {
        "late vote": [answers(most, [1] * 14), answers(half, [1] * 14)],
        "image alone": [answers(half, [20] * 14)] * 2,
        "audio alone": [answers(none, [1, 20] * 7)] * 2,
        "text alone": [answers(none, None)] * 2,
    }
    rows = {row["name"]: row for row in summarise(task, chosen, found)}
    vote = rows["late vote"]
    assert vote["accuracy"]["mean"] == pytest.approx((12 + 7) / 28)
    assert vote["accuracy"]["seeds"] == pytest.approx([12 / 14, 0.5])
    assert vote["accuracy"]["over_single"]["single"] == "image alone"
    assert vote["accuracy"]["over_single"]["mean"] == pytest.approx(5 / 28)
    assert vote["r10"]["over_single"]["single"] == "audio alone"
    assert vote["r10"]["over_single"]["mean"] == 0.5
    assert vote["r10"]["over_single"]["beats"]
    assert rows["text alone"]["r1"] is None
    assert "over_single" not in rows["image alone"]["accuracy"]
    empty = {"category": {}, "retrieval": {}}
    table = markdown({"contenders": list(rows.values()), "floors": empty})
    assert "| late vote | 7 | 67.9 ± 25.3 | 100.0 ± 0.0 | 100.0 ± 0.0 |" in table
    assert "beats audio alone +50.0 [50.0, 50.0]" in table


def test_answers_come_back_as_they_were_written(tmp_path: Path) -> None:
    for ranks in ([3, 1], None):
        given = answers([1, 0], ranks)
        given.save(tmp_path / "a.npz")
        back = Answers.load(tmp_path / "a.npz")
        assert back.right.tolist() == [1, 0]
        assert (back.ranks is None) == (ranks is None)
        assert ranks is None or back.ranks.tolist() == ranks
        assert (back.parameters, back.losses, back.cpu_s) == (7, (2.0, 1.0), 0.5)


def test_an_unknown_fusion_is_refused_with_the_known_ones() -> None:
    with pytest.raises(PretrainError, match=r"--only names 'lat vote'; known: sequence, cross, mmca, late concat"):
        select_contenders(["lat vote"])


def test_the_readme_shows_the_committed_figures() -> None:
    folder = Path(__file__).parents[2] / "pretrain"
    result = json.loads((folder / "results" / "fusion.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in result["contenders"]] == [contender.name for contender in contenders()]
    assert markdown(result) in (folder / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def zoo(rank_pool, tmp_path_factory) -> Path:
    """Shards of spoken pictures in one language, and a tokenizer."""
    made = rank_pool.load(ZOO)
    folder = tmp_path_factory.mktemp("fusion_zoo")
    rows = [
        made.row(number, "speech", media={"image": made.picture(number), "audio": made.clip(number)})
        for number in range(120)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    manifest = made.build(made.ManifestSource(root=folder / "rows.jsonl"), folder / "shards", made.BuildOptions())
    made.train_tokenizer([manifest], 320, folder / "tokenizer.model")
    return folder


@pytest.fixture(scope="module")
def zoo_task(zoo: Path) -> FusionTask:
    return read_task(str(zoo / "shards"), str(zoo / "tokenizer.model"), batch=8)


@pytest.mark.slow
@pytest.mark.parametrize("contender", contenders(), ids=lambda contender: contender.name)
def test_no_query_sees_its_caption_and_every_part_reaches_the_category(
    zoo_task: FusionTask, contender: Contender
) -> None:
    model = FusionModel(contender, vocab_size=zoo_task.tokenizer.vocab_size, classes=len(zoo_task.categories), seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate"):  # a gate of cross-attention starts at 0 and lets nothing through
                parameter.fill_(1.0)
    make = InputMaker(contender, zoo_task, RememberingDecoder())
    one, other = zoo_task.training[:2]
    changed = {
        "text": replace(one, text=other.text),
        "image": replace(one, media={**one.media, "image": other.media["image"]}),
        "audio": replace(one, media={**one.media, "audio": other.media["audio"]}),
    }
    with torch.no_grad():
        before = model(make([one, other]))
        for part in contender.parts:
            after = model(make([changed[part], other]))
            assert (after.logits[0] - before.logits[0]).abs().max() > 1e-6, part
            if before.query is None:
                continue
            torch.testing.assert_close(after.query[1], before.query[1], rtol=1e-5, atol=1e-5)
            difference = float((after.query[0] - before.query[0]).abs().max())
            assert (difference > 1e-6) == (part in contender.query), (part, difference)


@pytest.mark.slow
def test_the_command_prints_a_table_and_continues_from_its_work(zoo: Path, tmp_path: Path, capsys) -> None:
    command = ["bench", "fusion", "--shards", str(zoo / "shards"), "--tokenizer", str(zoo / "tokenizer.model"),
               "--only", "late graph", "--seeds", "2", "--steps", "12", "--batch", "8",
               "--work", str(tmp_path / "work"), "--out", str(tmp_path / "fusion.json")]  # fmt: skip
    assert main(command) == 0
    table = capsys.readouterr().out
    assert "| late graph |" in table
    result = json.loads((tmp_path / "fusion.json").read_text())
    assert [row["name"] for row in result["contenders"]] == [
        "late graph", "image alone", "audio alone", "text alone",
    ]  # fmt: skip
    for row in result["contenders"]:
        assert all(last < first for first, last in row["losses"]), row
    assert len(list((tmp_path / "work").glob("*.npz"))) == 8
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["contenders"] == result["contenders"]
