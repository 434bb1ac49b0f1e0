"""Ranks agree: what one rank finds wrong ends all of them, with the same message."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from triweave.data_pipeline.errors import DataError
from triweave.pretrain.engine.world import LAUNCHER_VARIABLES, NOT_DETERMINISTIC, close_world, open_world
from triweave.pretrain.errors import CheckpointError, PretrainError

THIS = Path(__file__)


def agreements(world) -> dict[str, object]:
    """Run inside ranks: gather, stop, and errors of our own, of another folder and of both ranks."""
    found: dict[str, object] = {"gathered": world.gather([world.rank, 7.0]).tolist()}
    found["stop"] = [world.agree(stop=False), world.agree(stop=world.rank == 1)]
    cases = {
        "ours": CheckpointError("disk of rank 1 is full") if world.rank == 1 else None,
        "foreign": DataError("shard 3 is missing") if world.rank == 1 else None,
        "long": CheckpointError("x" * 10_000) if world.rank == 0 else None,
        "path": CheckpointError(os.fsdecode(b"/data/\xff")) if world.rank == 1 else None,
        "both": CheckpointError(f"rank {world.rank}"),
    }
    for name, error in cases.items():
        try:
            world.agree(error)
        except Exception as raised:
            found[name] = (type(raised).__name__, str(raised)[:40], raised.__notes__)
    found["together"] = world.together(lambda: world.rank * 10)
    return found


def set_a_variable(world) -> str | None:  # noqa: ARG001
    """Run inside ranks: return what the environment had, and change it."""
    before = os.environ.get("TRIWEAVE_NAN_AT_STEP")
    os.environ["TRIWEAVE_NAN_AT_STEP"] = "1:0"
    return before


def test_what_a_task_sets_in_the_environment_of_a_rank_goes_with_it(rank_pool):
    """Else the runs of a later test would have its faults and stores."""
    for _ in range(2):
        assert rank_pool.pool(2).run(THIS, "set_a_variable") == [None, None]


def test_half_a_launcher_environment_is_refused_by_name(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(PretrainError, match="RANK is set but LOCAL_RANK is not"):
        open_world("cpu")


def test_a_world_of_one_takes_its_environment_back() -> None:
    """A child that found RANK and the parent's port would fail, or wait for ranks that do not exist."""
    world = open_world("cpu")
    assert (world.rank, world.size) == (0, 1)
    assert os.environ["RANK"] == "0"
    close_world()
    assert [name for name in ("RANK", *LAUNCHER_VARIABLES) if name in os.environ] == []


def test_a_deterministic_world_refuses_what_can_differ_and_a_later_one_does_not():
    values, places = torch.zeros(4), torch.tensor([1, 1])
    try:
        open_world("cpu", deterministic=True)
        with pytest.raises(RuntimeError, match=NOT_DETERMINISTIC):
            values.put_(places, torch.tensor([1.0, 2.0]))
        open_world("cpu")
        values.put_(places, torch.tensor([1.0, 2.0]))
    finally:
        close_world()


LEAVER = """
import atexit, sys
from triweave.pretrain.engine.world import close_world, leave, open_world
class Global:
    def __del__(self):
        print("taken down")
kept = Global()
if sys.argv[1] == "joined":
    open_world("cpu")
    close_world()
atexit.register(lambda: print("at exit"))
print("done")
leave(3)
"""


@pytest.mark.parametrize(
    ("kind", "says"), [("joined", ["done", "at exit"]), ("alone", ["done", "at exit", "taken down"])]
)
def test_a_rank_ends_before_python_is_taken_down(kind: str, says: list[str]) -> None:
    """gloo's threads take the GIL when they drop work; while Python is taken down that is SIGABRT, now and then."""
    ended = subprocess.run([sys.executable, "-c", LEAVER, kind], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout.splitlines()) == (3, says), ended.stderr


def test_errors_and_stops_reach_every_rank(rank_pool):
    zero, one = rank_pool.pool(2).run(THIS, "agreements")
    note = ["all ranks raise this"]
    for answer in (zero, one):
        assert answer["gathered"] == [[0.0, 7.0], [1.0, 7.0]]
        assert answer["stop"] == [False, True]
        assert answer["ours"] == ("CheckpointError", "disk of rank 1 is full", note)
        assert answer["long"] == ("CheckpointError", "x" * 40, note)
    assert zero["path"] == ("CheckpointError", r"/data/\udcff", note)
    assert one["foreign"] == ("DataError", "shard 3 is missing", note)
    assert zero["foreign"] == ("PretrainError", "shard 3 is missing", note)
    assert (zero["both"][1], one["both"][1]) == ("rank 0", "rank 1")
    assert (zero["together"], one["together"]) == (0, 10)


def failing_bug(world) -> str:
    """A bug is no user's error: it keeps its type and traceback, and is not agreed on."""
    with pytest.raises(ZeroDivisionError):
        world.together(lambda: 1 // 0)
    return "passed on"


def test_bugs_are_not_dressed_up(rank_pool):
    assert rank_pool.pool(2).run(THIS, "failing_bug") == ["passed on"] * 2
