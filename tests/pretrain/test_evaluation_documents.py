"""Held-out documents, retrieval tasks, floors, probes and caption likelihood on a small labelled corpus."""

from __future__ import annotations

import base64
import io
import json
import wave
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import RidgeCV

from triweave.data_pipeline.config import DataConfig, SourceConfig
from triweave.data_pipeline.errors import DataError
from triweave.data_pipeline.media.modalities import MODALITIES
from triweave.data_pipeline.shards.build import BuildOptions, build
from triweave.data_pipeline.shards.manifest import Manifest
from triweave.data_pipeline.sources.manifest import ManifestSource
from triweave.data_pipeline.splits import fold_of
from triweave.data_pipeline.text.tokenizer import Tokenizer, train_tokenizer
from triweave.pretrain.checkpoints.load import LoadedRun
from triweave.pretrain.config import RunConfig
from triweave.pretrain.errors import PretrainError
from triweave.pretrain.evaluation import caption_nll, classification, retrieval
from triweave.pretrain.evaluation.documents import EvaluationDocument, read_documents
from triweave.pretrain.evaluation.embed import PartEncoder, encode_parts
from triweave.pretrain.evaluation.evaluate import evaluate_folds, evaluate_run
from triweave.pretrain.evaluation.floors import SimpleFeatures, cosines, length_scores, ridge_scores
from triweave.pretrain.evaluation.metrics import best_ranks, figures
from triweave.pretrain.evaluation.tasks import Task, relation, retrieval_tasks
from triweave.pretrain.model.config import ModelConfig
from triweave.pretrain.model.model import MultimodalTransformer

CONCEPTS = 120
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "white": (240, 240, 240)}
LONG = ("cat", "elephant", "hippopotamus in the water", "crocodile that sleeps in the warm sun")


def picture(number: int) -> bytes:
    """A picture of the concept's colour, the upper part as dark as the concept's animal is long."""
    pixels = np.empty((16, 16, 3), np.uint8)
    pixels[:] = list(COLOURS.values())[number % 4]
    pixels[: 4 * (number // 4 % 4)] //= 4
    pixels[number % 16, number // 16] = number
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def clip(number: int) -> bytes:
    """A tone whose pitch tells the colour and whose length tells the animal."""
    time = np.arange(1600 * (1 + number // 4 % 4) + 16 * number) / 16_000
    tone = (8000 * np.sin(2 * np.pi * (200 + 300 * (number % 4)) * time)).astype("<i2")
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(16_000)
        sound.writeframes(tone.tobytes())
    return file.getvalue()


def row(number: int, kind: str, *, media: dict[str, bytes], corpus: str = "zoo") -> dict:
    colour = list(COLOURS)[number % 4]
    text = f"A {colour} {LONG[number // 4 % 4]}, number {number}."
    parts = [{"modality": name, "bytes": base64.b64encode(data).decode()} for name, data in media.items()]
    labels = {"kind": kind, "language": "en", "category": "symbols" if number % 8 == 3 else colour}
    labels |= {"group": f"group-{number}", "split": "test" if number % 3 == 0 else "train"}
    parts.append({"modality": "text", "text": text})
    return {"id": f"{corpus}-{number}-{kind}", "parts": parts, "labels": labels, "source": {"corpus": corpus}}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures with captions, pictures with spoken captions, an effect, and speech with transcripts."""
    folder = tmp_path_factory.mktemp("zoo")
    rows = [row(number, "caption", media={"image": picture(number)}) for number in range(0, CONCEPTS, 2)]
    spoken = range(1, CONCEPTS, 2)
    rows += [row(number, "speech", media={"image": picture(number), "audio": clip(number)}) for number in spoken]
    rows.append(row(0, "effect", media={"image": picture(0), "audio": clip(500)}))
    rows += [row(number, "speech", media={"audio": clip(number)}, corpus="voices") for number in range(CONCEPTS)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    manifest = build(ManifestSource(root=folder / "rows.jsonl"), folder / "shards", BuildOptions())
    train_tokenizer([manifest], 320, folder / "tokenizer.model")
    return folder


def data_config(corpus: Path, **selection: object) -> DataConfig:
    source = SourceConfig(name="zoo", shards=str(corpus / "shards"), **selection)  # type: ignore[arg-type]
    return DataConfig(sources=[source], tokenizer=str(corpus / "tokenizer.model"), sequence_length=128)


@pytest.fixture
def documents(corpus: Path):
    return read_documents(data_config(corpus, split="train"))


@pytest.fixture
def make_run(corpus: Path) -> Callable[..., LoadedRun]:
    """An untrained model as a run that trained on the split train."""

    def make(*, contrastive: bool = True, seed: int = 0, **selection: object) -> LoadedRun:
        objectives = {"language_model": 1.0} | ({"contrastive": 1.0} if contrastive else {})
        model = ModelConfig(d_model=32, layers=1, heads=2, kv_heads=1, head_width=16, objectives=objectives)
        data = data_config(corpus, **(selection or {"split": "train"}))
        data = replace(data, packing=replace(data.packing, contrastive_share=0.5, contrastive_group_rows=8))
        config = RunConfig(run_dir="run", data=data, model=model)
        tokenizer = Tokenizer.load(data.tokenizer)
        features = {name: kind.features(data.geometry) for name, kind in MODALITIES.items()}
        network = MultimodalTransformer(model, vocab_size=tokenizer.vocab_size, media_features=features, seed=seed)
        return LoadedRun(config=config, model=network.eval(), tokenizer=tokenizer, step=7, run_dir=corpus / "run")

    return make


def groups(documents: tuple[EvaluationDocument, ...]) -> set[int]:
    return {int(document.group.removeprefix("group-")) for document in documents}


def test_held_out_documents_that_share_a_part_with_training_are_left_out(corpus: Path, tmp_path: Path) -> None:
    rows = [row(number, "speech", media={"audio": clip(number)}) for number in range(4)]  # 0 and 3 are held out
    for number, group in ((30, "text"), (33, "sound"), (36, "none")):
        media = {"audio": clip(1 if group == "sound" else number)}
        held_out = row(number, "speech", media=media, corpus="voices")
        if group == "text":
            held_out["parts"][-1]["text"] = "a RED elephant - number 4"
        rows.append(held_out)
    rows.append(row(4, "caption", media={"image": picture(4)}))
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    build(ManifestSource(root=tmp_path / "rows.jsonl"), tmp_path / "shards", BuildOptions())
    source = SourceConfig(name="zoo", shards=str(tmp_path / "shards"), split="train")
    told: list[str] = []
    found = read_documents(replace(data_config(corpus), sources=[source]), tell=told.append)
    assert groups(found.held_out) == {0, 3, 36}
    assert found.left_out == 2
    assert told == ["2 held-out documents share a text or a medium with training; left out"]


def test_a_run_on_the_split_train_is_asked_about_the_split_test(documents) -> None:
    assert (documents.split, documents.fold) == ("test", None)
    assert groups(documents.held_out) == set(range(0, CONCEPTS, 3))
    assert groups(documents.training) == set(range(CONCEPTS)) - groups(documents.held_out)


def test_another_split_can_be_asked_about(corpus: Path) -> None:
    data = data_config(corpus, split="test")  # as if `test` had been trained on and `train` were the validation split
    found = read_documents(data, asked_split="train")
    assert found.split == "train"
    assert groups(found.training) == set(range(0, CONCEPTS, 3))
    with pytest.raises(PretrainError, match="no held-out document"):
        read_documents(data_config(corpus, split="train"), asked_split="validation")


def test_a_fold_is_asked_about_what_it_left_out(corpus: Path) -> None:
    found = read_documents(data_config(corpus, hold_out="1/3"))
    assert (found.split, found.fold) == (None, "1/3")
    assert all(fold_of(document.group, 3) == 1 for document in found.held_out)
    assert not groups(found.held_out) & groups(found.training)
    assert len(groups(found.held_out) | groups(found.training)) == CONCEPTS


@pytest.mark.parametrize(("selection", "words"), [({}, "split is null"), ({"split": "test"}, "split is 'test'")])
def test_a_run_that_held_nothing_out_is_refused(corpus: Path, selection: dict[str, str], words: str) -> None:
    with pytest.raises(PretrainError, match=words) as refusal:
        read_documents(data_config(corpus, **selection))
    assert "split: train" in str(refusal.value)


def test_bytes_that_changed_are_refused(corpus: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    for path in (corpus / "shards").iterdir():
        (shards / path.name).write_bytes(path.read_bytes())
    tar = next(shards.glob("*.tar"))
    content = bytearray(tar.read_bytes())
    place = content.index(picture(2))
    content[place + 40] ^= 1
    tar.write_bytes(content)
    data = data_config(corpus, split="train")
    with pytest.raises(DataError, match="damaged"):
        read_documents(replace(data, sources=[replace(data.sources[0], shards=str(shards))]))


def test_parts_are_the_bytes_that_went_in(documents) -> None:
    document = next(document for document in documents.held_out if document.id == "zoo-6-caption")
    assert documents.part(document, "image").content == picture(6)
    assert documents.part(document, "text") == document.text


def test_tasks_follow_from_what_documents_hold(documents) -> None:
    tasks = {task.name: task for task in retrieval_tasks(documents)}
    assert list(tasks) == [
        *("voices speech->transcript en", "voices transcript->speech en"),
        *("zoo image->caption en", "zoo caption->image en", "zoo speech->caption", "zoo caption->speech"),
        *("zoo speech->image", "zoo image->speech"),
    ]
    (pool,) = tasks["zoo image->caption en"].pools
    assert len(pool.held_out) == CONCEPTS // 3  # without the effect, which shows the picture of another document
    assert all(document.kind != "effect" for document in (*pool.held_out, *pool.training))
    assert (tasks["zoo speech->image"].source, tasks["zoo speech->image"].target) == ("audio", "image")


def caption(number: int, text: str, image: str) -> EvaluationDocument:
    from triweave.data_pipeline.media.geometry import MediaInfo
    from triweave.pretrain.evaluation.documents import MediaRef

    info = MediaInfo(width=1, height=1)
    ref = MediaRef(modality="image", tar="", offset=0, size=0, xxh3=int(image, 16), info=info)
    names = {"corpus": "", "kind": "", "language": "en", "category": ""}
    return EvaluationDocument(id=str(number), group=str(number), text=text, media={"image": ref}, **names)


def test_equal_contents_are_one_candidate_and_all_its_partners_are_right() -> None:
    shown = [caption(0, "A cat.", "a"), caption(1, "a  CAT", "b"), caption(2, "A dog", "b"), caption(3, "Sun", "c")]
    asked = relation(shown, "text", "image")
    assert [document.id for document in asked.queries] == ["0", "2", "3"]
    assert [document.id for document in asked.candidates] == ["0", "1", "3"]
    assert asked.correct.tolist() == [[True, True, False], [False, True, False], [False, False, True]]
    assert (relation(shown, "image", "text").correct == asked.correct.T).all()


def test_ridge_finds_what_colours_and_pitches_tell(documents) -> None:
    features = SimpleFeatures(documents.read)
    for task in retrieval_tasks(documents):
        (pool,) = task.pools
        asked = relation(pool.held_out, task.source, task.target)
        sides = {"source": task.source, "target": task.target}
        scores = ridge_scores(pool.training, asked.queries, asked.candidates, features=features, **sides)
        found = figures(best_ranks(scores, asked.correct, seed=0))
        assert found.r10 > 0.6, task.name  # 40 or 20 candidates, of which chance finds 25 or 50 %
        if "text" in sides.values() and "audio" in sides.values():
            by_length = length_scores(pool.training, asked.queries, asked.candidates, **sides)
            assert figures(best_ranks(by_length, asked.correct, seed=0)).median_rank < len(asked.candidates) / 3


def test_ridge_is_that_of_scikit_learn_on_standardised_pixels(documents) -> None:
    features = SimpleFeatures(documents.read)
    (pool,) = next(task for task in retrieval_tasks(documents) if task.name == "zoo speech->image").pools
    scores = ridge_scores(
        pool.training, pool.held_out, pool.held_out, source="audio", target="image", features=features
    )
    x, y = features.of(pool.training, "audio"), features.of(pool.training, "image")
    scale = np.where(y.std(axis=0) > 0, y.std(axis=0), 1)
    model = RidgeCV(alphas=(1, 10, 100, 1e3, 1e4)).fit((x - x.mean(0)) / np.where(x.std(0) > 0, x.std(0), 1), y / scale)
    asked = (features.of(pool.held_out, "audio") - x.mean(0)) / np.where(x.std(0) > 0, x.std(0), 1)
    expected = cosines(
        model.predict(asked) - (y / scale).mean(0), features.of(pool.held_out, "image") / scale - (y / scale).mean(0)
    )
    np.testing.assert_allclose(scores, expected, atol=1e-4)


def test_a_part_encodes_alike_in_any_batch_and_apart_from_others(make_run, documents) -> None:
    run = make_run()
    parts = [documents.part(document, "text") for document in documents.held_out[:9]]
    parts += [documents.part(document, "image") for document in documents.held_out if document.has("image")][:3]
    together = encode_parts(run, parts)
    alone = np.concatenate([encode_parts(run, [part]).embeddings for part in parts])
    np.testing.assert_allclose(together.embeddings, alone, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(together.embeddings, axis=1), 1, atol=1e-5)


def test_shuffled_media_are_another_concept_of_the_same_corpus_and_language() -> None:
    kinds = [("zoo", "de"), ("zoo", "fr"), ("voices", "fr")]
    shown = [
        replace(
            caption(number, "x", "a"),
            group=str(number // 6),
            corpus=kinds[number % 3][0],
            language=kinds[number % 3][1],
        )
        for number in range(60)
    ]
    draws = [caption_nll.shuffled_partners(shown, seed=5, draw=draw) for draw in range(3)]
    for partners in draws:
        assert sorted(partners) == sorted(partners.values()) == list(range(60))
        for number, partner in partners.items():
            assert shown[number].group != shown[partner].group
            assert number % 3 == partner % 3
    assert draws[0] != draws[1]
    assert caption_nll.shuffled_partners(shown, seed=5, draw=0) == draws[0]


def test_a_language_that_is_one_concept_has_nothing_to_shuffle() -> None:
    shown = [replace(caption(number, "x", "a"), group="same") for number in range(10)]
    assert caption_nll.shuffled_partners(shown, seed=0, draw=0) == {}


def test_caption_likelihood_is_that_of_the_logits(make_run, documents) -> None:
    from triweave.data_pipeline.stream.prompt import prompt_batch
    from triweave.pretrain.batch import to_device

    run = make_run()
    document = next(document for document in documents.held_out if document.has("image"))
    prompt = [documents.part(document, "image"), document.text]
    nats, tokens = caption_nll.text_nlls(run, [["a much longer text than the other"], prompt])
    batch = to_device(prompt_batch([prompt], tokenizer=run.tokenizer, geometry=run.config.data.geometry), "cpu")
    words = run.tokenizer.encode(document.text)
    with torch.inference_mode():
        logs = run.model.logits(batch).log_softmax(-1)[0]
    first = batch.tokens.shape[1] - len(words)
    expected = -sum(logs[first + place - 1, word].item() for place, word in enumerate(words.tolist()))
    assert tokens[1] == len(words)
    assert nats[1] == pytest.approx(expected, rel=1e-5)


def test_a_probe_finds_what_is_linear(documents) -> None:
    features = SimpleFeatures(documents.read)
    seen, asked = (classification.pictures(part, "zoo") for part in (documents.training, documents.held_out))
    found = classification.linear_probe(
        features.of(seen, "image"),
        [document.text.split()[1] for document in seen],
        [document.group for document in seen],
        features.of(asked, "image"),
    )
    assert found == [document.text.split()[1] for document in asked]


class Oracle(PartEncoder):
    """An encoder that knows the answer: the concept's own direction, whatever the modality."""

    def embeddings(self, documents, modality):  # noqa: ARG002
        numbers = [int(document.group.removeprefix("group-")) for document in documents]
        return np.eye(CONCEPTS, dtype=np.float32)[numbers]


def test_each_recall_is_compared_with_its_own_best_floor() -> None:
    task = Task(name="t", corpus="zoo", language="en", source="audio", target="text", pools=())
    ranks = {"model": [1, 5, 20, 20], "ridge": [1, 1, 20, 20], "length": [9, 9, 9, 20]}
    pool = retrieval.PoolRanks(
        language="en",
        groups=["a", "b", "c", "d"],
        candidates=30,
        ranks={name: np.asarray(own) for name, own in ranks.items()},
        chance={k: np.full(4, k / 30) for k in (1, 10)},
    )
    found = retrieval.summarise(task, [{"all": pool}], seed=0)["difference"]
    assert (found["floor"], found["r1"]["floor"], found["r10"]["floor"]) == ("length", "ridge", "length")
    assert (found["r1"]["mean"], found["r10"]["mean"]) == (0.25 - 0.5, 0.5 - 0.75)


def test_figures_of_a_perfect_model_and_its_control(make_run, documents) -> None:
    task = next(task for task in retrieval_tasks(documents) if task.name == "zoo image->caption en")
    features = SimpleFeatures(documents.read)
    perfect, untrained = Oracle(make_run(), documents), PartEncoder(make_run(), documents)
    ranks = retrieval.rank_pool(task, task.pools[0], model=perfect, control=untrained, features=features, seed=0)
    found = retrieval.summarise(task, [ranks], seed=0)
    assert (found["n"], found["pool"], found["r1"], found["r10"], found["mrr"]) == (40, 40, 1, 1, 1)
    assert found["ci"]["r1"] == pytest.approx([0.9119, 1], abs=1e-3)
    assert found["chance"] == pytest.approx({"r1": 1 / 40, "r10": 1 / 4})
    assert found["difference"]["r10"]["mean"] == pytest.approx(1 - found["floors"]["ridge"]["r10"])
    assert found["control"]["r10"] < 0.6
    without = len([document for document in task.pools[0].held_out if document.category != "symbols"])
    assert found["without_symbols"]["n"] == found["without_symbols"]["pool"] == without < 40
    assert found["symbols"] is None  # fewer than 20


def test_the_whole_evaluation_is_deterministic_and_names_what_it_did(make_run) -> None:
    lines: list[str] = []
    first = evaluate_run(make_run(), tell=lines.append)
    second = evaluate_run(make_run())
    assert {**first, "seconds": 0} == {**second, "seconds": 0}
    assert json.loads(json.dumps(first, allow_nan=False)) == first
    assert (first["version"], first["step"], first["split"], first["folds"]) == (1, 7, "test", None)
    assert set(first["retrieval"]["voices speech->transcript en"]["floors"]) == {"ridge", "length"}
    assert first["classification"]["category"]["classes"] > 3
    for medium in ("image", "audio"):
        low, high = first["caption_nll"][medium]["ci"]
        assert low <= first["caption_nll"][medium]["gap"] <= high
        assert abs(first["caption_nll"][medium]["gap"]) < 0.1  # untrained: media tell nothing
    assert any("held-out documents (split test)" in line for line in lines)


def test_folds_pool_the_queries_of_all(make_run) -> None:
    runs = [make_run(hold_out=f"{fold}/2") for fold in range(2)]
    found = evaluate_folds(runs, run_dir=Path("both"))
    assert (found["folds"], found["split"], found["run_dir"]) == (2, None, "both")
    task = found["retrieval"]["zoo image->caption en"]
    assert task["n"] == CONCEPTS
    assert task["pool"] < CONCEPTS  # each query is ranked within its fold


def test_without_embeddings_retrieval_is_left_out_and_said_so(make_run) -> None:
    lines: list[str] = []
    found = evaluate_run(make_run(contrastive=False), tell=lines.append)
    assert found["retrieval"] == {}
    assert found["classification"]["category"]["prompt"] is None
    assert found["classification"]["category"]["probe_hidden"]["accuracy"] > 0
    assert set(found["caption_nll"]) == {"image", "audio"}
    assert any("no `contrastive`" in line for line in lines)


def test_shards_without_groups_are_refused(corpus: Path, tmp_path: Path) -> None:
    rows = [{"id": str(number), "parts": [{"modality": "text", "text": str(number)}]} for number in range(5)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    build(ManifestSource(root=tmp_path / "rows.jsonl"), tmp_path / "shards", BuildOptions())
    assert Manifest.load(tmp_path / "shards").samples == 5
    data = data_config(corpus, split="train")
    with pytest.raises(PretrainError, match="no label `group`"):
        read_documents(replace(data, sources=[replace(data.sources[0], shards=str(tmp_path / "shards"))]))
