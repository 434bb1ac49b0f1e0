"""Kill -9 at random moments of step, save and upload: the newest complete checkpoint is whole and loads each time.

A few kills in make test-all; SOAK_CHECKPOINT_KILLS (default 30) in a folder and in Ceph's radosgw by hand: make soak.
Every start draws ranks and ZeRO stage anew, so each run is an elastic history too.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import object_server
import pytest
import radosgw
import spine_runs as spine
import test_resume_soak as resume

from triweave.data_pipeline.storage.client import client_of, forget_clients
from triweave.data_pipeline.storage.location import is_remote, object_location
from triweave.launch.machine import free_port
from triweave.pretrain.checkpoints.checkpoint import list_checkpoints, read_checkpoint, step_of
from triweave.pretrain.ledger.audit import audit
from triweave.pretrain.ledger.consumed import next_attempt

KILLS = int(os.environ.get("SOAK_CHECKPOINT_KILLS", "30"))
SEED = int(os.environ.get("SOAK_SEED", "0"))
STEPS = 12
TOLERANCE = 1e-6
"""Of a loss, times the larger of 1 and itself."""
LAYOUTS = tuple((ranks, stage) for ranks in (1, 2, 3) for stage in (1, 2, 3))
MODEL = ("model.d_model=192", "model.layers=2")
"""Large enough that writing takes about as long as a step."""


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where checkpoints go; empty: the run's own folder. The environment names the object store."""
    if request.param == "folder":
        yield ""
        return
    if request.param == "radosgw" and (missing := radosgw.missing_programs()):
        pytest.skip(f"not installed: {', '.join(missing)}; tests/launch/install_system_packages.sh installs them")
    server = object_server.object_server() if request.param == "server" else radosgw.radosgw(tmp_path / "ceph")
    with server as started:
        for name, value in (started.environment | {"TRIWEAVE_CACHE_DIR": str(tmp_path / "cache")}).items():
            monkeypatch.setenv(name, value)
        if request.param == "radosgw":
            started.make_bucket("corpora")
        yield "s3://corpora/checkpoints"
        forget_clients()


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("place", ["folder", "server"], indirect=True)
def test_a_few_kills(place: str, run_config: Path, tmp_path: Path) -> None:
    kill_often(place, run_config, tmp_path, kills=3, seed=0)


@pytest.mark.soak
@pytest.mark.timeout(0)
@pytest.mark.parametrize("place", ["folder", "radosgw"], indirect=True)
def test_many_kills(place: str, run_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    found, layouts, worst, runs = kill_often(place, run_config, tmp_path, kills=KILLS, seed=SEED)
    with capsys.disabled():
        print(
            f"\ncheckpoints in {place or 'a folder'}: {found.total()} kills "
            f"({', '.join(f'{count} {what}' for what, count in sorted(found.items()))}) over {runs} runs of {STEPS} "
            f"steps, {len(layouts)} layouts of ranks x ZeRO stage; largest loss difference {worst:.1e}; "
            f"{time.monotonic() - began:.0f} s, SOAK_SEED={SEED}"
        )


def kill_often(
    place: str, config: Path, folder: Path, *, kills: int, seed: int
) -> tuple[Counter[str], set[tuple[int, int]], float, int]:
    """Kill until it is enough, each run to its end; return what kills met, the layouts, the worst loss, the runs."""
    straight = folder / "straight"
    (process,) = start(config, straight, folder / "straight.log", (1, 1), "")
    process.join()
    assert process.exitcode == 0, (folder / "straight.log").read_text()
    wanted, losses = spine.consumed(straight), [line["loss"] for line in spine.metrics(straight)]
    draw = random.Random(seed)
    found: Counter[str] = Counter()
    layouts: set[tuple[int, int]] = set()
    worst, runs = 0.0, 0
    while found.total() < kills:
        run_dir, location = folder / f"run-{runs}", f"{place}/{runs}" if place else ""
        history: list[str] = []
        try:
            while not killed_to_the_end(config, run_dir, location, draw, history, layouts, found):
                pass
            assert spine.consumed(run_dir) == wanted, "not the samples of the undisturbed run, each once"
            assert audit(run_dir, same_as=straight).exact
            for line, loss in zip(spine.metrics(run_dir), losses, strict=True):
                worst = max(worst, abs(line["loss"] - loss) / max(1.0, loss))
            assert worst <= TOLERANCE
        except BaseException:
            print(f"SOAK_SEED={seed}, run {runs}: {'; '.join(history)}")
            raise
        runs += 1
    return found, layouts, worst, runs


def killed_to_the_end(
    config: Path, run_dir: Path, location: str, draw: random.Random, history: list[str],
    layouts: set[tuple[int, int]], found: Counter[str],
) -> bool:  # fmt: skip
    """Start or resume on a random layout, kill one rank and then all; return whether the run was done before."""
    layout = draw.choice(LAYOUTS)
    more_steps, after_s, victim = draw.randrange(1, 6), draw.uniform(0, 0.4), draw.randrange(layout[0])
    attempt = next_attempt(run_dir)
    layouts.add(layout)
    log = run_dir.with_suffix(".log")
    history.append(f"{layout[0]} ranks, ZeRO {layout[1]}, killed {after_s:.3f} s behind {more_steps} steps")
    processes = start(config, run_dir, log, layout, location)
    try:
        if resume.running_after(processes, 300, lambda: resume.rows_written(run_dir, attempt) >= 4 * more_steps):
            resume.running_after(processes, after_s)
        processes[victim].kill()
        for process in processes:
            process.kill()
            process.join()
    finally:
        for process in processes:
            process.kill()
    codes = [process.exitcode for process in processes]
    history[-1] += f", exit codes {codes}"
    if codes == [0] * layout[0]:
        return True
    assert -signal.SIGKILL in codes, f"exit codes {codes} without a kill:\n{log.read_text()}"
    where = location or str(run_dir)
    for complete in list_checkpoints(where)[-1:]:
        read_checkpoint(complete).verify()
    found["in a save" if half_written(where) else "in a step"] += 1
    return False


def half_written(where: str) -> bool:
    """Return whether something of a checkpoint that is not complete lies there."""
    if not is_remote(where):
        return any((Path(where) / "checkpoints").glob(".writing-*"))
    root = object_location(where)
    complete = {step_of(folder) for folder in list_checkpoints(where)}
    return any(int(name.removeprefix("step-")) not in complete for name in client_of(root.bucket).folders(root.key))


def start(config: Path, run_dir: Path, log: Path, layout: tuple[int, int], location: str) -> list[BaseProcess]:
    """Start one process per rank that saves after every step."""
    ranks, stage = layout
    words = [str(config), f"run_dir={run_dir}", "--resume", f"train.steps={STEPS}", f"train.zero_stage={stage}",
             "checkpoint.every_steps=1", "checkpoint.keep=2", f"checkpoint.location={location}", *MODEL]  # fmt: skip
    shared: dict[str, Any] = {
        name: value for name, value in os.environ.items() if name.startswith(("AWS_", "TRIWEAVE_"))
    }
    shared |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared["OMP_NUM_THREADS"] = "1"
    processes: list[BaseProcess] = []
    sys.path.insert(0, str(Path(__file__).parent))  # where a new process finds the function it is to run
    try:
        for rank in range(ranks):
            environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(resume.FORKS.Process(target=resume.run_rank, args=(words, environment, log)))
            processes[-1].start()
    finally:
        sys.path.pop(0)
    return processes
