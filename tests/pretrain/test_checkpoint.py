"""Checkpoints: bit-identical with the same layout, loadable with any other, never half visible, damage named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from triweave.pretrain.checkpoints.checkpoint import list_checkpoints, newest_checkpoint, read_checkpoint
from triweave.pretrain.errors import CheckpointError

TASKS = Path(__file__).with_name("checkpoint_tasks.py")


@pytest.fixture(scope="session")
def tasks(rank_pool):
    return rank_pool.load(Path(__file__).with_name("engine_tasks.py"))


def bits(snapshot: dict[str, Any]) -> dict[Any, Any]:
    """Return a snapshot in a form that compares bit by bit."""
    return {**{key: values.tobytes() for key, values in snapshot["pieces"].items()}, **snapshot["steps"]}


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("ranks", "stage", "precision"),
    [
        pytest.param(2, 0, "fp32", marks=SLOW),
        (2, 1, "fp32"),
        pytest.param(2, 1, "bf16", marks=SLOW),
        pytest.param(2, 2, "bf16", marks=SLOW),
        (2, 3, "fp32"),
        (2, 3, "bf16"),
        pytest.param(3, 2, "fp32", marks=SLOW),
    ],
)
def test_same_layout_goes_on_bit_identically(rank_pool, tmp_path, ranks, stage, precision):
    """Weights, moments, step counts (fewer for the absent tower), RNG, and the losses and weights two steps later."""
    pool = rank_pool.pool(ranks)
    common = {"run_dir": str(tmp_path), "stage": stage, "precision": precision, "more": 2}
    whole = pool.run(TASKS, "save_after", steps=3, **common)
    resumed = pool.run(TASKS, "load_and_go_on", **common)
    for before, after in zip(whole, resumed, strict=True):
        assert bits(before["saved"]) == bits(after["saved"])
        assert before["rng"] == after["rng"]
        assert before["losses"] == after["losses"]
        assert bits(before["last"]) == bits(after["last"])
    assert {count for answer in resumed for count in answer["saved"]["steps"].values()} == {2.0, 3.0}
    assert resumed[0]["state"] == {"stream": "here"}


@pytest.mark.parametrize(("source", "target"), [((2, 3), (1, 1)), ((2, 2), (1, 3)), ((1, 0), (2, 3))])
def test_any_layout_loads_the_same_values(rank_pool, tasks, tmp_path, source, target):
    saved = rank_pool.pool(source[0]).run(TASKS, "save_after", run_dir=str(tmp_path), stage=source[1], steps=3)
    loaded = rank_pool.pool(target[0]).run(TASKS, "load_and_go_on", run_dir=str(tmp_path), stage=target[1])
    wanted, wanted_steps = tasks.assemble([answer["saved"] for answer in saved])
    found, found_steps = tasks.assemble([answer["saved"] for answer in loaded])
    assert found_steps == wanted_steps
    for kind, parameters in wanted.items():
        for name, values in parameters.items():
            assert np.array_equal(found[kind][name], values), (kind, name)


@pytest.mark.parametrize(
    ("stage", "precision"),
    [(1, "fp32"), pytest.param(0, "fp32", marks=SLOW), pytest.param(2, "bf16", marks=SLOW),
     pytest.param(3, "fp32", marks=SLOW), pytest.param(3, "bf16", marks=SLOW)],
)  # fmt: skip
def test_what_is_saved_beside_the_next_steps_is_the_state_of_the_call(rank_pool, tmp_path, stage, precision):
    """The copy is slower than a step: the update waits for it, and nothing else does."""
    for answer in rank_pool.pool(2).run(
        TASKS, "save_in_the_background", run_dir=str(tmp_path), stage=stage, precision=precision
    ):
        assert bits(answer["saved"]) != bits(answer["later"])
        assert bits(answer["loaded"]["saved"]) == bits(answer["saved"])
        assert answer["loaded"]["losses"] == answer["losses"]
        assert bits(answer["loaded"]["last"]) == bits(answer["later"])
        assert 0 < answer["times"].blocked_s < answer["times"].background_s
        assert answer["times"].bytes > 0


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(rank_pool, tmp_path):
    outcomes = rank_pool.pool(1).run(TASKS, "killed_while_saving", run_dir=str(tmp_path))[0]
    assert len(outcomes) >= 5  # four flushes and the save that was let through
    check_outcomes(outcomes)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.startswith(".")] == []


@pytest.mark.slow
def test_a_kill_at_any_request_leaves_a_whole_checkpoint(rank_pool, object_store):
    where = "s3://corpora/killed"
    outcomes = rank_pool.pool(1).run(TASKS, "killed_while_saving", run_dir=where, environment=object_store)[0]
    assert len(outcomes) >= 12
    check_outcomes(outcomes)


def check_outcomes(outcomes: list[tuple[int, list[int], bool]]) -> None:
    for moment, steps, whole in outcomes:
        assert whole, (moment, steps)
        assert steps[0] == 1
    assert outcomes[0][1] == [1]
    assert outcomes[-1][1] == [1, 2]


@pytest.mark.slow
def test_an_object_store_holds_checkpoints_of_any_layout(rank_pool, tasks, object_store):
    """Saved in the background by two ranks at ZeRO 3, range by range into one at ZeRO 1; the same bits on two."""
    where = "s3://corpora/runs/one"
    answers = rank_pool.pool(2).run(TASKS, "save_in_the_background", run_dir=where, stage=3, environment=object_store)
    for answer in answers:
        assert bits(answer["loaded"]["saved"]) == bits(answer["saved"])
    alone = rank_pool.pool(3).run(TASKS, "load_and_go_on", run_dir=where, stage=1, environment=object_store)
    wanted, found = (tasks.assemble([answer["saved"] for answer in side])[0] for side in (answers, alone))
    for kind, parameters in wanted.items():
        for name, values in parameters.items():
            assert np.array_equal(found[kind][name], values), (kind, name)


def test_a_rank_that_cannot_write_ends_all_with_one_message(rank_pool, tmp_path):
    """A save in the background fails on rank 1: all ranks hear of it at the next step, and when they wait for it."""
    zero, one = rank_pool.pool(2).run(TASKS, "save_where_rank_1_cannot", run_dir=str(tmp_path))
    assert zero == one
    assert len(zero) == 2
    for kind, said in zero:
        assert kind == "CheckpointError"
        assert "on rank 1" in said
        assert said.endswith("free space or change run_dir")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("file", "damage"),
    [("rank-00001-000.safetensors", flip), ("rank-00000-000.safetensors", cut), ("manifest.json", flip),
     ("rank-00001-000.safetensors", Path.unlink)],
)  # fmt: skip
def test_damage_is_named_and_the_checkpoint_before_is_taken(rank_pool, tmp_path, file, damage):
    pool = rank_pool.pool(2)
    first = pool.run(TASKS, "save_after", run_dir=str(tmp_path), stage=1, steps=1)
    pool.run(TASKS, "save_after", run_dir=str(tmp_path), stage=1, steps=2)
    damage(tmp_path / "checkpoints" / "step-0000002" / file)
    resumed = pool.run(TASKS, "load_and_go_on", run_dir=str(tmp_path), stage=1)
    for before, after in zip(first, resumed, strict=True):
        assert bits(before["saved"]) == bits(after["saved"])
        (told,) = after["told"]
        assert file in told
        assert "step-0000002" in told
    pool.run(TASKS, "save_after", run_dir=str(tmp_path), stage=1, steps=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-0000001"]  # the damaged one is overtaken
    damage(tmp_path / "checkpoints" / "step-0000001" / file)
    with pytest.raises(AssertionError, match=rf"no whole checkpoint in .*{file}"):
        pool.run(TASKS, "load_and_go_on", run_dir=str(tmp_path), stage=1)


def test_retention_and_manifest(rank_pool, tmp_path):
    pool = rank_pool.pool(2)
    (tmp_path / "checkpoints" / ".writing-step-0000001").mkdir(parents=True)
    for steps in (1, 2, 3):
        pool.run(TASKS, "save_after", run_dir=str(tmp_path), stage=2, steps=steps, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-0000002", "step-0000003"]
    assert newest_checkpoint(tmp_path) == 3
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-0000002", "step-0000003"]
    checkpoint = read_checkpoint(list_checkpoints(tmp_path)[-1])
    assert sorted(path.name for path in checkpoint.folder.iterdir()) == [
        "manifest.json", "rank-00000-000.safetensors", "rank-00001-000.safetensors",
    ]  # fmt: skip
    covered: dict[str, int] = {}
    for entry in checkpoint.manifest["files"].values():
        for name, _, numel, _ in entry["fragments"]:
            covered[name] = covered.get(name, 0) + numel
    shapes = {name: np.prod(entry["shape"]) for name, entry in checkpoint.manifest["parameters"].items()}
    assert covered == shapes


def test_another_model_is_refused_by_parameter_name(rank_pool, tmp_path):
    pool = rank_pool.pool(1)
    pool.run(TASKS, "save_after", run_dir=str(tmp_path), stage=1, steps=1)
    path = tmp_path / "checkpoints" / "step-0000001" / "manifest.json"
    checkpoint = read_checkpoint(path.parent)
    checkpoint.manifest["parameters"]["decoder.extra"] = {"shape": [2], "steps": 1.0}
    checkpoint.manifest["xxh3"] = _digest(checkpoint.manifest)
    path.write_text(json.dumps(checkpoint.manifest, sort_keys=True, indent=1))
    with pytest.raises(AssertionError, match=r"parameter decoder\.extra is only in the checkpoint"):
        pool.run(TASKS, "load_and_go_on", run_dir=str(tmp_path), stage=1)


def test_a_checkpoint_of_another_format_is_refused(tmp_path):
    folder = tmp_path / "checkpoints" / "step-0000001"
    folder.mkdir(parents=True)
    manifest = {"format": 99, "step": 1}
    (folder / "manifest.json").write_text(json.dumps({**manifest, "xxh3": _digest(manifest)}))
    with pytest.raises(CheckpointError, match="format 99; this version reads 3"):
        read_checkpoint(folder)


def _digest(manifest: dict[str, Any]) -> str:
    import xxhash

    return xxhash.xxh3_128_hexdigest(json.dumps(manifest, sort_keys=True, indent=1).encode())
