"""Load the model of a run from a checkpoint: one process, no DeepSpeed, whatever world and ZeRO stage wrote it.

The weights are the fp32 ones that training keeps, bit by bit; the config is the checkpoint's own copy of the resolved
one. Paths in a config are relative to the folder that the run was started in; `LoadedRun.locate` finds them from
elsewhere as long as the run lies where its config says, below that folder.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from triweave.data_pipeline.batch import PackedBatch
from triweave.data_pipeline.errors import TokenizerError
from triweave.data_pipeline.media.modalities import MODALITIES
from triweave.data_pipeline.stream.state import StreamState
from triweave.data_pipeline.text.tokenizer import Tokenizer
from triweave.pretrain.batch import DeviceBatch, kernel_tables, to_device
from triweave.pretrain.checkpoints.checkpoint import Checkpoint, find_whole_checkpoint
from triweave.pretrain.checkpoints.reader import Wanted
from triweave.pretrain.checkpoints.stores import MANIFEST
from triweave.pretrain.config import RunConfig, load_config
from triweave.pretrain.errors import CheckpointError, PretrainError
from triweave.pretrain.model.model import MultimodalTransformer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LoadedRun:
    """A trained model and what is needed to use it.

    config: of the run at this checkpoint. model: fp32, in eval mode, without gradients. step: optimizer steps behind
    it. run_dir: where it was found.
    """

    config: RunConfig
    model: MultimodalTransformer
    tokenizer: Tokenizer
    step: int
    run_dir: Path

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        return self.model.token_embedding.weight.device

    def to_device(self, batch: PackedBatch) -> DeviceBatch:
        """Return a batch as the model reads it: in its layout, with its kernels' tables, where its weights are."""
        tables = kernel_tables(self.config.model, self.device, self.model.token_embedding.weight.dtype)
        return to_device(replace(batch, extra=tables(batch)), self.device)

    def locate(self, path: str | Path) -> Path:
        """Return where a path of the config (shards, tokenizer) is now; unchanged where it is nowhere."""
        return locate(path, self.config, self.run_dir)


def load_run(
    run_dir: str | Path,
    *,
    step: int | None = None,
    device: str | torch.device = "cpu",
    tell: Callable[[str], None] = logger.warning,
) -> LoadedRun:
    """Return a run's model as it was at its newest whole checkpoint, or at the checkpoint of `step`.

    Every byte is checked against the manifest. Without `step` a damaged checkpoint is told about and passed over.
    Raises CheckpointError where there is no such run or checkpoint, or it is damaged or of another model;
    PretrainError for its config or the device, TokenizerError for its tokenizer.
    """
    root = Path(run_dir)
    target = _device(device)
    checkpoint = find_whole_checkpoint(run_dir, step, tell=tell)
    config = load_config(checkpoint.folder / MANIFEST, text=checkpoint.config_yaml)
    tokenizer = _tokenizer(config, root, checkpoint)
    model = _build(config, checkpoint, tokenizer)
    _read_weights(model, checkpoint)
    return LoadedRun(
        config=config,
        model=model.to(target).eval().requires_grad_(False),
        tokenizer=tokenizer,
        step=checkpoint.step,
        run_dir=root,
    )


def locate(path: str | Path, config: RunConfig, run_dir: Path) -> Path:
    """Return where a path of a config is: below the folder the run was started in, else as it is written."""
    path, said, found = Path(path), Path(config.run_dir), run_dir.resolve()
    if path.is_absolute() or said.is_absolute() or found.parts[-len(said.parts) :] != said.parts:
        return path
    started_in = found.parents[len(said.parts) - 1]
    return started_in / path if started_in != Path.cwd() and (started_in / path).exists() else path


def _device(device: str | torch.device) -> torch.device:
    target: torch.device | None = None
    with suppress(RuntimeError):
        target = torch.device(device)
    if target is None or target.type not in ("cpu", "cuda"):
        raise PretrainError(f"device {str(device)!r} is not known; use cpu or cuda")
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise PretrainError(f"device {str(device)!r}: there are {torch.cuda.device_count()} CUDA devices here; use cpu")
    return target


def _tokenizer(config: RunConfig, run_dir: Path, checkpoint: Checkpoint) -> Tokenizer:
    path = locate(config.data.tokenizer, config, run_dir)
    if not path.exists():
        raise TokenizerError(
            f"tokenizer {path} of the run {run_dir} is not there; run this in the folder that the run was started in, "
            "or put the file back"
        )
    tokenizer = Tokenizer.load(path)
    trained_with = _tokenizer_hash(checkpoint.state)
    if trained_with not in (None, tokenizer.hash):
        raise TokenizerError(
            f"tokenizer {path} is not the one {run_dir} was trained with (xxh3 {tokenizer.hash}, it was "
            f"{trained_with}); put that one back"
        )
    return tokenizer


def _tokenizer_hash(state: Mapping[str, Any]) -> str | None:
    """Return the xxh3 of the tokenizer that the stream's last plan names, None where there is no stream."""
    if "stream" not in state:
        return None
    segments = StreamState.from_json(state["stream"]).segments
    return segments[-1].identity.get("tokenizer") if segments else None


def _build(config: RunConfig, checkpoint: Checkpoint, tokenizer: Tokenizer) -> MultimodalTransformer:
    """Return a model with the towers that the checkpoint has, its weights still to be read."""
    stored = checkpoint.manifest["parameters"]
    towers = {name.split(".")[1] for name in stored if name.startswith("towers.")}
    if unknown := sorted(towers - set(MODALITIES)):
        raise CheckpointError(
            f"{checkpoint.folder} has a tower for {unknown[0]!r}, a modality that is not registered here; register it "
            "before loading"
        )
    features = {name: MODALITIES[name].features(config.data.geometry) for name in MODALITIES if name in towers}
    return MultimodalTransformer(
        config.model, vocab_size=tokenizer.vocab_size, media_features=features, seed=config.seed
    )


def _read_weights(model: MultimodalTransformer, checkpoint: Checkpoint) -> None:
    """Fill every parameter; tied ones are one parameter and are read once."""
    stored = checkpoint.manifest["parameters"]
    parameters = dict(model.named_parameters())
    if missing := sorted(set(parameters) ^ set(stored)):
        where = "the checkpoint" if missing[0] in stored else "the model"
        raise CheckpointError(
            f"{checkpoint.folder}: parameter {missing[0]} is only in {where} ({len(missing)} differ); it was written "
            "by another version of the model"
        )
    for name, parameter in parameters.items():
        if tuple(stored[name]["shape"]) != tuple(parameter.shape):
            raise CheckpointError(
                f"{checkpoint.folder}: parameter {name} is {stored[name]['shape']} there and {list(parameter.shape)} "
                "in the model of its config and tokenizer; put the tokenizer of the run back"
            )
    checkpoint.reader.read(
        Wanted(target=parameter.data.view(-1), kind="weight", name=name, offset=0)
        for name, parameter in parameters.items()
    )
