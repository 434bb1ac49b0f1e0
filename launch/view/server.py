"""The viewer's web server: this machine only, reads only, and a page that runs no code but its own.

It listens on 127.0.0.1 and answers only requests whose Host names it so (a foreign page cannot reach it through a DNS
name of its own) and that no other site sends. Every answer carries a policy that lets the page load scripts, styles,
pictures, sounds and data from here alone; scripts cannot turn text into markup (Trusted Types). Media are sent with the
type their own bytes have, never sniffed, in a sandbox; what is neither picture nor sound is a download.
"""

from __future__ import annotations

import json
import re
import socketserver
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from triweave.data_pipeline.errors import DataError, MediaError
from triweave.data_pipeline.media.images import reencode
from triweave.data_pipeline.stream.reader import CorruptSampleError
from triweave.data_pipeline.text.tokenizer import Tokenizer
from triweave.launch.errors import ViewError
from triweave.launch.view.documents import DOWNLOAD, list_entry, medium_type, shown_document, waveform
from triweave.launch.view.packs import PackBook
from triweave.launch.view.search import Facets, parse_query, search
from triweave.launch.view.shard_folder import ShardFolder

ADDRESS = "127.0.0.1"
POLICY = "; ".join(
    (
        "default-src 'none'",
        *(f"{kind}-src 'self'" for kind in ("script", "style", "img", "media", "connect")),
        *("base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"),
        *("require-trusted-types-for 'script'", "trusted-types 'none'"),
    )
)
MEDIA_POLICY = "default-src 'none'; sandbox"
PAGE_SAMPLES = 40
"""Samples of one page of the list."""
SEARCH_SECONDS = 0.6
"""How long one call looks for samples, or for the start of a plan segment; the page calls again."""
FACET_SECONDS = 0.3
THUMBNAIL_PX = 96
THUMBNAIL_BYTES = 8 << 20
"""A picture above this has no thumbnail."""
IDLE_SECONDS = 60
_HERE = Path(__file__).parent
SHOWN_FILES = {
    "/": (_HERE / "page.html", "text/html; charset=utf-8"),
    "/palette.css": (_HERE.parent / "report" / "page.css", "text/css; charset=utf-8"),
    "/view.css": (_HERE / "view.css", "text/css; charset=utf-8"),
    **{
        f"/{name}.js": (_HERE / f"{name}.js", "text/javascript; charset=utf-8")
        for name in ("view", "elements", "documents", "packs")
    },
}
_RANGE = re.compile(r"bytes=(\d{1,15})-(\d{1,15})?")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What is sent. ranges: whether a part of the body may be asked for."""

    body: bytes
    type: str
    status: HTTPStatus = HTTPStatus.OK
    policy: str = POLICY
    ranges: bool = False
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """The query part of an address."""

    values: dict[str, list[str]]

    def text(self, name: str) -> str:
        """Return a value, empty where there is none."""
        return self.values.get(name, [""])[0]

    def number(self, name: str) -> int:
        """Return a value as a whole number, 0 where there is none. Raises ViewError."""
        text = self.text(name) or "0"
        if not re.fullmatch(r"\d{1,15}", text):
            raise ViewError(f"{name}={text[:40]!r}: must be a whole number from 0 on")
        return int(text)


class ViewServer(ThreadingHTTPServer):
    """Serves shard folders, and the packs of a config where there is one."""

    daemon_threads = True

    def __init__(
        self,
        port: int,
        folders: list[ShardFolder],
        *,
        tokenizer: Tokenizer | None = None,
        packs: PackBook | None = None,
    ) -> None:
        """Listen on `port`, on any free one for 0. Raises ViewError where that cannot be."""
        self.folders = folders
        self.tokenizer = tokenizer
        self.packs = packs
        self.facets = [Facets() for _ in folders]
        self.facets_lock = threading.Lock()
        self.decoding = threading.Semaphore(2)
        try:
            super().__init__((ADDRESS, port), _Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ViewError(f"--port {port}: cannot listen there ({reason}); name another one, or 0 for any") from None
        self.hosts = {f"{ADDRESS}:{self.server_port}", f"localhost:{self.server_port}"}

    def server_bind(self) -> None:
        """Bind without asking a name server for our own name, as http.server would."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = ADDRESS, int(self.server_address[1])

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a browser that hung up; show anything else."""
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        """Address of the page."""
        return f"http://{ADDRESS}:{self.server_port}/"

    def answer(self, path: str, parameters: Parameters) -> Answer:
        """Return the answer to a path. Raises ViewError, DataError and CorruptSampleError."""
        if path in SHOWN_FILES:
            file, kind = SHOWN_FILES[path]
            return Answer(body=file.read_bytes(), type=kind)
        if path == "/favicon.ico":
            return Answer(body=b"", type="image/x-icon", status=HTTPStatus.NO_CONTENT)
        if path in ("/medium", "/thumbnail"):
            return self._medium(parameters, small=path == "/thumbnail")
        calls: dict[str, Callable[[Parameters], Any]] = {
            "/api/folders": self._folders,
            "/api/facets": self._facets,
            "/api/samples": self._samples,
            "/api/document": self._document,
            "/api/waveform": self._waveform,
            "/api/packs_of": self._packs_of,
            "/api/segment": lambda asked: self._book().reach(asked.number("segment"), SEARCH_SECONDS),
            "/api/block": lambda asked: self._book().block(asked.number("block"), segment=asked.number("segment")),
            "/api/pack": self._pack,
        }
        if path not in calls:
            return _problem(HTTPStatus.NOT_FOUND, "no such page")
        # Lone surrogates are legal in JSON and in Python, not in UTF-8: everything beyond ASCII is escaped.
        return Answer(body=json.dumps(calls[path](parameters)).encode(), type="application/json")

    def _folder(self, asked: Parameters) -> ShardFolder:
        number = asked.number("folder")
        if number >= len(self.folders):
            raise ViewError(f"folder {number}: there are {len(self.folders)}")
        return self.folders[number]

    def _book(self) -> PackBook:
        if self.packs is None:
            raise ViewError("packs need a config: start `triweave view` with --config")
        return self.packs

    def _folders(self, _: Parameters) -> dict[str, Any]:
        return {
            "folders": [
                {
                    "name": folder.name,
                    "location": folder.location,
                    "samples": folder.samples,
                    "shards": len(folder.manifest.shards),
                    "rows": folder.manifest.rows,
                }
                for folder in self.folders
            ],
            "tokenizer": self.tokenizer is not None,
            "segments": self.packs.segments() if self.packs else [],
        }

    def _facets(self, asked: Parameters) -> dict[str, Any]:
        folder, facets = self._folder(asked), self.facets[asked.number("folder")]
        with self.facets_lock:
            facets.advance(folder, FACET_SECONDS)
            counts = {name: values.most_common() for name, values in facets.counts.items()}
            return {"counts": counts, "samples": facets.samples, "done": facets.shards == len(folder.manifest.shards)}

    def _samples(self, asked: Parameters) -> dict[str, Any]:
        folder = self._folder(asked)
        start = asked.number("start")
        query = parse_query(asked.text("query"))
        found = search(folder, query, start=start, limit=PAGE_SAMPLES, seconds=SEARCH_SECONDS)
        folder.ask(found.numbers)
        return {
            "samples": [list_entry(folder, number) for number in found.numbers],
            "next": found.next,
            "unreadable": found.unreadable,
        }

    def _document(self, asked: Parameters) -> dict[str, Any]:
        whole = asked.text("whole") == "1"
        return shown_document(self._folder(asked), asked.number("sample"), self.tokenizer, whole=whole)

    def _packs_of(self, asked: Parameters) -> dict[str, Any]:
        folder, block, segment = self._folder(asked), asked.number("block"), asked.number("segment")
        shard, place = folder.place(asked.number("sample"))
        return {"block": block, "rows": self._book().rows_of(block, folder.name, shard, place, segment=segment)}

    def _pack(self, asked: Parameters) -> dict[str, Any]:
        return self._book().pack(asked.number("block"), asked.number("row"), segment=asked.number("segment"))

    def _waveform(self, asked: Parameters) -> dict[str, Any]:
        sample, part = self._folder(asked).sample(asked.number("sample")), self._part(asked)
        if sample.row["part_modality"][part] != "audio":
            raise ViewError(f"part {part} is no sound")
        with self.decoding:
            return waveform(sample, part)

    def _part(self, asked: Parameters) -> int:
        part, row = asked.number("part"), self._folder(asked).row(asked.number("sample"))
        if part >= len(row["part_modality"]):
            raise ViewError(f"part {part}: the sample has {len(row['part_modality'])}")
        return part

    def _medium(self, asked: Parameters, *, small: bool) -> Answer:
        sample, part = self._folder(asked).sample(asked.number("sample")), self._part(asked)
        kind = medium_type(sample, part)
        data = sample.medium(part)
        headers = {"Cache-Control": "private, max-age=600"}
        if small:
            if not kind.startswith("image/") or len(data) > THUMBNAIL_BYTES:
                raise ViewError(f"part {part} has no thumbnail")
            with self.decoding:
                data, _, kind = reencode(data, THUMBNAIL_PX)
        elif kind == DOWNLOAD:
            headers["Content-Disposition"] = f'attachment; filename="sample{sample.number}-part{part}.bin"'
        return Answer(body=data, type=kind, policy=MEDIA_POLICY, ranges=not small, headers=headers)


class _Handler(BaseHTTPRequestHandler):
    server: ViewServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "Triweave", ""
    error_content_type = "text/plain; charset=utf-8"
    error_message_format = "%(code)d %(message)s"
    timeout = IDLE_SECONDS

    def do_GET(self) -> None:
        """Answer one request."""
        address = urlsplit(self.path)
        if self.headers.get("Host") not in self.server.hosts:
            self._send(_problem(HTTPStatus.FORBIDDEN, f"this server is reached as {self.server.url} only"))
            return
        if address.path != "/" and self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
            self._send(_problem(HTTPStatus.FORBIDDEN, "asked by a page of another site"))
            return
        try:
            parameters = Parameters(values=parse_qs(address.query, max_num_fields=20))
            self._send(self.server.answer(address.path, parameters))
        except (ViewError, DataError, CorruptSampleError, ValueError) as error:
            status = HTTPStatus.UNPROCESSABLE_ENTITY if isinstance(error, MediaError) else HTTPStatus.NOT_FOUND
            self._send(_problem(status, str(error)))
        except ConnectionError:
            raise
        except Exception as error:
            # A message may quote a hostile text, and a terminal obeys control characters.
            lines = traceback.format_exc().splitlines()
            print("\n".join("".join(filter(str.isprintable, line)) for line in lines), file=sys.stderr)
            self._send(_problem(HTTPStatus.INTERNAL_SERVER_ERROR, f"{type(error).__name__}: {error}"))

    def _send(self, answer: Answer) -> None:
        body, status, headers = answer.body, answer.status, dict(answer.headers)
        if answer.ranges:
            headers["Accept-Ranges"] = "bytes"
            if asked := _RANGE.fullmatch(self.headers.get("Range", "")):
                first, last = int(asked[1]), min(int(asked[2] or len(body)), len(body) - 1)
                if first > last:
                    status, body = HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, b""
                    headers["Content-Range"] = f"bytes */{len(answer.body)}"
                else:
                    status, body = HTTPStatus.PARTIAL_CONTENT, body[first : last + 1]
                    headers["Content-Range"] = f"bytes {first}-{last}/{len(answer.body)}"
        self.send_response(status)
        self.send_header("Content-Type", answer.type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", answer.policy)
        for name, value in ({"Cache-Control": "no-store"} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def end_headers(self) -> None:
        """Add what every answer carries, errors of http.server included."""
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Referrer-Policy", "no-referrer")
        super().end_headers()

    def log_message(self, *_: object) -> None:
        """Keep quiet: queries are the user's business, and paths may hold terminal codes."""


def _problem(status: HTTPStatus, message: str) -> Answer:
    return Answer(body=json.dumps({"problem": message}).encode(), type="application/json", status=status)
