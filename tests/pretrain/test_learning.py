"""What a few hundred small steps must be able to learn: where in a picture, and which sound."""

import numpy as np
import pytest
import torch

from triweave.pretrain.batch import to_device
from triweave.pretrain.encoders.config import EncoderConfig
from triweave.pretrain.model.config import ModelConfig
from triweave.pretrain.model.model import MultimodalTransformer

SIDE = 3
TONES = 4
FIRST_COLUMN, FIRST_TONE = 30, 40


def where_is_the_bright_patch(generator, synthetic):
    """A picture with one bright patch, captioned with its column, the axis blocks of rotary pairs do not resolve."""
    row, column = generator.integers(0, SIDE, 2)
    values = generator.integers(0, 40, (SIDE * SIDE, 12)).astype(np.uint8)
    values[row * SIDE + column] = 230
    picture = synthetic.Media(modality="image", grid=(1, SIDE, SIDE), values=values)
    return synthetic.Document(parts=[picture, [FIRST_COLUMN + int(column)]])


def which_tone(generator, synthetic):
    """A sound whose energy lies in one band, captioned with the band."""
    tone = int(generator.integers(0, TONES))
    values = generator.normal(-9, 2, (3, 10)).astype(np.float32)
    values[:, 2 * tone : 2 * tone + 2] += 8
    sound = synthetic.Media(modality="audio", grid=(3, 1, 1), values=values)
    return synthetic.Document(parts=[sound, [FIRST_TONE + tone]])


ATTENTION = {"width": 32, "layers": 1, "heads": 2, "merge": 2}
FRAMES = {"mel_bins": 5}
ENCODERS = {
    "image": {},
    "vit": {"kind": "vit", **ATTENTION, "connector": "pixel_shuffle"},
    "vit-perceiver": {"kind": "vit", **ATTENTION, "connector": "perceiver", "connector_layers": 1},
    "cnn": {"kind": "cnn", "width": 32, "layers": 1},
    "audio": {},
    "transformer": {"kind": "transformer", **ATTENTION, **FRAMES, "connector": "pixel_shuffle"},
    "conv": {"kind": "conv", "width": 32, "layers": 2, **FRAMES},
    "mfcc": {"kind": "mfcc", **FRAMES, "coefficients": 5},
}
"""Options of the encoder of the one medium there is; the linear patches run always, the others are slow."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if not ENCODERS[n] else pytest.mark.slow) for n in ENCODERS])
def test_tokens_that_a_medium_determines_are_learned(synthetic, name):
    settings = EncoderConfig(**ENCODERS[name])
    if name in ("image", "vit", "vit-perceiver", "cnn"):
        modality, make, steps, first, count = "image", where_is_the_bright_patch, 120, FIRST_COLUMN, SIDE
    else:
        modality, make, steps, first, count = "audio", which_tone, 60, FIRST_TONE, TONES
    generator = np.random.default_rng(0)
    config = ModelConfig(d_model=64, layers=1, heads=4, kv_heads=2, head_width=32, encoders={modality: settings})
    model = MultimodalTransformer(config, vocab_size=synthetic.VOCAB_SIZE, media_features=synthetic.FEATURES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))

    def sample(documents):
        made = [make(generator, synthetic) for _ in range(documents)]
        return synthetic.pack([made], sum(document.length for document in made))

    for step in range(steps):
        batch = sample(32)
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / steps)
        (model(to_device(batch, "cpu")).total / batch.supervised_tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    fresh = sample(32)
    with torch.no_grad():
        logits = model.logits(to_device(fresh, "cpu")).flatten(0, 1)[torch.from_numpy(fresh.row_index)]
    losses = torch.nn.functional.cross_entropy(logits, torch.from_numpy(fresh.targets), reduction="none").numpy()
    chosen = (fresh.targets >= first) & (fresh.targets < first + count)
    assert losses[chosen].mean() < 0.2 * np.log(count)
