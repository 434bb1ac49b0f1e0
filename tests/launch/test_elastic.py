"""Elastic restarts: who has failed, which places are left, and a run that loses a rank for good and goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from triweave.launch.cli import main
from triweave.launch.deepspeed_launcher import LaunchCommand
from triweave.launch.elastic import hosts_left, ranks_left
from triweave.launch.errors import PreflightError
from triweave.launch.hostfile import Host, Place
from triweave.launch.metrics import read_metrics
from triweave.launch.supervisor import LostPlaces, RankWatch
from triweave.pretrain.config import load_config
from triweave.pretrain.health.events import read_events
from triweave.pretrain.health.heartbeat import Beat, read_beats
from triweave.pretrain.health.signals import REQUEUE
from triweave.pretrain.ledger.audit import audit
from triweave.pretrain.ledger.consumed import world_sizes

LAUNCH = (sys.executable, "-m", "triweave.launch.cli", "launch")
ENVIRONMENT = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
NO_PROCESS = 0
"""No process of Linux has this id."""
PLACES = tuple(Place(machine="here", slot=slot) for slot in range(3))


def leave_beats(run_dir: Path, *, gone: tuple[int, ...] | None = None, **phases: tuple[str, float]) -> None:
    """Leave the last beats of ranks: r0=(phase, seconds by the clock).

    gone: which of them have ended; all are on this machine then, else on one that nothing is known of.
    """
    host = "elsewhere" if gone is None else socket.gethostname()
    (run_dir / "health").mkdir(exist_ok=True)
    for name, (phase, time_s) in phases.items():
        rank = int(name[1:])
        pid = NO_PROCESS if rank in (gone or ()) else os.getpid()
        beat = Beat(rank=rank, ranks=3, host=host, pid=pid, step=3, phase=phase, collective="gather", collectives=12,
                    waiting=True, time_s=time_s)  # fmt: skip
        (run_dir / "health" / f"rank-{rank:05d}.json").write_text(json.dumps(asdict(beat)))


@pytest.mark.parametrize(
    ("phases", "failed"),
    [
        ({"r0": ("ended by RuntimeError", 9.0), "r1": ("update", 5.0), "r2": ("ended by RuntimeError", 9.1)}, 1),
        ({"r0": ("ended by RuntimeError", 9.2), "r1": ("ended by ValueError", 9.0)}, 1),
        ({"r0": ("update", 9.0), "r1": ("update", 5.0), "r2": ("ended by RuntimeError", 9.1)}, None),
        ({}, None),
    ],
)
def test_the_rank_that_failed_is_known_by_its_last_sign(tmp_path: Path, phases, failed) -> None:
    leave_beats(tmp_path, r0=("update", 1.0), r2=("ended by RuntimeError", 0.5))
    watch = RankWatch(tmp_path, ranks=3, stall_s=0, asked=[])  # what stands there is of a start before
    leave_beats(tmp_path, **phases)
    assert watch.failed_rank() == failed


def test_of_those_that_said_nothing_the_first_that_was_gone_has_failed(tmp_path: Path, monkeypatch) -> None:
    """A killed rank takes others with it, which the launcher kills as well."""
    monkeypatch.setattr("triweave.launch.supervisor.LOOK_S", 0.0)
    watch = RankWatch(tmp_path, ranks=3, stall_s=0, asked=[])
    phases = {"r0": ("update", 9.0), "r1": ("update", 9.1), "r2": ("ended by RuntimeError", 9.2)}
    for gone in ((1,), (0, 1, 2)):
        leave_beats(tmp_path, gone=gone, **phases)
        assert not watch.stalled()
    assert watch.failed_rank() == 1
    together = RankWatch(tmp_path, ranks=3, stall_s=0, asked=[])
    leave_beats(tmp_path, gone=(0, 1, 2), **{name: (phase, time_s + 1) for name, (phase, time_s) in phases.items()})
    assert not together.stalled()
    assert together.failed_rank() is None


def test_a_place_is_lost_when_its_rank_fails_twice_in_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    command = LaunchCommand(arguments=("true",), ranks=3, places=PLACES)
    lost = LostPlaces(elastic=True)
    for failed in (1, 2, None, 2, 1):
        lost.judge(command, failed)
        assert lost.places == ()
    lost.judge(command, 1)
    assert lost.places == (PLACES[1],)
    assert "rank 1, in slot 1 of here, has failed twice in a row" in capsys.readouterr().err
    fewer = LaunchCommand(arguments=("true",), ranks=2, places=(PLACES[0], PLACES[2]))
    lost.judge(fewer, 1)
    lost.judge(fewer, 1)
    assert lost.places == (PLACES[1], PLACES[2])
    rigid = LostPlaces(elastic=False)
    rigid.judge(command, 1)
    rigid.judge(command, 1)
    assert rigid.places == ()


@pytest.mark.skipif(shutil.which("ssh") is None, reason="there is no ssh")
def test_a_machine_that_does_not_answer_is_left_out() -> None:
    here = Host(name=socket.gethostname(), slots=2)
    lost = [Place(machine=here.name, slot=0)]
    silent = Host(name="no-such-machine.invalid", slots=2)
    assert hosts_left([silent, here], lost) == (Host(name=here.name, slots=2, without=(0,)),)
    assert hosts_left([here], [*lost, Place(machine=here.name, slot=1)]) == ()


def test_the_largest_count_that_the_config_can_have(tiny_run: Path) -> None:
    config = load_config(tiny_run)
    assert ranks_left(config, most=6, least=2) == 4 == config.train.global_batch_rows
    assert ranks_left(config, most=3, least=2) == 3
    with pytest.raises(PreflightError, match="--min-ranks 2: the run cannot go on with so many ranks: 1 are left;"):
        ranks_left(config, most=1, least=2)
    with pytest.raises(PreflightError, match=r"train\.global_batch_rows is 4"):
        ranks_left(config, most=6, least=5)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--restarts", "1", "--min-ranks", "0"], "--min-ranks 0: must be at least 1"),
        (["--min-ranks", "1"], "--min-ranks 1 is of restarts, and --restarts is 0; add --restarts N as well"),
        (
            ["--restarts", "1", "--min-ranks", "2"],
            "--min-ranks 2: the run starts with 1 ranks; ask for",
        ),
    ],
)
def test_a_least_number_that_cannot_be_is_refused(tiny_run: Path, words, said, capsys, monkeypatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert main(["launch", str(tiny_run), "--dry-run", *words]) == 2
    assert said in capsys.readouterr().err


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a launch of a config; it is ended with the test."""
    processes: list[subprocess.Popen[str]] = []

    def start(config: Path, *words: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*LAUNCH, str(config), *words], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        if process.poll() is None:
            process.terminate()
        process.communicate()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 400
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_a_run_goes_on_without_a_rank_that_dies_again_and_again(start, tiny_run: Path) -> None:
    """Rank 1 of 3 is killed in two starts; the third has 2 ranks and trains on each row once, from the checkpoint."""
    run_dir = tiny_run.parent / "run"
    words = ("--num-ranks", "3", "--oversubscribe", "--restarts", "2", "--min-ranks", "2", "train.steps=100000")
    process = start(tiny_run, *words)
    killed: list[int] = []

    def at_work() -> bool:
        beat = read_beats(run_dir).get(1)
        return beat is not None and beat.pid not in killed and beat.step >= 3 * (len(killed) + 1)

    for _ in range(2):
        wait_for(at_work, process)
        killed.append(read_beats(run_dir)[1].pid)
        os.kill(killed[-1], signal.SIGKILL)
    wait_for(lambda: len(world_sizes(run_dir)) == 3, process)
    resumed = json.loads((run_dir / "consumed" / "attempt-0003" / "lineage.json").read_text())["resumed_step"]
    wait_for(lambda: max(read_metrics(run_dir), default=0) >= resumed + 3, process)
    process.send_signal(signal.SIGUSR1)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == REQUEUE, errors
    assert "rank 1, in slot 1 of localhost, has failed twice in a row: its slot is left out from here on" in errors
    assert "going on with 2 ranks instead of 3" in errors
    assert world_sizes(run_dir) == {1: 3, 2: 3, 3: 2}
    assert [event["event"] for event in read_events(run_dir)] == ["restart", "restart", "restart", "preempted"]
    assert resumed >= 2
    assert audit(run_dir).exact
