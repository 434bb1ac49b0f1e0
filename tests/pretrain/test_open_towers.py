"""Towers from folders of their own (CLIP, SigLIP, Whisper) against transformers: states equal to 1e-5 both ways."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import yaml
from open_folders import CLIP_PX, TOLERANCE, clip_scale, encoder_of, make, make_tower, pixels, write_tokenizer
from safetensors.torch import load_file, save_file

from triweave.data_pipeline.media.geometry import MediaGeometry
from triweave.data_pipeline.media.modalities import MODALITIES
from triweave.data_pipeline.text.token_counts import write_token_counts
from triweave.data_pipeline.text.tokenizer import Tokenizer
from triweave.launch.cli import main
from triweave.pretrain.checkpoints.load import LoadedRun, load_run
from triweave.pretrain.config import load_config
from triweave.pretrain.encoders.tower import Items
from triweave.pretrain.errors import OpenModelError
from triweave.pretrain.model.model import MultimodalTransformer
from triweave.pretrain.open_models.export_tower import export_tower
from triweave.pretrain.open_models.initial import start_from
from triweave.pretrain.open_models.whisper_mel import whisper_log_mel

pytestmark = pytest.mark.slow
TASKS = Path(__file__).with_name("checkpoint_tasks.py")
CORPUS = Path(__file__).parents[1] / "data_pipeline" / "conftest.py"
MODALITY = {"clip": "image", "siglip": "image", "whisper": "audio"}
OPTION = {"image": "--vision", "audio": "--audio"}
RATE_HZ = 16_000


def imported(kind: str, folder: Path, family: str = "llama") -> Path:
    """Import a decoder with a tower of `kind`, both new; return the folder with its config."""
    make_tower(kind)[0].save_pretrained(folder / "tower")
    (folder / "tower" / "preprocessor_config.json").write_text("{}")
    make(family, vocab_size=320, image=(1, 2)).save_pretrained(folder / "decoder")
    write_tokenizer(folder / "decoder")
    option = OPTION[MODALITY[kind]]
    out = ["--out", str(folder / "imported")]
    assert main(["import", str(folder / "decoder"), option, str(folder / "tower"), *out]) == 0
    return folder / "imported"


def build(out: Path) -> tuple[MultimodalTransformer, list[str]]:
    """Return the model of an imported config and the parameters that start anew."""
    config = load_config(out / "config.yaml")
    features = {name: encoder.features for name, encoder in config.model.open_encoders.items()}
    model = MultimodalTransformer(config.model, vocab_size=320, media_features=features)
    return model, start_from(model, config.model, config.init_from)


def sounds() -> list[np.ndarray]:
    """Return clips of a bit less than a window, two windows and a bit, one token, and just a window; float32."""
    generator = np.random.default_rng(2)
    waves = []
    for samples in (15_900, 35_000, 300, 16_000):
        time = np.arange(samples) / RATE_HZ
        wave = 0.3 * np.sin(2 * np.pi * 300 * time * (1 + time)) + 0.05 * generator.standard_normal(samples)
        waves.append(wave.astype(np.float32))
    return waves


def whisper_payload(geometry: MediaGeometry) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (values, lengths, grids) of the sounds, decoded as the loader does."""
    audio, rows, grids = MODALITIES["audio"], [], []
    for wave in sounds():
        data = io.BytesIO()
        soundfile.write(data, wave, RATE_HZ, format="WAV", subtype="FLOAT")
        info, _, _ = audio.probe(data.getvalue())
        grids.append(audio.grid(info, geometry))
        rows.append(audio.decode(data.getvalue(), info, geometry))
        assert rows[-1].shape == (grids[-1][0], audio.features(geometry))
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int32)
    return torch.from_numpy(np.concatenate(rows)), lengths, torch.tensor(grids, dtype=torch.int32)


def whisper_states(theirs: Any, merge: int) -> torch.Tensor:
    """Return transformers' states of the sounds: its own features of every window, its encoder, tokens side by side."""
    from transformers import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor(feature_size=80, chunk_length=1)
    states = []
    for wave in sounds():
        for first in range(0, len(wave), RATE_HZ):
            part = wave[first : first + RATE_HZ]
            features = extractor(part, sampling_rate=RATE_HZ, return_tensors="pt").input_features
            found = theirs(features).last_hidden_state.reshape(-1, merge * theirs.config.d_model)
            states.append(found[: -(-len(part) // (320 * merge))])
    return torch.cat(states)


def states_of(kind: str, tower: Any, theirs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (ours, theirs), the states of the same items; CLIP's before its last block, the others' after the norm."""
    with torch.no_grad():
        if kind == "whisper":
            settings = tower.encoder.settings
            values, lengths, grids = whisper_payload(MediaGeometry(**settings.geometry))
            computed = tower.encoder(values, Items.of(lengths, grids, len(values)))
            return computed, whisper_states(theirs, settings.merge)
        values = torch.randint(0, 256, (32, tower.features), dtype=torch.uint8, generator=torch.Generator())
        pictures = torch.stack([pixels(part.numpy(), (1, 4, 4), CLIP_PX) for part in values.split(16)])
        if kind == "siglip":  # from CLIP's scale to [-1, 1]
            mean, deviation = clip_scale()
            pictures = (pictures * deviation + mean - 0.5) / 0.5
        found = theirs(pixel_values=pictures, output_hidden_states=True)
        expected = found.hidden_states[-2][:, 1:] if kind == "clip" else found.last_hidden_state
        grid = torch.tensor([[1, 4, 4]] * 2, dtype=torch.int32)
        computed = tower.encoder(tower.normalise(values), Items.of(torch.tensor([16, 16]), grid, 32))
        return computed, expected.flatten(0, 1)


@pytest.mark.parametrize("kind", MODALITY)
def test_a_decoder_gets_the_tower_of_another_folder_and_gives_it_back(kind, tmp_path):
    """Imported, its states are those of transformers; moved and exported, transformers computes the moved ones."""
    out, modality = imported(kind, tmp_path), MODALITY[kind]
    model, anew = build(out)
    assert {name.rpartition(".")[0] for name in anew} == {f"towers.{modality}.up", f"towers.{modality}.down"}
    computed, expected = states_of(kind, model.towers[modality], make_tower(kind)[1])
    assert computed.shape == expected.shape
    assert (computed - expected).abs().max() < TOLERANCE
    assert expected.std() > 0.05

    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.towers[modality].parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    run = LoadedRun(
        config=load_config(out / "config.yaml"), model=model.eval(), tokenizer=Tokenizer.load(out / "tokenizer"),
        step=1, run_dir=tmp_path,
    )  # fmt: skip
    (tmp_path / "back").mkdir()
    written = export_tower(run, modality, tmp_path / "back")
    theirs, _ = make_tower(kind)
    back, told = type(theirs).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(told.values()), told
    moved, expected = states_of(kind, model.towers[modality], encoder_of(back.eval()))
    assert (moved - expected).abs().max() < TOLERANCE
    assert (moved - computed).abs().max() > 0.1
    before, after = load_file(tmp_path / "tower" / "model.safetensors"), load_file(tmp_path / "back/model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert set(before) == set(after)
    assert len(changed) == written["trained"] < len(before) == written["tensors"]
    assert not any(name.startswith(("model.decoder", "text_model", "head")) for name in changed)
    assert (tmp_path / "back" / "preprocessor_config.json").is_file()


@pytest.mark.parametrize("bins", [80, 128])
def test_the_log_mel_is_that_of_whispers_feature_extractor(bins):
    transformers = pytest.importorskip("transformers")
    extractor = transformers.WhisperFeatureExtractor(feature_size=bins, chunk_length=3)
    wave = sounds()[1]
    expected = extractor(wave, sampling_rate=RATE_HZ, return_tensors="pt").input_features
    samples = torch.zeros(1, 3 * RATE_HZ)
    samples[0, : len(wave)] = torch.from_numpy(wave)
    computed = whisper_log_mel(samples, bins)
    assert computed.shape == (1, bins, 300) == expected.shape
    assert (computed - expected).abs().max() < 1e-6
    assert expected.std() > 0.2


def test_a_whisper_with_learnt_positions_is_refused(tmp_path):
    imported("whisper", tmp_path)
    weights = load_file(tmp_path / "tower" / "model.safetensors")
    weights["model.encoder.embed_positions.weight"] += 0.1
    save_file(weights, tmp_path / "tower" / "model.safetensors", {"format": "pt"})
    with pytest.raises(OpenModelError, match=r"model.encoder.embed_positions.weight are not the sinusoids of Whisper"):
        build(tmp_path / "imported")


def test_a_whisper_is_trained_under_zero_3_and_goes_back(rank_pool, tmp_path, capsys):
    """Three steps on two ranks with pictures of a LLaVA and sounds of a Whisper; both folders load in transformers."""
    out, made = imported("whisper", tmp_path, "llava"), rank_pool.load(CORPUS)
    records = made.write_records(tmp_path / "birds.jsonl", 18)
    made.build(made.ManifestSource(root=records), tmp_path / "birds", made.BuildOptions(shard_size_bytes=100_000))
    write_token_counts(made.Manifest.load(tmp_path / "birds"), out / "tokenizer")
    settings = yaml.safe_load((out / "config.yaml").read_text())
    settings["run_dir"] = str(tmp_path / "run")
    settings["data"] |= {"sources": [{"name": "birds", "shards": str(tmp_path / "birds")}], "sequence_length": 160,
                         "workers": 0}  # fmt: skip
    settings["data"]["geometry"] |= {"image_max_tokens": 16}
    settings |= {"schedule": {"warmup_steps": 1}, "optimizer": {"lr": 1e-3, "eps": 1e-5}}
    settings["train"] = {"steps": 3, "global_batch_rows": 4, "micro_batch_rows": 1, "zero_stage": 3, "device": "cpu",
                         "torch_threads": 1}  # fmt: skip
    (out / "config.yaml").write_text(yaml.safe_dump(settings))
    arguments = {"config": str(out / "config.yaml"), "overrides": [], "resume": False}
    assert rank_pool.pool(2).run(TASKS, "run_spine", **arguments) == ["", ""]
    export = ["checkpoint", "export", str(tmp_path / "run"), "--layout", "transformers", "--out"]
    assert main([*export, str(tmp_path / "llava")]) == 2
    assert "leave out audio (--leave-out)" in capsys.readouterr().err
    assert main([*export, str(tmp_path / "llava"), "--leave-out", "audio"]) == 0
    assert main([*export, str(tmp_path / "whisper"), "--tower", "audio", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["model_type"] == "whisper"
    whole, begun = make_tower("whisper")
    theirs = type(whole).from_pretrained(tmp_path / "whisper").eval()
    tower = load_run(tmp_path / "run").model.towers["audio"]
    computed, expected = states_of("whisper", tower, encoder_of(theirs))
    assert (computed - expected).abs().max() < TOLERANCE
    assert (expected - states_of("whisper", tower, begun)[1]).abs().max() > 1e-3  # it has learnt something
    assert main([*export, str(tmp_path / "x"), "--tower", "image"]) == 2
    assert "init_from.image of the run names no folder" in capsys.readouterr().err
