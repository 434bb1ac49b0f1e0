"""Connectors are their formulas, written out anew in plain torch."""

import math

import torch

from triweave.pretrain.encoders.config import EncoderConfig
from triweave.pretrain.encoders.transformer_config import sections_of
from triweave.pretrain.model.config import ModelConfig
from triweave.pretrain.model.connectors import Perceiver, project
from triweave.pretrain.model.model import initialise
from triweave.pretrain.model.rotary import rotate

MODEL = ModelConfig(d_model=16, layers=1, heads=2, kv_heads=2, head_width=8, init_std=0.3)
WIDTH, HEADS = 8, 2


def made(module):
    initialise(module, MODEL, 0)
    return module.requires_grad_(False)


def gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def rms(x, weight=1.0):
    return x * (x.square().mean(-1, keepdim=True) + MODEL.norm_eps).rsqrt() * weight


def test_mlp():
    connector = made(project(WIDTH, EncoderConfig(connector="mlp", connector_width=12), MODEL))
    x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0))
    first, second = connector.first, connector.second
    assert first.weight.shape == (12, WIDTH)
    wanted = gelu(x @ first.weight.t() + first.bias) @ second.weight.t() + second.bias
    torch.testing.assert_close(connector(x), wanted, rtol=0, atol=1e-6)


def test_pixel_shuffle_joins_the_positions_of_a_token():
    settings = EncoderConfig(kind="vit", width=WIDTH, heads=HEADS, merge=2, connector="pixel_shuffle")
    connector = made(project(WIDTH, settings, MODEL, positions=4))
    x = torch.randn(3 * 4, WIDTH, generator=torch.Generator().manual_seed(0))
    mlp = connector.mlp
    joined = torch.stack([torch.cat([x[4 * token + place] for place in range(4)]) for token in range(3)])
    inner = gelu(rms(joined, connector.norm.weight) @ mlp.first.weight.t() + mlp.first.bias)
    assert mlp.first.weight.shape == (MODEL.d_model, 4 * WIDTH)
    torch.testing.assert_close(connector(x), inner @ mlp.second.weight.t() + mlp.second.bias, rtol=0, atol=1e-6)


def test_a_perceiver_s_latents_attend_to_the_positions_of_their_item():
    """Two items of 2 and 1 tokens, 4 positions a token; dense attention over each item by itself."""
    settings = EncoderConfig(kind="vit", width=WIDTH, heads=HEADS, merge=2, connector="perceiver", connector_layers=2)
    sections = sections_of("image", WIDTH // HEADS)
    perceiver = made(Perceiver(settings, MODEL, sections))
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(1, 12, WIDTH, generator=generator)
    places = torch.randint(0, 6, (1, 12, 3), generator=generator)
    lo, hi = torch.tensor([[0, 0, 8]]).int(), torch.tensor([[8, 8, 12]]).int()
    found = perceiver(states, places[:, ::4], places, (lo, hi))
    keys, x = rms(states, perceiver.norm.weight), perceiver.latent.expand(1, 3, -1)
    for layer in perceiver.layers:
        q = (rms(x) @ layer.query.weight.t()).view(1, 3, HEADS, -1)
        k, v = (keys @ layer.key_value.weight.t()).view(1, 12, 2, HEADS, -1).unbind(2)
        q, _ = rotate(rms(q), rms(q), places[:, ::4], sections=sections, theta=MODEL.rope_theta)
        k, _ = rotate(rms(k), rms(k), places, sections=sections, theta=MODEL.rope_theta)
        mixed = []
        for token in range(3):
            own = slice(int(lo[0, token]), int(hi[0, token]))
            scores = torch.einsum("hk,thk->ht", q[0, token], k[0, own]) / math.sqrt(WIDTH // HEADS)
            mixed.append(torch.einsum("ht,thk->hk", scores.softmax(-1), v[0, own]).flatten())
        x = x + torch.stack(mixed).unsqueeze(0) @ layer.out.weight.t()
        gate, up = (rms(x) @ layer.feed_forward.gate_up.weight.t()).chunk(2, dim=-1)
        x = x + (gate * gate.sigmoid() * up) @ layer.feed_forward.down.weight.t()
    torch.testing.assert_close(found, x[0] @ perceiver.out.weight.t() + perceiver.out.bias, rtol=0, atol=1e-5)
