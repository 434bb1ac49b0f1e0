"""train.compile: the same training as without, at every stage, under the same checks, and resumed to the bit."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import spine_runs as spine
import torch
from siblings import load_sibling
from test_fusion import CROSS, MMCA, build, gradients  # noqa: F401 - build is a fixture

from triweave.pretrain.engine.compile import compile_blocks
from triweave.pretrain.errors import PretrainError

THIS = Path(__file__)
HERE = THIS.parent
TASKS = HERE / "engine_tasks.py"
CPU = torch.device("cpu")


@contextmanager
def counted_programs() -> Iterator[Callable[[], int]]:
    """Return how many programs the compiler has made within the block; what was made and set there goes with it."""
    import torch._functorch.config as functorch
    import torch._inductor.config as inductor
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    before = (
        torch._dynamo.config.patch(fail_on_recompile_limit_hit=False),
        functorch.patch(enable_autograd_cache=True),
        inductor.patch(fx_graph_cache=True),
    )
    with before[0], before[1], before[2]:
        yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def train_compiled(world: Any, **case: Any) -> dict[str, Any]:
    """Run inside ranks: engine_tasks.train_case with compiled blocks, and how many programs those have taken."""
    with counted_programs() as programs:
        answer = load_sibling("engine_tasks").train_case(world, compile=True, **case)
        return {**answer, "programs": programs()}


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_compiled_blocks_train_as_plain_ones(rank_pool, stage: int) -> None:
    """Whatever a rank holds; towers that nobody holds are left alone, others guarded, under compiled blocks as well."""
    gathered = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if stage == 3 else None
    case = {"case": "nobody_has_audio", "zero_stage": stage, "accumulation": 2, "steps": 4, "deepspeed": gathered}
    pool = rank_pool.pool(2)
    plain = pool.run(TASKS, "train_case", **case)
    made = pool.run(THIS, "train_compiled", **case)
    for wanted, found in zip(plain, made, strict=True):
        assert 1 <= found["programs"] <= 2, "the first shape's and that of any shape, for all blocks"
        np.testing.assert_allclose(found["losses"], wanted["losses"], rtol=0, atol=1e-6 * wanted["losses"][0])
        for one, other in zip(wanted["snapshots"], found["snapshots"], strict=True):
            assert one["pieces"].keys() == other["pieces"].keys()
            assert one["steps"] == other["steps"]
            for name, values in one["pieces"].items():
                largest = max(1.0, float(np.abs(values).max())) if name[1] == "weight" else float(np.abs(values).max())
                np.testing.assert_allclose(
                    other["pieces"][name], values, rtol=0, atol=1e-6 * largest, err_msg=str(name)
                )


@pytest.mark.slow
@pytest.mark.parametrize("fusion", [CROSS, MMCA], ids=["cross", "mmca"])
def test_one_program_serves_every_batch_of_a_fusion(build, synthetic, fusion) -> None:  # noqa: F811
    """More kinds of batches than the compiler makes programs: media of any number, recomputed activations."""
    options = {"activation_checkpointing": True, "layers": 1}
    plain, compiled = build(fusion, **options), build(fusion, **options)
    with counted_programs() as programs:
        compile_blocks(compiled, zero_stage=1, device=CPU)
        for seed in range(10):
            rows = [("image",) * (seed % 4), ("audio",) * (seed % 3)]
            batch = synthetic.make_batch(rows, length=48, seed=seed)
            guards = frozenset(synthetic.FEATURES) - set(batch.payloads)
            wanted, wanted_gradients = gradients(plain, batch, guards)
            found, found_gradients = gradients(compiled, batch, guards)
            assert found.total.item() == pytest.approx(wanted.total.item(), rel=1e-6)
            for name, gradient in wanted_gradients.items():
                largest = float(gradient.abs().max())
                torch.testing.assert_close(found_gradients[name], gradient, rtol=0, atol=1e-6 * largest, msg=name)
        assert 1 <= programs() < 10, "fewer than batches"


@pytest.mark.slow
def test_a_breach_of_the_participation_contract_is_seen_under_compiled_blocks(rank_pool) -> None:
    fault = {"fault": "drops a tower's output", "tower": "image", "case": "all"}
    for answer in rank_pool.pool(2).run(HERE / "participation_tasks.py", "disobey", stage=2, compile=True, **fault):
        steps, error, _ = answer
        assert steps == 2
        assert "ParticipationError: rank 1: module towers.image" in error


@pytest.mark.slow
def test_a_compiled_run_is_resumed_to_the_bit_by_a_new_process(run_config, tmp_path) -> None:
    gathered = "deepspeed={zero_optimization: {stage3_param_persistence_threshold: 0}}"
    words = ("train.compile=true", "train.zero_stage=3", gathered, "train.steps=4", "checkpoint.every_steps=2")
    straight, again = tmp_path / "straight", tmp_path / "again"
    first = spine.run_program(run_config, straight, *words)
    _, said = first.communicate(timeout=200)
    assert first.returncode == 0, said
    shutil.copytree(straight, again)
    shutil.rmtree(spine.list_checkpoints(again)[-1])
    second = spine.run_program(run_config, again, *words, "--resume")
    _, said = second.communicate(timeout=200)
    assert second.returncode == 0, said
    assert [line["loss"] for line in spine.metrics(again)] == [line["loss"] for line in spine.metrics(straight)]
    assert spine.files_of(again) == spine.files_of(straight)


@pytest.mark.slow
def test_a_machine_without_a_compiler_is_told_so(build, monkeypatch) -> None:  # noqa: F811
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def none() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(PretrainError, match=r"no compiler is found; install g\+\+.*or set train.compile=false"):
        compile_blocks(build(), zero_stage=1, device=CPU)
