"""What a config.json of transformers means here, and the config.json of one of our models.

Only what decides the function of a model is read; a value that our modules do not compute is an error naming its key.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from triweave.pretrain.errors import OpenModelError
from triweave.pretrain.model.config import FFN_WIDTH_MULTIPLE, LayoutConfig, ModelConfig, RopeScalingConfig
from triweave.pretrain.open_models.config import OpenEncoderConfig

FAMILIES = ("llama", "qwen2", "qwen3", "llava", "qwen2_5_vl")
"""Values of model_type that whole models may have."""
TOWERS = {
    "image": ("clip", "clip_vision_model", "siglip", "siglip_vision_model"),
    "audio": ("whisper",),
}
"""Modality -> values of model_type of its towers."""
WHISPER_MERGE = 4
"""Positions of 20 ms that make a token where the user says nothing: 12.5 tokens a second."""
DECODERS = ("llama", "qwen2", "qwen3", "qwen2_5_vl_text")
ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "silu": "silu"}
"""Their name of an activation -> ours."""
THEIR_ACTIVATIONS = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llava": "LlavaForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
}
"""model_type -> the class of transformers that holds it."""


@dataclass(frozen=True, kw_only=True)
class OpenModel:
    """What an open model's config.json asks of our config.

    family: its model_type. vocab_size: rows of its token table. model: keys of the `model:` section.
    encoders: of `model.open_encoders`. image_max_tokens: what its positions are meant for; None: any number.
    placeholders: modality -> (start, placeholder) token ids, None where it names none.
    """

    family: str
    vocab_size: int
    model: dict[str, Any]
    encoders: dict[str, OpenEncoderConfig] = field(default_factory=dict)
    image_max_tokens: int | None = None
    placeholders: dict[str, tuple[int | None, int | None]] = field(default_factory=dict)

    def model_config(self, **changes: Any) -> ModelConfig:
        """Return the model config, with other keys changed."""
        return ModelConfig(**{**self.model, "open_encoders": self.encoders, **changes})


def read_settings(config: Mapping[str, Any], where: str) -> OpenModel:
    """Return what a config.json asks for; `where` is what errors call it.

    Raises OpenModelError for a family, or a value in it, that our modules do not compute.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise OpenModelError(f"{where}: model_type is {family!r}; known: {', '.join(FAMILIES)}")
    if family == "llava":
        return _llava(config, where)
    if family == "qwen2_5_vl":
        return _qwen2_5_vl(config, where)
    return OpenModel(family=family, vocab_size=_whole(config, "vocab_size", where), model=_decoder(config, where))


def _decoder(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the `model:` keys of a decoder."""
    kind = config.get("model_type")
    if kind not in DECODERS:
        raise OpenModelError(f"{where}: the decoder's model_type is {kind!r}; known: {', '.join(DECODERS)}")
    _demand(config, where, hidden_act="silu", mlp_bias=False, use_sliding_window=False)
    if kind != "qwen2":  # it has biases whatever the key says
        _demand(config, where, attention_bias=False)
    width, heads = _whole(config, "hidden_size", where), _whole(config, "num_attention_heads", where)
    ffn_width = _whole(config, "intermediate_size", where)
    if ffn_width % FFN_WIDTH_MULTIPLE:
        raise OpenModelError(f"{where}: intermediate_size is {ffn_width}; multiples of {FFN_WIDTH_MULTIPLE} are read")
    rope = _rope(config, where, "mrope") if kind == "qwen2_5_vl_text" else _rope(config, where, "llama3")
    scaling = None
    if rope.get("rope_type", rope.get("type")) == "llama3":
        scaling = RopeScalingConfig(
            factor=float(rope["factor"]),
            slow=float(rope["low_freq_factor"]),
            fast=float(rope["high_freq_factor"]),
            positions=int(rope["original_max_position_embeddings"]),
        )
    return {
        "d_model": width,
        "layers": _whole(config, "num_hidden_layers", where),
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads") or heads,
        "head_width": config.get("head_dim") or width // heads,
        "ffn_multiple": ffn_width / width,
        "input_norm": False,
        "qk_norm": kind == "qwen3",
        "qkv_bias": kind in ("qwen2", "qwen2_5_vl_text"),
        "rope_theta": float(rope.get("rope_theta", 10000.0)),
        "rope_scaling": scaling,
        "norm_eps": float(config.get("rms_norm_eps", 1e-6)),
        "tie_embeddings": bool(config.get("tie_word_embeddings", False)),
        "layout": LayoutConfig(positions="sequential", media_attention="causal"),
    }


def _llava(config: Mapping[str, Any], where: str) -> OpenModel:
    text, vision = _part(config, "text_config", where), _part(config, "vision_config", where)
    if vision.get("model_type") != "clip_vision_model":
        raise OpenModelError(f"{where}: the vision tower is {vision.get('model_type')!r}; clip_vision_model is read")
    _demand(config, where, vision_feature_select_strategy="default")
    _demand(vision, where, num_channels=3)
    stored, layer = _whole(vision, "num_hidden_layers", where), config.get("vision_feature_layer", -2)
    if not isinstance(layer, int) or not -stored <= layer <= stored or layer == 0:
        raise OpenModelError(f"{where}: vision_feature_layer is {layer!r}; one of its {stored} layers is read")
    patch, side_px = _whole(vision, "patch_size", where), _whole(vision, "image_size", where)
    encoder = OpenEncoderConfig(
        kind="clip",
        width=_whole(vision, "hidden_size", where),
        layers=layer if layer > 0 else stored + 1 + layer,
        heads=_whole(vision, "num_attention_heads", where),
        ffn_width=_whole(vision, "intermediate_size", where),
        patch_px=patch,
        norm_eps=float(vision.get("layer_norm_eps", 1e-5)),
        activation=_activation(vision.get("hidden_act", "quick_gelu"), where),
        projector_activation=_activation(config.get("projector_hidden_act", "gelu"), where),
        projector_bias=bool(config.get("multimodal_projector_bias", True)),
        positions=side_px // patch,
    )
    tied = bool(config.get("tie_word_embeddings", False) or text.get("tie_word_embeddings", False))
    return OpenModel(
        family="llava",
        vocab_size=_whole(text, "vocab_size", where),
        model={**_decoder(text, where), "tie_embeddings": tied},
        encoders={"image": encoder},
        image_max_tokens=encoder.positions**2,
        placeholders={"image": (None, config.get("image_token_index", config.get("image_token_id")))},
    )


def read_tower(config: Mapping[str, Any], where: str, modality: str) -> OpenEncoderConfig:
    """Return what the config.json of a tower on its own, or of a whole CLIP, SigLIP or Whisper, asks for.

    As in LLaVA, CLIP's last block is left out. Raises OpenModelError for another family or what is not computed.
    """
    kind = str(config.get("model_type"))
    if kind not in TOWERS[modality]:
        raise OpenModelError(
            f"{where}: model_type is {kind!r}; as a tower of {modality} are read: {', '.join(TOWERS[modality])}"
        )
    if kind == "whisper":
        return _whisper(config, where)
    vision = config if kind.endswith("_vision_model") else _part(config, "vision_config", where)
    _demand(vision, where, num_channels=3)
    siglip = kind.startswith("siglip")
    patch, stored = _whole(vision, "patch_size", where), _whole(vision, "num_hidden_layers", where)
    return OpenEncoderConfig(
        kind="siglip" if siglip else "clip",
        width=_whole(vision, "hidden_size", where),
        layers=stored if siglip else stored - 1,
        heads=_whole(vision, "num_attention_heads", where),
        ffn_width=_whole(vision, "intermediate_size", where),
        patch_px=patch,
        norm_eps=float(vision.get("layer_norm_eps", 1e-6 if siglip else 1e-5)),
        activation=_activation(vision.get("hidden_act", "gelu_pytorch_tanh" if siglip else "quick_gelu"), where),
        positions=_whole(vision, "image_size", where) // patch,
    )


def _whisper(config: Mapping[str, Any], where: str) -> OpenEncoderConfig:
    """Return what Whisper's encoder asks for; `scale_embedding` concerns its decoder only."""
    positions, width = _whole(config, "max_source_positions", where), _whole(config, "d_model", where)
    if width % 2:
        raise OpenModelError(f"{where}: d_model is {width}; sinusoids need an even one")
    return OpenEncoderConfig(
        kind="whisper",
        width=width,
        layers=_whole(config, "encoder_layers", where),
        heads=_whole(config, "encoder_attention_heads", where),
        ffn_width=_whole(config, "encoder_ffn_dim", where),
        activation=_activation(config.get("activation_function", "gelu"), where),
        positions=positions,
        merge=math.gcd(WHISPER_MERGE, positions),
        mel_bins=_whole(config, "num_mel_bins", where),
    )


def _qwen2_5_vl(config: Mapping[str, Any], where: str) -> OpenModel:
    # before transformers 4.52 the decoder's keys stood beside vision_config
    text = {**config, **config.get("text_config", {}), "model_type": "qwen2_5_vl_text"}
    vision = _part(config, "vision_config", where)
    _demand(vision, where, hidden_act="silu", in_channels=3)
    patch, merge = _whole(vision, "patch_size", where), _whole(vision, "spatial_merge_size", where)
    sections = _rope(text, where, "mrope").get("mrope_section")
    model = _decoder(text, where)
    encoder = OpenEncoderConfig(
        kind="qwen2_5_vl",
        width=_whole(vision, "hidden_size", where),
        layers=_whole(vision, "depth", where),
        heads=_whole(vision, "num_heads", where),
        ffn_width=_whole(vision, "intermediate_size", where),
        patch_px=patch,
        norm_eps=1e-6,
        activation="silu",
        merge=merge,
        frames=_whole(vision, "temporal_patch_size", where),
        window=_whole(vision, "window_size", where) // merge // patch,
        full_attention=list(vision.get("fullatt_block_indexes", [])),
    )
    if vision.get("out_hidden_size", model["d_model"]) != model["d_model"]:
        raise OpenModelError(f"{where}: out_hidden_size is {vision['out_hidden_size']}, hidden_size {model['d_model']}")
    return OpenModel(
        family="qwen2_5_vl",
        vocab_size=_whole(text, "vocab_size", where),
        model={
            **model,
            "rope_sections": sections,
            "layout": LayoutConfig(positions="grid", media_attention="causal"),
            "tie_embeddings": bool(config.get("tie_word_embeddings", False)),
        },
        encoders={"image": encoder},
        placeholders={"image": (config.get("vision_start_token_id"), config.get("image_token_id"))},
    )


def family_of(config: ModelConfig) -> str:
    """Return the model_type whose function a model has; raises OpenModelError naming a setting where there is none."""
    encoder = config.open_encoders.get("image")
    qwen_vl = encoder is not None and encoder.kind == "qwen2_5_vl"
    positions = "grid" if qwen_vl else "sequential"
    needs = {
        "input_norm": config.input_norm is False,
        "open_encoders.image.kind": encoder is None or encoder.kind != "siglip",
        "softcap": config.softcap is None,
        "fusion.kind": config.fusion.kind == "sequence",
        "layout.media_attention": config.layout.media_attention == "causal" or encoder is None,
        "layout.positions": config.layout.positions == positions or encoder is None,
        "qk_norm": not (config.qk_norm and (config.qkv_bias or qwen_vl)),
        "qkv_bias": config.qkv_bias or not qwen_vl,
    }
    for name, fits in needs.items():
        if not fits:
            raise OpenModelError(
                f"no layout of transformers computes a model with model.{name} as it is here; models that are exported "
                "start from one that `triweave import` has read"
            )
    if encoder is not None:
        return "qwen2_5_vl" if qwen_vl else "llava"
    return _decoder_of(config)


def _decoder_of(config: ModelConfig) -> str:
    return "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama"


def write_settings(
    family: str, config: ModelConfig, vocab_size: int, placeholders: Mapping[str, tuple[int, int]]
) -> dict[str, Any]:
    """Return the config.json of a model, of which `read_settings` makes the same model again."""
    text = {
        "model_type": "qwen2_5_vl_text" if family == "qwen2_5_vl" else _decoder_of(config),
        "hidden_size": config.d_model,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "intermediate_size": config.ffn_width,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": _write_rope(config),
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_scaling is None else _write_rope(config),
        "tie_word_embeddings": config.tie_embeddings,
        "vocab_size": vocab_size,
    }
    if config.qkv_bias and config.head_width * config.heads != config.d_model:
        raise OpenModelError(
            f"{family} has heads of hidden_size / num_attention_heads, but model.head_width={config.head_width}, "
            f"heads={config.heads} and d_model={config.d_model}; no layout of transformers has both"
        )
    if family == "llava":
        return _write_llava(config, text, placeholders)
    if family == "qwen2_5_vl":
        return _write_qwen2_5_vl(config, text, placeholders)
    return {**text, "architectures": [ARCHITECTURES[family]]}


def _write_rope(config: ModelConfig) -> dict[str, Any]:
    scaling = config.rope_scaling
    if scaling is None:
        return {"rope_theta": config.rope_theta, "rope_type": "default"}
    return {
        "rope_theta": config.rope_theta,
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.slow,
        "high_freq_factor": scaling.fast,
        "original_max_position_embeddings": scaling.positions,
    }


def _write_llava(
    config: ModelConfig, text: dict[str, Any], placeholders: Mapping[str, tuple[int, int]]
) -> dict[str, Any]:
    encoder = config.open_encoders["image"]
    return {
        "model_type": "llava",
        "architectures": [ARCHITECTURES["llava"]],
        "image_token_index": placeholders["image"][1],
        "image_seq_length": encoder.positions**2,
        "multimodal_projector_bias": encoder.projector_bias,
        "projector_hidden_act": THEIR_ACTIVATIONS[encoder.projector_activation],
        "vision_feature_layer": -1,  # the blocks that LLaVA does not compute are not written
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": config.tie_embeddings,
        "text_config": text,
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": encoder.width,
            "num_hidden_layers": encoder.layers,
            "num_attention_heads": encoder.heads,
            "intermediate_size": encoder.ffn_width,
            "patch_size": encoder.patch_px,
            "image_size": encoder.patch_px * encoder.positions,
            "hidden_act": THEIR_ACTIVATIONS[encoder.activation],
            "layer_norm_eps": encoder.norm_eps,
            "num_channels": 3,
        },
    }


def _write_qwen2_5_vl(
    config: ModelConfig, text: dict[str, Any], placeholders: Mapping[str, tuple[int, int]]
) -> dict[str, Any]:
    encoder = config.open_encoders["image"]
    start, placeholder = placeholders["image"]
    rope = {"rope_theta": config.rope_theta, "rope_type": "default", "mrope_section": list(config.sections)}
    return {
        "model_type": "qwen2_5_vl",
        "architectures": [ARCHITECTURES["qwen2_5_vl"]],
        "image_token_id": placeholder,
        "vision_start_token_id": start,
        "tie_word_embeddings": config.tie_embeddings,
        "text_config": {**text, "rope_parameters": rope, "rope_scaling": {**rope, "rope_type": "default"}},
        "vision_config": {
            "model_type": "qwen2_5_vl_vision",
            "hidden_size": encoder.width,
            "out_hidden_size": config.d_model,
            "depth": encoder.layers,
            "num_heads": encoder.heads,
            "intermediate_size": encoder.ffn_width,
            "patch_size": encoder.patch_px,
            "spatial_merge_size": encoder.merge,
            "temporal_patch_size": encoder.frames,
            "window_size": encoder.window * encoder.token_px,
            "fullatt_block_indexes": list(encoder.full_attention),
            "hidden_act": "silu",
            "in_channels": 3,
        },
    }


def _rope(config: Mapping[str, Any], where: str, *also: str) -> dict[str, Any]:
    """Return rope_theta and what belongs to its type from either place where transformers keeps them."""
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", *also):
        raise OpenModelError(f"{where}: rope_type is {kind!r}; only {', '.join(('default', *also))} are computed here")
    if config.get("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0)) != 1.0:
        raise OpenModelError(f"{where}: partial_rotary_factor is not 1.0, which is what is computed here")
    return {"rope_theta": config.get("rope_theta", 10000.0), **rope}


def _demand(config: Mapping[str, Any], where: str, **values: Any) -> None:
    for key, value in values.items():
        if config.get(key, value) not in (value, None):
            raise OpenModelError(f"{where}: {key} is {config[key]!r}; only {value!r} is computed here")


def _activation(name: str, where: str) -> Any:
    if name not in ACTIVATIONS:
        raise OpenModelError(f"{where}: activation {name!r} is not computed here; known: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _part(config: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    if not isinstance(config.get(key), dict):
        raise OpenModelError(f"{where}: has no {key}")
    return dict(config[key])


def _whole(config: Mapping[str, Any], key: str, where: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise OpenModelError(f"{where}: {key} is {value!r}; it must be a whole number above 0")
    return value
