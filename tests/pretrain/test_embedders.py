import numpy as np
import pytest
import torch

from triweave.data_pipeline.media.geometry import MediaGeometry
from triweave.data_pipeline.media.mel import log_mel_tokens
from triweave.pretrain.embedders import EMBEDDERS, ImagePatchEmbedder, LogMelEmbedder


def embed(embedder, values):
    count = len(values)
    return embedder(values, torch.tensor([count]), torch.tensor([[count, 1, 1]]))


def test_image_patches_are_mapped_to_minus_one_to_one_before_the_product():
    embedder = ImagePatchEmbedder(4, 8)
    black, white = embed(embedder, torch.tensor([[0] * 4, [255] * 4], dtype=torch.uint8))
    weight, bias = embedder.project.weight.sum(1), embedder.project.bias
    torch.testing.assert_close(black, bias - weight)
    torch.testing.assert_close(white, bias + weight)


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


@pytest.mark.parametrize("name", list(EMBEDDERS))
def test_the_guard_payload_is_one_token_of_zeros_in_the_payload_s_dtype(name):
    embedder = EMBEDDERS[name](6, 8)
    values, lengths, grids = embedder.zero_payload(torch.device("cpu"))
    assert values.dtype == (torch.uint8 if name == "image" else torch.float32)
    assert torch.count_nonzero(values) == 0
    assert lengths.tolist() == [1]
    assert grids.tolist() == [[1, 1, 1]]
    assert embedder(values, lengths, grids).shape == (1, 8)


@pytest.mark.parametrize("name", list(EMBEDDERS))
def test_rows_are_embedded_independently(name):
    torch.manual_seed(0)
    embedder = EMBEDDERS[name](6, 8)
    values = torch.randint(0, 255, (5, 6)).to(embedder.payload_dtype)
    together = embed(embedder, values)
    torch.testing.assert_close(together[2:4], embed(embedder, values[2:4]))
