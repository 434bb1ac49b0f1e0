"""Open models against transformers itself, on small folders with random weights: logits equal to 1e-5 both ways.

The towers that come from folders of their own are in test_open_towers.py.
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from open_folders import CLIP_PX, PLACEHOLDER, QWEN_PX, START, TOLERANCE, make, their_logits, write_tokenizer
from open_models_on_shards import compare, packs
from PIL import Image
from safetensors.torch import save_file

from triweave.data_pipeline.stream.prompt import probe_media, prompt_batch
from triweave.data_pipeline.text.token_counts import write_token_counts
from triweave.launch.cli import main
from triweave.pretrain.batch import kernel_tables, to_device
from triweave.pretrain.checkpoints.load import load_run
from triweave.pretrain.generation.continuation import Continuation
from triweave.pretrain.model.model import MultimodalTransformer
from triweave.pretrain.open_models.export import as_transformers
from triweave.pretrain.open_models.folder import OpenFolder
from triweave.pretrain.open_models.initial import start_from
from triweave.pretrain.open_models.settings import read_settings

pytestmark = pytest.mark.slow
TASKS = Path(__file__).with_name("checkpoint_tasks.py")
CORPUS = Path(__file__).parents[1] / "data_pipeline" / "conftest.py"


def ours(model: MultimodalTransformer, batch: Any) -> torch.Tensor:
    tables = kernel_tables(model.config, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        return model.logits(to_device(dataclasses.replace(batch, extra=tables(batch)), "cpu"))


def documents(synthetic: Any, family: str) -> list[tuple[Any, list[tuple[np.ndarray, Sequence[int]]]]]:
    """Return documents and their pictures."""
    generator = np.random.default_rng(0)
    grids = {"llava": [(1, 4, 4)] * 2, "qwen2_5_vl": [(1, 3, 5), (1, 2, 2), (1, 4, 4)]}.get(family, [])
    px = CLIP_PX if family == "llava" else QWEN_PX
    pictures = [(generator.integers(0, 256, (h * w, px * px * 3)).astype(np.uint8), (t, h, w)) for t, h, w in grids]
    media = [synthetic.Media(modality="image", grid=grid, values=values) for values, grid in pictures]
    long: list[Any] = [[20, 21, 22] if media else list(range(20, 60))]
    for item in media:
        long += [item, [30, 31]]
    return [
        (synthetic.Document(parts=[[40, 41], *media[:1], [50]]), pictures[:1]),
        (synthetic.Document(parts=long), pictures),
    ]


@pytest.mark.parametrize("family", ["llama", "llama3", "qwen2", "qwen3", "llava", "qwen2_5_vl"])
def test_logits_are_theirs_imported_and_exported(family, synthetic, tmp_path):
    theirs = make(family)
    theirs.save_pretrained(tmp_path / "open")
    opened = read_settings(OpenFolder(tmp_path / "open").config, "here")
    config = opened.model_config(attention="reference")
    features = {name: encoder.features for name, encoder in config.open_encoders.items()}
    model = MultimodalTransformer(config, vocab_size=opened.vocab_size, media_features=features)
    assert start_from(model, config, {"model": str(tmp_path / "open")}) == []
    shown = documents(synthetic, family)
    batch = synthetic.pack([[document for document, _ in shown]], 96)
    computed = ours(model, batch)[0]

    weights, settings = as_transformers(
        config, dict(model.named_parameters()), vocab_size=96, placeholders={"image": (START, PLACEHOLDER)}
    )
    (tmp_path / "back").mkdir()
    (tmp_path / "back" / "config.json").write_text(json.dumps(settings))
    save_file(weights, tmp_path / "back" / "model.safetensors", {"format": "pt"})
    back, told = type(theirs).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(told.values()), told

    first = 0
    for document, pictures in shown:
        span = slice(first, first + document.length)
        expected = their_logits(theirs, batch.tokens[0, span], pictures)
        assert expected.std() > 0.05
        assert (expected - computed[span]).abs().max() < TOLERANCE
        assert (expected - their_logits(back.eval(), batch.tokens[0, span], pictures)).abs().max() < TOLERANCE
        first += document.length


@pytest.fixture(scope="module")
def corpus(rank_pool, tmp_path_factory) -> Callable[..., Path]:
    """Return tiny shards with pictures, sounds and text."""
    made = rank_pool.load(CORPUS)
    folder = tmp_path_factory.mktemp("open")
    records = made.write_records(folder / "birds.jsonl", 36)
    made.build(made.ManifestSource(root=records), folder / "birds", made.BuildOptions(shard_size_bytes=100_000))
    return folder / "birds"


@pytest.mark.parametrize("family", ["llama", "llava", "qwen2_5_vl"])
def test_imported_trained_resumed_under_zero_3_and_exported(family, corpus, rank_pool, tmp_path):
    """Five steps on two ranks, the last three after a resume; plain transformers then computes the same logits."""
    folder, out, run_dir = tmp_path / "open", tmp_path / "imported", tmp_path / "run"
    make(family, vocab_size=320, image=(1, 2)).save_pretrained(folder)
    write_tokenizer(folder)
    assert main(["import", str(folder), "--out", str(out)]) == 0
    write_token_counts(rank_pool.load(CORPUS).Manifest.load(corpus), out / "tokenizer")
    settings = yaml.safe_load((out / "config.yaml").read_text())
    settings["run_dir"] = str(run_dir)
    settings["data"] |= {"sources": [{"name": "birds", "shards": str(corpus)}], "sequence_length": 160, "workers": 0}
    settings["data"]["geometry"] |= {"image_max_tokens": 16}
    settings |= {"schedule": {"warmup_steps": 1}, "checkpoint": {"every_steps": 2, "keep": 5}}
    settings["optimizer"] = {"lr": 1e-3, "eps": 1e-5, "groups": {"towers.image": {"lr": 1e-4}}}
    settings["train"] = {"steps": 2, "global_batch_rows": 4, "micro_batch_rows": 1, "zero_stage": 3, "device": "cpu",
                         "torch_threads": 1}  # fmt: skip
    if family == "llama":
        settings["optimizer"].pop("groups")
    (out / "config.yaml").write_text(yaml.safe_dump(settings))
    for steps, resume in ((2, False), (5, True)):
        answers = rank_pool.pool(2).run(
            TASKS, "run_spine", config=str(out / "config.yaml"), overrides=[f"train.steps={steps}"], resume=resume
        )
        assert answers == ["", ""]
    export = ["checkpoint", "export", str(run_dir), "--layout", "transformers", "--out", str(tmp_path / "exported")]
    assert main(export) == 0

    run = load_run(run_dir)
    theirs, told = type(make(family)).from_pretrained(tmp_path / "exported", output_loading_info=True)
    assert not any(told.values()), told
    begun = dict(make(family, vocab_size=320, image=(1, 2)).named_parameters())
    now = dict(theirs.named_parameters())
    moved = [name for name in now if now[name].shape == begun[name].shape and not torch.equal(now[name], begun[name])]
    assert len(moved) > 10  # it has learnt something
    packed = compare(run, theirs.eval(), packs(run, rows=4))
    assert packed["max_abs_difference"] < TOLERANCE
    assert packed["documents"] > 4
    assert (packed["pictures"] > 0) == (family != "llama")
    batch = prompt_batch([prompt(run, family)], tokenizer=run.tokenizer, geometry=run.config.data.geometry)
    shown = [(payload.values, payload.grids[0].tolist()) for payload in batch.payloads.values()]
    expected = their_logits(theirs.eval(), batch.tokens[0], shown)
    with torch.no_grad():
        computed = run.model.logits(run.to_device(batch))[0]
    assert (expected - computed).abs().max() < TOLERANCE
    assert (tmp_path / "exported" / "tokenizer.json").is_file()
    longer = np.append(batch.tokens[0], 30)
    for cache in (True, False):  # what generation computes for the next token
        grown = Continuation(run.model, batch, cache=cache)
        with torch.no_grad():
            grown.append(torch.tensor([30]))
        assert (their_logits(theirs, longer, shown)[-1] - grown.logits[0]).abs().max() < TOLERANCE


def prompt(run: Any, family: str) -> list[Any]:
    """Return a picture of the tower's own size, none for a model of text, and words."""
    if family == "llama":
        return ["a bird"]
    side = 4 * run.config.data.geometry.image_patch_px
    data = io.BytesIO()
    noise = np.random.default_rng(1).integers(0, 256, (side, side, 3)).astype(np.uint8)
    Image.fromarray(noise).save(data, "PNG")
    return [probe_media("image", data.getvalue(), name="noise"), "a bird"]
