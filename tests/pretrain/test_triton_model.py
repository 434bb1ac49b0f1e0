"""The model on its Triton kernels, interpreted on the CPU: the demo's model in the real program, and single steps."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from triweave.kernels import backends
from triweave.kernels.errors import KernelInputError
from triweave.pretrain.batch import kernel_tables, to_device
from triweave.pretrain.fusion.config import FusionConfig
from triweave.pretrain.generation.continuation import Continuation
from triweave.pretrain.model.config import ModelConfig
from triweave.pretrain.model.model import MultimodalTransformer
from triweave.pretrain.train import main

pytest.importorskip("triton")
CORPUS = Path(__file__).parents[1] / "data_pipeline" / "conftest.py"
TASKS = Path(__file__).with_name("triton_tasks.py")
DEMO = Path(__file__).parents[2] / "launch" / "configs" / "demo_cpu.yaml"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def interpreter(rank_pool):
    """Triton kernels run interpreted, with bf16 put right."""
    with rank_pool.load(TASKS).interpreted_triton() as load:
        yield load


@pytest.fixture
def build(synthetic):
    def build(**options) -> MultimodalTransformer:
        config = ModelConfig(**({"d_model": 32, "layers": 1, "heads": 2, "kv_heads": 1, "head_width": 16} | options))
        return MultimodalTransformer(config, vocab_size=synthetic.VOCAB_SIZE, media_features=synthetic.FEATURES)

    return build


def step(model: MultimodalTransformer, batch, tables=None) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the loss sum and all gradients of one micro-batch, with the tables of a loader's worker where given."""
    extra = {} if tables is None else tables(batch)
    total = model(to_device(dataclasses.replace(batch, extra=extra), CPU)).total
    return total.detach(), list(torch.autograd.grad(total, list(model.parameters())))


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("recompute", [False, True], ids=["plain", "recomputed"])
def test_loss_and_gradients_are_those_of_the_reference(build, make_batch, monkeypatch, recompute):
    batch = make_batch([("image", "audio")], length=40)
    wanted = step(build(), batch)
    monkeypatch.setenv(backends.OVERRIDE_VARIABLE, "triton")
    model = build(activation_checkpointing=recompute)
    tables = kernel_tables(model.config, CPU, torch.float32)
    assert (tables.tile_lists, tables.strips) == (True, False)
    torch.testing.assert_close(step(model, batch, tables), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(
    "fusion",
    [
        FusionConfig(kind="cross", cross_every=1),
        FusionConfig(kind="cross", cross_every=1, scope="preceding", resampler_latents=2, resampler_layers=1),
        FusionConfig(kind="mmca"),
    ],
    ids=["cross", "resampled", "mmca"],
)
def test_every_fusion_is_that_of_the_reference(build, make_batch, monkeypatch, fusion):
    batch = make_batch([("image", "audio")], length=40)

    def fused() -> tuple[MultimodalTransformer, Any]:
        model = build(fusion=fusion)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("gate"):
                    parameter.fill_(0.7)
        return model, kernel_tables(model.config, CPU, torch.float32)

    model, tables = fused()
    wanted = step(model, batch, tables)
    monkeypatch.setenv(backends.OVERRIDE_VARIABLE, "triton")
    model, tables = fused()
    assert (tables.media_tile_lists, tables.media_strips) == (True, False)
    torch.testing.assert_close(step(model, batch, tables), wanted, rtol=1e-5, atol=1e-5)


def test_the_workers_lists_are_what_the_kernels_read_and_no_layer_makes_its_own(
    build, make_batch, monkeypatch, interpreter
):
    batch = make_batch(length=48)
    model = build(attention="triton", layers=2).bfloat16()
    tables = kernel_tables(model.config, CPU, torch.bfloat16)
    made = []
    kernels = interpreter("attention_triton")
    tile_lists = kernels.tile_lists
    monkeypatch.setattr(kernels, "tile_lists", lambda *a, **k: made.append(1) or tile_lists(*a, **k))
    with torch.no_grad():
        own = model(to_device(batch, CPU)).total
        assert len(made) == 2  # one for each layer
        given = model(to_device(dataclasses.replace(batch, extra=tables(batch)), CPU)).total
    assert len(made) == 2
    assert torch.equal(own, given)
    for_fp32 = kernel_tables(model.config, CPU, torch.float32)
    with pytest.raises(KernelInputError, match="another head width or dtype"), torch.no_grad():
        model(to_device(dataclasses.replace(batch, extra=for_fp32(batch)), CPU))


SHARDED = [
    *("train.zero_stage=3", "model.activation_checkpointing=true", "model.layers=1"),
    *("train.global_batch_rows=2", "train.micro_batch_rows=2", "data.packing.contrastive_group_rows=2", "data.seed=5"),
]
"""One layer whose weights are gone after its forward and its recomputation; packs with parts encoded alone."""


@pytest.mark.parametrize("cache", [True, False], ids=["cached", "recomputed"])
def test_decoding_reads_lists_that_are_made_once_a_token(build, synthetic, monkeypatch, interpreter, cache):
    generator = np.random.default_rng(0)
    documents = [synthetic.random_document(generator, kinds, synthetic.FEATURES) for kinds in (("image",), ())]
    prompts = synthetic.pack([[document] for document in documents], 24)

    def continued(implementation: str, *, cache: bool) -> list[torch.Tensor]:
        with torch.inference_mode():
            continuation = Continuation(build(attention=implementation, init_std=0.2).eval(), prompts, cache=cache)
            logits = [continuation.logits]
            for token in (20, 21):
                continuation.append(torch.full((2,), token))
                logits.append(continuation.logits)
            continuation.keep([1])
            continuation.append(torch.tensor([22]))
            return [*logits, continuation.logits]

    wanted = continued("reference", cache=cache)
    monkeypatch.setattr(interpreter("attention_triton"), "tile_lists", None)  # what a launcher would make its own with
    torch.testing.assert_close(continued("triton", cache=cache), wanted, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def demo_config(rank_pool, tmp_path_factory) -> Path:
    """The demo's run with packs of 64 tokens of a tiny corpus, 2 steps of one pack."""
    folder = tmp_path_factory.mktemp("triton_model")
    corpus = rank_pool.load(CORPUS)
    records = corpus.write_records(folder / "birds.jsonl", 24)
    manifest = corpus.build(corpus.ManifestSource(root=records), folder / "birds", corpus.BuildOptions())
    corpus.train_tokenizer([manifest], 400, folder / "tokenizer.model")
    corpus.write_token_counts(manifest, folder / "tokenizer.model")
    config = yaml.safe_load(DEMO.read_text())
    config["data"] |= {
        "sources": [{"name": "birds", "shards": str(folder / "birds")}],
        "tokenizer": str(folder / "tokenizer.model"),
        "sequence_length": 64,
        "seed": 1,
        "geometry": {"image_patch_px": 8, "image_max_tokens": 8},
        "packing": {"contrastive_share": 1.0, "contrastive_group_rows": 1},
    }
    config["train"] |= {"steps": 2, "global_batch_rows": 1, "micro_batch_rows": 1, "torch_threads": 1}
    config["model"]["contrastive"]["loss"] = "sigmoid"  # one document a pack: InfoNCE has nothing to tell apart
    config["checkpoint"] = {"every_steps": 0}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("settings", [[], SHARDED], ids=["whole", "zero3_recomputed"])
def test_the_demos_model_trains_two_steps_as_with_the_reference(rank_pool, demo_config, tmp_path, settings):
    measured = []
    for kernels in ("reference", "triton"):
        run_dir = tmp_path / kernels
        overrides = [f"run_dir={run_dir}", *settings]
        rank_pool.pool(1).run(TASKS, "run_with", config=str(demo_config), overrides=overrides, kernels=kernels)
        measured.append(metrics(run_dir))
    wanted, found = measured
    assert len(wanted) == len(found) == 2
    for ours, theirs in zip(found, wanted, strict=True):
        for name in ("loss", "objective"):
            assert ours[name] == pytest.approx(theirs[name], abs=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        assert theirs["supervised_tokens"] > 40
    assert ("contrastive_loss" in wanted[1]) == (settings == SHARDED)


@pytest.mark.slow
def test_a_run_without_the_interpreter_ends_in_one_line_before_its_first_step(
    demo_config, tmp_path, monkeypatch, capsys
):
    monkeypatch.delenv(backends.INTERPRET_VARIABLE, raising=False)
    assert main([str(demo_config), f"run_dir={tmp_path}", "model.attention=triton"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "attention: impl='triton' asks for 'triton', which cannot serve on cpu" in said
    assert not (tmp_path / "metrics.jsonl").exists()
