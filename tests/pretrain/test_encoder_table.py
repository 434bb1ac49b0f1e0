"""The table of encoders in pretrain/README.md is computed here: parameters and FLOPs beside the model of one_gpu.yaml.

python tests/pretrain/test_encoder_table.py prints it anew.
"""

import dataclasses
import functools
from pathlib import Path

import numpy as np
import pytest
import torch

from triweave.data_pipeline.media.modalities import MODALITIES
from triweave.pretrain.config import load_config
from triweave.pretrain.encoders.config import EncoderConfig
from triweave.pretrain.encoders.flops import tower_flops
from triweave.pretrain.encoders.registry import build_tower
from triweave.pretrain.model.flops import count_parameters

ROOT = Path(__file__).parents[2]
TOKENS = {"image": 256, "audio": 125}
"""A picture of 512 x 512 pixels, ten seconds of sound."""
TRANSFORMER = {"width": 384, "layers": 12, "heads": 6}
ROWS: dict[str, tuple[str, EncoderConfig]] = {
    "`patch`": ("image", EncoderConfig()),
    "`vit`, `merge: 2`, `pixel_shuffle`": (
        "image",
        EncoderConfig(kind="vit", **TRANSFORMER, merge=2, connector="pixel_shuffle"),
    ),
    "`vit`, `merge: 2`, `perceiver`": (
        "image",
        EncoderConfig(kind="vit", **TRANSFORMER, merge=2, connector="perceiver"),
    ),
    "`cnn`, `mlp`": ("image", EncoderConfig(kind="cnn", width=512, layers=8, connector="mlp")),
    "`patch` ": ("audio", EncoderConfig()),
    "`transformer`, `merge: 2`, `pixel_shuffle`": (
        "audio",
        EncoderConfig(kind="transformer", **TRANSFORMER, merge=2, connector="pixel_shuffle"),
    ),
    "`conv`, `mlp`": ("audio", EncoderConfig(kind="conv", width=384, layers=8, connector="mlp")),
    "`mfcc`": ("audio", EncoderConfig(kind="mfcc")),
}
"""Encoder and connector as the table names them -> modality and settings; what is not named is in the text above it."""


@functools.cache
def rows() -> list[str]:
    """Return the lines of the table."""
    config = load_config(ROOT / "launch" / "configs" / "one_gpu.yaml", [])
    model = config.model
    D, H, G, K = model.d_model, model.heads, model.kv_heads, model.head_width
    trunk = 2 * model.layers * (D * (H + 2 * G) * K + H * K * D + 3 * D * model.ffn_width)
    lines = []
    for name, (modality, settings) in ROWS.items():
        features, tokens = MODALITIES[modality].features(config.data.geometry), TOKENS[modality]
        settings.check(modality, features)
        with torch.device("meta"):
            tower = build_tower(modality, features, dataclasses.replace(model, encoders={modality: settings}))
        parameters = count_parameters(tower)["total"]
        flops = tower_flops(modality, np.array([tokens]), features, settings, model).forward
        figures = f"{parameters / 1e6:.2f} | {flops / 1e9:.2f} | {flops / tokens / trunk:.3f}"
        lines.append(f"| {modality} | {name.strip()} | {figures} |")
    return lines


@pytest.mark.parametrize("row", range(len(ROWS)))
def test_the_readme_s_table_is_what_is_counted(row):
    assert rows()[row] in (ROOT / "pretrain" / "README.md").read_text(encoding="utf-8").splitlines()


if __name__ == "__main__":
    print("\n".join(rows()))
