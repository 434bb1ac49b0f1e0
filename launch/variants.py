"""Trainings that differ from a run in one thing: its control on shuffled pairs, and a model for each fold.

    RUN/control          the same config with data.sources[*].shuffle_pairs
    RUN/folds/K          the same config with data.sources[*].hold_out = "K/N" instead of its split

They go through the launcher with --resume, so an interrupted one continues, and a finished one is left as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from triweave.launch.errors import LaunchError
from triweave.launch.machine import Machine

if TYPE_CHECKING:
    from triweave.pretrain.config import RunConfig

SHUFFLE_SEED = 1
"""Seed of the control's wrong pairs."""
REQUEST_NAME = "variant.yaml"
"""What a variant was asked to be, in its run_dir: the config it is trained with."""
LOG_NAME = "launch.log"


def control_config(config: RunConfig, run_dir: Path) -> RunConfig:
    """Return the config of the control of a run, which is written to `run_dir`."""
    return _variant(config, run_dir / "control", shuffle_pairs=SHUFFLE_SEED)


def fold_config(config: RunConfig, run_dir: Path, fold: int, folds: int) -> RunConfig:
    """Return the config of the model that is asked about fold `fold` of `folds`, below `run_dir`."""
    return _variant(config, run_dir / "folds" / str(fold), split=None, hold_out=f"{fold}/{folds}")


def train_variant(
    config: RunConfig, *, ranks: int, machine: Machine, tell: Callable[[str], object] = lambda _: None
) -> Path:
    """Train a variant to its last step unless that is done, and return its run_dir.

    Raises LaunchError where the folder holds another training or a rank fails, KeyboardInterrupt where it is stopped.
    """
    from triweave.launch.deepspeed_launcher import local_command
    from triweave.launch.machine import free_port
    from triweave.launch.preflight import check_run
    from triweave.launch.processes import run_to_end
    from triweave.pretrain.checkpoints.checkpoint import newest_checkpoint

    run_dir = Path(config.run_dir)
    request = _write_request(config, run_dir)
    steps, reached = config.train.steps, newest_checkpoint(run_dir)
    if reached >= steps:
        tell(f"{run_dir} is trained already ({reached} steps)")
        return run_dir
    check_run(config, ranks=ranks)
    tell(f"training {run_dir}, steps {reached + 1} to {steps}, on {ranks} rank{'s' * (ranks > 1)}")
    command = local_command([str(request.resolve()), "--resume"], machine=machine, ranks=ranks, port=free_port())
    with (run_dir / LOG_NAME).open("ab") as log:
        outcome = run_to_end(command, log=log)
    if outcome.stopped_by is not None:
        raise KeyboardInterrupt
    if outcome.exit_code != 0:
        raise LaunchError(
            f"the training of {run_dir} ended with exit code {outcome.exit_code}; its output is in "
            f"{run_dir / LOG_NAME}; the same command continues it"
        )
    return run_dir


def _variant(config: RunConfig, run_dir: Path, **changes: object) -> RunConfig:
    sources = [dataclasses.replace(source, **changes) for source in config.data.sources]  # type: ignore[arg-type]
    data = dataclasses.replace(config.data, sources=sources)
    return dataclasses.replace(config, run_dir=str(run_dir), data=data)


def _write_request(config: RunConfig, run_dir: Path) -> Path:
    """Write the variant's config into its folder. Raises LaunchError where another one is there.

    The same run named by another path is no other one.
    """
    from triweave.pretrain.config import load_config, save_resolved, to_yaml

    request = run_dir / REQUEST_NAME
    if request.is_file():
        earlier = dataclasses.replace(load_config(request), run_dir=config.run_dir)
        if to_yaml(earlier) != to_yaml(config):
            raise LaunchError(
                f"{run_dir} was trained with another config (compare {request}); remove the folder to train it anew"
            )
        if request.read_text(encoding="utf-8") == to_yaml(config):
            return request
    try:
        save_resolved(config, request)
    except OSError as error:
        raise LaunchError(f"{run_dir}: {error.strerror}; choose a run below a folder that can be written") from None
    return request
