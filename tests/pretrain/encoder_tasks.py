"""The engine's tasks with encoders in the model: a copy of engine_tasks for each, run inside rank processes."""

from __future__ import annotations

import dataclasses
import functools
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from siblings import load_path

from triweave.data_pipeline.config import DataConfig
from triweave.data_pipeline.media.geometry import MediaGeometry
from triweave.pretrain.encoders.config import EncoderConfig

FEATURES = {"image": 48, "audio": 12}
"""4 x 4 pixels, and 4 frames of 3 mel bands."""
TRANSFORMER = {"width": 16, "layers": 1, "heads": 2}
ENCODERS = {
    "attention": (
        {"kind": "vit", **TRANSFORMER, "merge": 2, "connector": "pixel_shuffle"},
        {"kind": "transformer", **TRANSFORMER, "mel_bins": 3, "connector": "mlp"},
    ),
    "convolution": (
        {"kind": "cnn", "width": 16, "layers": 2, "merge": 2, "connector": "pixel_shuffle"},
        {"kind": "conv", "width": 16, "layers": 3, "mel_bins": 3},
    ),
    "perceiver": (
        {"kind": "vit", **TRANSFORMER, "merge": 2, "connector": "perceiver", "connector_layers": 1},
        {"kind": "transformer", **TRANSFORMER, "mel_bins": 3, "merge": 4, "connector": "perceiver"},
    ),
    "mfcc": ({"connector": "mlp"}, {"kind": "mfcc", "mel_bins": 3, "coefficients": 2}),
}
"""Name -> options of the image's and of the audio's encoder."""


def engine(encoder: str) -> ModuleType:
    """Return the module engine_tasks with the model of an encoder."""
    name = f"triweave_test_engine_tasks_{encoder}"
    if name not in sys.modules:
        module = load_path(Path(__file__).with_name("engine_tasks.py"), name)
        image, audio = (EncoderConfig(**options) for options in ENCODERS[encoder])
        geometry = MediaGeometry(image_patch_px=4, audio_mel_bins=3, audio_frames_per_token=4)
        module.DataConfig = functools.partial(DataConfig, geometry=geometry)  # type: ignore[attr-defined]
        module.FEATURES = FEATURES  # type: ignore[attr-defined]
        module.MODEL = dataclasses.replace(module.MODEL, encoders={"image": image, "audio": audio})  # type: ignore[attr-defined]
    return sys.modules[name]


def train_case(world: Any, *, encoder: str, **options: Any) -> dict[str, Any]:
    """Train a few steps with an encoder; arguments and answer as in engine_tasks."""
    answer: dict[str, Any] = engine(encoder).train_case(world, **options)
    return answer
