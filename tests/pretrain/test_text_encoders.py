"""Text encoders of the late family: texts are encoded alone wherever they lie, and weights follow the seed only."""

import pytest
import torch

from triweave.pretrain.encoders.text import TEXT_ENCODERS, TextEncoderConfig
from triweave.pretrain.errors import PretrainError
from triweave.pretrain.model.config import ModelConfig
from triweave.pretrain.model.model import initialise

MODEL = ModelConfig(d_model=16, layers=1, heads=2, kv_heads=2, head_width=8, init_std=0.2)
FEATURES, WIDTH = 6, 16
LENGTHS = (5, 1, 3)


def build(kind):
    settings = TextEncoderConfig(kind=kind, width=WIDTH, layers=2, heads=2)
    encoder = TEXT_ENCODERS[kind](FEATURES, settings, MODEL)
    initialise(encoder, MODEL, 0)
    return encoder


def texts():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(length, FEATURES, generator=generator) for length in LENGTHS]


@pytest.mark.parametrize("kind", TEXT_ENCODERS)
def test_packed_texts_are_encoded_as_they_are_alone(kind):
    encoder = build(kind).double()
    made = [text.double() for text in texts()]
    packed = encoder(torch.cat(made), torch.tensor(LENGTHS))
    alone = torch.cat([encoder(text, torch.tensor([len(text)])) for text in made])
    assert packed.shape == (sum(LENGTHS), WIDTH)
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-12)
    gradient = torch.autograd.grad(packed.square().sum(), list(encoder.parameters()))
    wanted = torch.autograd.grad(alone.square().sum(), list(encoder.parameters()))
    torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", TEXT_ENCODERS)
def test_both_directions_are_read_and_no_other_text(kind):
    encoder, made = build(kind), texts()
    changed = [made[0], made[1], made[2] + torch.tensor([0.0, 1.0, 0.0]).unsqueeze(1)]
    before, after = (encoder(torch.cat(packed), torch.tensor(LENGTHS)) for packed in (made, changed))
    difference = (before - after).abs()
    assert torch.count_nonzero(difference[:6]) == 0
    assert difference[6:].amax(1).min() > 1e-4


@pytest.mark.parametrize("kind", TEXT_ENCODERS)
def test_weights_do_not_depend_on_torch_s_global_seed(kind):
    torch.manual_seed(1)
    first = build(kind)
    torch.manual_seed(2)
    second = dict(build(kind).named_parameters())
    assert all(torch.equal(parameter, second[name]) for name, parameter in first.named_parameters())


def test_an_lstm_forgets_nothing_at_first():
    biases = dict(build("lstm").named_parameters())["recurrence.bias_ih_l0"]
    assert biases.tolist() == [0.0] * 8 + [1.0] * 8 + [0.0] * 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0}, "width is 0; it must be at least 1"),
        ({"width": 36}, "heads is 4; width 36 must be a multiple"),
        ({"kind": "gru", "width": 5}, "width is 5; it must be even"),
    ],
)
def test_settings_that_cannot_work_are_refused(options, message):
    with pytest.raises(PretrainError, match=message):
        TextEncoderConfig(**options)
