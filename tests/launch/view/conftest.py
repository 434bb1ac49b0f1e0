"""Small shards to look at, hostile ones, and a server that shows them."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import xxhash
import yaml
from PIL import Image

from triweave.data_pipeline.config import load_data_config
from triweave.data_pipeline.media.geometry import MediaInfo
from triweave.data_pipeline.media.modalities import MODALITIES
from triweave.data_pipeline.shards.manifest import Manifest, write_manifest
from triweave.data_pipeline.shards.schema import Document, MediaPart, Part, TextPart, media_part
from triweave.data_pipeline.shards.writer import EncodedSample, ShardWriter, encode_sample, member_header
from triweave.data_pipeline.text.token_counts import write_token_counts
from triweave.data_pipeline.text.tokenizer import Tokenizer, train_tokenizer
from triweave.launch.view.packs import PackBook
from triweave.launch.view.server import ViewServer
from triweave.launch.view.shard_folder import ShardFolder

LANGUAGES = {"en": "A bird on a branch sings", "fr": "Un oiseau d'été chante", "ja": "小さな鳥が歌う 🙂"}
DOCUMENTS = 60
SHARD_DOCUMENTS = 25


def picture(number: int, width: int = 64, height: int = 48) -> MediaPart:
    pixels = np.full((height, width, 3), (number * 40 % 256, 120, 200 - number % 200), np.uint8)
    pixels[: height // 2, : width // 2] = 250
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return made("image", file.getvalue(), alt=f"stripes {number}" if number % 2 else None)


def clip(number: int, ms: int = 600, form: str = "FLAC") -> MediaPart:
    time = np.arange(8 * ms) / 8000
    file = io.BytesIO()
    tone = 0.5 * np.sin(2 * np.pi * (200 + 10 * number) * time) * np.exp(-2 * time)
    soundfile.write(file, tone.astype(np.float32), 8000, format=form, subtype="PCM_16")
    return made("audio", file.getvalue())


def made(modality: str, data: bytes, alt: str | None = None) -> MediaPart:
    info, extension, mime = MODALITIES[modality].probe(data)
    return media_part(modality, data, extension, mime, info, alt=alt)


def document(number: int) -> Document:
    """By number modulo 3: picture + text, text + clip, text alone."""
    language = list(LANGUAGES)[number % len(LANGUAGES)]
    text = TextPart(text=f"{LANGUAGES[language]} {number}.")
    parts: list[Part] = [[picture(number), text], [text, clip(number)], [text]][number // 3 % 3]
    return Document(
        id=f"item/{number}",
        parts=tuple(parts),
        source={"corpus": "birds" if number < 40 else "talk", "license": "CC0-1.0"},
        labels={
            "language": language,
            "number": number,
            "kind": "Two Words" if number % 7 == 0 else "plain",
            **({"annotations": {"words": [0, 2] * 2000}} if number == 31 else {}),
        },
    )


def write_folder(folder: Path, shards: list[list[EncodedSample]]) -> Manifest:
    """Write samples as a finished shard folder."""
    folder.mkdir(parents=True)
    entries = []
    for number, samples in enumerate(shards):
        with ShardWriter(folder, f"shard-{number:06d}") as writer:
            for sample in samples:
                writer.append(sample)
            entries.append(writer.seal())
    kept = sum(entry.samples for entry in entries)
    write_manifest(Manifest(root=folder, shards=tuple(entries), rows={"kept": kept}))
    return Manifest.load(folder)


@dataclass(frozen=True)
class ViewData:
    """Shards of DOCUMENTS documents, their tokenizer, and a config that packs them."""

    shards: Path
    tokenizer: Path
    config: Path


@pytest.fixture(scope="session")
def view_data(tmp_path_factory: pytest.TempPathFactory) -> ViewData:
    folder = tmp_path_factory.mktemp("view")
    samples = [encode_sample(f"item-{number}", document(number)) for number in range(DOCUMENTS)]
    starts = range(0, DOCUMENTS, SHARD_DOCUMENTS)
    manifest = write_folder(folder / "birds", [samples[start : start + SHARD_DOCUMENTS] for start in starts])
    train_tokenizer([manifest], 380, folder / "tokenizer.model")
    write_token_counts(manifest, folder / "tokenizer.model")
    data = {
        "sources": [{"name": "birds", "shards": str(folder / "birds")}],
        "tokenizer": str(folder / "tokenizer.model"),
        "sequence_length": 96,
        "packing": {"contrastive_share": 0.5},
        "geometry": {"image_patch_px": 8, "image_max_tokens": 16},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump({"data": data}), encoding="utf-8")
    return ViewData(folder / "birds", folder / "tokenizer.model", folder / "run.yaml")


@contextmanager
def serving(folders: list[ShardFolder], **more: Any) -> Iterator[ViewServer]:
    with ViewServer(0, folders, **more) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def serve() -> Callable[..., AbstractContextManager[ViewServer]]:
    """`serving`, for tests: modules cannot import a conftest."""
    return serving


@pytest.fixture(scope="session")
def view_server(view_data: ViewData, hostile_shards: Path) -> Iterator[ViewServer]:
    """Both folders, tokens and packs on a port of this machine."""
    folders = [ShardFolder("birds", str(view_data.shards)), ShardFolder("hostile", str(hostile_shards))]
    packs = PackBook(load_data_config(view_data.config))
    with serving(folders, tokenizer=Tokenizer.load(view_data.tokenizer), packs=packs) as server:
        yield server


@pytest.fixture
def ask(view_server: ViewServer) -> Iterator[Callable[..., HTTPResponse]]:
    """Return a function that sends a GET with headers, the Host of the server unless another is given."""
    connection = HTTPConnection("127.0.0.1", view_server.server_port, timeout=20)

    def send(path: str, method: str = "GET", **headers: str) -> HTTPResponse:
        connection.close()
        connection.putrequest(method, path, skip_host=True)
        sent = {"Host": f"127.0.0.1:{view_server.server_port}"} | {
            name.replace("_", "-"): value for name, value in headers.items()
        }
        for name, value in sent.items():
            connection.putheader(name, value)
        connection.endheaders()
        return connection.getresponse()

    yield send
    connection.close()


ATTACK = "fetch('/pwned');document.title='pwned'"
MARKUP = f'<img src=x onerror="{ATTACK}"><script>{ATTACK}</script></title><svg onload="{ATTACK}"></svg>'
DRAWING = f'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><script>{ATTACK}</script></svg>'.encode()
PAGE = f"<!DOCTYPE html><script>{ATTACK}</script>".encode()


def claimed(modality: str, data: bytes, extension: str, mime: str) -> MediaPart:
    """Return a part whose JSON says whatever is given, with the facts of a picture."""
    return media_part(modality, data, extension, mime, MediaInfo(width=9, height=9), alt=MARKUP)


def raw_sample(key: str, content: bytes, modalities: list[str], labels: str = "{}") -> EncodedSample:
    """Return a sample whose JSON member is `content`, whatever it is, with parts that point into it."""
    whole = encode_sample(key, Document(id=key, parts=(TextPart(text="-"),)))
    header = member_header(f"{key}.json", len(content))
    data = header + content + bytes(-len(content) % 512)
    row = replace(
        whole.row,
        labels=labels,
        size=len(data),
        xxh3=xxhash.xxh3_64_intdigest(data),
        json_size=len(content),
        **{
            f"part_{name}": [value] * len(modalities)
            for name, value in (
                *(("offset", 512), ("size", 20), ("width", 1), ("height", 1), ("samples", 0), ("rate", 0)),
                ("xxh3", 0),
            )
        },
        part_modality=modalities,
    )
    return EncodedSample(data=data, row=row)


HOSTILE = {
    "markup": 0,
    "drawing": 1,
    "page": 2,
    "unknown": 3,
    "types": 4,
    "deep": 5,
    "parts": 6,
    "surrogate": 7,
    "no-json": 8,
    "aiff": 9,
    "more": 10,
}
"""Name -> number of each hostile sample."""


@pytest.fixture(scope="session")
def hostile() -> dict[str, int]:
    """`HOSTILE`, for tests: modules cannot import a conftest."""
    return HOSTILE


@pytest.fixture(scope="session")
def hostile_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("view") / "hostile"
    markup = Document(
        id=MARKUP,
        parts=(TextPart(text=MARKUP, role=MARKUP), picture(1), replace(clip(1), t_ms=(0, 5), alt=MARKUP)),
        source={"corpus": MARKUP, "url": f"javascript:{ATTACK}", MARKUP: MARKUP},
        labels={"language": MARKUP, MARKUP: [MARKUP]},
    )
    typed = b'{"v":1,"id":{"a":1},"parts":[{"modality":"text","text":7}],"source":{},"labels":{}}'
    more = b'{"v":1,"id":"m","parts":[%b,%b],"source":{},"labels":{}}' % ((b'{"modality":"text","text":"m"}',) * 2)
    wide = (
        b'{"v":1,"id":"w","parts":[{"modality":"image","member":"../../../etc/passwd.svg","mime":"image/svg+xml",'
        b'"w":"1","h":[],"samples":"x","rate":"y","xxh3":"zz","bytes":-1}],"source":{},"labels":{"a":NaN}}'
    )
    samples = [
        encode_sample("markup", markup),
        encode_sample("drawing", Document(id="drawing", parts=(claimed("image", DRAWING, "svg", "image/svg+xml"),))),
        encode_sample("page", Document(id="page", parts=(claimed("audio", PAGE, "html", "text/html"),))),
        encode_sample("unknown", Document(id="unknown", parts=(claimed("hologram", PAGE, "html", "text/html"),))),
        raw_sample("types", typed, ["text"]),
        raw_sample("deep", b'{"v":1,"id":' + b"[" * 100_000, ["text"], labels="[" * 100_000),
        raw_sample("parts", wide, ["image", "text"]),
        raw_sample("surrogate", rb'{"v":1,"id":"\ud800","parts":[{"modality":"text","text":"\udfff"}],"source":{},'
                   rb'"labels":{"\ud800":"\ud800"}}', ["text"]),
        raw_sample("no-json", b"\xff\xfe\x00<script>", ["text"], labels="17"),
        encode_sample("aiff", Document(id="aiff", parts=(clip(2, form="AIFF"),))),
        raw_sample("more", more, ["text"]),
    ]  # fmt: skip
    assert len(samples) == len(HOSTILE)
    write_folder(folder, [samples])
    return folder
