"""The document schema: round trips, keys, hashes, and refusals."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triweave.data_pipeline.errors import SchemaError
from triweave.data_pipeline.media.geometry import MediaInfo
from triweave.data_pipeline.shards.schema import (
    KEY_PATTERN,
    Document,
    TextPart,
    content_hash,
    document_from_json,
    document_key,
    document_to_json,
    media_part,
)

IMAGE = replace(
    media_part("image", b"pixels", "jpg", "image/jpeg", MediaInfo(width=7, height=5), alt="a bird"), member="0001.jpg"
)
CLIP = replace(
    media_part("audio", b"waves", "flac", "audio/flac", MediaInfo(samples=24000, rate=16000), t_ms=(0, 1500)),
    member="0002.flac",
)
DOCUMENT = Document(
    id="birds/owl:de",
    parts=(TextPart(text="Ein Vogel. 鳥 \u0007", role="user"), IMAGE, CLIP),
    source={"corpus": "birds", "license": "CC0-1.0", "opt_out": False},
    labels={"language": "de", "number": 3, "nested": {"a": [1, None]}},
)


def test_round_trip_keeps_everything_but_the_bytes() -> None:
    without_bytes = (DOCUMENT.parts[0], replace(IMAGE, data=None), replace(CLIP, data=None))
    assert document_from_json(document_to_json(DOCUMENT)) == replace(DOCUMENT, parts=without_bytes)


def test_json_follows_the_published_form() -> None:
    content = json.loads(document_to_json(DOCUMENT))
    assert content["v"] == 1
    assert content["parts"][0] == {"modality": "text", "text": "Ein Vogel. 鳥 \u0007", "role": "user"}
    assert content["parts"][1] == {
        "modality": "image",
        "member": "0001.jpg",
        "mime": "image/jpeg",
        "bytes": 6,
        "w": 7,
        "h": 5,
        "xxh3": f"{IMAGE.xxh3:016x}",
        "alt": "a bird",
    }
    assert content["parts"][2]["ms"] == 1500
    assert content["parts"][2]["t_ms"] == [0, 1500]


def test_json_does_not_depend_on_label_order() -> None:
    other = replace(DOCUMENT, labels=dict(reversed(DOCUMENT.labels.items())))
    assert document_to_json(other) == document_to_json(DOCUMENT)


@given(st.text(min_size=1))
def test_every_id_gives_a_valid_key(document_id: str) -> None:
    try:
        document_id.encode()
    except UnicodeEncodeError:
        return
    assert KEY_PATTERN.fullmatch(document_key(document_id))


def test_keys_tell_alike_ids_apart() -> None:
    alike = ["a/b", "a-b", "A/B", "a b", "a.b", "x" * 200, "x" * 201, "鳥", "魚", "-", "--"]
    assert len({document_key(name) for name in alike}) == len(alike)


def test_content_hash_ignores_order_and_ids_but_not_content() -> None:
    parts = DOCUMENT.parts
    assert content_hash(parts) == content_hash(parts[::-1])
    assert content_hash(parts) != content_hash(parts[:2])
    assert content_hash([*parts, parts[0]]) != content_hash(parts)
    assert content_hash([TextPart(text="pixels")]) != content_hash([IMAGE])


@pytest.mark.parametrize(
    "junk",
    [b"", b"\xff\xfe", b"[]", b"3", b'{"v":1}', b'{"v":2,"id":"a","parts":[],"source":{},"labels":{}}',
     b'{"v":1,"id":"a","parts":[{"modality":"image"}],"source":{},"labels":{}}',
     b'{"v":1,"id":"a","parts":[{"modality":"image","member":"x","mime":"","bytes":1,"xxh3":"zz"}],"source":{},"labels":{}}',
     b'{"v":1,"id":"a","parts":[7],"source":{},"labels":{}}'],
)  # fmt: skip
def test_junk_is_one_clear_error(junk: bytes) -> None:
    with pytest.raises(SchemaError, match="document"):
        document_from_json(junk)


def test_documents_that_cannot_be_written_are_refused() -> None:
    with pytest.raises(SchemaError, match="no parts"):
        document_to_json(replace(DOCUMENT, parts=()))
    with pytest.raises(SchemaError, match="not JSON"):
        document_to_json(replace(DOCUMENT, labels={"a": float("nan")}))
    with pytest.raises(SchemaError, match="member name"):
        document_to_json(replace(DOCUMENT, parts=(replace(IMAGE, member=""),)))
