"""The test server started by hand: it ends as a whole, with no process of Ceph left."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("radosgw.py")


def processes_of(folder: Path) -> list[str]:
    """Return the command lines that name `folder`."""
    lines = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(entry.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue
    return [line for line in lines if str(folder) in line and line.split()[0].startswith(("ceph", "radosgw"))]


@pytest.mark.slow
@pytest.mark.usefixtures("ceph_programs")
def test_no_process_of_ceph_outlives_the_server(tmp_path: Path) -> None:
    folder = tmp_path / "by-hand"
    server = subprocess.Popen([sys.executable, str(SCRIPT), str(folder), "300"], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        assert server.stdout.readline().startswith("export AWS_ENDPOINT_URL=http://127.0.0.1:")
        assert len(processes_of(folder)) == 3
        server.terminate()
        assert server.wait(30) == 128 + signal.SIGTERM
        deadline = time.monotonic() + 20
        while processes_of(folder):
            assert time.monotonic() < deadline, processes_of(folder)
            time.sleep(0.1)
    finally:
        server.kill()
        server.communicate()
