"""Mapping tables of the towers of LLaVA, CLIP, SigLIP, Qwen2.5-VL and Whisper, and the names their trees have had.

transformers has moved these trees between releases (`vision_model.` inside of CLIP, `model.` around everything); a
name is first brought to the form of `canonical`.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from triweave.pretrain.engine.optimizer import TOWER_PREFIX
from triweave.pretrain.model.config import ModelConfig
from triweave.pretrain.open_models.config import COLOURS, OpenEncoderConfig
from triweave.pretrain.open_models.mapping import Entry, Form

IMAGE_TOWER = f"{TOWER_PREFIX}image."
AUDIO_TOWER = f"{TOWER_PREFIX}audio."
"""Start of the names of our parameters."""
LLAVA_DECODER = "language_model."
LLAVA_VISION = "vision_tower."
LLAVA_PROJECTOR = "multi_modal_projector."
QWEN_VISION = "visual."
WHISPER_ENCODER = "encoder."
CLIP_BLOCK = (
    ("attention.out", "self_attn.out_proj"),
    ("attention_norm", "layer_norm1"),
    ("feed_forward_norm", "layer_norm2"),
    ("up", "mlp.fc1"),
    ("down", "mlp.fc2"),
)
WHISPER_BLOCK = (
    ("attention.out", "self_attn.out_proj"),
    ("attention_norm", "self_attn_layer_norm"),
    ("feed_forward_norm", "final_layer_norm"),
    ("up", "fc1"),
    ("down", "fc2"),
)
"""Modules of a block with weight and bias: ours, theirs."""


def canonical(family: str, name: str) -> str:
    """Return a tensor's name as the tables here have it."""
    if family == "llava":
        name = re.sub(r"^model\.(?=language_model\.|vision_tower\.|multi_modal_projector\.)", "", name)
        name = name.removeprefix("language_model.") if name.startswith("language_model.lm_head") else name
        name = re.sub(r"^language_model\.model\.", "language_model.", name)
        return name.replace("vision_tower.vision_model.", "vision_tower.")
    if family in ("clip", "siglip"):
        return f"{LLAVA_VISION}{name.removeprefix('vision_model.')}"
    if family == "whisper":
        return re.sub(r"^(model\.)?(encoder\.)?", WHISPER_ENCODER, name)
    if family == "qwen2_5_vl":
        name = re.sub(r"^model\.visual\.", "visual.", name)
        return re.sub(r"^model\.language_model\.", "model.", name)
    return name


def on_disk(family: str, name: str) -> str:
    """Return a name of the tables as every release of transformers reads it."""
    if family == "llava":
        if name == "lm_head.weight":
            return f"{LLAVA_DECODER}{name}"
        name = re.sub(r"^language_model\.", "language_model.model.", name)
        return re.sub(r"^vision_tower\.", "vision_tower.vision_model.", name)
    return name


def idle_tensors(config: ModelConfig) -> dict[str, Tensor]:
    """Return the tensors that a layout wants and does not compute with: LLaVA's norm behind the last block of CLIP."""
    encoder = config.open_encoders.get("image")
    if encoder is None or encoder.kind != "clip":
        return {}
    name = on_disk("llava", f"{LLAVA_VISION}post_layernorm")
    return {f"{name}.weight": torch.ones(encoder.width), f"{name}.bias": torch.zeros(encoder.width)}


def unused_by_llava(settings: OpenEncoderConfig) -> tuple[str, ...]:
    """Return patterns of what LLaVA stores of CLIP and never computes: later blocks and the norm at the end."""
    last = settings.layers
    return (
        r"vision_tower\.(vision_model\.)?post_layernorm\.",
        rf"vision_tower\.(vision_model\.)?encoder\.layers\.(?!({'|'.join(map(str, range(last)))})\.)",
    )


def unused_by_tower(settings: OpenEncoderConfig) -> tuple[str, ...]:
    """Return patterns of what a folder of CLIP, SigLIP or Whisper stores beside what its tower computes here.

    Whisper's positions are sinusoids, which nothing trains.
    """
    if settings.kind == "whisper":
        return (r"^(model\.)?decoder\.", r"^proj_out\.", r"(^|\.)encoder\.embed_positions\.", r"^embed_positions\.")
    pairing = (r"^text_model\.", r"^(text|visual)_projection\.", r"^logit_(scale|bias)$", r"^(vision_model\.)?head\.")
    if settings.kind == "siglip":
        return pairing
    blocks = "|".join(map(str, range(settings.layers)))
    return (*pairing, r"^(vision_model\.)?post_layernorm\.", rf"^(vision_model\.)?encoder\.layers\.(?!({blocks})\.)")


def tower_entries(settings: OpenEncoderConfig) -> list[Entry]:
    """Return the table of the encoder of a folder that holds a tower on its own, without the projector."""
    return whisper_entries(settings) if settings.kind == "whisper" else clip_entries(settings)


def whisper_entries(settings: OpenEncoderConfig) -> list[Entry]:
    """Return the table of Whisper's encoder."""
    ours, theirs = f"{AUDIO_TOWER}encoder.", WHISPER_ENCODER
    entries = [*_both(f"{ours}conv1", f"{theirs}conv1"), *_both(f"{ours}conv2", f"{theirs}conv2")]
    for number in range(settings.layers):
        block, layer = f"{ours}blocks.{number}.", f"{theirs}layers.{number}."
        projections = tuple(f"{layer}self_attn.{which}_proj.weight" for which in "qkv")
        entries.append(Entry(ours=f"{block}attention.qkv.weight", theirs=projections, rows=(settings.width,) * 3))
        for own, other in (("query_bias", "q_proj"), ("value_bias", "v_proj")):
            entries.append(Entry(ours=f"{block}attention.{own}", theirs=(f"{layer}self_attn.{other}.bias",)))
        for own, other in WHISPER_BLOCK:
            entries += _both(f"{block}{own}", f"{layer}{other}")
    return entries + _both(f"{ours}final_norm", f"{theirs}layer_norm")


def clip_entries(settings: OpenEncoderConfig) -> list[Entry]:
    """Return the table of the vision tower of CLIP or SigLIP."""
    ours, theirs = f"{IMAGE_TOWER}encoder.", LLAVA_VISION
    entries = [
        Entry(ours=f"{ours}embed.weight", theirs=(f"{theirs}embeddings.patch_embedding.weight",), form=_patches()),
        Entry(ours=f"{ours}positions", theirs=(f"{theirs}embeddings.position_embedding.weight",)),
    ]
    if settings.kind == "clip":
        entries.append(Entry(ours=f"{ours}class_token", theirs=(f"{theirs}embeddings.class_embedding",)))
        entries += _both(f"{ours}input_norm", f"{theirs}pre_layrnorm")
    else:
        entries.append(Entry(ours=f"{ours}embed.bias", theirs=(f"{theirs}embeddings.patch_embedding.bias",)))
        entries += _both(f"{ours}final_norm", f"{theirs}post_layernorm")
    for number in range(settings.layers):
        block, layer = f"{ours}blocks.{number}.", f"{theirs}encoder.layers.{number}."
        for kind in ("weight", "bias"):
            projections = tuple(f"{layer}self_attn.{which}_proj.{kind}" for which in "qkv")
            rows = (settings.width,) * 3
            entries.append(Entry(ours=f"{block}attention.qkv.{kind}", theirs=projections, rows=rows))
        for own, other in CLIP_BLOCK:
            entries += _both(f"{block}{own}", f"{layer}{other}")
    return entries


def projector_entries(settings: OpenEncoderConfig) -> list[Entry]:
    """Return the table of LLaVA's projector."""
    return [
        entry
        for own, other in (("up", "linear_1"), ("down", "linear_2"))
        for entry in _both(f"{IMAGE_TOWER}{own}", f"{LLAVA_PROJECTOR}{other}", bias=settings.projector_bias)
    ]


def qwen_entries(settings: OpenEncoderConfig) -> list[Entry]:
    """Return the table of Qwen2.5-VL's vision tower and merger."""
    ours, theirs = f"{IMAGE_TOWER}encoder.", QWEN_VISION
    form = _patches(settings.frames)
    entries = [Entry(ours=f"{ours}embed.weight", theirs=(f"{theirs}patch_embed.proj.weight",), form=form)]
    for number in range(settings.layers):
        block, layer = f"{ours}blocks.{number}.", f"{theirs}blocks.{number}."
        for kind in ("weight", "bias"):
            pair = (f"{layer}mlp.gate_proj.{kind}", f"{layer}mlp.up_proj.{kind}")
            rows = (settings.ffn_width,) * 2
            entries.append(Entry(ours=f"{block}gate_up.{kind}", theirs=pair, rows=rows))
        for own, other in (("attention.qkv", "attn.qkv"), ("attention.out", "attn.proj"), ("down", "mlp.down_proj")):
            entries += _both(f"{block}{own}", f"{layer}{other}")
        entries.append(Entry(ours=f"{block}attention_norm.weight", theirs=(f"{layer}norm1.weight",)))
        entries.append(Entry(ours=f"{block}feed_forward_norm.weight", theirs=(f"{layer}norm2.weight",)))
    entries.append(Entry(ours=f"{IMAGE_TOWER}merger_norm.weight", theirs=(f"{theirs}merger.ln_q.weight",)))
    for own, other in (("up", "mlp.0"), ("down", "mlp.2")):
        entries += _both(f"{IMAGE_TOWER}{own}", f"{theirs}merger.{other}")
    return entries


def _both(ours: str, theirs: str, *, bias: bool = True) -> list[Entry]:
    kinds = ("weight", "bias") if bias else ("weight",)
    return [Entry(ours=f"{ours}.{kind}", theirs=(f"{theirs}.{kind}",)) for kind in kinds]


def _patches(frames: int = 0) -> Form:
    """Return the form of a convolution over squares: [W, 3, (frames,) p, p] there, [W, (frames) p p 3] here."""

    def to_ours(kernel: Tensor) -> Tensor:
        return kernel.movedim(1, -1).flatten(1)

    def to_theirs(matrix: Tensor) -> Tensor:
        side = round((matrix.shape[1] / COLOURS / max(1, frames)) ** 0.5)
        shape = (frames, side, side, COLOURS) if frames else (side, side, COLOURS)
        return matrix.unflatten(1, shape).movedim(-1, 1)

    return to_ours, to_theirs
