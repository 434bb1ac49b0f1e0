import dataclasses

import pytest
import yaml

from triweave.data_pipeline.errors import DataError
from triweave.pretrain.config import load_config, save_resolved, to_plain
from triweave.pretrain.errors import PretrainError
from triweave.pretrain.model.config import OBJECTIVES, ContrastiveConfig, ModelConfig
from triweave.pretrain.model.heads import HEADS

MINIMAL = """
run_dir: runs/x
data:
  sources: [{name: stamps, shards: /shards}]
  tokenizer: tokenizer.model
model: {layers: 2, d_model: 64}
optimizer: {lr: 1e-3}
deepspeed: {zero_optimization: {reduce_bucket_size: 9}}
"""


WITH_CONTRASTIVE = "model.objectives={language_model: 1, contrastive: 0.5}"


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(MINIMAL)
    return file


def test_defaults_then_file_then_overrides(path):
    config = load_config(path, ["model.layers=3", "optimizer.lr=3e-4", "model.softcap=30", "train.steps=7"])
    assert (config.model.layers, config.model.d_model, config.model.heads) == (3, 64, ModelConfig().heads)
    assert config.optimizer.lr == 3e-4
    assert config.model.softcap == 30.0
    assert config.train.steps == 7
    assert config.data.sources[0].shards == "/shards"
    assert config.deepspeed == {"zero_optimization": {"reduce_bucket_size": 9}}


def test_overrides_reach_strings_lists_tuples_and_the_pass_through(path):
    config = load_config(
        path,
        [
            "run_dir=2024",
            "data.sources=[{name: a, shards: b, weight: 2}]",
            "optimizer.betas=[0.8, 0.9]",
            "model.rope_sections=null",
            "deepspeed.zero_optimization.sub_group_size=5",
            "deepspeed.tag=a",
        ],
    )
    assert config.run_dir == "2024"
    assert config.data.sources[0].weight == 2.0
    assert config.optimizer.betas == (0.8, 0.9)
    assert config.deepspeed == {"zero_optimization": {"reduce_bucket_size": 9, "sub_group_size": 5}, "tag": "a"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.layer=3", "model.layer: unknown key; did you mean model.layers"),
        ("modl.layers=3", "modl: unknown key; did you mean model"),
        ("data.sequence_lenght=8", "did you mean data.sequence_length"),
        (
            "data.sources=[{name: q, shard: x}]",
            r"data.sources\[0\].shard: unknown key; did you mean data.sources\[0\].shards",
        ),
        ("qqq=1", "qqq: unknown key; known keys: run_dir, data"),
        ("model.layers=abc", "run.yaml: model.layers: must be int, got abc"),
        ("model.layers=2.5", "model.layers: must be int, got 2.5"),
        ("train.zero_stage=4", r"train.zero_stage: must be one of \[0, 1, 2, 3\], got 4"),
        ("train.precision=fp8", "train.precision: must be one of .*got fp8"),
        ("model.layers=null", "model.layers is null; give it a value"),
        ("deepspeed=null", "deepspeed is null; give it a value"),
        ("deepspeed.zero_optimization=null", "deepspeed.zero_optimization is None; it must be a mapping"),
        ("deepspeed.zero_optimization=true", "deepspeed.zero_optimization is True; it must be a mapping"),
        ("model=3", "model is 3; it must be a mapping"),
        ("model.layers.x=3", "model.layers is 2 in the file, not a mapping"),
        ("model.heads.x=3", "model.heads is one value"),
        ("model.layers", "an override has the form key=value"),
        ("model.layers=[", r"model.layers=\[: not a YAML value"),
        ("model.layers=-1", "model.layers is -1; it must be above 0"),
        ("model.d_model=0", "model.d_model is 0; it must be above 0"),
        ("model.init_std=-1", "model.init_std is -1.0; it must be 0 or above"),
        ("model.softcap=0", "model.softcap is 0.0"),
        ("model.kv_heads=3", r"model.kv_heads is 3 and does not divide model.heads=8; use one of \[1, 2, 4, 8\]"),
        ("model.head_width=15", "model.head_width is 15; .* even"),
        ("model.rope_sections=[1, 2, 3]", "must sum to head_width / 2 = 32"),
        ("model.objectives={}", "model.objectives is empty"),
        ("model.objectives={vision: 1}", "model.objectives names 'vision'; known: language_model, contrastive"),
        ("model.objectives={contrastive: 1}", "model.objectives leaves out language_model; name it, with weight 0"),
        ("model.contrastive.loss=triplet", "sigmoid"),
        ("model.contrastive.width=0", "model.contrastive.width is 0; it must be at least 1"),
        ("model.contrastive.scale=0", "model.contrastive.scale is 0.0; it must be above 0, or null"),
        ("model.contrastive.widht=3", "model.contrastive.widht: unknown key; did you mean model.contrastive.width"),
        (WITH_CONTRASTIVE, "contrastive_share is 0, .* set data.packing.contrastive_share=1.0, or remove contrastive"),
        ("seed=-1", "seed is -1"),
        ("run_dir=", "run_dir is empty"),
        ("data.sequence_length=-3", "data.sequence_length"),
        ("train.global_batch_rows=0", "train.global_batch_rows is 0"),
        ("optimizer.lr=-1", "optimizer.lr is -1.0"),
        ("deepspeed.zero_optimization.stage=3", r"deepspeed.zero_optimization.stage is decided by train.zero_stage"),
    ],
)
def test_a_bad_override_is_one_line_that_names_the_key(path, override, message):
    with pytest.raises((PretrainError, DataError), match=message) as caught:
        load_config(path, [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read the config: No such file"),
        ("a: [", "not YAML"),
        ("- a", "holds no mapping"),
        ("run_dir: x", "data"),
        ("data: {sources: [], tokenizer: t}\nrun_dir: x", "data.sources is empty"),
    ],
)
def test_a_bad_file_is_one_line_that_names_it(tmp_path, text, message):
    file = tmp_path / "run.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises((PretrainError, DataError), match=message) as caught:
        load_config(file)
    assert "\n" not in str(caught.value)


def test_the_resolved_config_holds_every_key_and_loads_to_an_equal_config(path, tmp_path):
    config = load_config(path, ["model.rope_sections=[8, 12, 12]"])
    saved = tmp_path / "run" / "config.yaml"
    save_resolved(config, saved)
    assert load_config(saved) == config
    assert set(yaml.safe_load(saved.read_text())["model"]) == {item.name for item in dataclasses.fields(ModelConfig)}
    assert [file.name for file in saved.parent.iterdir()] == ["config.yaml"]
    assert to_plain(config)["optimizer"]["betas"] == [0.9, 0.95]


def test_more_ranks_than_rows_are_refused_with_the_line_that_fixes_it(path):
    config = load_config(path, ["train.global_batch_rows=4"])
    config.check_world(4)
    with pytest.raises(PretrainError, match=r"start at most 4 or set train\.global_batch_rows=5"):
        config.check_world(5)
    with pytest.raises(PretrainError, match="start at least 1"):
        config.check_world(0)


SHARED = (WITH_CONTRASTIVE, "data.packing.contrastive_share=0.5")


def test_groups_that_steps_would_cut_are_refused_with_the_line_that_fixes_it(path):
    whole = ("data.packing.contrastive_group_rows=4", "train.global_batch_rows=8")
    load_config(path, [*SHARED, *whole])
    with pytest.raises(PretrainError, match=r"global_batch_rows is 8, no multiple of .*=64, .* such as 8"):
        load_config(path, [*SHARED, "train.global_batch_rows=8"])
    with pytest.raises(PretrainError, match=r"global_batch_rows is 10, no multiple of .*=4, .* such as 2"):
        load_config(path, [*SHARED, whole[0], "train.global_batch_rows=10"])
    load_config(path, ["train.global_batch_rows=8"])  # without the objective nothing depends on it
    load_config(path, ["train.global_batch_rows=8", WITH_CONTRASTIVE.replace("0.5", "0")])


def test_a_resume_in_the_middle_of_a_group_is_refused(path):
    config = load_config(path, [*SHARED, "data.packing.contrastive_group_rows=8", "train.global_batch_rows=8"])
    config.check_resume_row(16)
    with pytest.raises(PretrainError, match=r"goes on at plan row 12, no multiple of .*=8, .*, such as 4"):
        config.check_resume_row(12)
    load_config(path).check_resume_row(12)


def test_initial_scale_and_bias_follow_the_loss():
    sigmoid, infonce = ContrastiveConfig(), ContrastiveConfig(loss="infonce")
    assert (sigmoid.initial_scale, sigmoid.initial_bias) == (10.0, -10.0)
    assert (infonce.initial_scale, infonce.initial_bias) == (1 / 0.07, 0.0)
    chosen = ContrastiveConfig(scale=3.0, bias=0.0)
    assert (chosen.initial_scale, chosen.initial_bias) == (3.0, 0.0)


def test_objective_names_and_the_heads_registry_agree():
    assert list(OBJECTIVES) == list(HEADS)


def test_rotary_sections_alternate_by_default_and_fill_every_width():
    assert ModelConfig(head_width=12).sections == (1,) * 6
    assert ModelConfig(head_width=128, rope_sections=[16, 24, 24]).sections == (16, 24, 24)
