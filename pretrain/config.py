"""RunConfig: everything one run depends on, read from one YAML file and dotted overrides.

Defaults, then the file, then `key=value` overrides, the later winning. Every section is a frozen dataclass beside its
owner; jsonargparse checks the types, each dataclass its own values, and unknown keys are named with the nearest known.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from triweave.data_pipeline.config import DataConfig
from triweave.data_pipeline.errors import DataError
from triweave.pretrain.checkpoints.checkpoint import CheckpointConfig
from triweave.pretrain.encoders.config import check_encoders
from triweave.pretrain.engine.config import TrainConfig, deepspeed_config
from triweave.pretrain.engine.optimizer import OptimizerConfig
from triweave.pretrain.engine.schedule import ScheduleConfig
from triweave.pretrain.errors import PretrainError
from triweave.pretrain.health.settings import HealthConfig
from triweave.pretrain.model.config import ModelConfig
from triweave.pretrain.objectives.config import (
    SEGMENT_OBJECTIVES,
    ClassificationConfig,
    RegressionConfig,
    TasksConfig,
)
from triweave.pretrain.open_models.config import INIT_PARTS, check_open_encoders

SEED_LIMIT = 2**63


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One pretraining run."""

    run_dir: str
    """Folder of the run: resolved config, metrics, checkpoints, consumed samples. Made when missing."""
    data: DataConfig
    """What is read and how it is packed."""
    seed: int = 0
    """Seed of the initial weights; the order of the data has its own, data.seed."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Architecture."""
    init_from: dict[str, str] = field(default_factory=dict)
    """{model: FOLDER} starts from a local transformers folder, whose model section `triweave import` writes; a resumed
    run goes on from its checkpoint and does not look at it."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW and clipping."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Learning rate over the steps."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Steps, batch, ZeRO stage, precision."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When to save and what to keep."""
    tasks: TasksConfig = field(default_factory=TasksConfig)
    """Which of the objectives a step trains."""
    health: HealthConfig = field(default_factory=HealthConfig)
    """What is done about bad steps and about ranks that stand still."""
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """Passed to DeepSpeed as written; keys that follow from the other sections are refused."""

    def __post_init__(self) -> None:
        if not self.run_dir:
            raise PretrainError("run_dir is empty; name the folder this run writes to")
        if not 0 <= self.seed < SEED_LIMIT:
            raise PretrainError(f"seed is {self.seed}; it must be in [0, 2**63)")
        check_encoders(self.model.encoders, self.data.geometry)
        check_open_encoders(self.model.open_encoders, self.data.geometry)
        for part in self.init_from:
            if part not in INIT_PARTS:
                raise PretrainError(f"init_from.{part}: unknown key; known: {', '.join(INIT_PARTS)}")
        if self.train.compile and self.model.attention in ("flex", "flash"):
            raise PretrainError(
                f"train.compile is true and model.attention is {self.model.attention!r}, whose kernels the compiler "
                "cannot take as one operation; set model.attention=auto, or train.compile=false"
            )
        if self.train.compile and self.train.sequence_parallel > 1:
            raise PretrainError(
                f"train.compile is true and train.sequence_parallel is {self.train.sequence_parallel}, whose blocks "
                "exchange heads in their middle; set one of them to its default"
            )
        self._check_objectives()
        if self.model.objectives.get("contrastive"):
            self._check_contrastive()
        if self.train.sequence_parallel > 1:
            self._check_sequence_parallel()

    def _check_sequence_parallel(self) -> None:
        """Raise PretrainError where something reads what lies in other ranks' slices of the rows."""
        ranks, model = self.train.sequence_parallel, self.model
        asked = f"train.sequence_parallel is {ranks}"
        if model.heads < ranks:
            raise PretrainError(
                f"{asked} but model.heads is {model.heads}, so some ranks would have none; use at most {model.heads}"
            )
        # late fusion joins objectives over items, so it is among these
        if others := [name for name in model.objective_names if name != "language_model"]:
            raise PretrainError(
                f"{asked} but model.objectives has {others[0]}, whose rows reach over slices; set "
                f"train.sequence_parallel=1, or remove {others[0]}"
            )
        if self.train.absent_modality == "align":
            raise PretrainError(
                f"{asked} but train.absent_modality is align, and slices of one row hold unlike media; set "
                "train.absent_modality to skip, or train.sequence_parallel=1"
            )

    def _check_objectives(self) -> None:
        """Raise PretrainError where the data lacks what an objective learns from, or the schedule of tasks is none."""
        wanted = self.model.objectives
        self.tasks.check(wanted)
        labelled: dict[str, ClassificationConfig | RegressionConfig] = {
            "classification": self.model.classification,
            "regression": self.model.regression,
        }
        for name, settings in labelled.items():
            if name in wanted and settings.label not in self.data.labels:
                raise PretrainError(
                    f"model.{name}.label is {settings.label} but data.labels is {self.data.labels}, so no batch brings "
                    f"it; set data.labels={[*self.data.labels, settings.label]}"
                )
        over_segments = [name for name, settings in labelled.items() if settings.over != "documents"]
        for name in wanted:
            if name in (*SEGMENT_OBJECTIVES[1:], *over_segments) and not self.data.packing.contrastive_share > 0:
                raise PretrainError(
                    f"model.objectives has {name}, which learns from parts that are packed alone, but "
                    "data.packing.contrastive_share is 0; set data.packing.contrastive_share=1.0"
                )

    def _check_contrastive(self) -> None:
        """Raise PretrainError unless the data has segments, and every group of them lies within one step."""
        packing, rows = self.data.packing, self.train.global_batch_rows
        if not packing.contrastive_share > 0:
            raise PretrainError(
                "model.objectives has contrastive but data.packing.contrastive_share is 0, so no part is packed alone; "
                "set data.packing.contrastive_share=1.0, or remove contrastive from model.objectives"
            )
        if rows % packing.contrastive_group_rows:
            fitting = math.gcd(rows, packing.contrastive_group_rows)
            raise PretrainError(
                f"train.global_batch_rows is {rows}, no multiple of data.packing.contrastive_group_rows="
                f"{packing.contrastive_group_rows}, so groups would be cut by steps; set "
                f"data.packing.contrastive_group_rows to {rows} or another divisor of it, such as {fitting}"
            )

    def check_resume_row(self, row: int) -> None:
        """Raise PretrainError where going on at plan row `row` would cut contrastive groups by steps."""
        group_rows = self.data.packing.contrastive_group_rows
        if self.model.objectives.get("contrastive") and row % group_rows:
            raise PretrainError(
                f"the checkpoint goes on at plan row {row}, no multiple of data.packing.contrastive_group_rows="
                f"{group_rows}, so groups would be cut by steps; set it to a divisor of {row} and of "
                f"train.global_batch_rows={self.train.global_batch_rows}, such as "
                f"{math.gcd(row, self.train.global_batch_rows)}"
            )

    def check_world(self, world_size: int) -> None:
        """Raise PretrainError where `world_size` ranks make no whole groups, or cannot all get a row of every step."""
        rows, together = self.train.global_batch_rows, self.train.sequence_parallel
        if world_size < 1:
            raise PretrainError(f"{world_size} ranks asked for; start at least 1")
        if world_size % together:
            raise PretrainError(
                f"{world_size} ranks are no multiple of train.sequence_parallel={together}; start "
                f"{world_size - world_size % together or together}, or set train.sequence_parallel to a divisor of "
                f"{world_size}"
            )
        if rows * together < world_size:
            raise PretrainError(
                f"{world_size} ranks but train.global_batch_rows is {rows}, so some would have no rows; "
                f"start at most {rows * together} or set train.global_batch_rows={world_size // together}"
            )


def load_config(path: str | Path, overrides: Sequence[str] = (), *, text: str | None = None) -> RunConfig:
    """Return the config of a YAML file with dotted overrides such as `model.layers=4` applied.

    text: what the file says, where it is no file of this machine; `path` only names it then.

    Raises PretrainError (or the DataError of the `data:` section), one line each, for a file that is missing or no
    YAML mapping, an unknown key, a value of the wrong type or out of range, and a `deepspeed` key that we decide.
    """
    tree = _read_mapping(Path(path), text)
    for override in overrides:
        _apply_override(tree, override)
    _check_keys(RunConfig, tree, "")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(RunConfig)
    try:
        config = RunConfig(**vars(parser.instantiate(parser.parse_object(tree))))
    except (PretrainError, DataError):
        raise
    except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
        raise _user_error(Path(path), error) from None
    deepspeed_config(config, accumulation=1, parameters=1)  # refuses keys of ours before any rank is started
    return config


def save_resolved(config: RunConfig, path: str | Path) -> None:
    """Write every key of the config as YAML, atomically; `load_config` of the file gives an equal config."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(to_yaml(config))
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(target)


def to_yaml(config: RunConfig) -> str:
    """Return every key of the config as YAML."""
    text: str = yaml.safe_dump(to_plain(config), sort_keys=False, allow_unicode=True)
    return text


def to_plain(value: Any) -> Any:
    """Return a config as dicts, lists and scalars, as YAML and JSON know them."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: to_plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return value


def _read_mapping(path: Path, text: str | None) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8") if text is None else text)
    except OSError as error:
        raise PretrainError(f"{path}: cannot read the config: {error.strerror}; pass an existing YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PretrainError(f"{path}: not YAML: {_one_line(error)}") from None
    if not isinstance(tree, dict):
        raise PretrainError(f"{path}: holds no mapping of keys; see the configs shipped in launch/configs")
    return tree


def _apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one dotted key of the tree; values are YAML, except where the key takes a string."""
    name, separator, text = override.partition("=")
    if not separator or not name:
        raise PretrainError(f"{override!r}: an override has the form key=value, for example model.layers=4")
    keys = name.split(".")
    owner: Any = RunConfig
    here: Any = tree
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if dataclasses.is_dataclass(owner):
            prefix = ".".join([*keys[:depth], ""])
            _check_keys(typing.cast(type, owner), {key: None}, prefix, shallow=True)
            owner = typing.get_type_hints(owner)[key]
        elif typing.get_origin(owner) is not dict and owner is not Any:
            raise PretrainError(f"{name}: {'.'.join(keys[:depth])} is one value and has no keys of its own")
        else:
            owner = (typing.get_args(owner) or (Any,))[-1]
        if last:
            here[key] = text if owner is str else _yaml_value(name, text)
            return
        here = here.setdefault(key, {})
        if not isinstance(here, dict):
            raise PretrainError(f"{name}: {'.'.join(keys[: depth + 1])} is {here!r} in the file, not a mapping")


def _yaml_value(name: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise PretrainError(f"{name}={text}: not a YAML value: {_one_line(error)}") from None


def _check_keys(owner: type, tree: Any, prefix: str, *, shallow: bool = False) -> None:
    """Raise PretrainError for the first key below `prefix` that its dataclass lacks, with the nearest known key."""
    if not isinstance(tree, dict):
        raise PretrainError(f"{prefix.rstrip('.')} is {tree!r}; it must be a mapping of keys to values")
    hints = typing.get_type_hints(owner)
    known = [item.name for item in dataclasses.fields(owner)]
    for key, value in tree.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            advice = f"did you mean {prefix}{near[0]}?" if near else f"known keys: {', '.join(known)}"
            raise PretrainError(f"{prefix}{key}: unknown key; {advice}")
        if shallow:
            continue
        inner = hints[key]
        if value is None and type(None) not in typing.get_args(inner):
            raise PretrainError(f"{prefix}{key} is null; give it a value, or remove the key where it has a default")
        if dataclasses.is_dataclass(inner):
            _check_keys(typing.cast(type, inner), value, f"{prefix}{key}.")
        elif typing.get_origin(inner) in (list, dict) and isinstance(value, list | dict):
            element = typing.get_args(inner)[-1]
            for name, item in value.items() if isinstance(value, dict) else enumerate(value):
                if dataclasses.is_dataclass(element):
                    place = f".{name}" if isinstance(value, dict) else f"[{name}]"
                    _check_keys(typing.cast(type, element), item, f"{prefix}{key}{place}.")


def _user_error(path: Path, error: Exception) -> PretrainError:
    """Return jsonargparse's complaint as one line that starts with the file and the key."""
    text = _one_line(error)
    text = re.sub(r'^Parser key "([^"]*)":', r"\1:", text)
    text = re.sub(r"<class '(\w+)'>", r"\1", text)
    text = re.sub(r"\btyping\.Literal\[", "one of [", text)
    text = re.sub(r"Expected an? (.+)\. Got value: ", r"must be \1, got ", text)
    return PretrainError(f"{path}: {text}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
