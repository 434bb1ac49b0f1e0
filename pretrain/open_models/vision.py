"""What the towers of open models share: pixels in CLIP's scale, activations, attention within items.

P positions of all items in one sequence, W width of the encoder.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from triweave.kernels.attention import attention
from triweave.pretrain.encoders.tower import Tower
from triweave.pretrain.errors import PretrainError
from triweave.pretrain.model.config import ModelConfig
from triweave.pretrain.model.rotary import turn
from triweave.pretrain.open_models.config import COLOURS, OpenEncoderConfig

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_DEVIATION = (0.26862954, 0.26130258, 0.27577711)
"""Of red, green and blue in [0, 1], as CLIP was trained (Radford et al. 2021); Qwen2.5-VL kept them, SigLIP has 1/2."""
HALF = (0.5, 0.5, 0.5)
CHANNEL_LEVELS = 255

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "silu": functional.silu,
}
"""Name in OpenEncoderConfig -> function."""
Angles = tuple[Tensor, Tensor] | None
"""(cos, sin) [1, P, 1, K/2] that turn queries and keys; None for learnt positions."""


class OpenVisionTower(Tower):
    """A tower over pixels in the scale of its model."""

    payload_dtype = torch.uint8

    def __init__(self, features: int, settings: OpenEncoderConfig, config: ModelConfig) -> None:  # noqa: ARG002 - made alike
        """Make a tower for tokens of `features` numbers; raises PretrainError where they are not its squares."""
        nn.Module.__init__(self)
        if features != settings.features:
            raise PretrainError(
                f"a token of model.open_encoders has {settings.features} numbers ({settings.token_px} pixels a side) "
                f"but the data gives {features}; set data.geometry.image_patch_px={settings.token_px}"
            )
        self.features = features
        self.centred = settings.kind == "siglip"

    def normalise(self, values: Tensor) -> Tensor:
        """Return (values / 255 - mean) / deviation by channel, computed in fp32, in the weights' dtype."""
        scale = (HALF, HALF) if self.centred else (PIXEL_MEAN, PIXEL_DEVIATION)
        mean, deviation = (torch.tensor(row, device=values.device) for row in scale)
        pixels = values.float().unflatten(-1, (-1, COLOURS)) / CHANNEL_LEVELS
        return ((pixels - mean) / deviation).flatten(-2).to(next(self.parameters()).dtype)


class ItemAttention(nn.Module):
    """out(attention(qkv(x))) over the keys [kv_lo, kv_hi), with biases, in Whisper all but that of the keys."""

    def __init__(self, settings: OpenEncoderConfig, implementation: str) -> None:
        super().__init__()
        self.heads, self.implementation = settings.heads, implementation
        whisper = settings.kind == "whisper"
        self.qkv = nn.Linear(settings.width, 3 * settings.width, bias=not whisper)
        self.query_bias = nn.Parameter(torch.zeros(settings.width)) if whisper else None
        self.value_bias = nn.Parameter(torch.zeros(settings.width)) if whisper else None
        self.out = nn.Linear(settings.width, settings.width)

    def forward(self, x: Tensor, kv_lo: Tensor, kv_hi: Tensor, angles: Angles = None) -> Tensor:
        """Map x [1, P, W] to [1, P, W]; kv_lo, kv_hi int32 [1, P]."""
        projected: Tensor = self.qkv(x)
        if self.query_bias is not None and self.value_bias is not None:
            bias = torch.cat([self.query_bias, torch.zeros_like(self.query_bias), self.value_bias])
            projected = projected + bias
        q, k, v = projected.unflatten(-1, (3, self.heads, -1)).unbind(2)
        if angles is not None:
            q, k = turn(q, *angles), turn(k, *angles)
        mixed, _ = attention(q, k, v, kv_lo, kv_hi, impl=self.implementation)
        returned: Tensor = self.out(mixed.flatten(2))
        return returned


def through(
    blocks: nn.ModuleList, x: Tensor, arguments: Callable[[int], tuple[object, ...]], *, recompute: bool
) -> Tensor:
    """Return x [1, P, W] after all blocks; `arguments(number)` are those of a block beside x."""
    for number, block in enumerate(blocks):
        if recompute and torch.is_grad_enabled():
            x = checkpoint(block, x, *arguments(number), use_reentrant=False)
        else:
            x = block(x, *arguments(number))
    return x
