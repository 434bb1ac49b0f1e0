"""Open models without transformers: what is written is read again, names and settings that do not fit are refused.

That both mean what transformers means is shown in test_open_models_transformers.py.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from triweave.data_pipeline.media.geometry import MediaGeometry
from triweave.launch.cli import main
from triweave.pretrain.batch import arrange, kernel_tables, to_device
from triweave.pretrain.config import load_config
from triweave.pretrain.errors import OpenModelError, PretrainError
from triweave.pretrain.model.config import LayoutConfig, ModelConfig, RopeScalingConfig
from triweave.pretrain.model.model import MultimodalTransformer
from triweave.pretrain.open_models.config import OpenEncoderConfig, check_open_encoders
from triweave.pretrain.open_models.export import as_transformers
from triweave.pretrain.open_models.flops import open_tower_flops
from triweave.pretrain.open_models.folder import OpenFolder
from triweave.pretrain.open_models.initial import start_from
from triweave.pretrain.open_models.settings import read_settings

VOCABULARY = 40
IMAGE = (3, 4)
"""Start and placeholder of pictures."""
CLIP = OpenEncoderConfig(kind="clip", width=16, layers=2, heads=2, ffn_width=24, patch_px=4, positions=3)
SIGLIP = dataclasses.replace(CLIP, kind="siglip", activation="gelu_tanh", norm_eps=1e-6)
QWEN = OpenEncoderConfig(
    kind="qwen2_5_vl", width=16, layers=2, heads=2, ffn_width=24, patch_px=4, activation="silu", norm_eps=1e-6,
    merge=2, frames=2, window=2, full_attention=[1],
)  # fmt: skip
WHISPER = OpenEncoderConfig(
    kind="whisper", width=16, layers=2, heads=2, ffn_width=24, activation="gelu", positions=6, merge=2, mel_bins=5
)
"""Windows of three tokens."""
PLAIN = {
    "d_model": 32, "layers": 2, "heads": 4, "kv_heads": 2, "head_width": 8, "ffn_multiple": 2.0,
    "attention": "reference", "input_norm": False, "qk_norm": False,
    "layout": LayoutConfig(positions="sequential", media_attention="causal"),
}  # fmt: skip
CASES: dict[str, ModelConfig] = {
    "llama": ModelConfig(**PLAIN),
    "llama3": ModelConfig(
        **PLAIN, rope_theta=5e5, rope_scaling=RopeScalingConfig(factor=8.0, slow=1.0, fast=4.0, positions=8192)
    ),
    "qwen2": ModelConfig(**PLAIN, qkv_bias=True, tie_embeddings=True),
    "qwen3": ModelConfig(**{**PLAIN, "qk_norm": True, "head_width": 16}),
    "llava": ModelConfig(**PLAIN, open_encoders={"image": CLIP}),
    "qwen2_5_vl": ModelConfig(
        **{**PLAIN, "layout": LayoutConfig(media_attention="causal"), "qkv_bias": True, "rope_sections": [2, 1, 1]},
        open_encoders={"image": QWEN},
    ),
}
TOWERS = {
    "clip": CASES["llava"],
    "siglip": ModelConfig(**PLAIN, open_encoders={"image": SIGLIP}),
    "qwen2_5_vl": CASES["qwen2_5_vl"],
    "whisper": ModelConfig(**PLAIN, open_encoders={"audio": WHISPER}),
    "whisper sounds alone": ModelConfig(
        **PLAIN, open_encoders={"audio": dataclasses.replace(WHISPER, whole_window=False)}
    ),
}


def payload_of(model: MultimodalTransformer) -> tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (modality, values, lengths, grids) of three items that the model's tower reads."""
    ((modality, settings),) = model.config.open_encoders.items()
    shapes = [[7, 1, 1], [3, 1, 1], [1, 1, 1]] if modality == "audio" else [[1, 3, 3], [1, 2, 5], [1, 1, 1]]
    grids = torch.tensor(shapes, dtype=torch.int32)
    lengths = grids.prod(1).int()
    shape = (int(lengths.sum()), settings.features)
    values = torch.randn(shape) if modality == "audio" else torch.randint(0, 256, shape, dtype=torch.uint8)
    return modality, values, lengths, grids


def build(config: ModelConfig, seed: int = 1) -> MultimodalTransformer:
    """Return a model in which every number is random, biases and norms too."""
    features = {name: encoder.features for name, encoder in config.open_encoders.items()}
    model = MultimodalTransformer(config, vocab_size=VOCABULARY, media_features=features, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def write(model: MultimodalTransformer, folder: Path) -> Path:
    """Write a model as a transformers folder."""
    weights, settings = as_transformers(
        model.config, dict(model.named_parameters()), vocab_size=VOCABULARY, placeholders={"image": IMAGE}
    )
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(settings))
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("family", CASES)
def test_what_is_written_is_read_again_to_the_last_bit(family, tmp_path):
    config = CASES[family]
    folder = write(build(config), tmp_path / family)
    opened = read_settings(OpenFolder(folder).config, "here")
    assert opened.family == ("llama" if family == "llama3" else family)
    assert opened.model_config(attention="reference").sections == config.sections or family != "qwen2_5_vl"
    other = build(opened.model_config(attention="reference"), seed=2)
    assert start_from(other, other.config, {"model": str(folder)}) == []
    for (name, expected), (same, parameter) in zip(
        build(config).named_parameters(), other.named_parameters(), strict=True
    ):
        assert name == same
        assert torch.equal(expected, parameter), name


def change(folder: Path, *, drop: str = "", add: str = "", **settings: object) -> None:
    weights = load_file(folder / "model.safetensors")
    weights.pop(drop, None)
    if add:
        weights[add] = torch.zeros(1)
    save_file(weights, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **settings}))


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"drop": "model.layers.1.mlp.up_proj.weight"}, r"it lacks 1 tensors: model.layers.1.mlp.up_proj"),
        ("llama", {"add": "model.layers.1.extra"}, r"the mapping has no place for 1 tensors: model.layers.1.extra"),
        ("llava", {"drop": "multi_modal_projector.linear_2.bias"}, r"it lacks 1 tensors: .*linear_2.bias"),
        ("qwen2_5_vl", {"add": "visual.blocks.2.norm1.weight"}, r"no place for 1 tensors: visual.blocks.2"),
        ("llama", {"auto_map": {"AutoModel": "model.Evil"}}, r"auto_map.*never run"),
        ("llama", {"model_type": "mamba"}, r"model_type is 'mamba'; known: llama, qwen2"),
        ("llama", {"hidden_act": "gelu"}, r"hidden_act is 'gelu'; only 'silu' is computed"),
        ("llama", {"rope_scaling": {"rope_type": "yarn"}, "rope_parameters": None}, r"rope_type is 'yarn'"),
        ("qwen2", {"use_sliding_window": True}, r"use_sliding_window is True"),
        ("llava", {"vision_feature_select_strategy": "full"}, r"vision_feature_select_strategy is 'full'"),
        ("llama", {"hidden_size": 64}, r"needs model.d_model=64, the config has 32"),
        ("llama", {"rms_norm_eps": 1e-3}, r"needs model.norm_eps=0.001, the config has 1e-06"),
    ],
)  # fmt: skip
def test_a_folder_that_does_not_fit_is_refused_by_name(family, changes, message, tmp_path):
    folder = write(build(CASES[family]), tmp_path / family)
    change(folder, **changes)
    model = build(CASES[family], seed=2)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(OpenModelError, match=message):
        start_from(model, model.config, {"model": str(folder)})
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_a_pickle_is_never_read(tmp_path):
    folder = write(build(CASES["llama"]), tmp_path / "pickled")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(OpenModelError, match=r"pytorch_model.bin is a pickle, which is never read"):
        OpenFolder(folder)


def test_siglip_has_no_layout_to_be_exported_to():
    model = build(TOWERS["siglip"])
    with pytest.raises(OpenModelError, match=r"no layout .* model.open_encoders.image.kind"):
        as_transformers(model.config, dict(model.named_parameters()), vocab_size=VOCABULARY, placeholders={})
    parts = {"vocab_size": VOCABULARY, "placeholders": {}, "leave_out": ["image"]}
    _, settings = as_transformers(model.config, dict(model.named_parameters()), **parts)
    assert settings["model_type"] == "llama"  # the decoder goes alone


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({"input_norm": True}, "input_norm"),
        ({"softcap": 3.0}, "softcap"),
        ({"qk_norm": True, "qkv_bias": True}, "qk_norm"),
    ],
)
def test_a_model_that_transformers_does_not_have_is_not_exported(changes, setting):
    model = build(ModelConfig(**{**PLAIN, **changes}))
    with pytest.raises(OpenModelError, match=rf"no layout .* model.{setting}"):
        as_transformers(model.config, dict(model.named_parameters()), vocab_size=VOCABULARY, placeholders={})


def test_a_tower_without_a_place_is_named_and_can_be_left_out():
    config = CASES["llava"]
    model = MultimodalTransformer(config, vocab_size=VOCABULARY, media_features={"image": CLIP.features, "audio": 10})
    parts = {"vocab_size": VOCABULARY, "placeholders": {"image": IMAGE}}
    with pytest.raises(OpenModelError, match=r"llava has no place for 2 parameters: towers.audio.*leave out audio"):
        as_transformers(config, dict(model.named_parameters()), **parts)
    weights, _ = as_transformers(config, dict(model.named_parameters()), **parts, leave_out=["audio"])
    assert "language_model.lm_head.weight" in weights


@pytest.mark.parametrize("kind", TOWERS)
def test_packed_items_are_as_alone_and_a_guard_gets_zero_gradients(kind, synthetic):
    model = build(TOWERS[kind])
    modality, values, lengths, grids = payload_of(model)
    tower = model.towers[modality]
    packed = tower(values, lengths, grids).split(lengths.tolist())
    for together, numbers, grid in zip(packed, values.split(lengths.tolist()), grids, strict=True):
        alone = tower(numbers, grid.prod().view(1).int(), grid.view(1, 3))
        assert (together - alone).abs().max() <= 1e-6 * max(1.0, float(alone.detach().abs().max()))
    assert tower(*tower.zero_payload(torch.device("cpu"))).isfinite().all()
    model.zero_grad()
    text = synthetic.pack([[synthetic.Document(parts=[[20, 21]])]], 8)
    tables = kernel_tables(model.config, torch.device("cpu"), torch.float32)
    model(to_device(dataclasses.replace(text, extra=tables(text)), "cpu"), frozenset({modality})).total.backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in tower.parameters())


def test_what_a_layout_does_to_positions_and_reach(synthetic):
    """Sequential positions count from each document's start; causal media see nothing after themselves."""
    picture = synthetic.Media(modality="image", grid=(1, 2, 2), values=np.zeros((4, 12), np.uint8))
    document = synthetic.Document(parts=[[20], picture, [21]])
    segment = synthetic.Document(parts=[[22], picture], alone=True)
    batch = synthetic.pack([[document, document, segment]], 40)
    changed = arrange(batch, LayoutConfig(positions="sequential", media_attention="causal"))
    size = document.length
    for first in (0, size):
        span = slice(first, first + size)
        assert (changed.positions[0, span] == np.arange(size)[:, None]).all()
        assert (changed.kv_hi[0, span] == np.arange(first, first + size) + 1).all()
    rest = slice(2 * size, None)
    assert (changed.kv_hi[0, rest] == batch.kv_hi[0, rest]).all()
    assert (changed.kv_lo == batch.kv_lo).all()
    assert arrange(batch, LayoutConfig()) is batch
    again = arrange(changed, LayoutConfig(positions="sequential", media_attention="causal"))
    assert (again.positions == changed.positions).all()
    assert (again.kv_hi == changed.kv_hi).all()


def test_a_batch_of_another_layout_is_refused(synthetic):
    batch = to_device(synthetic.pack([[synthetic.Document(parts=[[20, 21]])]], 8), "cpu")
    with pytest.raises(PretrainError, match=r"layout|Layout"):
        build(CASES["llama"]).logits(batch)


def test_windows_of_attention_are_what_they_say():
    """A picture of 4 x 4 tokens has four windows of 2 x 2; a token's state depends on its own window only."""
    inner = dataclasses.replace(QWEN, full_attention=[])
    encoder = build(ModelConfig(**{**PLAIN, "qkv_bias": True}, open_encoders={"image": inner})).towers["image"]
    grid, length = torch.tensor([[1, 4, 4]], dtype=torch.int32), torch.tensor([16], dtype=torch.int32)
    values = torch.randint(0, 256, (16, QWEN.features), dtype=torch.uint8)
    changed = values.clone()
    changed[5] = 255 - changed[5]
    moved = (encoder(values, length, grid) - encoder(changed, length, grid)).abs().amax(1)
    assert set(moved.nonzero().flatten().tolist()) == {0, 1, 4, 5}
    whole = build(CASES["qwen2_5_vl"]).towers["image"]
    assert ((whole(values, length, grid) - whole(changed, length, grid)).abs().amax(1) > 0).all()


@pytest.mark.parametrize("kind", TOWERS)
def test_flops_are_what_torch_counts(kind, monkeypatch):
    """Attention is put in as products of whole spans, which the counter sees."""
    model = build(TOWERS[kind])
    modality, values, lengths, grids = payload_of(model)

    def spans(q, k, v, kv_lo, kv_hi, **_):
        mixed = torch.zeros_like(q)
        for lo, hi in sorted({*zip(kv_lo[0].tolist(), kv_hi[0].tolist(), strict=True)}):
            own = (q[0, lo:hi].transpose(0, 1), k[0, lo:hi].transpose(0, 1), v[0, lo:hi].transpose(0, 1))
            mixed[0, lo:hi] = (torch.bmm(torch.bmm(own[0], own[1].mT).softmax(-1), own[2])).transpose(0, 1)
        return mixed, None

    monkeypatch.setattr("triweave.pretrain.open_models.vision.attention", spans)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.towers[modality](values, lengths, grids)
    expected = open_tower_flops(grids.numpy(), model.config.open_encoders[modality], model.config)
    assert counter.get_total_flops() == expected.forward


def test_wrong_squares_are_refused_before_any_rank_starts():
    with pytest.raises(PretrainError, match=r"image_patch_px is 32, but .* of image_patch_px=8"):
        check_open_encoders({"image": QWEN}, MediaGeometry())
    with pytest.raises(PretrainError, match=r"names 'smell'; known: image, audio"):
        check_open_encoders({"smell": QWEN}, MediaGeometry())
    with pytest.raises(PretrainError, match=r"audio: kind is 'qwen2_5_vl'; known: whisper"):
        check_open_encoders({"audio": QWEN}, MediaGeometry())
    with pytest.raises(PretrainError, match=r"audio_features is log_mel, but .* of audio_features=samples"):
        check_open_encoders({"audio": WHISPER}, MediaGeometry())
    samples = MediaGeometry(**{**WHISPER.geometry, "audio_frames_per_token": 8})
    with pytest.raises(PretrainError, match=r"audio_frames_per_token is 8, but .* audio_frames_per_token=4"):
        check_open_encoders({"audio": WHISPER}, samples)
    check_open_encoders({"audio": WHISPER}, MediaGeometry(**WHISPER.geometry))
    with pytest.raises(PretrainError, match=r"audio_features is samples, which only model.open_encoders.audio reads"):
        check_open_encoders({}, samples)
    with pytest.raises(PretrainError, match=r"merge is 4, which does not divide the 6 positions"):
        dataclasses.replace(WHISPER, merge=4)
    with pytest.raises(PretrainError, match=r"kind clip needs it"):
        dataclasses.replace(CLIP, positions=0)


def byte_tokenizer(path: Path, special: list[str]) -> None:
    """Write a tokenizer.json of bytes and special tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["a cat and a dog sit on a mat"] * 3, trainer)
    tokenizer.save(str(path))


def test_import_writes_a_config_that_loads_and_a_tokenizer(tmp_path, capsys):
    config = dataclasses.replace(CASES["qwen2_5_vl"], attention="auto")
    model = MultimodalTransformer(config, vocab_size=320, media_features={"image": QWEN.features})
    weights, settings = as_transformers(
        config, dict(model.named_parameters()), vocab_size=320, placeholders={"image": (1, 2)}
    )
    folder = tmp_path / "open"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings))
    save_file(weights, folder / "model.safetensors")
    byte_tokenizer(folder / "tokenizer.json", ["<|endoftext|>", "<|vision_start|>", "<|image_pad|>"])
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    out = tmp_path / "imported"
    assert main(["import", str(folder), "--out", str(out), "--modality", "audio", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    run = load_config(out / "config.yaml")
    assert run.model == config
    assert run.init_from == {"model": str(folder)}
    assert run.data.geometry.image_patch_px == QWEN.token_px
    assert told["tensors"] == len(weights)
    audio = told["media"]["audio"]
    assert told["media"]["image"] == {"start": 1, "placeholder": 2}
    assert audio["placeholder"] == audio["start"] + 1 <= 319  # rows that the vocabulary has and no text uses
    assert told["vocab_size"] == 320
    assert main(["import", str(folder), "--out", str(tmp_path / "x"), "--modality", "smell"]) == 2
    assert "smell" in capsys.readouterr().err
    assert main(["import", str(folder), "--out", str(tmp_path / "x"), "--audio", str(folder)]) == 2
    assert "model_type is 'qwen2_5_vl'; as a tower of audio are read: whisper" in capsys.readouterr().err
    assert main(["import", str(folder), "--out", str(tmp_path / "x"), "--vision", str(folder)]) == 2
    assert "a qwen2_5_vl has a tower of its own for image" in capsys.readouterr().err
    assert main(["checkpoint", "export", str(out), "--out", str(tmp_path / "x"), "--tower", "image"]) == 2
    assert "--tower goes with --layout transformers" in capsys.readouterr().err
    assert yaml.safe_load((out / "config.yaml").read_text())["data"]["tokenizer"] == str(out / "tokenizer")
