"""Hundreds of kills: a build that is killed at random moments and continued writes the same bytes. By hand: make soak.

SOAK_KILLS kills (default 200) over as many builds as they take, drawn from SOAK_SEED (default 0).
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest
import test_build as builds

from triweave.data_pipeline.shards.manifest import Manifest
from triweave.data_pipeline.shards.verify import verify

numbers = builds.numbers
expected = builds.expected

KILLS = int(os.environ.get("SOAK_KILLS", "200"))
SEED = int(os.environ.get("SOAK_SEED", "0"))
WORKERS = (1, 1, 2, 3, 4)
LONGEST_DELAY_S = 2.0
"""About what a build takes from its first file to its end; a kill later than that finds it finished."""


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_any_kills_lead_to_the_same_bytes(expected: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = builds.files(expected)
    draw = random.Random(SEED)
    found: Counter[str] = Counter()
    finished = 0
    began = time.monotonic()
    while found.total() < KILLS:
        out = tmp_path / f"build-{finished}" / "shards"
        history: list[str] = []
        sessions: list[int] = []
        try:
            while not killed_to_the_end(out, draw, history, sessions, found):
                if (out / "manifest.json").exists():
                    assert not verify(out).damage, "a manifest stands for whole shards, whenever it appears"
            assert builds.files(out) == whole
            rows = builds.ledger_rows(out)
            assert Counter(row["status"] for row in rows) == Manifest.load(out).rows
            assert sorted(row["row"] for row in rows) == list(range(len(rows)))
            assert no_process_is_left(sessions)
        except BaseException:
            print(f"SOAK_SEED={SEED}, build {finished}: {'; '.join(history)}")
            raise
        finished += 1
    with capsys.disabled():
        print(
            f"\nbuild: {found.total()} kills ({', '.join(f'{count} {what}' for what, count in sorted(found.items()))}) "
            f"over {finished} builds in {time.monotonic() - began:.0f} s, SOAK_SEED={SEED}"
        )


def killed_to_the_end(
    out: Path, draw: random.Random, history: list[str], sessions: list[int], found: Counter[str]
) -> bool:
    """Start the build, kill it after a random time; return whether it was done before that.

    The kill hits the build alone, whose workers must notice, or all of its processes; the next start waits for nobody.
    """
    workers, everyone = draw.choice(WORKERS), draw.random() < 0.3
    delay_s = draw.uniform(0, 0.9) if draw.random() < 0.1 else None
    work_s = draw.uniform(0, LONGEST_DELAY_S if workers > 1 else LONGEST_DELAY_S / 4)
    process = builds.start(out, workers, -1)
    sessions.append(process.pid)
    try:
        if delay_s is None:
            wait_for_work(out, process)
            delay_s = work_s
        code = process.wait(delay_s)
        history.append(f"{workers} workers, finished")
        assert code == 0, f"the build ended with {code}"
        return True
    except subprocess.TimeoutExpired:
        if everyone:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
        process.wait()
    history.append(f"{workers} workers, {'all' if everyone else 'parent'} killed after {delay_s:.3f} s")
    found[stage(out)] += 1
    return False


def wait_for_work(out: Path, process: subprocess.Popen[bytes]) -> None:
    """Wait until this process, not an earlier one, has opened the lock of the work folder, or has ended."""
    lock, deadline = out / ".build" / "lock", time.monotonic() + 60
    while process.poll() is None:
        links = []
        for link in Path(f"/proc/{process.pid}/fd").glob("*"):
            try:
                links.append(link.readlink())
            except OSError:  # closed in between
                continue
        if lock in links:
            return
        assert time.monotonic() < deadline
        time.sleep(0.005)


def stage(out: Path) -> str:
    """Name how far the killed build had come, by what it left."""
    if (out / "manifest.json").exists():
        return "after the manifest"
    if list(out.glob("shard-*.parquet")):
        return "with finished shards"
    return "with finished chunks" if list((out / ".build").glob("0*.json")) else "at the start"


def no_process_is_left(sessions: list[int]) -> bool:
    deadline = time.monotonic() + 60
    while any(builds.session_processes(session) for session in sessions):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
