"""Hundreds of kills: a training run killed at random moments and resumed on random layouts. By hand: make soak.

SOAK_RESUME_KILLS kills (default 200) over as many runs as they take, drawn from SOAK_SEED (default 0). The run has
three plan segments. Ranks are forked from a process that has imported everything, which takes most of a start's time.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import pytest
import spine_runs as spine
from rank_pool import PRELOADED

from triweave.launch.machine import free_port
from triweave.pretrain.checkpoints.checkpoint import newest_checkpoint
from triweave.pretrain.engine.world import leave
from triweave.pretrain.ledger.audit import audit
from triweave.pretrain.ledger.consumed import next_attempt
from triweave.pretrain.train import main

KILLS = int(os.environ.get("SOAK_RESUME_KILLS", "200"))
SEED = int(os.environ.get("SOAK_SEED", "0"))
STEPS = 60
TOLERANCE = 1e-5
LAYOUTS = tuple((ranks, stage, workers) for ranks in (1, 2, 3) for stage in (0, 1, 2, 3) for workers in (0, 1, 2))
SCHEDULE = [{"after_step": 20, "sequence_length": 160}, {"after_step": 40, "sequence_length": 96}]
STARTING_S = 3.0
"""One kill in five comes within this time, which opening data, model and engine takes; the others a few steps after."""
ENDING_S = 120.0
"""A run whose loader worker was killed must have ended by itself within this time."""
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(PRELOADED)


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_any_kills_and_layouts_lead_to_the_same_run(
    run_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    straight = tmp_path / "straight"
    (process,) = start(run_config, straight, tmp_path / "straight.log", (1, 2, 0), 10)
    process.join()
    assert process.exitcode == 0, (tmp_path / "straight.log").read_text()
    losses = [line["loss"] for line in spine.metrics(straight)]
    assert len(losses) == STEPS
    wanted = spine.consumed(straight)
    assert Counter(step for step, *_ in wanted) == dict.fromkeys(range(1, STEPS + 1), 4)
    draw = random.Random(SEED)
    found: Counter[str] = Counter()
    layouts: Counter[tuple[int, int, int]] = Counter()
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
        starts = "; ".join(shares(layouts, place) for place in range(3))
        print(
            f"\nresume: {found.total()} kills ({kills}) over {runs} runs of {STEPS} steps, "
            f"starts by ranks, ZeRO stage and loader workers {starts}; "
            f"largest loss difference {worst:.1e}; {time.monotonic() - began:.0f} s, SOAK_SEED={SEED}"
        )


def shares(layouts: Counter[tuple[int, int, int]], place: int) -> str:
    """Return how often each value stood at one place of the layouts."""
    counts: Counter[int] = Counter()
    for layout, count in layouts.items():
        counts[layout[place]] += count
    return ", ".join(f"{value}: {count}" for value, count in sorted(counts.items()))


def killed_to_the_end(
    config: Path,
    run_dir: Path,
    draw: random.Random,
    history: list[str],
    layouts: Counter[tuple[int, int, int]],
    found: Counter[str],
) -> bool:
    """Start or resume the run on a random layout, kill it at a random moment; return whether it was done before.

    One rank dies first, the others at once or a little later, when they may have ended by themselves. Or it is a loader
    worker alone, of which all ranks must end.
    """
    layout, every_steps = draw.choice(LAYOUTS), draw.choice([1, 2, 3])
    ranks, stage, workers = layout
    early_s = draw.uniform(0, STARTING_S) if draw.random() < 0.2 else None
    more_steps, within_step_s, apart_s = draw.randrange(1, 16), draw.uniform(0, 0.1), draw.choice([0.0, 0.0, 0.3])
    victim, of_loader = draw.randrange(ranks), draw.random() < 0.3
    attempt = next_attempt(run_dir)
    layouts[layout] += 1
    history.append(
        f"{ranks} ranks, ZeRO {stage}, {workers} workers, every {every_steps}, from step {newest_checkpoint(run_dir)}"
    )
    log = run_dir.with_suffix(".log")
    processes = start(config, run_dir, log, layout, every_steps)
    what = "rank"
    try:
        if early_s is not None:
            running_after(processes, early_s)
        elif running_after(processes, 300, lambda: rows_written(run_dir, attempt) >= 4 * more_steps):
            running_after(processes, within_step_s)
        if all(process.is_alive() for process in processes):
            if of_loader and (loaders := loader_workers(processes[victim])):
                what = "loader worker"
                draw.choice(loaders).kill()
                for process in processes:
                    process.join(ENDING_S)
                assert not any(process.is_alive() for process in processes), f"hangs:\n{log.read_text()}"
            else:
                processes[victim].kill()
                time.sleep(apart_s)
        for process in processes:
            process.kill()
            process.join()
    finally:
        for process in processes:
            process.kill()
    codes = [process.exitcode for process in processes]
    history[-1] += f", {what} killed, to {newest_checkpoint(run_dir)}, exit codes {codes}"
    if codes == [0] * ranks:
        return True
    if what == "rank":
        assert -signal.SIGKILL in codes, f"exit codes {codes} without a kill:\n{log.read_text()}"
    when = "before the first step" if rows_written(run_dir, attempt) == 0 else "while training"
    found[f"of a {what} {when}"] += 1
    return False


def loader_workers(rank: BaseProcess) -> list[psutil.Process]:
    """Return the processes that make batches for a rank."""
    try:
        return psutil.Process(rank.pid).children()
    except psutil.NoSuchProcess:
        return []


def run_rank(words: list[str], environment: dict[str, str], log: Path) -> None:
    """Be one rank, in a process that has imported everything."""
    os.environ.update(environment)
    with log.open("a") as stream:
        for descriptor in (1, 2):
            os.dup2(stream.fileno(), descriptor)
    leave(main(words))


def start(config: Path, run_dir: Path, log: Path, layout: tuple[int, int, int], every_steps: int) -> list[BaseProcess]:
    """Start one process per rank; --resume starts anew where there is no checkpoint."""
    ranks, stage, workers = layout
    words = [str(config), f"run_dir={run_dir}", "--resume", f"train.steps={STEPS}", f"train.zero_stage={stage}",
             f"checkpoint.every_steps={every_steps}", "checkpoint.keep=2", f"data.workers={workers}",
             f"data.schedule={json.dumps(SCHEDULE)}"]  # fmt: skip
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared["OMP_NUM_THREADS"] = "1"
    processes: list[BaseProcess] = []
    for rank in range(ranks):
        environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(FORKS.Process(target=run_rank, args=(words, environment, log)))
        processes[-1].start()
    return processes


def running_after(processes: list[BaseProcess], limit_s: float, reached: Callable[[], bool] = lambda: False) -> bool:
    """Wait so long, or until `reached`; return whether all processes still run."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline and not reached():
        if not all(process.is_alive() for process in processes):
            return False
        time.sleep(0.002)
    return True


def rows_written(run_dir: Path, attempt: int) -> int:
    """Return how many rows the ranks of an attempt have trained on."""
    files = (run_dir / "consumed" / f"attempt-{attempt:04d}").glob("rank-*.jsonl")
    return sum(path.read_bytes().count(b"\n") for path in files)
