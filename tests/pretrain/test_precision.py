"""fp16 and its loss scale, and ZeRO++'s quantisation: what is allowed where, and what reaches DeepSpeed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import spine_runs as spine
import torch
import yaml

from triweave.launch.cli import main
from triweave.pretrain.config import RunConfig, load_config
from triweave.pretrain.engine.config import deepspeed_config
from triweave.pretrain.engine.loss_scale import LARGEST, LossScale, LossScaleConfig
from triweave.pretrain.engine.zeropp import check_zeropp_device
from triweave.pretrain.errors import PretrainError
from triweave.pretrain.ledger.consumed import read_consumed

TASKS = Path(__file__).with_name("precision_tasks.py")
BASE = {"run_dir": "run", "data": {"sources": [{"name": "a", "shards": "a"}], "tokenizer": "t"}}


def configured(train: dict[str, object], zero: dict[str, object] | None = None) -> RunConfig:
    tree = {**BASE, "train": train, "deepspeed": {"zero_optimization": zero or {}}}
    return load_config("run.yaml", text=yaml.safe_dump(tree))


def test_the_scale_halves_on_overflow_and_doubles_after_so_many_updates_without():
    scale = LossScale(LossScaleConfig(initial=8, least=2, grow_every=3))
    seen = []
    for overflow in (1, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0):
        (scale.overflowed if overflow else scale.held)()
        seen.append(scale.scale)
    assert seen == [4, 2, 2, 2, 2, 2, 2, 2, 4, 4, 4, 8]
    assert scale.can_fall
    assert not LossScale(LossScaleConfig(initial=2, least=2)).can_fall
    highest = LossScale(LossScaleConfig(initial=LARGEST, grow_every=1))
    highest.held()
    assert highest.scale == LARGEST


def test_a_restored_scale_goes_on_in_the_middle_of_its_count():
    one, other = (LossScale(LossScaleConfig(initial=8, grow_every=3)) for _ in range(2))
    one.overflowed()
    one.held()
    one.held()
    other.restore(json.loads(json.dumps(one.state())))
    for scale in (one, other):
        scale.held()
    assert one.scale == other.scale == 8
    assert one.state() == other.state()


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"loss_scale": {"initial": 1000}}, "train.loss_scale.initial is 1000; it must be a power of two"),
        ({"loss_scale": {"initial": 2.0**30}}, "train.loss_scale.initial is .* at most 1.67772e.07"),
        ({"loss_scale": {"least": 0}}, "train.loss_scale.least is 0; it must be a power of two"),
        ({"loss_scale": {"initial": 1, "least": 2}}, "train.loss_scale.least is 2, above .*initial=1; lower it"),
        ({"loss_scale": {"grow_every": 0}}, "train.loss_scale.grow_every is 0; it must be at least 1"),
        ({"precision": "fp16", "zero_stage": 0}, "train.precision=fp16 needs fp32 master weights"),
    ],
)
def test_scales_that_cannot_be_are_refused(train, message):
    with pytest.raises(PretrainError, match=message):
        configured(train)


@pytest.mark.parametrize(
    ("train", "zero", "message"),
    [
        ({"zero_stage": 2, "precision": "bf16"}, {"zero_quantized_weights": True}, "weights does nothing at .*stage=2"),
        ({"zero_stage": 1}, {"zero_hpz_partition_size": 2}, "zero_hpz_partition_size does nothing at .*zero_stage=1"),
        ({"zero_stage": 3}, {"zero_quantized_weights": True}, "which train.precision=fp32 is not; set .*=bf16"),
        (
            {"zero_stage": 3, "precision": "bf16"},
            {"zero_quantized_gradients": True},
            "reads gradients as fp16 whatever they are, and train.precision is bf16; set train.precision=fp16",
        ),
        ({"zero_stage": 3}, {"zero_quantized_nontrainable_weights": True}, "no checkpoint could hold; remove it"),
        ({"zero_stage": 3}, {"zeropp_loco_param": {"err_beta": 0.8}}, "zeropp_loco_param keeps errors .* remove it"),
    ],
)
def test_zeropp_that_would_not_do_what_it_says_is_refused(train, zero, message):
    with pytest.raises(PretrainError, match=message):
        configured(train, zero)


def test_quantisation_is_refused_off_cuda():
    with pytest.raises(PretrainError, match="has kernels for CUDA only, and this run is on cpu; remove it"):
        check_zeropp_device({"zero_quantized_weights": True}, torch.device("cpu"))
    check_zeropp_device({"zero_quantized_weights": True}, torch.device("cuda"))
    check_zeropp_device({"zero_hpz_partition_size": 2}, torch.device("cpu"))


def test_what_reaches_deepspeed_for_zeropp_on_cuda():
    zero = {"zero_quantized_weights": True, "zero_quantized_gradients": True, "zero_hpz_partition_size": 8}
    config = configured({"zero_stage": 3, "precision": "fp16", "loss_scale": {"initial": 4096}}, zero)
    made = deepspeed_config(config, accumulation=1, parameters=1000)
    assert made["zero_optimization"].items() >= {**zero, "stage": 3}.items()
    assert made["fp16"] == {"enabled": True, "loss_scale": 4096}
    assert made["bf16"] == {"enabled": False}
    assert made["communication_data_type"] == "fp16"  # what its kernel reads
    assert made["data_types"] == {"grad_accum_dtype": "fp32"}
    weights_only = configured({"zero_stage": 3, "precision": "bf16"}, {"zero_quantized_weights": True})
    made = deepspeed_config(weights_only, accumulation=1, parameters=1000)
    assert made["communication_data_type"] == "fp32"
    assert made["fp16"]["enabled"] is False


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "zero", "message"),
    [
        ({"precision": "fp16"}, {}, "train.precision is fp16, which DeepSpeed does not have on this cpu; set"),
        ({"precision": "bf16"}, {"zero_quantized_weights": True}, "zero_quantized_weights has kernels for CUDA only"),
    ],
    ids=["fp16", "quantised"],
)
def test_a_run_on_cpu_is_refused_before_it_starts(settings, zero, message, tmp_path, capsys, monkeypatch):
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: False)
    train = {"device": "cpu", "zero_stage": 3, **settings}
    run = {**BASE, "run_dir": str(tmp_path / "run"), "train": train, "deepspeed": {"zero_optimization": zero}}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    assert main(["train", str(path)]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.parametrize("offload", ["none", "cpu"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_overflow_leaves_the_step_out_on_all_ranks_and_lowers_the_scale(rank_pool, stage, offload):
    settings = {"zero_optimization": {"offload_optimizer": {"device": offload}}}
    one, other = rank_pool.pool(2).run(
        TASKS, "train", stage=stage, scale={"initial": 2.0**24}, steps=8, deepspeed=settings
    )
    skipped = [step for step in one if step["action"] == "skip"]
    assert len(skipped) > 2  # more than health.skips: these are no bad steps
    for number, step in enumerate(skipped[:3]):
        assert step["unchanged"]
        assert step["scale"] == 2.0 ** (24 - number)
        assert f"overflows fp16 at loss scale {step['scale']:g}, which is {step['scale'] / 2:g} now" in step["reason"]
        assert "rank 0 held samples" in step["samples"]
    assert any(step["action"] == "update" and not step["unchanged"] for step in one)
    assert one[-1]["judge"]["skipped"] == 0
    for mine, theirs in zip(one, other, strict=True):
        assert {key: mine[key] for key in ("loss", "scale", "action", "reason", "state")} == {
            key: theirs[key] for key in ("loss", "scale", "action", "reason", "state")
        }


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_scale_that_grows_changes_no_gradient(rank_pool, stage):
    """The step at whose end the scale doubles too; fp32 says what the gradients are, fp16 rounds to 1e-3 of it."""
    pool = rank_pool.pool(2)
    growing = pool.run(TASKS, "train", stage=stage, scale={"initial": 256.0, "grow_every": 1}, steps=4, clip_norm=0.5)
    steady = pool.run(TASKS, "train", stage=stage, scale={"initial": 2048.0}, steps=4, clip_norm=0.5)
    assert [step["scale"] for step in growing[0]] == [256, 512, 1024, 2048]
    for one, other in zip(growing, steady, strict=True):
        for found, wanted in zip(one, other, strict=True):
            assert found["norm"] == pytest.approx(wanted["norm"], rel=2e-3)
            for key, values in wanted["snapshot"]["pieces"].items():
                if key[1] == "exp_avg":
                    largest = float(np.abs(values).max())
                    np.testing.assert_allclose(
                        found["snapshot"]["pieces"][key], values, rtol=0, atol=0.02 * largest, err_msg=str(key)
                    )
    plain = pool.run(
        TASKS.with_name("engine_tasks.py"), "train_case", case="nobody_has_audio", zero_stage=stage, accumulation=1,
        steps=4, lr=1e-4, clip_norm=0.5,
    )[0]  # fmt: skip
    assert [step["loss"] for step in steady[0]] == pytest.approx(plain["losses"], rel=2e-3)
    assert [step["norm"] for step in steady[0]] == pytest.approx(plain["norms"], rel=1e-2)


@pytest.mark.slow
def test_what_no_scale_can_cure_is_a_bad_step(rank_pool):
    pool = rank_pool.pool(2)
    for broken in pool.run(TASKS, "break_a_loss", stage=2):
        assert broken["reason"].startswith("the loss of step 2 is not finite")
        assert broken["unchanged"]
        assert broken["state"]["scale"] == 1024
        assert broken["judge"]["skipped"] == 1
    for reasons, error in pool.run(TASKS, "overflow_at_the_least", stage=2):
        assert reasons == [f"the gradient of step {step} is not finite" for step in (1, 2)]
        assert error.startswith("NonFiniteError: the gradient of step 3 is not finite")


@pytest.mark.slow
def test_a_run_in_fp16_is_resumed_to_the_bit_with_its_scale(rank_pool, run_config, tmp_path):
    words = [
        "train.precision=fp16", "train.loss_scale={initial: 16777216, grow_every: 3}", "schedule.total_steps=12",
        "checkpoint.every_steps=6", "health.skips=0",
    ]  # fmt: skip

    def train(name: str, steps: int, *, resume: bool = False) -> Path:
        overrides = [f"run_dir={tmp_path / name}", f"train.steps={steps}", *words]
        said = rank_pool.pool(2).run(TASKS, "run_program", config=str(run_config), overrides=overrides, resume=resume)
        assert said == ["", ""]
        return tmp_path / name

    straight = train("straight", 12)
    train("halved", 6)
    halved = train("halved", 12, resume=True)
    scales = [line["loss_scale"] for line in spine.metrics(straight)]
    assert [line["loss_scale"] for line in spine.metrics(halved)] == scales
    assert scales[6] not in (scales[0], 2.0**24)
    assert spine.files_of(halved) == spine.files_of(straight)
    skipped = {line["step"] for line in spine.metrics(straight) if "skipped" in line}
    assert skipped
    assert {row.step for row in read_consumed(straight) if row.skipped} == skipped
