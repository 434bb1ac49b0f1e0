"""The tokenizer: exact round trip of any text, markers that no text can forge, reproducible training."""

import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from triweave.data_pipeline.errors import ShardDamagedError, ShardMissingError, TokenizerError
from triweave.data_pipeline.media.modalities import MODALITIES
from triweave.data_pipeline.shards.build import BuildOptions, build
from triweave.data_pipeline.shards.manifest import Manifest
from triweave.data_pipeline.sources.folder import FolderSource
from triweave.data_pipeline.text.shard_texts import read_texts
from triweave.data_pipeline.text.tokenizer import CHAT_MARKERS, RESERVED_MEDIA, Tokenizer, _TextSample, train_tokenizer

VOCAB_SIZE = 480


@pytest.fixture(scope="module")
def path(tiny_shards, tmp_path_factory):
    out = tmp_path_factory.mktemp("tokenizer") / "tiny.model"
    train_tokenizer([tiny_shards], VOCAB_SIZE, out)
    return out


@pytest.fixture(scope="module")
def tokenizer(path):
    return Tokenizer.load(path)


@settings(max_examples=300, deadline=None)
@given(text=st.text())
@example(text="  two  spaces, and one at the end ")
@example(text="\n\ttabs and\r\nlines\n")
@example(text="the symbol \u2581 of sentencepiece \u2581\u2581 itself")
@example(text="unknown \u2047 and \ufffd, NUL \0, \U0001f9f6, e\u0301 is not \u00e9, ﬁ is not fi")
@example(text="日本語 русский العربية हिन्दी ไทย")
def test_round_trip_of_any_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text).tolist())) == text.encode()


def test_encoding_many_is_encoding_each(tokenizer):
    texts = ["a bird", "", " \u2581 x", "Vogel"]
    assert [list(ids) for ids in tokenizer.encode_many(texts)] == [tokenizer.encode(text).tolist() for text in texts]
    assert tokenizer.encode("a bird").dtype == np.int32
    assert tokenizer.encode("").shape == (0,)


def all_markers(tokenizer):
    media = {token for tokens in tokenizer.media.values() for token in (tokens.start_id, tokens.placeholder_id)}
    return media | set(tokenizer.markers.values()) | {tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id}


def test_hostile_text_never_becomes_a_marker(tokenizer):
    processor = sentencepiece.SentencePieceProcessor(model_proto=pickle.loads(pickle.dumps(tokenizer))._model)
    pieces = [processor.id_to_piece(token) for token in sorted(all_markers(tokenizer))]
    assert "<|image|>" in pieces
    assert "<|end|>" in pieces
    assert "</s>" in pieces
    for text in [*pieces, "".join(pieces), " ".join(pieces), "<0x41>", "<unk>"]:
        assert not set(tokenizer.encode(text).tolist()) & all_markers(tokenizer)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_corpus_full_of_markers_learns_none_of_them(tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(30):
        (corpus / f"{number}.txt").write_text(f"<|image|><|image_pad|> {number} <|end|></s> owl", encoding="utf-8")
    out = tmp_path / "hostile.model"
    train_tokenizer([build(FolderSource(root=corpus), tmp_path / "shards", BuildOptions())], 295, out)
    tokenizer = Tokenizer.load(out)
    ids = tokenizer.encode("<|image|><|image_pad|> <|end|></s>")
    assert not set(ids.tolist()) & all_markers(tokenizer)


def test_the_marker_ids_are_distinct_and_cover_registry_and_reserve(tokenizer):
    assert set(tokenizer.media) == {*MODALITIES, *RESERVED_MEDIA}
    assert set(tokenizer.markers) == set(CHAT_MARKERS)
    assert len(all_markers(tokenizer)) == 3 + 2 * len(tokenizer.media) + len(CHAT_MARKERS)
    assert tokenizer.vocab_size == VOCAB_SIZE
    assert tokenizer.decode([tokenizer.bos_id, *tokenizer.encode("owl"), tokenizer.media["image"].start_id]) == "owl"


def test_a_registered_modality_gets_markers(tiny_shards, tmp_path, monkeypatch):
    monkeypatch.setitem(MODALITIES, "sensor", MODALITIES["image"])
    train_tokenizer([tiny_shards], VOCAB_SIZE, tmp_path / "sensor.model")
    assert "sensor" in Tokenizer.load(tmp_path / "sensor.model").media


def test_training_is_reproducible_in_another_process_and_for_other_shard_sizes(tiny_corpus, path, tmp_path):
    manifest = build(FolderSource(root=tiny_corpus), tmp_path / "shards", BuildOptions(shard_size_bytes=10_000_000))
    program = (
        "import sys; from pathlib import Path; from triweave.data_pipeline.shards.manifest import Manifest;"
        "from triweave.data_pipeline.text.tokenizer import train_tokenizer;"
        f"train_tokenizer([Manifest.load(sys.argv[1])], {VOCAB_SIZE}, Path(sys.argv[2]))"
    )
    out = tmp_path / "again.model"
    subprocess.run([sys.executable, "-c", program, str(manifest.root), str(out)], check=True, capture_output=True)
    assert out.read_bytes() == path.read_bytes()
    assert Tokenizer.load(out).hash == Tokenizer.load(path).hash


def test_the_sample_does_not_depend_on_the_order_of_the_texts():
    texts = [(f"key{number}", 0, f"text number {number} " * (1 + number % 7)) for number in range(300)]

    def sampled(order, seed=0):
        sample = _TextSample(seed=seed, limit_bytes=2_000)
        for entry in order:
            sample.add(*entry)
        return list(sample.sentences()), sample

    forwards, sample = sampled(texts)
    assert forwards == sampled(reversed(texts))[0]
    assert forwards != sampled(texts, seed=1)[0]
    assert 1_500 < sample.sampled_bytes == sum(len(text) for text in forwards) <= 2_000
    assert sample.text_bytes == sum(len(text) for _, _, text in texts)


@given(st.text(st.sampled_from("ab \nж"), max_size=6_000))
@settings(max_examples=50, deadline=None)
def test_long_texts_are_cut_without_losing_a_character(text):
    sample = _TextSample(seed=0, limit_bytes=10**9)
    sample.add("key", 0, text)
    pieces = list(sample.sentences())
    assert max(map(len, pieces)) <= 1_000
    assert sum(map(len, pieces)) == len(text)
    assert sorted("".join(pieces)) == sorted(text)


@pytest.mark.parametrize("vocab_size", [-1, 0, 3, 100, 300, 200_000])
def test_an_impossible_vocabulary_names_the_limit_and_the_limit_works(tiny_shards, vocab_size, tmp_path):
    with pytest.raises(TokenizerError, match=rf"^vocab_size={vocab_size} .*at (least|most) (\d+)$") as caught:
        train_tokenizer([tiny_shards], vocab_size, tmp_path / "out.model")
    assert not list(tmp_path.iterdir())
    limit = int(str(caught.value).rsplit(" ", 1)[1])
    train_tokenizer([tiny_shards], limit, tmp_path / "out.model")
    assert Tokenizer.load(tmp_path / "out.model").vocab_size == limit


def test_shards_without_text_are_refused(tmp_path):
    manifest = Manifest(root=tmp_path, shards=())
    with pytest.raises(TokenizerError, match="holds no text"):
        train_tokenizer([manifest], 400, tmp_path / "out.model")


def test_what_is_no_tokenizer_is_refused(tmp_path):
    with pytest.raises(TokenizerError, match=r"cannot be read \(No such file"):
        Tokenizer.load(tmp_path / "none.model")
    with pytest.raises(TokenizerError, match=r"tokenizer.json cannot be read .* name a folder of `triweave import`"):
        Tokenizer.load(tmp_path)
    for content in (b"", b"junk" * 100):
        (tmp_path / "junk.model").write_bytes(content)
        with pytest.raises(TokenizerError, match="is no sentencepiece model"):
            Tokenizer.load(tmp_path / "junk.model")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a small owl"] * 9),
        model_prefix=str(tmp_path / "foreign"),
        vocab_size=14,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    with pytest.raises(TokenizerError, match="has no media and chat markers"):
        Tokenizer.load(tmp_path / "foreign.model")


def test_a_lone_surrogate_is_one_clear_error(tokenizer):
    for text in ("a \ud800 b", "\u2581\udfff"):
        with pytest.raises(TokenizerError, match="lone surrogate"):
            tokenizer.encode(text)


def test_a_pickled_tokenizer_is_the_same(tokenizer):
    twin = pickle.loads(pickle.dumps(tokenizer))
    assert (twin.hash, twin.media, twin.vocab_size) == (tokenizer.hash, tokenizer.media, tokenizer.vocab_size)
    assert twin.encode("Ein Vogel").tolist() == tokenizer.encode("Ein Vogel").tolist()


class TestReadTexts:
    @pytest.fixture
    def manifest(self, tiny_shards, tmp_path):
        shutil.copytree(tiny_shards.root, tmp_path / "shards")
        return Manifest.load(tmp_path / "shards")

    def test_texts_come_in_tar_order_with_none_for_media(self, manifest):
        samples = [sample for number in range(len(manifest.shards)) for sample in read_texts(manifest, number)]
        assert len(samples) == manifest.samples == 24
        texts = [text for sample in samples for text in sample.texts if text is not None]
        assert sorted(int(text.split(".")[0]) for text in texts) == list(range(24))
        assert any(None in sample.texts for sample in samples)

    def test_a_changed_text_names_shard_and_key(self, manifest):
        sample = next(iter(read_texts(manifest, 0)))
        tar = manifest.tar_path(0)
        text = next(text for text in sample.texts if text is not None).encode()
        tar.write_bytes(tar.read_bytes().replace(text, text.replace(b". ", b": ")))
        with pytest.raises(ShardDamagedError, match=rf"{tar.name}: the text of {sample.key}"):
            list(read_texts(manifest, 0))

    def test_a_cut_or_empty_tar_is_damage_and_a_lost_one_is_missing(self, manifest):
        tar = manifest.tar_path(0)
        for size in (tar.stat().st_size // 2, 0):
            with open(tar, "r+b") as file:
                file.truncate(size)
            with pytest.raises(ShardDamagedError, match=tar.name):
                list(read_texts(manifest, 0))
        tar.unlink()
        with pytest.raises(ShardMissingError, match=tar.name):
            list(read_texts(manifest, 0))


def test_a_vocabulary_beyond_int32_is_one_line(tiny_shards, tmp_path):
    with pytest.raises(TokenizerError, match=r"^vocab_size=99999999999: "):
        train_tokenizer([tiny_shards], 99_999_999_999, tmp_path / "tokenizer.model")
