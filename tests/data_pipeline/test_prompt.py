"""Prompts: the tokens, intervals and payloads of a document, alone segments, files of prompts and their refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import xxhash

from triweave.data_pipeline.errors import MediaError, PromptError
from triweave.data_pipeline.media.geometry import MediaGeometry
from triweave.data_pipeline.media.modalities import MODALITIES
from triweave.data_pipeline.stream import prompt
from triweave.data_pipeline.stream.prompt import PromptMedia, prompt_batch, read_media, read_prompts
from triweave.data_pipeline.text.tokenizer import Tokenizer

GEOMETRY = MediaGeometry(image_patch_px=8, image_max_tokens=12)


@pytest.fixture(scope="module")
def tokenizer(stream_data) -> Tokenizer:
    return Tokenizer.load(stream_data.tokenizer)


@pytest.fixture
def media(tmp_path, picture, clip) -> tuple[PromptMedia, PromptMedia]:
    """A picture of 2 x 3 patches and a clip, read from files."""
    (tmp_path / "bird.png").write_bytes(picture(1, width=24, height=16))
    (tmp_path / "song.flac").write_bytes(clip(2, ms=400))
    return read_media(tmp_path / "bird.png"), read_media(tmp_path / "song.flac")


def test_a_prompt_is_laid_out_like_a_document(tokenizer, media) -> None:
    image, audio = media
    batch = prompt_batch([["A bird", image, audio, "sings"], [image]], tokenizer=tokenizer, geometry=GEOMETRY)
    first, last = tokenizer.encode("A bird").tolist(), tokenizer.encode("sings").tolist()
    sound = MODALITIES["audio"].grid(audio.info, GEOMETRY)[0]
    image_tokens, audio_tokens = tokenizer.media["image"], tokenizer.media["audio"]
    wanted = [
        tokenizer.bos_id, *first, image_tokens.start_id, *[image_tokens.placeholder_id] * 6, audio_tokens.start_id,
        *[audio_tokens.placeholder_id] * sound, *last,
    ]  # fmt: skip
    assert batch.tokens[0].tolist() == wanted
    span = len(first) + 2
    assert batch.kv_hi[0, span : span + 6].tolist() == [span + 6] * 6
    assert batch.kv_hi[0, span - 1] == span
    assert not batch.kv_lo.any()
    short = 1 + 1 + 6
    assert batch.tokens[1, :short].tolist() == [tokenizer.bos_id, image_tokens.start_id, *wanted[span : span + 6]]
    assert (batch.tokens[1, short:] == tokenizer.pad_id).all()
    assert (batch.kv_hi[1, short:] == 0).all()
    # media in order of rows: the picture comes twice, decoded from its bytes
    decoded = MODALITIES["image"].decode(image.content, image.info, GEOMETRY)
    assert np.array_equal(batch.payloads["image"].values, np.concatenate([decoded, decoded]))
    assert batch.payloads["image"].item_rows.tolist() == [0, 1]
    assert batch.payloads["audio"].lengths.tolist() == [sound]


def test_end_closes_the_document(tokenizer, media) -> None:
    batch = prompt_batch([["A", media[0]], ["bird"]], tokenizer=tokenizer, geometry=GEOMETRY, end=True)
    for row in range(2):
        tokens = batch.tokens[row][batch.kv_hi[row] > 0]
        assert tokens[-1] == tokenizer.eos_id
        assert (tokens == tokenizer.eos_id).sum() == 1


def test_alone_parts_are_segments_that_see_only_themselves(tokenizer, media) -> None:
    image, audio = media
    batch = prompt_batch([[image, "A  Bird!"], [audio]], tokenizer=tokenizer, geometry=GEOMETRY, alone=True)
    segments = batch.segments
    assert segments.rows.tolist() == [0, 0, 1]
    assert segments.modality.tolist() == [1, 0, 2]
    text = len(tokenizer.encode("A  Bird!"))
    assert segments.lengths[:2].tolist() == [9, text + 2]
    assert segments.content_keys.tolist() == [
        xxhash.xxh3_64_intdigest(image.content),
        xxhash.xxh3_64_intdigest(b"a bird"),
        xxhash.xxh3_64_intdigest(audio.content),
    ]
    assert not segments.group_keys.any()
    assert batch.kv_lo[0, :9].tolist() == [0] * 9
    assert batch.kv_hi[0, :9].tolist() == [9] * 9
    assert batch.kv_lo[0, 9 : 11 + text].tolist() == [9] * (text + 2)
    assert batch.tokens[0, 8] == tokenizer.eos_id
    assert batch.row_index.size == 0


def test_no_prompts_and_an_empty_one(tokenizer) -> None:
    assert prompt_batch([], tokenizer=tokenizer, geometry=GEOMETRY).tokens.shape == (0, 0)
    assert prompt_batch([[]], tokenizer=tokenizer, geometry=GEOMETRY).tokens.tolist() == [[tokenizer.bos_id]]


def test_bounds_are_checked_before_decoding(tmp_path, picture, monkeypatch) -> None:
    path = tmp_path / "big.png"
    path.write_bytes(picture(1))
    monkeypatch.setattr(prompt, "MAX_MEDIA_FILE_BYTES", 10)
    with pytest.raises(MediaError, match=r"big\.png: more than 10 bytes"):
        read_media(path)


def test_media_errors_name_the_file(tmp_path, tokenizer, picture, clip) -> None:
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "what.xyz").write_text("?")
    with pytest.raises(MediaError, match=r"text\.png: image of 10 bytes: .* \(its first bytes are of none of them\)"):
        read_media(tmp_path / "text.png")
    with pytest.raises(MediaError, match=r"none\.png: cannot be read: No such file"):
        read_media(tmp_path / "none.png")
    with pytest.raises(MediaError, match=r"what\.xyz: no picture or sound by its ending"):
        read_media(tmp_path / "what.xyz")
    whole = picture(1, width=200, height=200)
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    cut = read_media(tmp_path / "cut.png")
    with pytest.raises(MediaError, match=r"cut\.png: image"):
        prompt_batch([[cut]], tokenizer=tokenizer, geometry=GEOMETRY)
    (tmp_path / "song.dat").write_bytes(clip(1))
    assert read_media(tmp_path / "song.dat", "audio").info.rate == 16_000


def test_prompt_files(tmp_path: Path, picture, clip) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.png").write_bytes(picture(1))
    (folder / "b.flac").write_bytes(clip(1))
    one = [{"text": "x"}, {"image": "a.png"}, {"audio": "b.flac"}, {"text": "y"}]
    (tmp_path / "in" / "one.json").write_text(json.dumps(one))
    (parts,) = read_prompts(folder / "one.json")
    assert [part if isinstance(part, str) else part.modality for part in parts] == ["x", "image", "audio", "y"]
    (folder / "two.yaml").write_text("- - image: a.png\n- - text: A small\n  - audio: b.flac\n")
    assert [len(parts) for parts in read_prompts(folder / "two.yaml")] == [1, 2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "holds no prompt"),
        ("[]", "holds no prompt"),
        ("{[", "neither JSON nor YAML"),
        ('["text"]', "'text'; a part has one key, text or image or audio"),
        ('[{"text": "a", "image": "b"}]', "a part has one key"),
        ('[{"video": "a"}]', "a part has one key"),
        ('[{"text": 5}]', "part 0: its text is 5; it must be a string"),
        ('[[{"text": "a"}], []]', r"prompt 1 is \[\]; a prompt is a list of parts"),
        ('[[{"text": "a"}], {"text": "a"}]', "prompt 1 is .*; a prompt is a list of parts"),
        ("[" * 100_000, "neither JSON nor YAML"),
    ],
)
def test_files_of_another_shape_are_refused_in_one_line(tmp_path, content, message) -> None:
    path = tmp_path / "prompt.json"
    path.write_text(content)
    with pytest.raises(PromptError, match=message) as caught:
        read_prompts(path)
    assert "prompt.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_prompt_file(tmp_path) -> None:
    with pytest.raises(PromptError, match="cannot be read: No such file"):
        read_prompts(tmp_path / "none.json")


def test_a_path_that_can_be_none_is_refused(tmp_path) -> None:
    (tmp_path / "prompt.json").write_text('[{"image": "a\\u0000b.png"}]')
    with pytest.raises(MediaError, match="cannot be read: embedded null byte"):
        read_prompts(tmp_path / "prompt.json")


def test_what_has_no_size_is_read_up_to_the_bound_only(monkeypatch) -> None:
    monkeypatch.setattr(prompt, "MAX_MEDIA_FILE_BYTES", 1000)
    monkeypatch.setattr(prompt, "MAX_PROMPT_FILE_BYTES", 1000)
    with pytest.raises(MediaError, match="more than 1000 bytes"):
        read_media("/dev/zero", "image")
    with pytest.raises(PromptError, match="more than 1000 bytes"):
        read_prompts("/dev/zero")


def test_anchors_that_stand_for_billions_are_refused_at_once(tmp_path) -> None:
    levels = ["&a0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"&a{level} [{', '.join([f'*a{level - 1}'] * 10)}]" for level in range(1, 10)]
    (tmp_path / "bomb.yaml").write_text(f"- text: [{', '.join(levels)}]\n")
    with pytest.raises(PromptError, match="it must be a string"):
        read_prompts(tmp_path / "bomb.yaml")
