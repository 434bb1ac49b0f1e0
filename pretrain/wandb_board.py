"""Weights & Biases: the same figures as metrics.jsonl, for those who watch their runs there (extra `wandb`).

Key and host come from its own login or from WANDB_API_KEY and WANDB_BASE_URL, never from a config. With
WANDB_MODE=offline the figures stay in RUN/wandb until `wandb sync`. Nothing is sent but figures, the resolved config
and the machine's load: no code, no console output, no state of git.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from triweave.pretrain.errors import PretrainError


def check_wandb(project: str) -> None:
    """Raise PretrainError where a project is named and the package is not installed."""
    if project and find_spec("wandb") is None:
        raise PretrainError(
            f"train.wandb_project is {project!r}, but wandb is not installed; install the extra: "
            "pip install 'triweave[wandb]', or set train.wandb_project=''"
        )


class WandbBoard:
    """One run of a project. A resumed run goes on under the same id; steps that it does again are not sent twice."""

    def __init__(self, project: str, run_dir: str | Path, config: Mapping[str, Any]) -> None:
        """Begin, or go on with, the run that stands for run_dir. Raises PretrainError where wandb refuses it."""
        import wandb

        folder = Path(run_dir).absolute()
        try:
            self._run = wandb.init(
                project=project,
                name=folder.name,
                id=hashlib.sha256(str(folder).encode()).hexdigest()[:16],
                resume="allow",
                dir=str(folder),
                config=dict(config),
                settings=wandb.Settings(console="off", disable_code=True, disable_git=True, silent=True),
            )
        except (wandb.Error, ValueError, OSError) as error:
            reason = " ".join(str(error).split())
            raise PretrainError(
                f"train.wandb_project is {project!r}, and Weights & Biases refuses it: {reason}; run `wandb login`, "
                "set WANDB_MODE=offline, or set train.wandb_project=''"
            ) from error

    def write(self, figures: Sequence[tuple[str, float]], step: int) -> None:
        """Send the figures of a step."""
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        """Send what is left and end."""
        self._run.finish()
