"""Near duplicates: the lookup against brute force, what counts as a twin, builds and their ledgers."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import dedup_quality as made
import numpy as np
import pytest

from triweave.data_pipeline.dedup import audio, near_duplicates
from triweave.data_pipeline.dedup.key_index import KeyIndex
from triweave.data_pipeline.dedup.near_duplicates import NearDuplicateFinder, NearDuplicateIndex
from triweave.data_pipeline.dedup.options import DedupOptions
from triweave.data_pipeline.dedup.sketch import PhashStep, Sketch, sketch
from triweave.data_pipeline.errors import BuildError
from triweave.data_pipeline.media.images import probe as probe_picture
from triweave.data_pipeline.shards.build import BuildOptions, build
from triweave.data_pipeline.shards.ledger import read_ledger
from triweave.data_pipeline.shards.manifest import Manifest
from triweave.data_pipeline.shards.schema import (
    Document,
    Part,
    TextPart,
    document_from_json,
    document_to_json,
    media_part,
)
from triweave.data_pipeline.shards.writer import EncodedSample, ShardWriter
from triweave.data_pipeline.sources.folder import FolderSource
from triweave.launch.cli import main

ALL = DedupOptions(text=0.8, image=6, audio=0.2)


def document(*parts: str | Part, name: str = "d") -> Document:
    return Document(id=name, parts=tuple(TextPart(text=part) if isinstance(part, str) else part for part in parts))


def test_the_key_index_finds_what_a_dictionary_finds(tmp_path: Path) -> None:
    index, model = KeyIndex(tmp_path, bucket=5, buffer_entries=40), {}
    generator = np.random.default_rng(0)
    for number in range(600):
        keys = np.unique(generator.integers(0, 250, 7).astype(np.uint64))
        found, counts = index.find(keys)
        held = [model.get(key, []) for key in keys.tolist()]
        assert counts.tolist() == [len(values) for values in held]
        assert sorted(found.tolist()) == sorted(value for values in held for value in values)
        index.add(keys, counts, number)
        for key, values in zip(keys.tolist(), held, strict=True):
            if len(values) < 5:
                model.setdefault(key, []).append(number)
    assert 1 < len(index._runs) < 8
    assert list(tmp_path.iterdir()) == []


def flipped(data: bytes, bits: int, seed: int) -> bytes:
    value = int.from_bytes(data, "big")
    for place in random.Random(seed).sample(range(len(data) * 8), bits):
        value ^= 1 << place
    return value.to_bytes(len(data), "big")


def pictures_sketch(*hashes: int) -> bytes:
    return Sketch(text=None, images=np.array(hashes, np.uint64), clips=()).pack()


@pytest.mark.parametrize("limit", [0, 3, 6, 11])
def test_every_picture_within_the_limit_is_found(limit: int, tmp_path: Path) -> None:
    index = NearDuplicateIndex(DedupOptions(image=limit), tmp_path)
    kept = [random.Random(seed).randbytes(8) for seed in range(150)]
    for number, value in enumerate(kept):
        index.add(str(number), pictures_sketch(int.from_bytes(value, "big")))
    for number, value in enumerate(kept):
        for bits in {0, limit // 2, limit}:
            twin = index.twin(pictures_sketch(int.from_bytes(flipped(value, bits, number), "big")))
            assert twin is not None
            assert twin.id == str(number)
        beyond = flipped(value, limit + 1, number)
        assert index.twin(pictures_sketch(int.from_bytes(beyond, "big"))) is None


@pytest.mark.parametrize("limit", [0.1, 0.2])
def test_nearly_every_clip_at_the_limit_is_found(limit: float, tmp_path: Path) -> None:
    index = NearDuplicateIndex(DedupOptions(audio=limit), tmp_path)

    def packed(bits: bytes) -> bytes:
        return Sketch(text=None, images=np.zeros(0, np.uint64), clips=(audio.Fingerprint(ms=1000, bits=bits),)).pack()

    kept = [random.Random(seed).randbytes(audio.BYTES) for seed in range(200)]
    for number, bits in enumerate(kept):
        index.add(str(number), packed(bits))
    most = int(limit * audio.BITS)
    twins = [index.twin(packed(flipped(bits, most, seed))) for seed, bits in enumerate(kept)]
    assert [twin.id for twin in twins if twin is not None] == [str(number) for number in range(200)]
    assert all(index.twin(packed(flipped(bits, most + 1, 1))) is None for bits in kept)


@pytest.fixture
def index(tmp_path: Path) -> Callable[..., str | None]:
    """Ask whether a document is a near duplicate of those kept before; keep it if not."""
    finder = NearDuplicateFinder(thresholds=ALL)
    held = finder.index(tmp_path)

    def ask(name: str, *parts: str | Part) -> str | None:
        signature = finder.signature(document(*parts, name=name))
        twin = held.twin(signature) if signature else None
        if twin is None and signature:
            held.add(name, signature)
        return None if twin is None else f"{twin.id}: {twin.reason}"

    return ask


def test_everything_compared_must_be_near_in_one_earlier_document(index: Callable[..., str | None]) -> None:
    words, other = " ".join(made.prose(0)), " ".join(made.prose(1))
    edited = words.replace(words.split()[100], "changed", 1)
    bird, tree = (made.ENCODER.encode("image", made.picture(made.picture_pixels(seed))) for seed in (0, 1))
    bird_again = made.ENCODER.encode("image", made.picture(made.picture_pixels(0), "JPEG", quality=60))
    speech, talk = (made.ENCODER.encode("audio", made.clip(made.sound(seed))) for seed in (0, 1))
    speech_again = made.ENCODER.encode("audio", made.clip(made.sound(0), form="OGG", subtype="VORBIS"))
    assert index("a", words, bird, speech) is None
    assert index("b", edited, speech_again, bird_again) == "a: near duplicate by text and audio and image"
    assert index("other words", other, bird, speech) is None
    assert index("other picture", words, tree, speech) is None
    assert index("other clip", words, bird, talk) is None
    assert index("no clip", words, bird) is None
    assert index("two pictures", words, bird, tree, speech) is None
    assert index("the same two", edited, tree, bird_again, speech) == (
        "two pictures: near duplicate by text and audio and image"
    )
    assert index("one picture twice", words, bird, bird, speech) is None
    assert index("text", words) is None
    assert index("text again", edited) == "text: near duplicate by text"


def test_the_first_kept_document_is_named(index: Callable[..., str | None]) -> None:
    words = made.prose(5, 300)
    near = list(words)
    near[:44] = [f"new{place}" for place in range(44)]
    between = list(words)
    between[:22] = near[:22]
    assert made.jaccard(words, near) < 0.8 < min(made.jaccard(words, between), made.jaccard(near, between))
    assert index("late", " ".join(words)) is None
    assert index("later", " ".join(near)) is None
    assert index("both", " ".join(between)) == "late: near duplicate by text"


def test_among_many_candidates_those_with_most_in_common_are_compared(
    index: Callable[..., str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(near_duplicates, "MOST_CANDIDATES", 2)
    words = made.prose(5, 300)
    for number in range(30):
        related = [*words[:240], *made.prose(100 + number, 60)]
        assert index(f"related {number}", " ".join(related)) is None
    assert index("twin", " ".join(words)) is None
    assert index("again", " ".join([*words[:-1], "changed"])) == "twin: near duplicate by text"


def test_what_cannot_be_compared_is_never_a_duplicate(index: Callable[..., str | None]) -> None:
    words = " ".join(made.prose(3))
    plain = [made.ENCODER.encode("image", made.picture(np.full((40, 40, 3), shade, np.uint8))) for shade in (10, 200)]
    silent = made.ENCODER.encode("audio", made.clip(np.zeros(16_000, np.float32)))
    for name, parts in {"a": (words, plain[0]), "b": (words, plain[1]), "c": (words, silent), "d": ("?",)}.items():
        assert index(name, *parts) is None
        assert index(f"{name} again", *parts) is None
    assert sketch(document("a b", plain[0]), DedupOptions(text=0.8)) is not None


def test_a_sketch_comes_back_from_its_bytes() -> None:
    parts = [
        made.ENCODER.encode("image", made.picture(made.picture_pixels(1))),
        made.ENCODER.encode("audio", made.clip(made.sound(2))),
    ]
    found = sketch(document("one two three", *parts), ALL)
    assert found is not None
    again = Sketch.unpack(found.pack())
    assert np.array_equal(again.text, found.text)
    assert again.images.tolist() == found.images.tolist() == [made.hash_of(parts[0].data)]
    assert again.clips == found.clips == (made.print_of(parts[1].data),)
    assert len(found.pack()) == 9 + 512 + 8 + 36


def test_phash_is_in_the_json_of_documents_that_have_one() -> None:
    data = made.picture(made.picture_pixels(3))
    plain = made.picture(np.full((20, 20, 3), 7, np.uint8))
    parts = [media_part("image", item, "png", "image/png", probe_picture(item)[0]) for item in (data, plain)]
    named = [replace(part, member=f"{place:04d}.png") for place, part in enumerate(parts)]
    hashed = PhashStep().apply(document("a", *named))
    described = json.loads(document_to_json(hashed))["parts"]
    assert described[1]["phash"] == f"{made.hash_of(data):016x}"
    assert "phash" not in described[2]
    assert "phash" not in json.loads(document_to_json(document("a", *named)))["parts"][1]
    back = document_from_json(document_to_json(hashed)).parts
    assert [getattr(part, "phash", None) for part in back] == [None, made.hash_of(data), None]


PAIRS = 300
ILLUSTRATED = 40


def write_pairs(folder: Path) -> Path:
    """Write pairs of documents, chunks apart: one word changed, and another encoding of the picture where one is."""
    folder.mkdir()
    for number in range(PAIRS):
        words = made.prose(number, 120)
        first, second = folder / f"a{number:03d}", folder / f"b{number:03d}"
        first.with_suffix(".txt").write_text(" ".join(words))
        words[60] = "changed"
        second.with_suffix(".txt").write_text(" ".join(words))
        if number < ILLUSTRATED:
            first.with_suffix(".png").write_bytes(made.picture(made.picture_pixels(number)))
            second.with_suffix(".jpg").write_bytes(made.picture(made.picture_pixels(number), "JPEG", quality=70))
    return folder


def files(folder: Path) -> dict[str, bytes]:
    left_out = (".build", "throughput.json")
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name not in left_out}


OPTIONS = BuildOptions(
    shard_size_bytes=300_000,
    near_duplicates=NearDuplicateFinder(thresholds=DedupOptions(text=0.8, image=6)),
    steps=(PhashStep(),),
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "corpus")


@pytest.fixture(scope="module")
def expected(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return build(FolderSource(root=corpus), tmp_path_factory.mktemp("built") / "shards", OPTIONS)


def test_a_build_keeps_one_of_each_pair_and_says_which(expected: Manifest) -> None:
    assert expected.rows == {"kept": PAIRS, "filtered": 0, "failed": 0, "duplicate": PAIRS}
    rows = {row["id"]: row for row in read_ledger(expected.ledger_path).to_pylist()}
    for number in range(PAIRS):
        pair = [rows[f"a{number:03d}"], rows[f"b{number:03d}"]]
        copy, kept = sorted(pair, key=lambda row: row["status"])
        assert (copy["status"], kept["status"]) == ("duplicate", "kept")
        reason = f"near duplicate by text{' and image' if number < ILLUSTRATED else ''}"
        assert (copy["duplicate_of"], copy["reason"]) == (kept["id"], reason)
    assert expected.build["near_duplicates"] == {"text": 0.8, "image": 6}
    assert len(expected.shards) > 2


def test_in_listing_order_the_first_of_the_source_is_kept(corpus: Path, tmp_path: Path) -> None:
    options = BuildOptions(shuffle_seed=None, near_duplicates=OPTIONS.near_duplicates)
    manifest = build(FolderSource(root=corpus), tmp_path / "shards", options)
    rows = read_ledger(manifest.ledger_path).to_pylist()
    assert {row["id"][0] for row in rows if row["status"] == "kept"} == {"a"}


def test_an_interrupted_build_remembers_what_it_kept(
    corpus: Path, expected: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = ShardWriter.append

    def append(writer: ShardWriter, sample: EncodedSample) -> None:
        if writer.name == "shard-000002" and writer.tar_bytes:
            raise KeyboardInterrupt
        plain(writer, sample)

    monkeypatch.setattr(ShardWriter, "append", append)
    with pytest.raises(KeyboardInterrupt):
        build(FolderSource(root=corpus), tmp_path / "shards", OPTIONS)
    monkeypatch.undo()
    build(FolderSource(root=corpus), tmp_path / "shards", OPTIONS)
    assert files(tmp_path / "shards") == files(expected.root)


@pytest.mark.slow
def test_the_bytes_do_not_depend_on_the_workers(corpus: Path, expected: Manifest, tmp_path: Path) -> None:
    for workers in (2, 4):
        out = tmp_path / str(workers)
        build(FolderSource(root=corpus), out, replace(OPTIONS, workers=workers))
        assert files(out) == files(expected.root)


def test_other_thresholds_are_another_build(corpus: Path, expected: Manifest) -> None:
    with pytest.raises(BuildError, match="near_duplicates"):
        build(FolderSource(root=corpus), expected.root, BuildOptions(shard_size_bytes=300_000, steps=OPTIONS.steps))


def test_the_command_line_asks_for_all_of_it(corpus: Path, expected: Manifest, tmp_path: Path) -> None:
    arguments = ["build", "--source", "folder", "--input", str(corpus), "--out", str(tmp_path / "shards")]
    assert main([*arguments, "--dedup", "text,image=6", "--shard-size-mb", str(300_000 / (1 << 20))]) == 0
    assert files(tmp_path / "shards") == files(expected.root)
    with pytest.raises(SystemExit):
        main([*arguments, "--dedup", "text", "--keep-duplicates"])
