"""The supervisor: what it says of ranks that stand still, what it starts again, and how a real launch meets both."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from triweave.launch import supervisor
from triweave.launch.cli import main
from triweave.launch.deepspeed_launcher import LaunchCommand
from triweave.launch.metrics import read_metrics
from triweave.launch.processes import Outcome
from triweave.launch.stall_report import main_frames, stall_report
from triweave.launch.supervisor import STALLED, supervise
from triweave.pretrain.health.events import read_events
from triweave.pretrain.health.heartbeat import Beat, Heartbeat, mark_phase, noted, read_beats
from triweave.pretrain.health.signals import HANG_AT_STEP, REQUEUE
from triweave.pretrain.ledger.audit import audit

LAUNCH = (sys.executable, "-m", "triweave.launch.cli", "launch")
ENVIRONMENT = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
SECRET = "wJalrXUtnFEMI-not-a-real-secret"


def beat(rank: int, **changes: object) -> Beat:
    fields = {
        "rank": rank, "ranks": 2, "host": "elsewhere", "pid": 7, "step": 3, "phase": "update", "collective": "gather",
        "collectives": 12, "waiting": True, "time_s": time.time() - 40, **changes,
    }  # fmt: skip
    return Beat(**fields)  # type: ignore[arg-type]


def test_a_heartbeat_says_what_the_rank_does(tmp_path: Path) -> None:
    seen: list[Beat] = []
    with Heartbeat(tmp_path, rank=3, ranks=4, stall_s=0) as heartbeat:
        heartbeat.begin(17)
        noted("all_reduce", lambda: seen.append(read_beats(tmp_path)[3]))()
        seen.append(read_beats(tmp_path)[3])
        thread = threading.Thread(target=noted("of another thread", lambda: None))
        thread.start()
        thread.join()
        mark_phase("update")
        seen.append(read_beats(tmp_path)[3])
    seen.append(read_beats(tmp_path)[3])
    assert [(each.phase, each.collective, each.collectives, each.waiting) for each in seen] == [
        ("data", "all_reduce", 1, True),
        ("data", "all_reduce", 1, False),
        ("update", "all_reduce", 1, False),
        ("done", "all_reduce", 1, False),
    ]
    assert {(each.rank, each.ranks, each.step, each.pid) for each in seen} == {(3, 4, 17, os.getpid())}
    mark_phase("nobody listens")
    with pytest.raises(ZeroDivisionError), Heartbeat(tmp_path, rank=3, ranks=4, stall_s=0):
        noted("broken", lambda: 1 // 0)()
    assert (read_beats(tmp_path)[3].phase, read_beats(tmp_path)[3].waiting) == ("ended by ZeroDivisionError", False)


def test_the_report_names_every_rank_and_who_is_behind(tmp_path: Path) -> None:
    stopped = subprocess.Popen(["sleep", "60"])
    stopped.send_signal(signal.SIGSTOP)
    (tmp_path / "health").mkdir()
    stacks = (
        'Thread 0x01 (most recent call first):\n  File "/a/loader.py", line 5 in work\n\n'
        'Thread 0x02 (most recent call first):\n  File "/b/torch.py", line 70 in all_gather\n'
        '  File "/b/wrapper.py", line 7 in wrapper\n  File "/a/pretrain/health/heartbeat.py", line 8 in run\n'
        '  File "/a/pretrain/train.py", line 9 in main\n'
    )
    (tmp_path / "health" / "rank-00000.stacks").write_text("Timeout (0:00:20)!\n" + stacks)
    try:
        os.waitid(os.P_PID, stopped.pid, os.WSTOPPED | os.WNOWAIT)
        late = beat(1, collectives=11, waiting=False, phase="data", host=socket.gethostname(), pid=stopped.pid)
        report = stall_report(tmp_path, {0: beat(0), 1: late}, ranks=3, still_s=21.4)
    finally:
        stopped.kill()
        stopped.wait()
    lines = report.splitlines()
    assert lines[0] == "no rank has moved for 21 s; where each stands:"
    assert lines[2].split()[:4] == ["0", "elsewhere", "7", "3"]
    assert "gather (number 12, in it)  40 s ago" in lines[2]
    assert lines[3].split()[0] == "1"
    assert lines[3].endswith("stopped")
    assert "no sign yet of rank 2" in lines[4]
    assert lines[5].strip() == "behind the others, who wait for it in a collective: rank 1"
    assert lines[6].strip() == "rank 0 is in all_gather (torch.py:70) < main (train.py:9)"
    assert main_frames("") == []


def supervised(
    script: str, run_dir: Path, *, stall_s: float = 0.0, restarts: int = 0, again: str = "exit 0"
) -> Outcome:
    """Supervise a shell program in the launcher's place; `again` is what a restart starts."""

    def command(text: str) -> LaunchCommand:
        return LaunchCommand(arguments=("bash", "-c", text), ranks=1)

    return supervise(
        command(script), lambda _: command(again), run_dir=run_dir, log=io.BytesIO(), stall_s=stall_s, restarts=restarts
    )


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "RESTART_PAUSE_S", 0.0)
    monkeypatch.setattr(supervisor, "LOOK_S", 0.1)
    monkeypatch.setattr(supervisor, "STACKS_S", 0.0)
    monkeypatch.setattr(supervisor, "START_S", 0.0)


def test_a_failure_is_started_again_within_the_budget(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert supervised("kill -9 $$", tmp_path, restarts=2, again="exit 7").exit_code == 7
    said = capfd.readouterr().err
    assert "exit code 137; starting again from the newest checkpoint, 1 restarts left" in said
    assert "exit code 7; starting again from the newest checkpoint, 0 restarts left" in said
    assert [event["event"] for event in read_events(tmp_path)] == ["restart", "restart"]
    assert supervised("exit 1", tmp_path, restarts=1).exit_code == 0
    for code in (2, REQUEUE):
        assert supervised(f"exit {code}", tmp_path, restarts=1).exit_code == code


def test_ranks_that_show_no_sign_are_ended(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    started = time.monotonic()
    assert supervised("trap '' TERM; sleep 60", tmp_path, stall_s=0.5).exit_code == STALLED == 124
    assert time.monotonic() - started < 20
    assert "no sign yet of rank 0" in capfd.readouterr().err
    assert [event["event"] for event in read_events(tmp_path)] == ["stall"]


def test_a_sign_now_and_then_is_enough(tmp_path: Path) -> None:
    """A file of a former start is no sign of this one, a new one is."""
    (tmp_path / "health").mkdir()
    path = tmp_path / "health" / "rank-00000.json"
    path.write_text(json.dumps(asdict(beat(0))))
    new = path.with_suffix(".new")
    write = f"""for n in 1 2 3 4 5 6; do sleep 0.2
    sed 's/"step": [0-9]*/"step": '$n'/' {path} > {new}; cp {new} {path}; done"""
    assert supervised(write, tmp_path, stall_s=1.0).exit_code == 0
    assert supervised("sleep 30", tmp_path, stall_s=0.3).exit_code == STALLED


def test_a_negative_budget_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "no.yaml", "--restarts", "-1"]) == 2
    assert capsys.readouterr().err == "triweave launch: --restarts -1: must be 0 or above\n"


def wait_for(condition: object, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 240
    while not condition():  # type: ignore[operator]
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_a_stopped_rank_is_reported_and_the_run_started_again(tiny_run: Path) -> None:
    """Rank 1 stops itself after step 3: the report names it, the second start goes on from step 2 to the end."""
    run_dir = tiny_run.parent / "run"
    result = subprocess.run(
        [*LAUNCH, str(tiny_run), "--num-ranks", "2", "--oversubscribe", "--restarts", "1", "health.stall_s=20"],
        env={**ENVIRONMENT, HANG_AT_STEP: "3:1"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    lines = result.stderr.splitlines()
    first = next(at for at, line in enumerate(lines) if "no rank has moved for 2" in line)
    assert lines[first + 2].split()[0] == "0"
    assert lines[first + 3].split()[0] == "1"
    assert lines[first + 3].endswith("stopped")
    assert "behind the others, who wait for it in a collective: rank 1" in result.stderr
    assert "rank 0 is in " in result.stderr
    assert "(train.py:" in result.stderr
    assert "exit code 124; starting again from the newest checkpoint, 0 restarts left" in result.stderr
    assert sorted(read_metrics(run_dir)) == [1, 2, 3, 4]
    assert [event["event"] for event in read_events(run_dir)] == ["stall", "restart"]
    proof = audit(run_dir)
    assert proof.exact
    assert proof.replayed == 4


@pytest.mark.slow
def test_no_secret_shows_and_sigusr1_ends_a_launch_with_75(tiny_run: Path) -> None:
    """Credentials in the environment are in no command line of any process and in no file of the run."""
    run_dir = tiny_run.parent / "run"
    process = subprocess.Popen(
        [*LAUNCH, str(tiny_run), "--num-ranks", "2", "--oversubscribe", "train.steps=100000", "data.workers=1"],
        env={**ENVIRONMENT, "AWS_ACCESS_KEY_ID": SECRET + "-id", "AWS_SECRET_ACCESS_KEY": SECRET},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: max(read_metrics(run_dir), default=0) >= 2, process)
    listed = subprocess.run(["ps", "axww", "-o", "args"], capture_output=True, text=True, check=True).stdout
    assert str(tiny_run) in listed
    assert SECRET not in listed
    process.send_signal(signal.SIGUSR1)
    out, errors = process.communicate(timeout=240)
    assert process.returncode == REQUEUE, errors
    assert errors.splitlines()[-1] == (
        "triweave launch: stopped with a checkpoint before the last step; go on with --resume"
    )
    files = [path for path in run_dir.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"launch.log", "config.yaml", "metrics.jsonl", "manifest.json"}
    assert SECRET not in out + errors
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []
    last = max(read_metrics(run_dir))
    assert (run_dir / "checkpoints" / f"step-{last:07d}").is_dir()
