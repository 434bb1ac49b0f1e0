"""Dozens of kills: a training run killed at random moments and resumed on random layouts. By hand: make soak.

SOAK_RESUME_KILLS kills (default 40) over as many runs as they take, drawn from SOAK_SEED (default 0).
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from triweave.pretrain.audit import audit
from triweave.pretrain.checkpoint import newest_checkpoint
from triweave.pretrain.consumed import next_attempt

sys.path.insert(0, str(Path(__file__).parent))
try:
    import test_spine as spine
finally:
    sys.path.pop(0)

run_config = spine.run_config

KILLS = int(os.environ.get("SOAK_RESUME_KILLS", "40"))
SEED = int(os.environ.get("SOAK_SEED", "0"))
STEPS = 60
TOLERANCE = 1e-5
LAYOUTS = tuple((ranks, stage) for ranks in (1, 2) for stage in (0, 1, 2, 3))
STARTING_S = 8.0
"""One kill in five comes within this time, which importing and loading takes; the others a few steps after it."""


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_any_kills_and_layouts_lead_to_the_same_run(
    run_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    straight = tmp_path / "straight"
    (process,) = start(run_config, straight, 1, 2, 10)
    _, said = process.communicate()
    assert process.returncode == 0, said
    losses = [line["loss"] for line in spine.metrics(straight)]
    assert len(losses) == STEPS
    wanted = spine.consumed(straight)
    assert [(step, row) for step, row, _, _ in wanted] == [(1 + row // 4, row) for row in range(4 * STEPS)]
    draw = random.Random(SEED)
    found: Counter[str] = Counter()
    layouts: Counter[tuple[int, int]] = Counter()
    worst = 0.0
    runs = 0
    began = time.monotonic()
    while found.total() < KILLS:
        run_dir = tmp_path / f"run-{runs}"
        history: list[str] = []
        try:
            while not killed_to_the_end(run_config, run_dir, draw, history, layouts, found):
                pass
            assert spine.consumed(run_dir) == wanted, "not the samples of the undisturbed run, each once"
            assert audit(run_dir, same_as=straight).exact
            lines = spine.metrics(run_dir)
            assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
            worst = max(worst, *(abs(line["loss"] - loss) for line, loss in zip(lines, losses, strict=True)))
            assert worst <= TOLERANCE
        except BaseException:
            print(f"SOAK_SEED={SEED}, run {runs}: {'; '.join(history)}")
            raise
        runs += 1
    with capsys.disabled():
        kills = ", ".join(f"{count} {what}" for what, count in sorted(found.items()))
        starts = ", ".join(f"{ranks} x ZeRO {stage}: {count}" for (ranks, stage), count in sorted(layouts.items()))
        print(
            f"\nresume: {found.total()} kills ({kills}) over {runs} runs of {STEPS} steps, starts by layout {starts}; "
            f"largest loss difference {worst:.1e}; {time.monotonic() - began:.0f} s, SOAK_SEED={SEED}"
        )


def killed_to_the_end(
    config: Path,
    run_dir: Path,
    draw: random.Random,
    history: list[str],
    layouts: Counter[tuple[int, int]],
    found: Counter[str],
) -> bool:
    """Start or resume the run on a random layout, kill it at a random moment; return whether it was done before.

    One rank dies first, the other at once or a little later, when it may have ended by itself.
    """
    (ranks, stage), every_steps = draw.choice(LAYOUTS), draw.choice([1, 2, 3])
    early_s = draw.uniform(0, STARTING_S) if draw.random() < 0.2 else None
    more_steps, within_step_s, apart_s = draw.randrange(1, 16), draw.uniform(0, 0.1), draw.choice([0.0, 0.0, 0.3])
    victim = draw.randrange(ranks)
    attempt = next_attempt(run_dir)
    layouts[ranks, stage] += 1
    history.append(f"{ranks} ranks, ZeRO {stage}, every {every_steps}, from step {newest_checkpoint(run_dir)}")
    processes = start(config, run_dir, ranks, stage, every_steps)
    try:
        if early_s is not None:
            running_after(processes, early_s)
        elif running_after(processes, 300, lambda: rows_written(run_dir, attempt) >= 4 * more_steps):
            running_after(processes, within_step_s)
        if all(process.poll() is None for process in processes):
            processes[victim].kill()
            time.sleep(apart_s)
            for process in processes:
                process.kill()
        said = [process.communicate(timeout=60)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    codes = [process.returncode for process in processes]
    history[-1] += f", to {newest_checkpoint(run_dir)}, exit codes {codes}"
    if codes == [0] * ranks:
        return True
    assert -signal.SIGKILL in codes, f"exit codes {codes} without a kill:\n{''.join(said)}"
    found["before the first step" if rows_written(run_dir, attempt) == 0 else "while training"] += 1
    return False


def start(config: Path, run_dir: Path, ranks: int, stage: int, every_steps: int) -> list[subprocess.Popen[str]]:
    """Start one process per rank; --resume starts anew where there is no checkpoint."""
    words = ("--resume", f"train.steps={STEPS}", f"train.zero_stage={stage}", f"checkpoint.every_steps={every_steps}",
             "checkpoint.keep=2")  # fmt: skip
    if ranks == 1:
        return [spine.run_program(config, run_dir, *words)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        spine.run_program(config, run_dir, *words, RANK=str(rank), LOCAL_RANK=str(rank), **shared)
        for rank in range(ranks)
    ]


def running_after(
    processes: list[subprocess.Popen[str]], limit_s: float, reached: Callable[[], bool] = lambda: False
) -> bool:
    """Wait so long, or until `reached`; return whether all processes still run."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline and not reached():
        if any(process.poll() is not None for process in processes):
            return False
        time.sleep(0.002)
    return True


def rows_written(run_dir: Path, attempt: int) -> int:
    """Return how many rows the ranks of an attempt have trained on."""
    files = (run_dir / "consumed" / f"attempt-{attempt:04d}").glob("rank-*.jsonl")
    return sum(path.read_bytes().count(b"\n") for path in files)
