"""Mapping tables: which tensors of a transformers folder make which parameter of ours, and back.

Every tensor of a folder and every parameter of the part it fills must stand in the table; what is left over on either
side is an error that names it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from triweave.pretrain.errors import OpenModelError
from triweave.pretrain.model.config import ModelConfig
from triweave.pretrain.open_models.folder import OpenFolder

Form = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
"""One tensor of theirs as rows of ours, and rows of ours as their tensor."""
NAMED = 3
"""An error names at most so many tensors."""


def _same(tensor: Tensor) -> Tensor:
    return tensor


SAME: Form = (_same, _same)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One parameter of ours: their tensors, each through `form`, one under the other.

    rows: of each of their tensors in ours; () for one tensor, which has all of them.
    grows: ours may have further rows, which keep what they hold (token tables with markers of ours at their end).
    """

    ours: str
    theirs: tuple[str, ...]
    rows: tuple[int, ...] = ()
    form: Form = SAME
    grows: bool = False


def decoder_entries(config: ModelConfig, *, model: str, head: str) -> list[Entry]:
    """Return the table of a Llama, Qwen2 or Qwen3 decoder; `model`, `head`: what their names begin with."""
    H, G, K = config.heads, config.kv_heads, config.head_width
    entries = [
        Entry(ours="token_embedding.weight", theirs=(f"{model}embed_tokens.weight",), grows=True),
        Entry(ours="decoder.final_norm.weight", theirs=(f"{model}norm.weight",)),
    ]
    if not config.tie_embeddings:
        entries.append(Entry(ours="heads.language_model.weight", theirs=(f"{head}lm_head.weight",), grows=True))
    for number in range(config.layers):
        ours, theirs = f"decoder.blocks.{number}", f"{model}layers.{number}"
        for kind in ("weight", "bias") if config.qkv_bias else ("weight",):
            projections = tuple(f"{theirs}.self_attn.{which}_proj.{kind}" for which in "qkv")
            entries.append(Entry(ours=f"{ours}.attention.qkv.{kind}", theirs=projections, rows=(H * K, G * K, G * K)))
        if config.qk_norm:
            entries += [
                Entry(ours=f"{ours}.attention.{which}_norm", theirs=(f"{theirs}.self_attn.{which}_norm.weight",))
                for which in "qk"
            ]
        entries += [
            Entry(ours=f"{ours}.attention.out.weight", theirs=(f"{theirs}.self_attn.o_proj.weight",)),
            Entry(ours=f"{ours}.attention_norm.weight", theirs=(f"{theirs}.input_layernorm.weight",)),
            Entry(ours=f"{ours}.feed_forward_norm.weight", theirs=(f"{theirs}.post_attention_layernorm.weight",)),
            Entry(
                ours=f"{ours}.feed_forward.gate_up.weight",
                theirs=(f"{theirs}.mlp.gate_proj.weight", f"{theirs}.mlp.up_proj.weight"),
                rows=(config.ffn_width, config.ffn_width),
            ),
            Entry(ours=f"{ours}.feed_forward.down.weight", theirs=(f"{theirs}.mlp.down_proj.weight",)),
        ]
    return entries


def copy_in(
    parameters: Mapping[str, Tensor],
    folder: OpenFolder,
    entries: Sequence[Entry],
    *,
    canonical: Callable[[str], str] = str,
    ignored: Collection[str] = (),
) -> set[str]:
    """Fill our parameters from a folder and return their names.

    canonical: a name as it stands in the folder -> as in the table (transformers has renamed whole trees of them).
    ignored: patterns of their tensors that hold nothing to learn.
    Raises OpenModelError for a tensor of the folder that the table does not use, one that it lacks, and a shape that
    does not fit, before anything is changed.
    """
    stored = check_names(folder, entries, canonical=canonical, ignored=ignored)
    for apply in (False, True):
        for entry in entries:
            _copy_entry(parameters[entry.ours], folder, entry, [stored[name] for name in entry.theirs], apply=apply)
    return {entry.ours for entry in entries}


def check_names(
    folder: OpenFolder,
    entries: Sequence[Entry],
    *,
    canonical: Callable[[str], str] = str,
    ignored: Collection[str] = (),
) -> dict[str, str]:
    """Return name in the table -> name in the folder; raises OpenModelError where they do not match one to one."""
    stored = {canonical(name): name for name in folder.names if not _matches(name, ignored)}
    wanted = {name for entry in entries for name in entry.theirs}
    for names, what in ((set(stored) - wanted, "has no place for"), (wanted - set(stored), "lacks")):
        if names:
            shown = ", ".join(stored.get(name, name) for name in sorted(names)[:NAMED])
            subject = "the mapping" if what != "lacks" else "it"
            raise OpenModelError(
                f"{folder.path}: {subject} {what} {len(names)} tensors: {shown}; is its config.json the one of its "
                "weights?"
            )
    return stored


def copy_out(parameters: Mapping[str, Tensor], entries: Sequence[Entry]) -> dict[str, Tensor]:
    """Return their tensors by name, fp32, made of our parameters."""
    tensors = {}
    for entry in entries:
        ours = parameters[entry.ours].detach().float().cpu()
        parts = ours.split(entry.rows) if entry.rows else (ours,)
        for name, part in zip(entry.theirs, parts, strict=True):
            tensors[name] = entry.form[1](part).contiguous().clone()
    return tensors


def _copy_entry(target: Tensor, folder: OpenFolder, entry: Entry, names: Sequence[str], *, apply: bool) -> None:
    shapes = [tuple(entry.form[0](torch.empty(folder.shape(name), device="meta")).shape) for name in names]
    rows = entry.rows or (shapes[0][0],)
    room = target.shape[0] >= sum(rows) if entry.grows else target.shape[0] == sum(rows)
    if not room or any(shape != (count, *target.shape[1:]) for shape, count in zip(shapes, rows, strict=True)):
        raise OpenModelError(
            f"{folder.path}: {' and '.join(names)} have shapes {', '.join(map(str, shapes))}, parameter {entry.ours} "
            f"is {tuple(target.shape)}; take the model section that `triweave import` wrote"
        )
    if apply:
        with torch.no_grad():
            first = 0
            for name, count in zip(names, rows, strict=True):
                target[first : first + count].copy_(entry.form[0](folder.tensor(name)))
                first += count


def _matches(name: str, patterns: Collection[str]) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)
