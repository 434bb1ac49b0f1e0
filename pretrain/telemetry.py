"""Telemetry of rank 0: metrics.jsonl, TensorBoard and the progress line.

    RUN/metrics.jsonl     one object per optimizer step, each step once: a resume removes the steps it does again
    RUN/tensorboard/      the same figures
    RUN/wandb/            the same, where `train.wandb_project` names a project (`wandb_board`)

Of rank 0's loader each line has the figures of the latest steps as `loader`, and of all ranks the one that waits most
for its data as `stall`, where one does (`data_pipeline/stream/stalls.py`).

A terminal gets one line that is redrawn, anything else a plain line every `train.log_every_steps` steps.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import torch

from triweave.data_pipeline.batch import TEXT_ID
from triweave.data_pipeline.media.modalities import MODALITIES
from triweave.data_pipeline.stream.stalls import Exchange, StallMeter, StepLoad, alone
from triweave.kernels.backends import choices
from triweave.kernels.roofline.chips import chip_of_device, peaks
from triweave.pretrain.checkpoints.saver import SaveTimes
from triweave.pretrain.engine.zero import StepResult
from triweave.pretrain.objectives.window import LANGUAGE_MODEL
from triweave.pretrain.wandb_board import WandbBoard

METRICS = "metrics.jsonl"


def step_metrics(result: StepResult) -> dict[str, Any]:
    """Return a step's line of metrics.jsonl.

    loss: objective per supervised token. loss_by_modality: cross-entropy per supervised token that follows text only,
    a picture, a sound ...; a modality without such tokens in the step is left out. loss_by_source: the same by source,
    of a run with several. tower_grad_norm, tower_update_norm: by tower, before clipping, and of the change of the
    weights, in the steps that `train.norms_every_steps` names. step_s: the whole step with the longest wait for data of
    any rank. flops: of the step's matrix products, media included, exactly those that training needs (`flops.Flops`),
    over all ranks; mfu: their share of what the devices' makers promise, on CUDA devices that `kernels.roofline.chips`
    knows. rank_imbalance: the most FLOPs of any rank over their mean. tokens: every position that is no padding, over
    all ranks. media_per_s: pictures, sounds ... a second. memory_bytes: peak of rank 0. With the contrastive objective
    also contrastive_pairs (positives of the step), objective (loss and weighted contrastive loss together) and, where
    there are pairs, contrastive_loss per positive pair and contrastive_accuracy, the share of queries whose nearest
    candidate in their group is their own partner. Of a model with several objectives also objective and tasks: those
    that the step has trained and that had rows, with the fields of `TaskFigures`.
    """
    window, work, slots = result.window, result.window.work, modality_slots()
    seconds = result.step_s + window.data_wait_s
    return {
        "step": result.step,
        "loss": result.loss,
        "loss_by_modality": {
            name: result.cross_entropy[index] / float(window.weights[index])
            for name, index in slots.items()
            if window.weights[index] and LANGUAGE_MODEL in result.tasks
        },
        "supervised_by_modality": {
            name: float(window.weights[index]) for name, index in slots.items() if window.weights[index]
        },
        **_sources(result),
        **_contrastive(result),
        **_tasks(result),
        "lr": result.lr,
        "grad_norm": result.grad_norm,
        **({} if result.loss_scale is None else {"loss_scale": result.loss_scale}),
        **_norms(result),
        "tokens": window.tokens,
        "supervised_tokens": window.supervised,
        "tokens_per_s": window.tokens / seconds,
        "tokens_by_modality": {name: int(work.tokens[slot]) for name, slot in slots.items() if work.tokens[slot]},
        "media_per_s": {name: work.items[slot] / seconds for name, slot in slots.items() if work.items[slot]},
        "flops": work.flops,
        "flops_per_s": work.flops / seconds,
        "rank_imbalance": window.rank_imbalance,
        **_utilisation(result, seconds),
        "step_s": seconds,
        "data_wait_s": window.data_wait_s,
        "data_wait_fraction": window.data_wait_s / seconds,
        "absent_towers": sorted(window.absent),
        "memory_bytes": peak_memory_bytes(),
        "time_s": time.time(),
        **({"skipped": result.verdict.reason} if result.verdict.reason else {}),
    }


def _utilisation(result: StepResult, seconds: float) -> dict[str, float]:
    """Return the share of the devices' published matrix rate that the step's FLOPs are, where one is published."""
    if not torch.cuda.is_initialized():
        return {}
    chip = chip_of_device(torch.cuda.get_device_name())
    if chip is None:
        return {}
    peak = peaks(chip).fp32_flops if result.precision == "fp32" else peaks(chip).matrix_flops
    return {"mfu": result.window.work.flops / seconds / (len(result.window.calls) * peak)}


def _sources(result: StepResult) -> dict[str, Any]:
    if len(result.by_source) < 2:
        return {}
    weights = dict(zip(result.by_source, result.window.source_weights.tolist(), strict=True))
    return {
        "loss_by_source": {
            name: loss / weights[name]
            for name, loss in result.by_source.items()
            if weights[name] and LANGUAGE_MODEL in result.tasks
        },
        "supervised_by_source": {name: weight for name, weight in weights.items() if weight},
    }


def _norms(result: StepResult) -> dict[str, Any]:
    if not result.tower_norms:
        return {}
    return {
        "tower_grad_norm": {name: norms.gradient for name, norms in result.tower_norms.items()},
        "tower_update_norm": {name: norms.update for name, norms in result.tower_norms.items()},
    }


def _contrastive(result: StepResult) -> dict[str, float]:
    figures = result.contrastive
    if figures is None:
        return {}
    known = {"objective": result.objective, "contrastive_pairs": figures.pairs}
    if not figures.pairs:
        return known
    return {**known, "contrastive_loss": figures.loss, "contrastive_accuracy": figures.accuracy}


def _tasks(result: StepResult) -> dict[str, Any]:
    if not result.several_tasks:
        return {}
    figures = {
        name: {key: value for key, value in vars(figure).items() if value is not None}
        for name, figure in result.tasks.items()
    }
    return {"objective": result.objective, "tasks": figures}


def finite(metrics: dict[str, Any]) -> dict[str, Any]:
    """Return the figures as JSON has them: null for NaN and infinity, which a bad step has."""
    return {
        name: finite(value) if isinstance(value, dict) else None if _is_broken(value) else value
        for name, value in metrics.items()
    }


def _is_broken(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def modality_slots() -> dict[str, int]:
    """Return modality name -> its slot in per-modality vectors."""
    return {"text": TEXT_ID, **{name: modality.id for name, modality in MODALITIES.items()}}


def peak_memory_bytes() -> int:
    """Return the most memory this process has held: on the device where it uses one, else resident on the host."""
    if torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Telemetry:
    """Writes a run's figures on rank 0; other ranks only say what they wait for."""

    def __init__(
        self,
        run_dir: str | Path,
        *,
        rank: int,
        first_step: int,
        total_steps: int,
        every_steps: int,
        stalls: StallMeter,
        exchange: Exchange = alone,
        wandb: WandbBoard | None = None,
    ) -> None:
        """first_step: step that comes next; lines of that and later steps are removed from metrics.jsonl.

        exchange: how this rank's stall is told to the others.
        """
        self._active = rank == 0
        self._stalls, self._exchange = stalls, exchange
        if not self._active:
            return
        self._every_steps = every_steps
        self._wandb = wandb
        path = Path(run_dir) / METRICS
        _keep_steps_before(path, first_step)
        self._file = path.open("a", encoding="utf-8")
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(Path(run_dir) / "tensorboard"), purge_step=first_step)
        self._line = _progress_line(first_step - 1, total_steps) if sys.stderr.isatty() else None
        self._total_steps = total_steps
        self._told_choices = 0

    def step(self, result: StepResult, load: StepLoad, save: SaveTimes | None = None) -> None:
        """Record a finished step; say which kernels `auto` chose since the one before, and what the worst rank waits
        for. Collective: the ranks compare their waiting now and then.

        save: the checkpoint that was done since the step before, where there was one; `checkpoint` of the step's line.
        """
        self._stalls.add(load, result.step_s)
        news = self._stalls.news(self._exchange)
        if not self._active:
            return
        for choice in choices()[self._told_choices :]:
            self._told_choices += 1
            self.tell(f"kernels: {choice}")
        if news:
            self.tell(news)
        metrics = step_metrics(result) | {"loader": self._stalls.figures()}
        if worst := self._stalls.worst:
            metrics["stall"] = {name: value for name, value in asdict(worst).items() if name not in ("advice", "ranks")}
        if save is not None:
            metrics["checkpoint"] = asdict(save)
        self._file.write(json.dumps(finite(metrics)) + "\n")
        self._file.flush()
        figures = _flat(metrics)
        for name, value in figures:
            self._board.add_scalar(name, value, result.step)
        if self._wandb is not None:
            self._wandb.write(figures, result.step)
        pairs = ""
        if "contrastive_loss" in metrics:
            pairs = f"  contrastive {metrics['contrastive_loss']:.4f} ({metrics['contrastive_accuracy']:.0%})"
        text = (
            f"loss {metrics['loss']:.4f}{pairs}  {metrics['tokens_per_s']:,.0f} tokens/s  lr {metrics['lr']:.2e}  "
            f"|g| {metrics['grad_norm']:.2f}  data wait {metrics['data_wait_fraction']:.0%}"
        )
        if self._line is not None:
            self._line.update(self._line.task_ids[0], completed=result.step, figures=text)
        elif result.step % self._every_steps == 0 or result.step == self._total_steps:
            print(f"step {result.step}/{self._total_steps}  {text}", file=sys.stderr, flush=True)

    def tell(self, message: str) -> None:
        """Print a line beside the progress."""
        if not self._active:
            return
        if self._line is not None:
            self._line.console.print(message, highlight=False)
        else:
            print(message, file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._active:
            if self._line is not None:
                self._line.stop()
            self._board.close()
            self._file.close()
            if self._wandb is not None:
                self._wandb.close()


def _progress_line(done: int, total: int) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
    )
    line = Progress(*columns, console=Console(stderr=True))
    line.add_task("train", total=total, completed=done, figures="")
    line.start()
    return line


def _flat(metrics: dict[str, Any]) -> list[tuple[str, float]]:
    """Return (tag, value) of every number, a nested one as `outer/inner`."""
    found: list[tuple[str, float]] = []
    for name, value in metrics.items():
        if isinstance(value, dict):
            found += [(f"{name}/{inner}", number) for inner, number in _flat(value)]
        elif isinstance(value, int | float) and name not in ("step", "time_s"):
            found.append((name, float(value)))
    return found


def _keep_steps_before(path: Path, first_step: int) -> None:
    """Drop the lines of steps that come again, and one that a kill cut off."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] < first_step]
    working = path.with_suffix(".writing")
    working.write_text("".join(kept), encoding="utf-8")
    os.replace(working, path)
