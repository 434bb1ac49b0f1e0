"""A proxy on loopback that hands requests on to an object store and spoils the answers it is told to.

busy      503 SlowDown, the store is not asked
reset     half of the body, then the connection is reset
stall     the head, then nothing
truncate  half of the body under the Content-Length of all of it, then the connection is closed
short     half of the body, and a head that promises no more
flip      all of the body with one byte changed
"""

from __future__ import annotations

import asyncio
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple
from urllib.parse import urlsplit

FAULTS = ("busy", "reset", "stall", "truncate", "short", "flip")
STALL_SECONDS = 60.0
_BUSY = b"<Error><Code>SlowDown</Code></Error>"


class Request(NamedTuple):
    """number: of the requests that this proxy had, from 0."""

    number: int
    method: str
    path: str


Choose = Callable[[Request], str | None]
"""Returns the fault that a request meets, or None for an answer as it is."""


class FaultProxy:
    """endpoint: its URL. choose: may be exchanged at any time. done: how often each fault was given."""

    def __init__(self, upstream: str) -> None:
        parts = urlsplit(upstream)
        self.upstream = (str(parts.hostname), int(parts.port or 80))
        self.endpoint = ""
        self.choose: Choose = lambda _: None
        self.done: Counter[str] = Counter()
        self.requests = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request and close the connection."""
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            head = await reader.readuntil(b"\r\n\r\n")
            body = await reader.readexactly(_length(head))
            method, path = head.split(b" ", 2)[:2]
            fault = self.choose(Request(self.requests, method.decode(), path.decode()))
            self.requests += 1
            if fault == "busy":
                answer = (
                    b"HTTP/1.1 503 Slow Down\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(_BUSY) + _BUSY
                )
            else:
                answer = await self._ask(head, body)
            head, _, content = answer.partition(b"\r\n\r\n")
            if method == b"HEAD" and fault != "busy":
                fault = None if fault != "stall" else fault
            elif fault not in (None, "busy") and not content:
                fault = None
            if fault is not None:
                self.done[fault] += 1
            await self._spoiled(writer, head, content, fault)
        with suppress(ConnectionError):
            writer.close()

    async def _spoiled(self, writer: asyncio.StreamWriter, head: bytes, content: bytes, fault: str | None) -> None:
        half = len(content) // 2
        if fault == "stall":
            writer.write(head[:20])
            await writer.drain()
            await asyncio.sleep(STALL_SECONDS)
            return
        if fault == "short":
            head = re.sub(rb"(?i)content-length: \d+", b"Content-Length: %d" % half, head)
        if fault == "flip":
            content = content[:half] + bytes([content[half] ^ 0x40]) + content[half + 1 :]
        if fault in ("reset", "truncate", "short"):
            content = content[:half]
        writer.write(head + b"\r\n\r\n" + content)
        await writer.drain()
        if fault == "reset":
            connection: socket.socket = writer.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    async def _ask(self, head: bytes, body: bytes) -> bytes:
        """Return the store's answer, which says that the connection closes after it."""
        reader, writer = await asyncio.open_connection(*self.upstream)
        try:
            lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"connection:")]
            writer.write(lines[0] + b"\r\nConnection: close\r\n" + b"\r\n".join(lines[1:]) + body)
            answer = await reader.read(-1)
        finally:
            writer.close()
        first, _, rest = answer.partition(b"\r\n")
        return first + b"\r\nConnection: close\r\n" + re.sub(rb"(?i)connection: [\w-]+\r\n", b"", rest, count=1)


def _length(head: bytes) -> int:
    match = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
    return int(match[1]) if match else 0


@contextmanager
def fault_proxy(upstream: str) -> Iterator[FaultProxy]:
    """Run the proxy in a thread until the end of the block."""
    proxy = FaultProxy(upstream)
    loop = asyncio.new_event_loop()
    ready = threading.Event()

    async def run() -> None:
        server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0, limit=1 << 20)
        proxy.endpoint = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        ready.set()
        async with server:
            await server.serve_forever()

    def work() -> None:
        task = loop.create_task(run())
        proxy_tasks.append(task)
        with suppress(asyncio.CancelledError):
            loop.run_until_complete(task)
        pending = asyncio.all_tasks(loop)
        for other in pending:
            other.cancel()
        if pending:
            loop.run_until_complete(asyncio.wait(pending))
        loop.close()

    proxy_tasks: list[asyncio.Task[None]] = []
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    ready.wait(10)
    try:
        yield proxy
    finally:
        loop.call_soon_threadsafe(proxy_tasks[0].cancel)
        thread.join(10)
