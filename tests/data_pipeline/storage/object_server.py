"""What the storage code uses of S3, in memory on loopback, for quick tests. It checks no signature; radosgw.py does."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape


class Stored(NamedTuple):
    data: bytes
    etag: str
    metadata: dict[str, str]


@dataclass
class ObjectServer:
    """endpoint: its URL. objects: "bucket/key" -> what is stored. log: (method, "bucket/key", Range header) so far.

    failure: status and code that every read and listing is answered with.
    """

    endpoint: str = ""
    objects: dict[str, Stored] = field(default_factory=dict)
    log: list[tuple[str, str, str]] = field(default_factory=list)
    failure: tuple[int, str] | None = None
    uploads: dict[str, tuple[dict[str, str], dict[int, bytes]]] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        keys = {"AWS_ACCESS_KEY_ID": "someone", "AWS_SECRET_ACCESS_KEY": "something"}
        return {"AWS_ENDPOINT_URL": self.endpoint, "AWS_REGION": "us-east-1", **keys}

    def store(self, name: str, data: bytes, metadata: dict[str, str] | None = None) -> None:
        self.objects[name] = Stored(data, f'"{hashlib.md5(data).hexdigest()}"', metadata or {})

    def ranges(self, ending: str) -> list[str]:
        """Return the Range headers of the reads of objects with such a name."""
        return [span for method, name, span in self.log if method == "GET" and name.endswith(ending)]


@contextmanager
def object_server() -> Iterator[ObjectServer]:
    """Serve an empty store until the end of the block."""
    state = ObjectServer()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"state": state}))
    server.daemon_threads = True
    state.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    state: ObjectServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: object) -> None:
        """Keep standard error clean."""

    def _asked(self) -> tuple[str, dict[str, list[str]]]:
        parts = urlsplit(self.path)
        name = unquote(parts.path).strip("/")
        self.state.log.append((self.command, name, self.headers.get("Range", "")))
        return name, parse_qs(parts.query, keep_blank_values=True)

    def _answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _fail(self, status: int, code: str) -> None:
        self._answer(status, f"<Error><Code>{code}</Code></Error>".encode())

    def do_GET(self) -> None:
        name, query = self._asked()
        if self.state.failure:
            self._fail(*self.state.failure)
            return
        if "list-type" in query:
            self._answer(200, self._listing(name, query["prefix"][0]).encode())
            return
        stored = self.state.objects.get(name)
        if stored is None:
            self._fail(404, "NoSuchKey")
            return
        if self.headers.get("If-Match", stored.etag) != stored.etag:
            self._fail(412, "PreconditionFailed")
            return
        headers = {"ETag": stored.etag, "Last-Modified": formatdate(0, usegmt=True)}
        headers |= {f"x-amz-meta-{key}": value for key, value in stored.metadata.items()}
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if span is None:
            self._answer(200, stored.data, headers)
            return
        first, last = int(span[1]), min(int(span[2]), len(stored.data) - 1)
        if first > last:
            self._fail(416, "InvalidRange")
            return
        headers["Content-Range"] = f"bytes {first}-{last}/{len(stored.data)}"
        self._answer(206, stored.data[first : last + 1], headers)

    do_HEAD = do_GET  # noqa: N815

    def do_PUT(self) -> None:
        name, query = self._asked()
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if "uploadId" in query:
            self.state.uploads[query["uploadId"][0]][1][int(query["partNumber"][0])] = body
            self._answer(200, headers={"ETag": f'"{len(body)}"'})
        elif self.headers.get("If-None-Match") == "*" and name in self.state.objects:
            self._fail(412, "PreconditionFailed")
        else:
            self.state.store(name, body, self._metadata())
            self._answer(200, headers={"ETag": self.state.objects[name].etag})

    def do_POST(self) -> None:
        name, query = self._asked()
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "uploads" in query:
            upload = f"u{len(self.state.uploads)}"
            self.state.uploads[upload] = (self._metadata(), {})
            answer = f"<Bucket>b</Bucket><Key>{name}</Key><UploadId>{upload}</UploadId>"
            self._answer(200, f"<InitiateMultipartUploadResult>{answer}</InitiateMultipartUploadResult>".encode())
        elif "delete" in query:
            keys = re.findall(r"<Key>([^<]*)</Key>", body.decode())
            for key in keys:
                self.state.objects.pop(f"{name}/{key}", None)
            gone = "".join(f"<Deleted><Key>{key}</Key></Deleted>" for key in keys)
            self._answer(200, f"<DeleteResult>{gone}</DeleteResult>".encode())
        else:
            metadata, parts = self.state.uploads.pop(query["uploadId"][0])
            self.state.store(name, b"".join(parts[number] for number in sorted(parts)), metadata)
            answer = f"<Location>l</Location><Bucket>b</Bucket><Key>k</Key><ETag>{self.state.objects[name].etag}</ETag>"
            self._answer(200, f"<CompleteMultipartUploadResult>{answer}</CompleteMultipartUploadResult>".encode())

    def do_DELETE(self) -> None:
        name, _ = self._asked()
        self.state.objects.pop(name, None)
        self._answer(204)

    def _metadata(self) -> dict[str, str]:
        prefix = "x-amz-meta-"
        return {
            key[len(prefix) :].lower(): value for key, value in self.headers.items() if key.lower().startswith(prefix)
        }

    def _listing(self, bucket: str, prefix: str) -> str:
        found = {name.removeprefix(f"{bucket}/"): stored for name, stored in sorted(self.state.objects.items())}
        rows = [
            f"<Contents><Key>{escape(key)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f"<ETag>{escape(stored.etag)}</ETag><Size>{len(stored.data)}</Size></Contents>"
            for key, stored in found.items()
            if key.startswith(prefix) and "/" not in key[len(prefix) :]
        ]
        below = {key[: key.index("/", len(prefix)) + 1] for key in found
                 if key.startswith(prefix) and "/" in key[len(prefix) :]}  # fmt: skip
        rows += [f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>" for name in sorted(below)]
        return f"<ListBucketResult><IsTruncated>false</IsTruncated>{''.join(rows)}</ListBucketResult>"
