"""Encoders and connectors: packed items are encoded as they are alone, by the formulas; what cannot work is refused."""

import dataclasses

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from triweave.data_pipeline.media.geometry import MediaGeometry
from triweave.data_pipeline.media.mel import log_mel_tokens
from triweave.pretrain.encoders.config import ENCODER_KINDS, EncoderConfig, check_encoders
from triweave.pretrain.encoders.convolution import FrameConvolution, ImageConvolution, shelves
from triweave.pretrain.encoders.flops import tower_flops
from triweave.pretrain.encoders.mfcc import CepstralEmbedder, cosines
from triweave.pretrain.encoders.patch import ImagePatchEmbedder, LogMelEmbedder
from triweave.pretrain.encoders.registry import ENCODERS, build_tower
from triweave.pretrain.encoders.tower import Items
from triweave.pretrain.encoders.transformer import VisionTransformer
from triweave.pretrain.errors import PretrainError
from triweave.pretrain.model.config import ModelConfig
from triweave.pretrain.model.model import initialise

SIDE_PX, BINS, FRAMES = 16, 5, 8
FEATURES = {"image": SIDE_PX**2 * 3, "audio": FRAMES * BINS}
GRIDS = {"image": [(1, 2, 3), (1, 1, 1), (1, 3, 2), (1, 2, 3)], "audio": [(4, 1, 1), (1, 1, 1), (3, 1, 1)]}
SIZES = {"width": 32, "layers": 2, "heads": 2}
CONVOLUTION = {"width": 32, "layers": 5}
MEL = {"mel_bins": BINS}
TOWERS = {
    "image-patch": {},
    "image-patch-mlp": {"connector": "mlp", "connector_width": 24},
    "image-vit": {"kind": "vit", **SIZES},
    "image-vit-shuffle": {"kind": "vit", **SIZES, "merge": 2, "connector": "pixel_shuffle", "connector_width": 24},
    "image-vit-perceiver": {"kind": "vit", **SIZES, "merge": 2, "connector": "perceiver"},
    "image-cnn": {"kind": "cnn", **CONVOLUTION},
    "image-cnn-shuffle": {"kind": "cnn", **CONVOLUTION, "merge": 2, "connector": "pixel_shuffle"},
    "audio-patch": {},
    "audio-transformer": {"kind": "transformer", **SIZES, **MEL, "connector": "mlp"},
    "audio-transformer-shuffle": {"kind": "transformer", **SIZES, **MEL, "merge": 4, "connector": "pixel_shuffle"},
    "audio-conv": {"kind": "conv", **CONVOLUTION, **MEL},
    "audio-conv-perceiver": {"kind": "conv", **CONVOLUTION, **MEL, "merge": 2, "connector": "perceiver", "heads": 2},
    "audio-mfcc": {"kind": "mfcc", **MEL, "coefficients": 4},
}
"""`modality-kind[-connector]` -> options of its encoder."""
MODEL = ModelConfig(d_model=16, layers=1, heads=2, kv_heads=2, head_width=8, init_std=0.2)
WITHIN_ITEMS = [name for name in TOWERS if "patch" not in name]
"""Those in which tokens of one item see each other; MFCC by the slopes over five frames."""


def tower_of(name):
    modality = name.split("-")[0]
    config = dataclasses.replace(MODEL, encoders={modality: EncoderConfig(**TOWERS[name])})
    tower = build_tower(modality, FEATURES[modality], config)
    initialise(torch.nn.ModuleDict({"towers": torch.nn.ModuleDict({modality: tower})}), config, seed=0)
    return tower


def items_of(modality):
    generator = np.random.default_rng(0)
    items = []
    for grid in GRIDS[modality]:
        shape = (int(np.prod(grid)), FEATURES[modality])
        high = generator.integers(0, 256, shape).astype(np.uint8)
        items.append(high if modality == "image" else generator.normal(-6, 4, shape).astype(np.float32))
    return items


def embed(tower, items, grids):
    lengths = torch.tensor([len(item) for item in items], dtype=torch.int32)
    return tower(torch.from_numpy(np.concatenate(items)), lengths, torch.tensor(grids, dtype=torch.int32))


def gradients_of(tower, items, grids):
    tower.zero_grad(set_to_none=True)
    embedded = embed(tower, items, grids)
    weight = torch.from_numpy(np.random.default_rng(1).normal(size=embedded.shape[1])).to(embedded.dtype)
    (embedded @ weight).square().sum().backward()
    return {name: parameter.grad for name, parameter in tower.named_parameters()}


@pytest.mark.parametrize("name", TOWERS)
def test_packed_items_are_encoded_as_they_are_alone(name):
    """Outputs to 1e-6 in fp32; gradients, whose sums over pixels cancel, in fp64."""
    tower, modality = tower_of(name), name.split("-")[0]
    items, grids = items_of(modality), GRIDS[modality]
    with torch.no_grad():
        packed = embed(tower, items, grids)
        wanted = torch.cat([embed(tower, [item], [grid]) for item, grid in zip(items, grids, strict=True)])
    torch.testing.assert_close(packed, wanted, rtol=0, atol=1e-6 * max(1.0, float(wanted.abs().max())))
    tower.double()
    packed_gradients = gradients_of(tower, items, grids)
    alone = [gradients_of(tower, [item], [grid]) for item, grid in zip(items, grids, strict=True)]
    for parameter, gradient in packed_gradients.items():
        added = sum(gradients[parameter] for gradients in alone)
        torch.testing.assert_close(gradient, added, rtol=0, atol=1e-10 * float(added.abs().max()), msg=parameter)
        assert torch.count_nonzero(gradient), parameter


@pytest.mark.parametrize("name", TOWERS)
def test_changing_one_item_leaves_the_others_bit_identical(name):
    tower, modality = tower_of(name), name.split("-")[0]
    items, grids = items_of(modality), GRIDS[modality]
    changed = [items[0][::-1] // 2 + 1, *items[1:]]
    difference = (embed(tower, items, grids) - embed(tower, changed, grids)).abs().amax(1)
    assert difference[: len(items[0])].min() > 1e-4
    assert torch.count_nonzero(difference[len(items[0]) :]) == 0


@pytest.mark.parametrize("name", WITHIN_ITEMS)
def test_tokens_see_their_own_item(name):
    """The last token of an item is changed, and the one before it notices."""
    tower, modality = tower_of(name), name.split("-")[0]
    (item, *_), (grid, *_) = items_of(modality), GRIDS[modality]
    changed = item.copy()
    changed[-1] = changed[-1] // 2 + 3
    difference = (embed(tower, [item], [grid]) - embed(tower, [changed], [grid])).abs().amax(1)
    assert difference[-2:].min() > 1e-5


@pytest.mark.parametrize("name", TOWERS)
def test_what_shows_one_token_says_so(name):
    """Masked media rely on it: a token's vector then does not change with its neighbours."""
    assert EncoderConfig(**TOWERS[name]).shows_one_token == (name not in WITHIN_ITEMS)


@pytest.mark.parametrize("name", [name for name in WITHIN_ITEMS if name.startswith("image")])
def test_where_tokens_stand_in_their_picture_matters(name):
    tower = tower_of(name)
    (item, *_) = items_of("image")
    upright, turned = embed(tower, [item], [(1, 2, 3)]), embed(tower, [item], [(1, 3, 2)])
    assert (upright - turned).abs().amax(1)[1:].min() > 1e-5


@pytest.mark.parametrize("name", TOWERS)
def test_the_guard_payload_is_one_token_of_zeros_with_finite_gradients(name):
    tower = tower_of(name)
    values, lengths, grids = tower.zero_payload(torch.device("cpu"))
    assert values.dtype == (torch.uint8 if name.startswith("image") else torch.float32)
    assert torch.count_nonzero(values) == 0
    assert (lengths.tolist(), grids.tolist()) == ([1], [[1, 1, 1]])
    embedded = tower(values, lengths, grids)
    assert embedded.shape == (1, 16)
    embedded.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in tower.parameters())


def picture_of(item, grid):
    """Return the picture [3, height, width] of an item's squares, normalised."""
    _, high, wide = grid
    picture = torch.empty(3, high * SIDE_PX, wide * SIDE_PX)
    for number, square in enumerate(item):
        row, column = divmod(number, wide)
        pixels = torch.from_numpy(square.reshape(SIDE_PX, SIDE_PX, 3).transpose(2, 0, 1).astype(np.float32))
        picture[:, row * SIDE_PX : (row + 1) * SIDE_PX, column * SIDE_PX : (column + 1) * SIDE_PX] = pixels
    return (picture - 127.5) / 127.5


def token_major(mapped, merge):
    """Return positions [tokens merge^2, C] of a map [C, rows merge, columns merge], a token's in raster order."""
    _, rows, columns = mapped.shape
    found = []
    for row in range(0, rows, merge):
        for column in range(0, columns, merge):
            found += [mapped[:, row + y, column + x] for y in range(merge) for x in range(merge)]
    return torch.stack(found)


def test_vit_patches_are_the_squares_of_the_picture():
    tower: VisionTransformer = tower_of("image-vit-shuffle")
    (item, *_), (grid, *_) = items_of("image"), GRIDS["image"]
    found = tower.patches(tower.normalise(torch.from_numpy(item)))
    half = SIDE_PX // 2
    unfolded = functional.unfold(picture_of(item, grid).unsqueeze(0), half, stride=half)[0]
    pixels = unfolded.view(3, half, half, -1).permute(1, 2, 0, 3).flatten(0, 2)
    wanted = token_major(pixels.unflatten(1, (grid[1] * 2, grid[2] * 2)), 2)
    assert torch.equal(found, wanted)


def test_vit_places_are_rows_and_columns_of_the_whole_picture():
    tower = tower_of("image-vit-shuffle")
    items = Items.of(torch.tensor([6, 1]), torch.tensor([[1, 2, 3], [1, 1, 1]]), 7)
    rows, columns = torch.meshgrid(torch.arange(4), torch.arange(6), indexing="ij")
    wanted = token_major(torch.stack([torch.zeros(4, 6), rows, columns]), 2).long()
    places = tower.places(items)[0]
    assert torch.equal(places[:24], wanted)
    assert places[24:].tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]]


def plain_network(network, x):
    """Return what a residual network makes of one picture, without canvas or mask."""

    def ready(norm, x):
        return functional.relu(x * norm.weight.view(-1, 1, 1) * (x.square().mean(1, keepdim=True) + norm.eps).rsqrt())

    x = network.stem(x)
    for block in network.blocks:
        shown = ready(block.first_norm, x)
        kept = block.shortcut(shown) if block.shortcut else x
        x = kept + block.second(ready(block.second_norm, block.first(shown)))
    return ready(network.final_norm, x)


@hypothesis.given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=12))
@hypothesis.settings(deadline=None, max_examples=50)
def test_pictures_on_a_canvas_do_not_touch(sizes):
    rows, columns, corners = shelves(sizes)
    taken = np.zeros((rows + 1, columns + 1), int)
    for (high, wide), (top, left) in zip(sizes, corners, strict=True):
        assert top + high <= rows
        assert left + wide <= columns
        taken[top : top + high + 1, left : left + wide + 1] += 1  # with the gap below and at the right
    assert taken.max() == 1


@pytest.mark.parametrize(("most_tokens", "bound"), [(256, 1.6), (4, 3.0)])
def test_a_canvas_is_not_much_larger_than_its_pictures(most_tokens, bound):
    """32 pictures of random shapes, of more than a quarter of the most tokens; what README.md says."""
    generator = np.random.default_rng(0)
    sizes = []
    for _ in range(32):
        tokens = int(generator.integers(most_tokens // 4 + 1, most_tokens + 1))
        high = max(1, int((tokens / np.exp(generator.normal(0, 0.4))) ** 0.5))
        sizes.append((high, max(1, tokens // high)))
    rows, columns, _ = shelves(sizes)
    assert rows * columns < bound * sum(high * wide for high, wide in sizes)


@pytest.mark.parametrize("name", ["image-cnn", "image-cnn-shuffle"])
def test_cnn_is_its_network_over_the_whole_picture(name):
    tower: ImageConvolution = tower_of(name)
    items, grids = items_of("image"), GRIDS["image"]
    lengths = torch.tensor([len(item) for item in items])
    found = tower.encode(
        tower.normalise(torch.from_numpy(np.concatenate(items))),
        Items.of(lengths, torch.tensor(grids), int(lengths.sum())),
        None,
    )
    wanted = [
        token_major(plain_network(tower.encoder, picture_of(item, grid).unsqueeze(0))[0], tower.merge)
        for item, grid in zip(items, grids, strict=True)
    ]
    torch.testing.assert_close(found, torch.cat(wanted), rtol=0, atol=1e-5)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_frame_convolution_is_torch_s_with_zeros_beyond_the_ends(stride):
    torch.manual_seed(0)
    convolution = FrameConvolution(3, 4, stride)
    lengths = (6, 2, 4)
    sounds = [torch.randn(length, 3) for length in lengths]
    ends = torch.tensor([number + 1 in (6, 8, 12) for number in range(12)])
    starts = torch.tensor([number in (0, 6, 8) for number in range(12)])
    weight = convolution.taps.weight.unflatten(1, (3, 3)).transpose(1, 2)
    wanted = [
        functional.conv1d(sound.t().unsqueeze(0), weight, convolution.taps.bias, stride, padding=1)[0].t()
        for sound in sounds
    ]
    torch.testing.assert_close(convolution(torch.cat(sounds), starts, ends), torch.cat(wanted), rtol=0, atol=1e-6)


def test_cepstra_are_the_orthonormal_cosine_transform():
    table = cosines(40, 40).double()
    torch.testing.assert_close(table.t() @ table, torch.eye(40).double(), rtol=0, atol=1e-6)
    wave = torch.cos(torch.pi / 40 * (torch.arange(40) + 0.5) * 3).double()
    coefficients = wave @ table
    assert coefficients.abs().argmax() == 3
    assert coefficients[3] == pytest.approx((40 / 2) ** 0.5, rel=1e-6)


def test_mfcc_slopes_of_a_ramp_are_its_slope():
    """A sound whose every band rises by 2.25 a frame (half a normalised unit): c_0 rises evenly, its slope does not."""
    tower: CepstralEmbedder = tower_of("audio-mfcc")
    fed = []
    tower.project.register_forward_pre_hook(lambda _, arguments: fed.append(arguments[0]))
    ramp = np.repeat(np.arange(4 * FRAMES, dtype=np.float32)[:, None] * 2.25 - 6, BINS, axis=1)
    embed(tower, [ramp.reshape(4, -1)] * 2, [(4, 1, 1)] * 2)
    found = fed[0].view(2, 4 * FRAMES, 3, 4)
    rise = 0.5 * BINS**0.5
    torch.testing.assert_close(found[0, :, 0, 0], rise * torch.arange(4.0 * FRAMES), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found[0, 2:-2, 1, 0], torch.full((4 * FRAMES - 4,), rise), rtol=1e-5, atol=1e-4)
    assert found[0, 4:-4, 2].abs().max() < 1e-4
    assert torch.equal(found[0], found[1])  # the ends of an item are its own, wherever it lies


def test_log_mel_of_sound_at_speech_level_is_normalised_to_about_unit_size():
    """Catches an embedder whose constants are for another scale of the waveform than the data pipeline's."""
    generator = np.random.default_rng(0)
    seconds = np.arange(32_000) / 16_000
    noise = np.cumsum(generator.normal(size=32_000)) * 0.003  # falls with frequency, as speech does
    waveform = (noise - noise.mean()) * (0.5 + 0.5 * np.sin(2 * np.pi * 3 * seconds)) + generator.normal(
        size=32_000
    ) * 3e-3
    tokens = log_mel_tokens(waveform.astype(np.float32), MediaGeometry())
    normalised = (tokens - LogMelEmbedder.offset) / LogMelEmbedder.scale
    assert abs(normalised.mean()) < 1
    assert np.abs(normalised).max() < 4


def test_image_patches_are_mapped_to_minus_one_to_one_before_the_product():
    embedder = ImagePatchEmbedder(4, EncoderConfig(), ModelConfig(d_model=8))
    values = torch.tensor([[0] * 4, [255] * 4], dtype=torch.uint8)
    black, white = embedder(values, torch.tensor([2]), torch.tensor([[1, 1, 2]]))
    weight, bias = embedder.project.weight.sum(1), embedder.project.bias
    torch.testing.assert_close(black, bias - weight)
    torch.testing.assert_close(white, bias + weight)


def test_the_table_of_kinds_is_the_registry():
    assert {modality: tuple(kinds) for modality, kinds in ENCODERS.items()} == ENCODER_KINDS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "vitt"}, "kind is 'vitt'; known: patch, vit, cnn"),
        ({"layers": 3}, "layers is 3, but kind patch with connector linear takes none of the options"),
        ({"kind": "vit", "width": 0}, "width is 0; it must be above 0"),
        ({"kind": "vit", "width": 60}, "heads is 4; width 60 must be a multiple of 2 x heads"),
        ({"kind": "vit", "merge": 2}, "merge is 2, but connector linear takes one position a token"),
        ({"kind": "vit", "connector": "pixel_shuffle"}, "set merge to 2 or more"),
        ({"connector": "perceiver"}, "kind patch has none"),
        ({"kind": "mfcc", "coefficients": 90}, "coefficients is 90; 80 mel bands"),
    ],
)
def test_encoders_that_cannot_work_are_refused(options, message):
    with pytest.raises(PretrainError, match=message):
        EncoderConfig(**options)


@pytest.mark.parametrize(
    ("modality", "options", "message"),
    [
        ("smell", {}, "model.encoders names 'smell'; known: image, audio"),
        ("audio", {"kind": "vit"}, "model.encoders.audio: kind is 'vit'; known: patch, transformer, conv, mfcc"),
        ("image", {"kind": "vit", "merge": 3, "connector": "perceiver"}, "merge is 3, but a token has 32 pixels"),
        ("audio", {"kind": "mfcc", "mel_bins": 40}, "mel_bins is 40, but data.geometry.audio_mel_bins is 80"),
        ("audio", {"kind": "transformer", "merge": 3, "connector": "perceiver"}, "a token has 8 frames"),
        ("image", {"kind": "cnn", "layers": 3}, "layers is 3, but a stride of 32 has 4 resolutions"),
        ("image", {"kind": "cnn", "width": 36}, "it must be a multiple of 8"),
    ],
)
def test_encoders_that_do_not_fit_the_data_are_refused(modality, options, message):
    with pytest.raises(PretrainError, match=message):
        check_encoders({modality: EncoderConfig(**options)}, MediaGeometry())


def test_a_modality_has_one_encoder():
    with pytest.raises(PretrainError, match="both name 'image'; remove one of the two"):
        ModelConfig(encoders={"image": EncoderConfig()}, open_encoders={"image": None})


def test_a_stride_that_is_no_power_of_two_is_refused():
    with pytest.raises(PretrainError, match="has a stride of 28, which is no power of two"):
        check_encoders({"image": EncoderConfig(kind="cnn")}, MediaGeometry(image_patch_px=28))


@pytest.mark.parametrize("name", TOWERS)
def test_flops_are_what_torch_counts(name):
    """All but the products inside the attention op, which its counter cannot see into; one picture fills its canvas."""
    tower, modality = tower_of(name), name.split("-")[0]
    settings = EncoderConfig(**TOWERS[name])
    count = 1 if settings.kind == "cnn" else len(GRIDS[modality])
    items, grids = items_of(modality)[:count], GRIDS[modality][:count]
    lengths = np.array([len(item) for item in items])
    flops = tower_flops(modality, lengths, FEATURES[modality], settings, MODEL)
    with FlopCounterMode(display=False) as counter:
        embedded = embed(tower, items, grids)
        forward = counter.get_total_flops()
        embedded.sum().backward()
        both = counter.get_total_flops()
    c, scores = settings.positions_per_token(modality), 0
    if settings.kind in ("vit", "transformer"):
        scores += 4 * settings.layers * settings.width * int(((lengths * c) ** 2).sum())
    if settings.connector == "perceiver":
        scores += 4 * settings.connector_layers * settings.width * int((lengths**2).sum()) * c
    assert forward == flops.forward - scores
    assert both == 3 * (flops.forward - scores) - flops.spared
