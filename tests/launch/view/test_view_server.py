"""What the server answers, and what it refuses: other hosts, other sites, types that a browser would run."""

from __future__ import annotations

import io
import json
import socket
import subprocess
import sys
from collections.abc import Callable
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from triweave.data_pipeline.text.tokenizer import Tokenizer
from triweave.launch.cli import main
from triweave.launch.view.documents import FACT_CHARACTERS, PEAKS, token_spans
from triweave.launch.view.server import SHOWN_FILES, ViewServer
from triweave.launch.view.shard_folder import ShardFolder

Ask = Callable[..., HTTPResponse]


def content(answer: HTTPResponse, status: int = 200) -> Any:
    body = json.loads(answer.read())
    assert answer.status == status, body
    return body


def test_every_answer_has_the_policy(ask: Ask) -> None:
    for path in [*SHOWN_FILES, "/api/folders", "/nothing", "/api/document?sample=999"]:
        answer = ask(path)
        policy = answer.headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; ")
        assert "unsafe" not in policy
        assert "require-trusted-types-for 'script'" in policy
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert (answer.headers["Content-Type"] == "application/json") == (path not in SHOWN_FILES)
        assert answer.status == (404 if path in ("/nothing", "/api/document?sample=999") else 200)
    page = ask("/").read().decode()
    assert "<script>" not in page
    assert "style=" not in page
    assert "http" not in page
    for path in SHOWN_FILES:
        assert b"innerHTML" not in ask(path).read()


@pytest.mark.parametrize("host", ["evil.example", "evil.example:PORT", "127.0.0.1", "127.0.0.1:1", "[::1]:PORT", ""])
def test_other_hosts_are_refused(ask: Ask, view_server: ViewServer, host: str) -> None:
    for path in ("/", "/api/folders", "/medium?sample=0&part=0"):
        answer = ask(path, Host=host.replace("PORT", str(view_server.server_port)))
        assert answer.status == 403
        assert b"item" not in answer.read()
    assert ask("/", Host=f"localhost:{view_server.server_port}").status == 200


def test_other_sites_are_refused(ask: Ask) -> None:
    for site in ("cross-site", "same-site"):
        assert ask("/api/folders", Sec_Fetch_Site=site).status == 403
        assert ask("/medium?sample=0&part=0", Sec_Fetch_Site=site).status == 403
        assert ask("/", Sec_Fetch_Site=site).status == 200  # a link to the page
    assert ask("/api/folders", Sec_Fetch_Site="same-origin").status == 200


def test_it_only_reads_and_only_here(ask: Ask, view_server: ViewServer) -> None:
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        assert ask("/", method=method).status == 501
    assert view_server.server_address[0] == "127.0.0.1"
    for path in ("/../server.py", "/view.js/../server.py", "//etc/passwd", "/%2e%2e/server.py", "/server.py"):
        assert ask(path).status == 404


def test_a_document_as_it_is_stored(ask: Ask) -> None:
    shown = content(ask("/api/document?sample=31"))
    assert shown["id"] == "item/31"
    assert shown["place"].startswith("shard-000001.tar, sample 6, byte ")
    labels = dict(shown["labels"])
    assert labels.pop("annotations").startswith('{"words": [0, 2, 0, 2, ')
    assert labels == {"kind": "plain", "language": "fr", "number": "31"}
    assert all(len(value) <= FACT_CHARACTERS for _, value in shown["labels"])
    assert dict(shown["source"])["license"] == "CC0-1.0"
    text, sound = shown["parts"]
    assert text["text"] == "Un oiseau d'été chante 31."
    assert (sound["kind"], sound["ms"], sound["info"]) == ("audio", 600, {"samples": 4800, "rate": 8000})
    assert json.loads(shown["json"])["id"] == "item/31"
    listed = content(ask("/api/samples?start=31"))["samples"][0]
    assert (listed["excerpt"], listed["modalities"]) == ("Un oiseau d'été chante 31.", {"text": 1, "audio": 1})


def test_long_texts_come_in_two_steps(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triweave.launch.view.documents.SHOWN_CHARACTERS", 10)
    (part,) = content(ask("/api/document?sample=6"))["parts"]
    assert (part["text"], part["left_out"]) == ("A bird on ", 17)
    (part,) = content(ask("/api/document?sample=6&whole=1"))["parts"]
    assert (part["text"], part["left_out"]) == ("A bird on a branch sings 6.", 0)


def test_many_parts_come_in_two_steps(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triweave.launch.view.documents.SHOWN_PARTS", 1)
    shown = content(ask("/api/document?sample=31"))
    assert ([part["modality"] for part in shown["parts"]], shown["left_out"]) == (["text"], 1)
    assert len(content(ask("/api/document?sample=31&whole=1"))["parts"]) == 2


def test_a_bug_is_said_without_control_characters(
    ask: Ask, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("\x1b]0;pwned\x07")

    monkeypatch.setattr("triweave.launch.view.server.list_entry", broken)
    assert content(ask("/api/samples"), 500)["problem"].startswith("ZeroDivisionError")
    error = capsys.readouterr().err
    assert "in broken" in error
    assert "\x1b" not in error
    assert "\x07" not in error


def test_token_boundaries_are_those_of_the_tokenizer(view_data: Any) -> None:
    tokenizer = Tokenizer.load(view_data.tokenizer)
    for text in ("A bird on a branch", "été 🙂 \u2581 x\n", "", "小さな鳥"):
        spans = token_spans(tokenizer, text)
        ids = tokenizer.encode(text).tolist()
        assert [token for token, _ in spans] == ids
        assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    spans = token_spans(tokenizer, "Å bird")  # a letter that the corpus has not got is spelled in two bytes
    assert [words for _, words in spans[:2]] == ["<C3>", "<85>Å"]
    assert "".join(words for _, words in spans[2:]) == " bird"
    assert tokenizer.token_bytes(tokenizer.eos_id) == b""


def test_media_and_ranges_of_them(ask: Ask, view_data: Any) -> None:
    sample = ShardFolder("birds", str(view_data.shards)).sample(31)
    data = sample.medium(1)
    whole = ask("/medium?sample=31&part=1")
    assert (whole.status, whole.headers["Content-Type"], whole.read()) == (200, "audio/flac", data)
    assert whole.headers["Content-Security-Policy"] == "default-src 'none'; sandbox"
    some = ask("/medium?sample=31&part=1", Range="bytes=10-19")
    assert (some.status, some.read()) == (206, data[10:20])
    assert some.headers["Content-Range"] == f"bytes 10-19/{len(data)}"
    assert ask("/medium?sample=31&part=1", Range="bytes=5-").read() == data[5:]
    assert ask("/medium?sample=31&part=1", Range=f"bytes={len(data)}-").status == 416
    small = ask("/thumbnail?sample=0&part=0")
    assert (small.headers["Content-Type"], Image.open(io.BytesIO(small.read())).size) == ("image/jpeg", (64, 48))
    assert content(ask("/thumbnail?sample=31&part=1"), 404)["problem"] == "part 1 has no thumbnail"
    assert content(ask("/medium?sample=31&part=0"), 404)["problem"].startswith("part 0 is text")
    assert content(ask("/medium?sample=31&part=2"), 404)["problem"] == "part 2: the sample has 2"


def test_a_waveform_follows_the_sound(ask: Ask) -> None:
    drawn = content(ask("/api/waveform?sample=31&part=1"))
    assert (drawn["ms"], len(drawn["peaks"])) == (600, PEAKS)
    first, last = drawn["peaks"][:100], drawn["peaks"][-100:]
    assert 60 < max(high for _, high in first) <= 64  # half of full scale, decaying
    assert max(high for _, high in last) < 30
    assert all(-127 <= low <= high <= 127 for low, high in drawn["peaks"])


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("/api/document?sample=60", "sample 60: birds has the samples 0 to 59"),
        ("/api/document?sample=-1", "sample='-1': must be a whole number from 0 on"),
        ("/api/document?folder=2", "folder 2: there are 2"),
        ("/api/samples?query=%22a", 'the query has a quotation mark (") that is not closed'),
        ("/api/pack?row=99999", "row 99999: block 0 has the rows 0 to "),
        ("/api/waveform?sample=0&part=0", "part 0 is no sound"),
    ],
)
def test_what_is_not_there_is_named(ask: Ask, path: str, problem: str) -> None:
    assert content(ask(path), 404)["problem"].startswith(problem)


def test_hostile_media_are_never_shown(ask: Ask, hostile: dict[str, int]) -> None:
    for name in ("drawing", "page", "unknown", "aiff"):
        answer = ask(f"/medium?folder=1&sample={hostile[name]}&part=0")
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        if name in ("unknown", "aiff"):  # of no kind that a browser shows
            assert answer.headers["Content-Type"] == "application/octet-stream"
            assert answer.headers["Content-Disposition"].startswith("attachment")
            assert answer.headers["Content-Security-Policy"] == "default-src 'none'; sandbox"
        else:  # claims to be a picture or a sound, and its bytes are none
            assert "not a readable" in content(answer, 422)["problem"]
        (part,) = content(ask(f"/api/document?folder=1&sample={hostile[name]}"))["parts"]
        assert part["kind"] == "other"
        assert bool(part["problem"]) == (name in ("drawing", "page"))


def test_hostile_samples_cost_an_entry_and_not_the_list(ask: Ask, hostile: dict[str, int]) -> None:
    listed = content(ask("/api/samples?folder=1"))["samples"]
    assert [entry["number"] for entry in listed] == list(range(len(hostile)))
    damaged = {name for name, number in hostile.items() if listed[number]["damage"]}
    assert damaged == {"types", "deep", "parts", "no-json"}
    for name, number in hostile.items():
        shown = content(ask(f"/api/document?folder=1&sample={number}"))
        assert bool(shown["damage"]) == (name in damaged | {"more"}), name
    facets = content(ask("/api/facets?folder=1"))
    assert facets["done"]
    assert content(ask("/api/samples?folder=1&query=onerror"))["samples"][0]["number"] == hostile["markup"]


def test_the_command_serves_until_interrupted(view_data: Any) -> None:
    command = [sys.executable, "-m", "triweave.launch.cli", "view", "--config", str(view_data.config), "--port", "0"]
    with subprocess.Popen([*command, "data.sequence_length=200"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        port = int(line.split("/")[2].rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=20) as link:
            link.sendall(f"GET /api/block HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n\r\n".encode())
            with link.makefile("rb") as answer:
                assert json.loads(answer.read().split(b"\r\n\r\n", 1)[1])["sequence_length"] == 200
        process.send_signal(2)
        assert process.wait(timeout=20) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to show: name a shard folder"),
        (["SHARDS", "--port", "65536"], "--port 65536: must be from 0 to 65535"),
        (["SHARDS", "--port", "TAKEN"], "cannot listen there (Address already in use); name another one"),
        (["SHARDS", "data.seed=1"], "data.seed=1: overrides a config; name it with --config"),
        (["missing"], "no shard folder at missing"),
        (["SHARDS", "--tokenizer", "missing.model"], "tokenizer missing.model cannot be read"),
    ],
)
def test_errors_are_one_line(
    view_data: Any, view_server: ViewServer, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"SHARDS": str(view_data.shards), "TAKEN": str(view_server.server_port)}
    assert main(["view", *(places.get(item, item) for item in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_two_folders_of_one_name_stay_apart(view_data: Any, tmp_path: Path) -> None:
    import argparse
    import shutil

    from triweave.launch.commands.view import make_server

    other = shutil.copytree(view_data.shards, tmp_path / "birds")
    options = argparse.Namespace(
        arguments=[str(view_data.shards), str(other)], tokenizer=None, config=str(view_data.config), port=0
    )
    with make_server(options) as server:
        assert [(folder.name, folder.location) for folder in server.folders] == [
            ("birds", str(view_data.shards)),
            (str(other), str(other)),
        ]
