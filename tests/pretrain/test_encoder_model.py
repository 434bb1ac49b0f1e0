"""Encoders inside the model: guards, tables from the loader's worker, recomputation and initial weights."""

import dataclasses
import pickle

import numpy as np
import pytest
import torch

from triweave.pretrain.batch import ENCODER_TILES, kernel_tables, to_device
from triweave.pretrain.encoders.config import EncoderConfig
from triweave.pretrain.engine.participation import gradient_parameters
from triweave.pretrain.model.config import ModelConfig
from triweave.pretrain.model.model import MultimodalTransformer

FEATURES = {"image": 48, "audio": 12}
"""4 x 4 pixels, and 4 frames of 3 mel bands."""
TRANSFORMER = {"width": 16, "layers": 2, "heads": 2}
ENCODERS = {
    "patch": ({"connector": "mlp"}, {"connector": "mlp"}),
    "attention": (
        {"kind": "vit", **TRANSFORMER, "merge": 2, "connector": "pixel_shuffle"},
        {"kind": "transformer", **TRANSFORMER, "mel_bins": 3, "connector": "mlp"},
    ),
    "convolution": (
        {"kind": "cnn", "width": 16, "layers": 2, "merge": 2, "connector": "pixel_shuffle"},
        {"kind": "conv", "width": 16, "layers": 3, "mel_bins": 3},
    ),
    "perceiver": (
        {"kind": "vit", **TRANSFORMER, "merge": 2, "connector": "perceiver"},
        {"kind": "transformer", **TRANSFORMER, "mel_bins": 3, "merge": 4, "connector": "perceiver"},
    ),
    "mfcc": ({}, {"kind": "mfcc", "mel_bins": 3, "coefficients": 2}),
}
"""Name -> options of the image's and of the audio's encoder."""


def config_of(name, **options):
    image, audio = (EncoderConfig(**chosen) for chosen in ENCODERS[name])
    sizes = {"d_model": 32, "layers": 1, "heads": 2, "kv_heads": 2, "head_width": 16}
    return ModelConfig(**(sizes | options), encoders={"image": image, "audio": audio})


@pytest.fixture
def build(synthetic):
    def build(config):
        return MultimodalTransformer(config, vocab_size=synthetic.VOCAB_SIZE, media_features=FEATURES, seed=1)

    return build


def gradients(model, batch, guards=frozenset()):
    model.zero_grad(set_to_none=True)
    sums = model(to_device(batch, "cpu"), guards)
    sums.total.backward()
    return sums, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", ENCODERS)
def test_a_guarded_tower_gets_gradients_of_exactly_0(build, make_batch, name):
    """All its parameters take part, and even an infinite gradient in the trunk does not reach them."""
    model = build(config_of(name))
    batch = make_batch([("image",)], features=FEATURES)
    plain, _ = gradients(model, batch)
    model.decoder.register_forward_pre_hook(
        lambda _, arguments: arguments[0].register_hook(lambda gradient: gradient * torch.inf) and None
    )
    guarded, found = gradients(model, batch, frozenset({"audio"}))
    assert torch.equal(guarded.total, plain.total)
    for parameter, gradient in found.items():
        if parameter.startswith("towers.audio."):
            assert gradient is not None, parameter
            assert torch.count_nonzero(gradient) == 0, parameter
    reached = gradient_parameters(model(to_device(batch, "cpu"), frozenset({"audio"})).total)
    assert {id(parameter) for parameter in model.towers.parameters()} <= reached


@pytest.mark.parametrize("name", ["attention", "perceiver"])
def test_tables_made_in_a_worker_change_no_bit(build, make_batch, name):
    config = config_of(name)
    model, batch = build(config), make_batch(features=FEATURES)
    maker = pickle.loads(pickle.dumps(kernel_tables(config, torch.device("cpu"), torch.float32)))
    ready = dataclasses.replace(batch, extra=maker(batch))
    readers = {"encoder"} | ({"perceiver"} if name == "perceiver" else set())
    assert {modality: set(made) for modality, made in ready.extra[ENCODER_TILES].items()} == {
        "image": readers,
        "audio": readers,
    }
    (with_tables, found), (without, wanted) = gradients(model, ready), gradients(model, batch)
    assert torch.equal(with_tables.total, without.total)
    assert all(torch.equal(found[parameter], wanted[parameter]) for parameter in wanted)


def test_the_tables_are_read(build, make_batch):
    """Tables of other items are wrong tables: a tower that ignored them would not notice."""
    config = config_of("attention")
    model, batch = build(config), make_batch(features=FEATURES)
    extra = kernel_tables(config, torch.device("cpu"), torch.float32)(batch)
    extra[ENCODER_TILES]["image"]["encoder"]["segments"] = extra[ENCODER_TILES]["image"]["encoder"]["segments"][:-1]
    with torch.no_grad():
        cut = model(to_device(dataclasses.replace(batch, extra=extra), "cpu")).total
        assert cut != model(to_device(batch, "cpu")).total


def test_activation_checkpointing_changes_no_bit(build, make_batch):
    batch = make_batch(features=FEATURES)
    sums, found = gradients(build(config_of("attention")), batch)
    recomputed, again = gradients(build(config_of("attention", activation_checkpointing=True)), batch)
    assert torch.equal(recomputed.total, sums.total)
    assert all(torch.equal(again[name], found[name]) for name in found)


def test_what_writes_to_an_encoder_s_residual_stream_is_scaled_by_its_own_depth(build):
    """The trunk has one block, the encoders two and the connector of images two."""
    parameters = dict(build(config_of("perceiver")).named_parameters())
    down = "feed_forward.down.weight"
    for name, depth in (
        (f"decoder.blocks.0.{down}", 1),
        (f"towers.image.encoder.blocks.0.{down}", 2),
        (f"towers.image.connector.layers.0.{down}", 2),
    ):
        assert float(parameters[name].detach().std()) == pytest.approx(0.02 / np.sqrt(2 * depth), rel=0.1), name


@pytest.mark.parametrize("name", ENCODERS)
def test_packed_documents_have_the_losses_they_have_alone(build, synthetic, name):
    model = build(config_of(name))
    rows = synthetic.make_rows([("image", "audio"), ("audio", "image")], length=96, seed=3, features=FEATURES)
    documents = [document for row in rows for document in row]
    with torch.no_grad():
        packed = model(to_device(synthetic.pack(rows, 96), "cpu")).total
        alone = sum(model(to_device(synthetic.alone(document), "cpu")).total for document in documents)
    torch.testing.assert_close(packed, alone, rtol=1e-6, atol=0)
