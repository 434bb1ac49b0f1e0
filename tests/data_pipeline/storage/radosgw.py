"""A real S3 server on loopback: Ceph's monitor, one object store in memory and its gateway, as a context manager.

About 20 s to start and 420 MB of memory. Needs the programs of the Debian packages `radosgw`, `ceph-osd`, `ceph-mon`
(tests/launch/install_system_packages.sh installs them); no root, nothing outside of the folder it is given.
"""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

PROGRAMS = ("ceph-mon", "ceph-osd", "radosgw", "radosgw-admin", "monmaptool", "ceph")
START_SECONDS = 120
_PR_SET_PDEATHSIG = 1  # prctl(2)
CONFIG = """[global]
fsid = {fsid}
mon host = v1:127.0.0.1:{mon_port}
ms bind msgr2 = false
ms bind ipv4 = true
public addr = 127.0.0.1
auth cluster required = none
auth service required = none
auth client required = none
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
osd pool default pgp num = 1
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon warn on pool no redundancy = false
mon allow pool size one = true
run dir = {folder}
log file = {folder}/$name.log
admin socket = {folder}/$name.asok
pid file = {folder}/$name.pid
[mon]
mon data = {folder}/mon
mon initial members = a
mon osd full ratio = 0.99
mon data avail crit = 1
[osd]
osd objectstore = memstore
memstore device bytes = {store_bytes}
osd data = {folder}/osd
osd memory target = 939524096
osd crush update on start = false
osd class update on start = false
[client]
rgw frontends = beast endpoint=127.0.0.1:{rgw_port}
rgw data = {folder}/rgw
rgw enable usage log = false
rgw thread pool size = 32
rgw num rados handles = 1
rgw dynamic resharding = false
rgw override bucket index max shards = 1
"""


@dataclass(frozen=True, kw_only=True)
class S3Server:
    """Where it answers, and who may."""

    endpoint: str
    access_key: str
    secret_key: str

    @property
    def environment(self) -> dict[str, str]:
        """What the usual variables are set to."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": "us-east-1",
        }

    def make_bucket(self, name: str) -> None:
        """Make a bucket and its first object, for which Ceph makes the pool of the data; that takes seconds."""
        import obstore
        from obstore.store import S3Store

        options = {"endpoint": self.endpoint, "access_key_id": self.access_key, "region": "us-east-1",
                   "secret_access_key": self.secret_key}  # fmt: skip
        client = S3Store(name, client_options={"allow_http": True}, **options)
        url = obstore.sign(client, "PUT", "", timedelta(seconds=60))
        urllib.request.urlopen(urllib.request.Request(url, method="PUT"), timeout=60).close()
        obstore.put(client, "ready", b"ready")


def missing_programs() -> list[str]:
    """Return the programs that are not installed."""
    search = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))
    return [program for program in PROGRAMS if shutil.which(program, path=search) is None]


@contextmanager
def radosgw(folder: Path, store_bytes: int = 2 << 30) -> Iterator[S3Server]:
    """Start the server with its files below `folder`, yield it, and end its processes."""
    folder.mkdir(parents=True, exist_ok=True)
    mon_port, rgw_port = _free_port(), _free_port()
    config = folder / "ceph.conf"
    fsid, osd = str(uuid.uuid4()), str(uuid.uuid4())
    config.write_text(
        CONFIG.format(fsid=fsid, mon_port=mon_port, rgw_port=rgw_port, folder=folder, store_bytes=store_bytes)
    )
    server = S3Server(
        endpoint=f"http://127.0.0.1:{rgw_port}",
        access_key="TRIWEAVEACCESSKEY000",
        secret_key="triweave-secret-" + "x" * 24,
    )
    running: list[subprocess.Popen[bytes]] = []
    try:
        _run(
            config,
            "monmaptool",
            "--create",
            "--fsid",
            fsid,
            "--addv",
            "a",
            f"[v1:127.0.0.1:{mon_port}]",
            folder / "map",
        )
        (folder / "mon").mkdir()
        _run(config, "ceph-mon", "--mkfs", "-i", "a", "--monmap", folder / "map", "--mon-data", folder / "mon")
        running.append(_start(config, "ceph-mon", "-f", "-i", "a"))
        _run(config, "ceph", "osd", "new", osd)
        (folder / "osd").mkdir()
        _run(config, "ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
        _run(config, "ceph", "osd", "crush", "add", "osd.0", "1.0", "host=h", "root=default")
        # Told to (`update on start`), a quick one tells the monitor its place under a zero fsid, is refused, and ends.
        running.append(_start(config, "ceph-osd", "-f", "-i", "0"))
        user = ("--uid=tester", "--display-name=tester")
        keys = (f"--access-key={server.access_key}", f"--secret-key={server.secret_key}")
        _run(config, "radosgw-admin", "user", "create", *user, *keys)
        (folder / "rgw").mkdir()
        running.append(_start(config, "radosgw", "-f", "-n", "client.rgw"))
        _wait_until_it_answers(server.endpoint, running)
        yield server
    finally:
        for process in reversed(running):
            process.kill()
            process.wait()


def _run(config: Path, *command: object) -> None:
    words = [str(word) for word in command]
    place = ("-c", str(config)) if words[0] != "monmaptool" else ()
    subprocess.run(
        [*words, *place], check=True, capture_output=True, timeout=START_SECONDS, env=_environment(), cwd=config.parent
    )


def _start(config: Path, *command: str) -> subprocess.Popen[bytes]:
    with open(config.parent / f"{command[0]}.out", "wb") as out:
        return subprocess.Popen(
            [*command, "-c", str(config)],
            stdout=out,
            stderr=out,
            env=_environment(),
            cwd=config.parent,
            preexec_fn=_end_with_parent,
        )


def _end_with_parent() -> None:
    """Let the kernel end this process when the thread that started it ends, even by SIGKILL."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _environment() -> dict[str, str]:
    return os.environ | {"PATH": os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))}


def _wait_until_it_answers(endpoint: str, running: list[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        ended = [process.args for process in running if process.poll() is not None]
        assert not ended, f"ended while starting: {ended}"
        try:
            urllib.request.urlopen(endpoint, timeout=2).close()
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.2)
        else:
            return
    raise TimeoutError(f"{endpoint} did not answer within {START_SECONDS} s")


def _free_port() -> int:
    """Return a port that nobody listens at, below those that Linux gives to outgoing connections meanwhile."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_768)
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


def _by_hand(folder: Path, seconds: float) -> None:
    """Serve for `seconds`, or until Ctrl-C, SIGTERM or the end of the terminal; then no process of Ceph is left."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, _: sys.exit(128 + received))
    with radosgw(folder) as started:
        started.make_bucket("corpora")
        print("\n".join(f"export {name}={value}" for name, value in started.environment.items()), flush=True)
        time.sleep(seconds)


if __name__ == "__main__":  # python radosgw.py FOLDER [SECONDS]
    _by_hand(Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 3600)
