"""DataConfig: what to read, how to blend and pack it, and the reader of the `data:` key of a run's YAML."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_type_hints

from triweave.data_pipeline.errors import ConfigError, DataError
from triweave.data_pipeline.media.geometry import MediaGeometry
from triweave.data_pipeline.splits import SPLITS

MAX_SEQUENCE_LENGTH = 1 << 24
"""Longest pack; packing keeps a bit per token of room, and positions are int32."""
SOURCE_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
MAX_FOLDS = 1000
MEDIA_BUDGETS = ("image_tokens", "images", "audio_ms", "encoder_cost")
"""Budgets of a pack beside its tokens."""
MAX_ENCODER_WEIGHT = 1_000_000


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One shard folder of the mixture."""

    name: str
    """Name of the source in the plan, the ledger and the logs: [a-z0-9_-], at most 64 characters."""
    shards: str
    """Folder with tars, indices and manifest.json, as `triweave build` writes it, or the s3://bucket/prefix that
    `triweave push` copied it to."""
    weight: float = 1.0
    """How much of this source is drawn, in the unit that data.weight_unit names; 0 leaves it out for now."""
    split: str | None = None
    """Take only samples whose `split` label is this: train, validation or test; None: all of them."""
    hold_out: str | None = None
    """"k/N": leave out the samples of fold k of N, dealt by their `group` label, whatever their split; None: none."""
    shuffle_pairs: int | None = None
    """Seed of the control: every medium is exchanged for one of its modality from the same shard, so that pairs are
    wrong and everything else is as it was; None: true pairs."""

    def __post_init__(self) -> None:
        """Refuse weights, names and selections that no plan can use."""
        self._check_selection()
        if not 0 <= self.weight < float("inf"):
            raise ConfigError(f"data.sources.{self.name}.weight={self.weight}: must be 0 or more, and finite")
        if not SOURCE_NAME.fullmatch(self.name):
            raise ConfigError(f"data.sources name {self.name!r}: use 1 to 64 of a-z, 0-9, _ and -")

    @property
    def fold(self) -> tuple[int, int] | None:
        """The fold that is left out and the number of folds."""
        if self.hold_out is None:
            return None
        number, _, folds = self.hold_out.partition("/")
        return int(number), int(folds)

    def _check_selection(self) -> None:
        prefix = f"data.sources.{self.name}"
        if self.split is not None and self.split not in SPLITS:
            raise ConfigError(f"{prefix}.split={self.split!r}: must be one of {', '.join(SPLITS)}, or null for all")
        if self.hold_out is not None:
            match = re.fullmatch(r"(\d{1,4})/(\d{1,4})", self.hold_out)
            if not match or not 2 <= int(match[2]) <= MAX_FOLDS or int(match[1]) >= int(match[2]):
                raise ConfigError(
                    f"{prefix}.hold_out={self.hold_out!r}: must be k/N with k below N, and N from 2 to {MAX_FOLDS}, "
                    "for example 0/5"
                )
            if self.split is not None:
                raise ConfigError(
                    f"{prefix}: split={self.split} and hold_out={self.hold_out} do not go together; "
                    "set one of them to null"
                )
        if self.shuffle_pairs is not None and not 0 <= self.shuffle_pairs < 2**63:
            raise ConfigError(f"{prefix}.shuffle_pairs={self.shuffle_pairs}: must be in [0, 2**63), or null")


@dataclass(frozen=True, kw_only=True)
class PackingConfig:
    """Budgets of one pack beside its tokens. None: whatever fits into the tokens, so the cap scales with the length."""

    image_tokens: int | None = None
    """Most image tokens in a pack, the bound on what the image tower sees at once; None: sequence_length."""
    images: int | None = None
    """Most pictures in a pack; None: sequence_length // 4, so only documents of a few tokens meet it."""
    audio_ms: int | None = None
    """Most milliseconds of audio in a pack; None: what sequence_length audio tokens last."""
    encoder_cost: int | None = None
    """Most work of the media encoders for a pack, the sum of encoder_weights x media tokens; None: whatever fits."""
    encoder_weights: dict[str, float] = field(default_factory=dict)
    """Modality -> work of its encoder for one media token, in tokens of the trunk; 1 for those that are not named. Part
    of the estimated cost that rows are dealt to ranks by."""
    attention_cost_tokens: int = 2048
    """Length of a document at which its attention costs as much as the rest of the trunk: part of that estimate. By
    operations 12 x d_model for plain blocks (24 d_model^2 a token against 2 n d_model); 2048 is a width of 170."""
    contrastive_group_rows: int = 64
    """Consecutive plan rows whose spans are each other's negatives; independent of ranks and micro-batches."""
    contrastive_share: float = 0.0
    """Share of the documents with parts of two or more modalities whose first part of each also comes alone, as a
    one-span segment for contrastive losses; 0: none."""

    def __post_init__(self) -> None:
        """Refuse caps below 1 and shares that are none."""
        if not 0 <= self.contrastive_share <= 1:
            raise ConfigError(f"data.packing.contrastive_share={self.contrastive_share}: must be from 0 to 1")
        for name in (*MEDIA_BUDGETS, "attention_cost_tokens", "contrastive_group_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                default = ", or null for the default" if name in MEDIA_BUDGETS else ""
                raise ConfigError(f"data.packing.{name}={value}: must be at least 1{default}")
        for name, weight in self.encoder_weights.items():
            if not 0 <= weight <= MAX_ENCODER_WEIGHT:
                raise ConfigError(
                    f"data.packing.encoder_weights.{name}={weight}: must be from 0 to {MAX_ENCODER_WEIGHT:,}"
                )

    def caps(self, sequence_length: int, geometry: MediaGeometry) -> dict[str, int]:
        """Return budget name -> cap of a pack of `sequence_length` tokens, `tokens` first."""
        token_ms = geometry.audio_frames_per_token * geometry.audio_hop_ms
        window_ms = geometry.audio_window_ms
        return {
            "tokens": sequence_length,
            "image_tokens": self.image_tokens or sequence_length,
            "images": self.images or max(1, sequence_length // 4),
            "audio_ms": self.audio_ms or sequence_length * token_ms + window_ms,
            "encoder_cost": self.encoder_cost
            or math.ceil(sequence_length * max([1.0, *self.encoder_weights.values()])),
        }


@dataclass(frozen=True, kw_only=True)
class BatchCaps:
    """Most of each budget in all rows of a global step together; a step that would pass one has fewer rows."""

    image_tokens: int | None = None
    """Most image tokens in a step; None: whatever the rows hold."""
    images: int | None = None
    """Most pictures in a step; None: whatever the rows hold."""
    audio_ms: int | None = None
    """Most milliseconds of audio in a step; None: whatever the rows hold."""
    encoder_cost: int | None = None
    """Most work of the media encoders for a step, as in packing.encoder_cost; None: whatever the rows hold."""

    @property
    def set_caps(self) -> dict[str, int]:
        """Budget name -> cap, of those that are set."""
        return {name: value for name in MEDIA_BUDGETS if (value := getattr(self, name)) is not None}


@dataclass(frozen=True, kw_only=True)
class ScheduleEntry:
    """A change of the plan at a step boundary; what it does not name stays as it was before."""

    after_step: int
    """Steps that the plan before this entry makes, counted from the start of the stream; at least 1."""
    weights: dict[str, float] | None = None
    """Source name -> new weight; 0 leaves a source out."""
    sequence_length: int | None = None
    """New length of a pack."""
    image_tokens: int | None = None
    """New packing.image_tokens."""
    images: int | None = None
    """New packing.images."""
    audio_ms: int | None = None
    """New packing.audio_ms."""
    encoder_cost: int | None = None
    """New packing.encoder_cost."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Everything the stream of packs depends on, and how this machine reads it."""

    sources: list[SourceConfig]
    """Shard folders to blend. One source is read epoch by epoch; several are drawn by weight."""
    tokenizer: str
    """Tokenizer file of `triweave tokenizer train`; `triweave tokenize` must have counted the shards with it."""
    sequence_length: int = 4096
    """Tokens of a pack, L."""
    geometry: MediaGeometry = field(default_factory=MediaGeometry)
    """How pictures and sounds become tokens."""
    packing: PackingConfig = field(default_factory=PackingConfig)
    """Budgets of a pack beside its tokens."""
    batch_caps: BatchCaps = field(default_factory=BatchCaps)
    """Budgets of a global step. Like the number of rows of a step they may change at a resume."""
    weight_unit: Literal["samples", "tokens", "epochs"] = "samples"
    """What the weights of the sources say: their shares of the samples drawn, their shares of the tokens drawn, or how
    many epochs of each are drawn in one pass (0.5: every other pass a sample comes; 3: three times)."""
    schedule: list[ScheduleEntry] = field(default_factory=list)
    """Changes of weights, length and caps, each from a step on. Entries later than a checkpoint may be added or altered
    when it is resumed."""
    block_samples: int = 65_536
    """Samples that are shuffled and packed together: more mixes better and costs each process memory, about 1 kB
    each."""
    labels: list[str] = field(default_factory=list)
    """Document labels that come with every batch, for objectives that learn them; `triweave stats` lists them."""
    seed: int = 0
    """Seed of every order the plan draws."""
    workers: int = 2
    """Processes per rank that read, decode and pack; 0 does it in the training process. Never changes what is read."""
    prefetch: int = 2
    """Micro-batches each worker keeps ready; all workers together at least those of one step, which are asked for at
    once."""
    corrupt_budget: float = 0.001
    """Damaged samples a rank may replace by fillers before it stops: below 1 a share of an epoch's samples, rounded
    up; from 1 on a number."""

    def __post_init__(self) -> None:
        """Refuse values no plan can use."""
        if not self.sources:
            raise ConfigError("data.sources is empty: name at least one shard folder")
        names = [source.name for source in self.sources]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"data.sources names {name!r} twice: give each source its own name")
        for name, least in (("sequence_length", 8), ("block_samples", 1), ("workers", 0), ("prefetch", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"data.{name}={getattr(self, name)}: must be at least {least}")
        if self.sequence_length > MAX_SEQUENCE_LENGTH:
            raise ConfigError(f"data.sequence_length={self.sequence_length}: must be at most {MAX_SEQUENCE_LENGTH}")
        if not 0 <= self.corrupt_budget < float("inf"):
            raise ConfigError(f"data.corrupt_budget={self.corrupt_budget}: must be 0 or more, and finite")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"data.seed={self.seed}: must be in [0, 2**63)")
        if not any(source.weight for source in self.sources):
            raise ConfigError("data.sources: every source has weight=0; give at least one a weight above 0")
        self._check_batch_caps()
        self._check_schedule()

    def _check_batch_caps(self) -> None:
        for name, cap in self.batch_caps.set_caps.items():
            if cap < self.caps[name]:
                raise ConfigError(
                    f"data.batch_caps.{name}={cap}: a single pack may hold {self.caps[name]}; raise it, or set "
                    f"data.packing.{name} to {cap} or less"
                )
            rows = self.packing.contrastive_group_rows
            if self.packing.contrastive_share and cap < rows * self.caps[name]:
                raise ConfigError(
                    f"data.batch_caps.{name}={cap}: a step holds whole contrastive groups, and one of {rows} packs may "
                    f"hold {rows * self.caps[name]}; raise it, or lower data.packing.contrastive_group_rows or "
                    f"data.packing.{name}"
                )

    def _check_schedule(self) -> None:
        """Refuse entries out of order or of unknown sources; a segment that cannot be raises when it is made."""
        names = [source.name for source in self.sources]
        before = 0
        for number, entry in enumerate(self.schedule):
            prefix = f"data.schedule[{number}]"
            if entry.after_step <= before:
                raise ConfigError(
                    f"{prefix}.after_step={entry.after_step}: must be above "
                    f"{f'that of the entry before it, {before}' if number else '0'}"
                )
            before = entry.after_step
            for name in entry.weights or {}:
                if name not in names:
                    near = difflib.get_close_matches(name, names, n=1)
                    hint = f"did you mean {near[0]}?" if near else f"sources: {', '.join(names)}"
                    raise ConfigError(f"{prefix}.weights.{name}: data.sources has no such name; {hint}")
        if self.schedule:
            _ = self.segments

    @property
    def segments(self) -> tuple[DataConfig, ...]:
        """The config of each plan segment, without a schedule: the first as written, then one for every entry."""
        segments = [replace(self, schedule=[])]
        for number, entry in enumerate(self.schedule):
            try:
                segments.append(_changed(segments[-1], entry))
            except ConfigError as error:
                raise ConfigError(f"data.schedule[{number}]: {error}") from None
        return tuple(segments)

    @property
    def caps(self) -> dict[str, int]:
        """Budget name -> cap of one pack."""
        return self.packing.caps(self.sequence_length, self.geometry)


def _changed(config: DataConfig, entry: ScheduleEntry) -> DataConfig:
    """Return a config with the changes of one entry of its schedule."""
    weights = entry.weights or {}
    caps = {name: value for name in MEDIA_BUDGETS if (value := getattr(entry, name)) is not None}
    return replace(
        config,
        sources=[replace(source, weight=weights.get(source.name, source.weight)) for source in config.sources],
        sequence_length=config.sequence_length if entry.sequence_length is None else entry.sequence_length,
        packing=replace(config.packing, **caps),
    )


def load_data_config(path: str | Path, overrides: Sequence[str] = ()) -> DataConfig:
    """Return the `data:` key of a run's YAML with dotted `data.key=value` overrides applied.

    Keys outside `data` are left to their owners, and overrides of them are ignored, so the same command line works for
    planning and for training. Raises ConfigError naming the key, and the nearest known one where a key is unknown.
    """
    import jsonargparse

    keys = read_yaml(path)
    if "data" not in keys:
        raise ConfigError(f"{path}: has no `data:` key, which names the shards and the tokenizer")
    dotted = [item for item in overrides if item.split("=", 1)[0].split(".")[0] == "data"]
    check_keys(DataConfig, keys["data"], "data")
    for item in dotted:
        check_override(DataConfig, item, "data")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--data", type=DataConfig, required=True)
    try:
        parsed = parser.parse_args(["--data", _to_json(keys["data"])] + [f"--{item}" for item in dotted])
        config = parser.instantiate_classes(parsed).data
    except DataError:
        raise
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, DataError):
            cause = cause.__cause__ or cause.__context__
        if cause is not None:
            raise cause from None
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from None
    assert isinstance(config, DataConfig)
    return config


LISTED: dict[str, type] = {"sources": SourceConfig, "schedule": ScheduleEntry}
"""Keys that hold a list of mappings, and what each of these is."""


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Return the mapping a YAML file holds. Raises ConfigError where there is none."""
    import yaml

    try:
        keys = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the config: {error.strerror}; pass an existing YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(keys, dict):
        raise ConfigError(f"{path}: holds no mapping of keys; see the configs shipped in launch/configs")
    return keys


def check_keys(owner: type, keys: Any, prefix: str) -> None:
    """Raise ConfigError for the first key that `owner` (a dataclass) does not have, naming the nearest one it has."""
    if not isinstance(keys, dict):
        raise ConfigError(f"{prefix}={keys!r}: must be a mapping of keys to values")
    types = get_type_hints(owner)
    known = [item.name for item in fields(owner)]
    for key, value in keys.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"did you mean {prefix}.{near[0]}?" if near else f"known keys: {', '.join(known)}"
            raise ConfigError(f"{prefix}.{key}: unknown key; {hint}")
        if is_dataclass(types[key]) and isinstance(types[key], type):
            check_keys(types[key], value, f"{prefix}.{key}")
        elif key in LISTED and isinstance(value, list):
            for number, item in enumerate(value):
                check_keys(LISTED[key], item, f"{prefix}.{key}[{number}]")


def check_override(owner: type, item: str, prefix: str) -> None:
    """Raise ConfigError where `prefix.key[.key]=value` is no assignment, or names a key that `owner` does not have."""
    name, separator, _ = item.partition("=")
    if not separator:
        raise ConfigError(f"{item!r}: an override has the form key=value, for example {prefix}.seed=1")
    nested: Any = None
    for part in reversed(name.split(".")[1:]):
        nested = {part: nested}
    if nested is None:
        raise ConfigError(f"{item!r}: set one key of {prefix} at a time, for example {prefix}.seed=1")
    types = get_type_hints(owner)
    first = name.split(".")[1]
    inner = types.get(first)
    if len(name.split(".")) > 2 and not (isinstance(inner, type) and is_dataclass(inner)) and first in types:
        raise ConfigError(f"{name}: {prefix}.{first} has no keys of its own to override")
    if len(name.split(".")) > 2 or first not in types:
        check_keys(owner, nested, prefix)


def _to_json(keys: Any) -> str:
    import json

    return json.dumps(keys)
