"""Tokenizers of imported models: text never becomes a marker, bytes add up, processes can be handed one."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from triweave.data_pipeline.errors import TokenizerError
from triweave.data_pipeline.text.hugging_face import HuggingFaceTokenizer
from triweave.data_pipeline.text.tokenizer import Tokenizer

tokenizers = pytest.importorskip("tokenizers")
SPECIAL = ["<|endoftext|>", "<|vision_start|>", "<|image_pad|>"]
MEANINGS = {
    "vocab_size": 320, "pad": 0, "bos": 0, "eos": 0,
    "media": {"image": {"start": 1, "placeholder": 2}, "audio": {"start": 318, "placeholder": 319}},
}  # fmt: skip
TEXTS = ["a cat", "  two  spaces ", "naïve – 猫 🐈\n", "", "a <|image_pad|> b <|endoftext|>"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(["a cat and a dog"] * 3, trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "triweave.json").write_text(json.dumps(MEANINGS))
    return tmp_path


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back_and_is_never_a_marker(folder, text):
    tokenizer = Tokenizer.load(folder)
    ids = tokenizer.encode(text).tolist()
    assert not tokenizer.unwritable & set(ids)
    assert tokenizer.decode(ids) == text
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    assert tokenizer.encode_many([text, "a cat"]) == [ids, tokenizer.encode("a cat").tolist()]


def test_markers_ends_and_rows_behind_the_vocabulary_are_unwritable(folder):
    tokenizer = Tokenizer.load(folder)
    assert {0, 1, 2, 318, 319} <= tokenizer.unwritable
    assert set(range(tokenizer.vocab_size)) >= tokenizer.unwritable
    assert tokenizer.media["audio"].placeholder_id == 319
    assert tokenizer.decode([0, 1, *tokenizer.encode("a cat").tolist(), 319]) == "a cat"


def test_it_travels_and_its_hash_covers_both_files(folder):
    tokenizer = Tokenizer.load(folder)
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.hash == tokenizer.hash
    assert copy.encode("a dog").tolist() == tokenizer.encode("a dog").tolist()
    (folder / "triweave.json").write_text(json.dumps({**MEANINGS, "vocab_size": 321}))
    assert Tokenizer.load(folder).hash != tokenizer.hash


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("triweave.json", "{}", r"triweave.json is damaged \(KeyError"),
        ("triweave.json", json.dumps({**MEANINGS, "vocab_size": 300}), r"names id 319, but vocab_size is 300"),
        ("triweave.json", json.dumps({**MEANINGS, "eos": 70}), r"becomes token 70, which is a marker"),
        ("tokenizer.json", "nonsense", r"tokenizer.json is damaged"),
        ("triweave.json", None, r"triweave.json cannot be read"),
    ],
)
def test_damage_is_named(folder, file, content, message):
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_text(content)
    with pytest.raises(TokenizerError, match=message):
        HuggingFaceTokenizer.read(folder)


def test_a_lone_surrogate_is_refused(folder):
    with pytest.raises(TokenizerError, match="lone surrogate"):
        Tokenizer.load(folder).encode("a \ud800 b")
