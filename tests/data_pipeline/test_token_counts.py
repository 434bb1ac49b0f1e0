"""Token counts: right, aligned with the index, reused when whole, never mistaken for those of other shards."""

import os
import shutil

import pyarrow.parquet as pq
import pytest

from triweave.data_pipeline.errors import DataError
from triweave.data_pipeline.shards.index import read_index
from triweave.data_pipeline.shards.manifest import Manifest
from triweave.data_pipeline.text import token_counts
from triweave.data_pipeline.text.shard_texts import read_texts
from triweave.data_pipeline.text.token_counts import read_token_counts, token_counts_path, write_token_counts
from triweave.data_pipeline.text.tokenizer import SentencePieceTokenizer, Tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def model(tiny_shards, tmp_path_factory):
    out = tmp_path_factory.mktemp("tokenizer") / "tiny.model"
    train_tokenizer([tiny_shards], 480, out)
    return out


@pytest.fixture
def manifest(tiny_shards, tmp_path):
    shutil.copytree(tiny_shards.root, tmp_path / "shards")
    assert len(tiny_shards.shards) > 1
    return Manifest.load(tmp_path / "shards")


def sidecars(manifest):
    return sorted(manifest.root.glob("*.tokens-*"))


def test_counts_are_those_of_encode_in_the_order_of_the_index(manifest, model):
    report = write_token_counts(manifest, model)
    tokenizer = Tokenizer.load(model)
    total = 0
    for number in range(len(manifest.shards)):
        table = read_token_counts(manifest, number, tokenizer.hash)
        assert table["key"].to_pylist() == read_index(manifest, number, ["key"])["key"].to_pylist()
        expected = [
            [0 if text is None else len(tokenizer.encode(text)) for text in sample.texts]
            for sample in read_texts(manifest, number)
        ]
        assert table["part_tokens"].to_pylist() == expected
        total += sum(map(sum, expected))
    assert (report.samples, report.texts, report.tokens) == (24, 24, total)
    assert (report.written, report.reused) == (len(manifest.shards), 0)


def test_the_number_of_workers_does_not_show(manifest, model):
    write_token_counts(manifest, model, workers=1)
    alone = {path.name: path.read_bytes() for path in sidecars(manifest)}
    for path in sidecars(manifest):
        path.unlink()
    done = []
    write_token_counts(manifest, model, workers=2, progress=done.append)
    assert {path.name: path.read_bytes() for path in sidecars(manifest)} == alone
    assert sum(done) == manifest.samples


def test_a_second_run_reuses_whole_sidecars_and_writes_only_the_rest(manifest, model, monkeypatch):
    write_token_counts(manifest, model)
    first, second = sidecars(manifest)[:2]
    before = first.read_bytes()
    first.write_bytes(before[:-20])
    second.unlink()
    done = []
    report = write_token_counts(manifest, model, progress=done.append)
    assert (report.written, report.reused) == (2, len(manifest.shards) - 2)
    assert first.read_bytes() == before
    assert sum(done) == manifest.samples
    monkeypatch.setattr(token_counts, "_write_shard", lambda *_: pytest.fail("tokenised again"))
    assert write_token_counts(manifest, model).reused == len(manifest.shards)


def test_a_run_that_dies_leaves_no_half_sidecar(manifest, model, monkeypatch):
    def die(*_):
        yield ["key"], [[1]]
        raise KeyboardInterrupt

    monkeypatch.setattr(token_counts, "_count", die)
    with pytest.raises(KeyboardInterrupt):
        write_token_counts(manifest, model)
    assert sidecars(manifest) == []


def test_what_a_killed_run_left_half_written_is_removed(manifest, model):
    path = token_counts_path(manifest, 1, Tokenizer.load(model).hash)
    leftover = path.with_name(f"{path.name}.tmp-12345")
    leftover.write_bytes(b"half")
    write_token_counts(manifest, model)
    assert not leftover.exists()
    assert path.exists()


class DeadlyTokenizer(SentencePieceTokenizer):
    """Ends the worker process that unpickles it, as the kernel does when memory runs out."""

    def __reduce__(self):
        return os._exit, (9,)


def test_a_killed_worker_is_one_clear_error(manifest, model, monkeypatch):
    monkeypatch.setattr(Tokenizer, "load", lambda path: DeadlyTokenizer(path.read_bytes(), str(path)))
    with pytest.raises(DataError, match=r"a worker counting tokens .* was killed"):
        write_token_counts(manifest, model, workers=2)


def test_missing_counts_name_the_command(manifest):
    with pytest.raises(DataError, match=rf"run `triweave tokenize {manifest.root} --tokenizer FILE`"):
        read_token_counts(manifest, 0, "0123456789abcdef" * 2)


def test_counts_of_other_shards_or_tokenizers_are_not_taken(manifest, model):
    write_token_counts(manifest, model)
    tokenizer_hash = Tokenizer.load(model).hash
    own = token_counts_path(manifest, 0, tokenizer_hash)
    shutil.copy(token_counts_path(manifest, 1, tokenizer_hash), own)
    with pytest.raises(DataError, match="belong to other shards"):
        read_token_counts(manifest, 0, tokenizer_hash)
    assert write_token_counts(manifest, model).written == 1
    other_hash = tokenizer_hash[:16] + "0" * 16
    with pytest.raises(DataError, match="another tokenizer"):
        read_token_counts(manifest, 0, other_hash)


def test_damage_is_an_error_not_a_wrong_number(manifest, model):
    write_token_counts(manifest, model)
    tokenizer_hash = Tokenizer.load(model).hash
    path = token_counts_path(manifest, 0, tokenizer_hash)
    whole = path.read_bytes()
    for damaged in (b"", b"junk", whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="are damaged"):
            read_token_counts(manifest, 0, tokenizer_hash)


def test_no_flipped_byte_gives_other_counts(manifest, model):
    """Parquet's pages carry no checksum unless asked; a flip may decompress to other numbers."""
    write_token_counts(manifest, model)
    tokenizer = Tokenizer.load(model)
    path = token_counts_path(manifest, 0, tokenizer.hash)
    whole = path.read_bytes()
    expected = read_token_counts(manifest, 0, tokenizer.hash)
    for offset in range(len(whole)):
        path.write_bytes(whole[:offset] + bytes([whole[offset] ^ 0x10]) + whole[offset + 1 :])
        try:
            assert read_token_counts(manifest, 0, tokenizer.hash).equals(expected), f"byte {offset}"
        except DataError:
            continue


def test_a_folder_that_cannot_be_written_is_one_clear_error(manifest, model, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "ParquetWriter", full)
    with pytest.raises(DataError, match="No space left on device"):
        write_token_counts(manifest, model)
