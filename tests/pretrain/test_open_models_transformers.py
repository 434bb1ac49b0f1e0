"""Open models against transformers itself, on small folders with random weights: logits equal to 1e-5 both ways.

transformers is a requirement of these tests only; nothing of ours imports it.
"""

from __future__ import annotations

import dataclasses
import io
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from triweave.data_pipeline.stream.prompt import probe_media, prompt_batch
from triweave.data_pipeline.text.token_counts import write_token_counts
from triweave.launch.cli import main
from triweave.pretrain.batch import kernel_tables, to_device
from triweave.pretrain.checkpoints.load import load_run
from triweave.pretrain.config import load_config
from triweave.pretrain.encoders.tower import Items
from triweave.pretrain.generation.continuation import Continuation
from triweave.pretrain.model.model import MultimodalTransformer
from triweave.pretrain.open_models.export import as_transformers
from triweave.pretrain.open_models.folder import OpenFolder
from triweave.pretrain.open_models.initial import start_from
from triweave.pretrain.open_models.settings import read_settings

pytestmark = pytest.mark.slow
TOLERANCE = 1e-5
TASKS = Path(__file__).with_name("checkpoint_tasks.py")
CORPUS = Path(__file__).parents[1] / "data_pipeline" / "conftest.py"
START, PLACEHOLDER, VIDEO, END = 3, 4, 91, 93
TEXT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
CLIP_PX, QWEN_PX = 7, 8
"""Pixels a side of a token of the two."""


def make(family: str, vocab_size: int = 96, image: tuple[int, int] = (START, PLACEHOLDER)) -> Any:
    """Return a model of transformers in which every number is random, biases and norms too."""
    transformers = pytest.importorskip("transformers")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    text = {**TEXT, "vocab_size": vocab_size}
    if family == "llava":
        vision = {
            "model_type": "clip_vision_model", "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3,
            "num_attention_heads": 2, "image_size": 4 * CLIP_PX, "patch_size": CLIP_PX, "projection_dim": 16,
        }  # fmt: skip
        config = transformers.LlavaConfig(
            vision_config=vision, text_config={"model_type": "llama", **text}, image_token_index=image[1]
        )
        model = transformers.LlavaForConditionalGeneration(config)
    elif family == "qwen2_5_vl":
        vision = {
            "depth": 3, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32,
            "patch_size": QWEN_PX // 2, "window_size": 2 * QWEN_PX, "fullatt_block_indexes": [1],
            "spatial_merge_size": 2, "temporal_patch_size": 2,
        }  # fmt: skip
        rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
        config = transformers.Qwen2_5_VLConfig(
            text_config={**text, "rope_parameters": rope}, vision_config=vision, image_token_id=image[1],
            video_token_id=VIDEO, vision_start_token_id=image[0], vision_end_token_id=END,
        )  # fmt: skip
        model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    else:
        name = {"llama": "Llama", "llama3": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
        scaling = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
                   "high_freq_factor": 4.0, "original_max_position_embeddings": 16}  # fmt: skip
        more = {
            "qwen2": {"tie_word_embeddings": True},
            "qwen3": {"head_dim": 16},
            "llama3": {"rope_parameters": scaling, "head_dim": 16},
        }.get(family, {})
        config = getattr(transformers, f"{name}Config")(**text, **more)
        model = getattr(transformers, f"{name}ForCausalLM")(config)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    return model.eval()


def clip_scale() -> tuple[torch.Tensor, torch.Tensor]:
    """Return transformers' own mean and deviation of CLIP's pixels, [3, 1, 1] each."""
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    return torch.tensor(OPENAI_CLIP_MEAN).view(3, 1, 1), torch.tensor(OPENAI_CLIP_STD).view(3, 1, 1)


def pixels(values: np.ndarray, grid: Sequence[int], px: int) -> torch.Tensor:
    """Return one picture [3, height, width] in CLIP's scale from payload rows."""
    _, h, w = grid
    picture = torch.from_numpy(values.copy()).view(h, w, px, px, 3).permute(4, 0, 2, 1, 3).reshape(3, h * px, w * px)
    mean, deviation = clip_scale()
    return (picture.float() / 255 - mean) / deviation


def their_logits(model: Any, ids: np.ndarray, pictures: Sequence[tuple[np.ndarray, Sequence[int]]]) -> torch.Tensor:
    """Return what transformers computes for one document."""
    tokens = torch.from_numpy(ids.copy()).long().unsqueeze(0)
    kind = model.config.model_type
    with torch.no_grad():
        if kind == "llava" and pictures:
            images = torch.stack([pixels(values, grid, CLIP_PX) for values, grid in pictures])
            return model(input_ids=tokens, pixel_values=images).logits[0]
        if kind == "qwen2_5_vl" and pictures:
            squares, grids = [], []
            for values, grid in pictures:
                picture, p = pixels(values, grid, QWEN_PX), QWEN_PX // 2
                _, h, w = grid
                cut = picture.expand(1, 2, 3, -1, -1).reshape(1, 2, 3, h, 2, p, w, 2, p)
                squares.append(cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(4 * h * w, 6 * p * p))
                grids.append([1, 2 * h, 2 * w])
            kinds = (tokens == model.config.image_token_id).int()
            return model(
                input_ids=tokens, pixel_values=torch.cat(squares), image_grid_thw=torch.tensor(grids),
                mm_token_type_ids=kinds,
            ).logits[0]  # fmt: skip
        return model(input_ids=tokens).logits[0]


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


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of bytes, with the ids 0, 1 and 2 as special tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    special = ["<|endoftext|>", "<|image_start|>", "<|image_pad|>"]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["a bird sings"], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_decoder_gets_the_vision_tower_of_another_folder(kind, tmp_path):
    """The encoder's states are those of transformers: CLIP's before its last block, SigLIP's after the last norm."""
    transformers = pytest.importorskip("transformers")
    vision = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
              "image_size": 4 * CLIP_PX, "patch_size": CLIP_PX}  # fmt: skip
    if kind == "clip":
        text = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
        whole = transformers.CLIPModel(transformers.CLIPConfig(vision_config=vision, text_config=text))
        theirs = whole.vision_model
    else:
        whole = theirs = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**vision))
    torch.manual_seed(6)
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.normal_(0, 0.2)
    whole.eval().save_pretrained(tmp_path / "tower")
    make("llama", vocab_size=320).save_pretrained(tmp_path / "llama")
    write_tokenizer(tmp_path / "llama")
    out = tmp_path / "imported"
    folders = [str(tmp_path / "llama"), "--vision", str(tmp_path / "tower"), "--out", str(out)]
    assert main(["import", *folders]) == 0
    config = load_config(out / "config.yaml")
    features = {"image": config.model.open_encoders["image"].features}
    model = MultimodalTransformer(config.model, vocab_size=320, media_features=features)
    anew = start_from(model, config.model, config.init_from)
    assert {name.rpartition(".")[0] for name in anew} == {"towers.image.up", "towers.image.down"}

    values = torch.randint(0, 256, (32, features["image"]), dtype=torch.uint8)
    tower, grid = model.towers["image"], torch.tensor([[1, 4, 4]] * 2, dtype=torch.int32)
    pictures = torch.stack([pixels(part.numpy(), (1, 4, 4), CLIP_PX) for part in values.split(16)])
    if kind == "siglip":  # from CLIP's scale to [-1, 1]
        mean, deviation = clip_scale()
        pictures = (pictures * deviation + mean - 0.5) / 0.5
    with torch.no_grad():
        found = theirs(pixel_values=pictures, output_hidden_states=True)
        expected = found.hidden_states[-2][:, 1:] if kind == "clip" else found.last_hidden_state
        states = tower.encoder(tower.normalise(values), Items.of(torch.tensor([16, 16]), grid, 32))
    assert (states - expected.flatten(0, 1)).abs().max() < TOLERANCE
    assert expected.std() > 0.05


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
