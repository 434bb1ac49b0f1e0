"""Blocklists: words in many scripts, domains, media before and after encoding, functions, and what the ledger says."""

from __future__ import annotations

import base64
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from triweave.data_pipeline.errors import ConfigError
from triweave.data_pipeline.scrub.blocklist_step import BlocklistStep, blocklist_step
from triweave.data_pipeline.shards.build import BuildOptions, build
from triweave.data_pipeline.shards.index import read_index
from triweave.data_pipeline.shards.ledger import read_ledger
from triweave.data_pipeline.shards.manifest import Manifest
from triweave.data_pipeline.shards.media_encoder import MediaEncoder, MediaOptions
from triweave.data_pipeline.shards.schema import Document, TextPart
from triweave.data_pipeline.sources.base import FilteredError
from triweave.data_pipeline.sources.html import HtmlSource
from triweave.data_pipeline.sources.manifest import ManifestSource
from triweave.launch.cli import main

Media = Callable[..., bytes]
LIST = """# of the tests
word: Grey Heron
word: straße
word: 禁止
domain: bad.example
domain: bücher.example

media: {sha256}
"""


def step_of(folder: Path, text: str) -> BlocklistStep:
    (folder / "list.txt").write_text(text, encoding="utf-8")
    step = blocklist_step([str(folder / "list.txt")])
    assert step is not None
    return step


def refusal(step: BlocklistStep, text: str, **more: object) -> str:
    document = Document(id="d", parts=(TextPart(text=text),), **more)  # type: ignore[arg-type]
    try:
        assert step.apply(document) is document
    except FilteredError as why:
        return str(why)
    return ""


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("A GREY  heron, standing.", 2),
        ("A grey\nｈｅｒｏｎ", 2),
        ("A grey heronry and a heron, grey", 0),
        ("In der STRASSE", 3),
        ("in der Hauptstraße", 0),
        ("这里禁止停车", 4),
        ("see https://bad.example/x?y", 5),
        ("see http://user:p@WWW.Bad.Example:8080/", 5),
        ("www.bad.example", 5),
        ("see https://notbad.example/ and bad.example", 0),
        ("https://BÜCHER.example/", 6),
        ("https://xn--bcher-kva.example/", 6),
        ("http://[::1 and https://good.example", 0),
    ],
)
def test_words_and_domains(tmp_path: Path, text: str, line: int) -> None:
    step = step_of(tmp_path, LIST.format(sha256="0" * 64))
    what = "word" if line < 5 else "domain"
    assert refusal(step, text) == (f"blocklist: a {what} (list.txt, line {line})" if line else "")


def test_the_url_a_document_came_from_counts(tmp_path: Path) -> None:
    step = step_of(tmp_path, "domain: bad.example")
    assert "a domain" in refusal(step, "A bird.", source={"url": "https://cdn.bad.example/1.jpg"})


@pytest.mark.parametrize("reencode", [None, 24])
def test_listed_media_take_their_pair_along(tmp_path: Path, picture: Media, reencode: int | None) -> None:
    """Listed as they came, also where they are encoded again; and listed as they would be stored."""
    options = MediaOptions(image_max_side_px=reencode)
    stored = MediaEncoder(options).encode("image", picture(2)).data
    assert stored is not None
    hashes = [hashlib.sha256(data).hexdigest() for data in (picture(1), stored)]
    step = step_of(tmp_path, f"media: {hashes[0].upper()}\nmedia: {hashes[1]}")
    rows = [
        {"id": str(number), "parts": [{"modality": "image", "bytes": base64.b64encode(picture(number)).decode()}]}
        for number in range(4)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    build_options = BuildOptions(media=options, steps=(step,), shuffle_seed=None)
    manifest = build(ManifestSource(root=tmp_path / "rows.jsonl"), tmp_path / "out", build_options)
    ledger = read_ledger(manifest.ledger_path).to_pylist()
    assert [row["status"] for row in ledger] == ["kept", "filtered", "filtered", "kept"]
    assert [row["reason"] for row in ledger[1:3]] == [f"blocklist: a medium (list.txt, line {line})" for line in (1, 2)]


def test_a_page_goes_on_without_a_listed_picture(tmp_path: Path, picture: Media) -> None:
    pages = tmp_path / "pages"
    pages.mkdir()
    for number in (0, 1):
        (pages / f"{number}.png").write_bytes(picture(number, width=64, height=64))
    (pages / "a.html").write_text("<p>" + "A page about birds. " * 20 + '<img src="0.png"><img src="1.png"></p>')
    listed = hashlib.sha256((pages / "0.png").read_bytes()).hexdigest()
    step = step_of(tmp_path, f"media: {listed}")
    manifest = build(HtmlSource(root=pages), tmp_path / "out", BuildOptions(steps=(step,)))
    (row,) = read_index(manifest, 0).to_pylist()
    assert row["part_modality"].count("image") == 1
    (reason,) = read_ledger(manifest.ledger_path)["reason"].to_pylist()
    assert reason == "without 1 media: 0.png (blocklist: a medium (list.txt, line 1))"


def test_a_function_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    code = 'def refuse(document):\n    return "too short" if len(document.parts[0].text) < 10 else None\n'
    (tmp_path / "my_rules_of_test.py").write_text(code)
    rows = [{"id": name, "parts": [{"modality": "text", "text": text}]} for name, text in (("a", "x"), ("b", "x" * 20))]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = ["build", "--source", "manifest", "--input", "rows.jsonl", "--blocklist", "my_rules_of_test:refuse"]
    assert main([*command, "--out", "one"]) == 0
    assert main([*command, "--out", "two", "--workers", "2"]) == 0
    one, two = (Manifest.load(tmp_path / name) for name in ("one", "two"))
    assert one.hash == two.hash
    ledger = {row["id"]: row["reason"] for row in read_ledger(one.ledger_path).to_pylist()}
    assert ledger == {"a": "blocklist: too short (my_rules_of_test:refuse)", "b": ""}
    ((name, xxh3),) = one.build["steps"]["blocklist"]["functions"]
    assert (name, len(xxh3)) == ("my_rules_of_test:refuse", 16)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("word: x\nwords: y", "line 2 is none of"),
        ("media: 12", "line 1 is none of"),
        ("word: !!", "line 1 is none of"),
        ("domain: https://x", "line 1 is none of"),
        (b"\xff\xfeword", "is not UTF-8"),
        (None, "cannot be read"),
    ],
)
def test_a_list_that_is_none_is_one_line(tmp_path: Path, content: str | bytes | None, message: str) -> None:
    path = tmp_path / "list.txt"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=message) as error:
        blocklist_step([str(path)])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["no_such_module_here:refuse", "json:no_such_function", "json:__doc__"])
def test_a_function_that_is_none_is_one_line(name: str) -> None:
    with pytest.raises(ConfigError, match=f"--blocklist {name}: "):
        blocklist_step([name])


def test_the_list_is_part_of_what_a_build_is(tmp_path: Path) -> None:
    one, two = (step_of(tmp_path, f"word: {word}").options for word in ("one", "two"))
    assert one != two
    assert json.loads(json.dumps(one)) == one
