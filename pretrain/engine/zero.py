"""The engine: one optimizer step over DeepSpeed ZeRO 0-3, exact in the global-token mean.

The loss of a step is  sum over all ranks and micro-batches of the loss sums / global supervised weight.  DeepSpeed
averages gradients over the ranks, so each micro-batch's sum is multiplied by  ranks / global weight  and its division
by the accumulation count is switched off; the result does not depend on how the rows are split. So are the sums of the
other objectives by the counts of their own rows (`objectives.window`), while the contrastive mean per positive pair is
one number of the whole step (`contrastive_window`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import nn

from triweave.data_pipeline.batch import PackedBatch
from triweave.pretrain.checkpoints.fragments import Fragment, fill_optimizer_state, fragments, publish_weights
from triweave.pretrain.engine.compile import compile_blocks
from triweave.pretrain.engine.config import Precision, deepspeed_config, offload_device, offloads
from triweave.pretrain.engine.forward import WatchedForward
from triweave.pretrain.engine.last_words import LastWords
from triweave.pretrain.engine.loss_norm import normalised
from triweave.pretrain.engine.loss_scale import LossScale
from triweave.pretrain.engine.nvme import keep_gradients, refuse_without_libaio, remove_files
from triweave.pretrain.engine.optimizer import TRUNK, TowerAdamW, build_adamw, freeze, group_parameters, tower_of
from triweave.pretrain.engine.participation import TowerWatch, Window, announce
from triweave.pretrain.engine.schedule import learning_rate_factor
from triweave.pretrain.engine.slices import slice_rows
from triweave.pretrain.engine.update import JudgedUpdate, TowerNorms
from triweave.pretrain.engine.work import Work, count_work
from triweave.pretrain.engine.world import World
from triweave.pretrain.errors import PretrainError
from triweave.pretrain.health.heartbeat import mark_phase, noted
from triweave.pretrain.health.judge import HEALTHY, StepJudge, Verdict
from triweave.pretrain.objectives.balance import Decision, TaskBalance
from triweave.pretrain.objectives.contrastive_window import ContrastiveFigures, ContrastiveWindow
from triweave.pretrain.objectives.losses import MODALITY_SLOTS, LossSums
from triweave.pretrain.objectives.rows import objective_weight
from triweave.pretrain.objectives.window import CONTRASTIVE, LANGUAGE_MODEL, TaskFigures, TaskWindow, decide

if TYPE_CHECKING:
    from triweave.pretrain.config import RunConfig


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one optimizer step did, the same on every rank.

    loss: the language model's objective (cross-entropy plus z-loss) per supervised token of the step, nats, times its
        weight; 0 in a step that does not train it.
    contrastive: figures of the contrastive objective, None in a step that does not train it.
    objective: what the step minimises, the objectives' means joined by `model.joint_loss`.
    tasks: objective -> its figures, of those that the step has trained and that had rows. decision: what was chosen.
    several_tasks: whether the run trains more than one objective.
    cross_entropy: float64 [MODALITY_SLOTS] sums by what the target follows, nats; window.weights are the denominators.
    by_source: the same sums by source; window.source_weights are their denominators, in the same order.
    grad_norm: global L2 norm before clipping, NaN or infinite where a gradient is. lr: learning rate of the trunk and
        all towers. step_s: seconds. tower_norms: of the trunk and the towers that were updated, in the steps that
        `train.norms_every_steps` names.
    verdict: whether the weights were updated, and why not; the figures of a bad step may be NaN.
    precision: what it computed in. loss_scale: what the loss was multiplied by in fp16.
    """

    step: int
    loss: float
    cross_entropy: list[float]
    grad_norm: float
    lr: float
    step_s: float
    window: Window
    objective: float
    tasks: dict[str, TaskFigures]
    decision: Decision
    several_tasks: bool = False
    by_source: dict[str, float] = field(default_factory=dict)
    tower_norms: dict[str, TowerNorms] = field(default_factory=dict)
    contrastive: ContrastiveFigures | None = None
    verdict: Verdict = HEALTHY
    precision: Precision = "fp32"
    loss_scale: float | None = None


@dataclass(frozen=True, kw_only=True)
class _Losses:
    """Sums over all ranks and micro-batches of a step.

    total: what the heads minimise, NaN where any of the sums is not finite; finite_here: whether this rank's all are.
    by_slot: [sources, MODALITY_SLOTS] cross-entropy by source and by what the target follows, nats.
    of_tasks: [2 T] as `TaskWindow.sums`.
    accurate: objectives whose hits mean something.
    """

    total: float
    by_slot: npt.NDArray[np.float64]
    of_tasks: list[float]
    accurate: tuple[str, ...]
    finite_here: bool


class Engine:
    """A model under DeepSpeed with its optimizer, its participation checks and its named fragments.

    Attributes: `model` (the bare module), `step` (windows trained on, those included whose update was left out),
    `accumulation` (micro-batches per step and rank), `world`, `judge` (of the health of steps), `balance` (of the
    objectives), `loss_scale` (of fp16).
    """

    def __init__(self, model: nn.Module, config: RunConfig, world: World, *, accumulation: int) -> None:
        """Hand the model, on CPU with the same weights on all ranks, over to DeepSpeed; collective.

        Raises PretrainError for a `deepspeed` section with keys of ours or values DeepSpeed does not take.
        """
        self.model, self.world, self.accumulation, self.step = model, world, accumulation, 0
        self._config = config
        self.before_update: Callable[[], None] = lambda: None
        self.judge, self.loss_scale = StepJudge(config.health), LossScale(config.train.loss_scale)
        self._objectives = config.model.objective_names
        self._sources = [source.name for source in config.data.sources]
        self.balance = TaskBalance(
            {name: config.model.objectives[name] for name in self._objectives},
            config.model.joint_loss,
            config.tasks,
            seed=config.data.seed,
        )
        self.shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        persistent = sorted(
            set(model.state_dict(keep_vars=True)) - {n for n, _ in model.named_parameters(remove_duplicate=False)}
        )
        assert not persistent, f"checkpoints hold parameters only, but the model has buffers: {persistent}"
        self._slicer = slice_rows(model, config, world)
        freeze(model, config.optimizer)
        trained = {tower_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.towers = tuple(model.get_submodule("towers")._modules)
        watch = TowerWatch(model, self.towers, world)
        groups = group_parameters(model.named_parameters(), config.optimizer)
        self.adamw = build_adamw(groups, config.optimizer)
        settings = deepspeed_config(
            config, accumulation=accumulation, parameters=sum(parameter.numel() for parameter in model.parameters())
        )
        if config.train.compile:
            compile_blocks(model, zero_stage=config.train.zero_stage, device=world.device)
        self._deepspeed = _under_deepspeed(model, self.adamw, settings)
        watch.refuse_lone_gathers()
        fill_optimizer_state(self._deepspeed.optimizer, self.adamw)
        stage = config.train.zero_stage
        peers_wait = world.size > 1 and (stage == 3 or config.train.sequence_parallel > 1)
        self._forward = WatchedForward(
            self._deepspeed,
            watch,
            world,
            words=LastWords(config.run_dir, world) if peers_wait else None,
            offloads=offloads(settings),
            frozen_trunk=TRUNK not in trained,
            sources=len(self._sources),
        )
        self._update = JudgedUpdate(
            self._deepspeed,
            self.adamw,
            model,
            self.judge,
            world,
            zero_stage=stage,
            clip_norm=config.optimizer.clip_norm,
            norms_every_steps=config.train.norms_every_steps,
            loss_scale=self.loss_scale if config.train.precision == "fp16" else None,
        )

    def train_window(self, micro_batches: Sequence[PackedBatch], *, data_wait_s: float = 0.0) -> StepResult:
        """Take one optimizer step over this rank's micro-batches; collective.

        Ranks of one sequence-parallel group get the same ones, and each trains on its slice of their rows.

        Towers nobody holds in the window stay bit-unchanged, and so does everything after a step that the judge of the
        run's health finds bad. Raises ParticipationError before any gradient of a micro-batch is reduced, and on all
        ranks NonFiniteError or HealthError where the judge ends the run;
        under ZeRO-3, and where ranks share rows, a wrong tower call is raised by its own rank first, since its peers
        already wait in a collective; they raise it when that rank's process has ended (`last_words`).
        The engine is not usable after an error.
        """
        started, loss_scale = time.perf_counter(), self._loss_scale()
        assert len(micro_batches) == self.accumulation, (len(micro_batches), self.accumulation)
        micro_batches = [normalised(batch, self._config.train.loss_norm) for batch in micro_batches]
        work = self._work(micro_batches)
        if self._slicer is not None:
            micro_batches = self._slicer.window(micro_batches, self.world, step=self.step + 1)
        window = self._announce(micro_batches, data_wait_s, work)
        self._begin_window(window)
        tasks = self._task_window(window)
        contrastive = self._contrastive_window(micro_batches, window, tasks)
        losses = self._accumulate(micro_batches, window, tasks, contrastive)
        pairs = contrastive.figures if contrastive is not None else None
        figures = tasks.figures(losses.of_tasks, losses.accurate, pairs)
        means = {name: figure.loss for name, figure in figures.items()}
        level = self.balance.level(means) if math.isfinite(losses.total) else math.nan
        mark_phase("update")
        self.before_update()
        grad_norm, verdict, norms = self._update(level, losses.finite_here, micro_batches, step=self.step + 1)
        self.step += 1
        if verdict.action == "update":
            self.balance.observe(means)
        return StepResult(
            step=self.step,
            loss=means.get(LANGUAGE_MODEL, 0.0) * self._config.model.objectives[LANGUAGE_MODEL],
            objective=tasks.objective(figures),
            tasks=figures,
            decision=tasks.decision,
            several_tasks=len(self.balance.objectives) > 1,
            contrastive=pairs,
            cross_entropy=losses.by_slot.sum(axis=0).tolist(),
            by_source=dict(zip(self._sources, losses.by_slot.sum(axis=1).tolist(), strict=True)),
            grad_norm=grad_norm,
            tower_norms=norms,
            lr=self.adamw.param_groups[0]["lr"],
            step_s=time.perf_counter() - started,
            window=window,
            verdict=verdict,
            precision=self._config.train.precision,
            loss_scale=loss_scale,
        )

    def fragments(self) -> list[Fragment]:
        """Return live fp32 views of the weights and moments this rank owns, by parameter name."""
        return fragments(self._deepspeed, self.adamw, self.shapes, self.world)

    def publish(self) -> None:
        """Derive the weights the model computes with from the fragments; collective, after they were overwritten."""
        publish_weights(self._deepspeed)

    def close(self) -> None:
        """Release DeepSpeed's hooks and buffers, and its files."""
        remove_files(self._deepspeed.optimizer)
        self._deepspeed.destroy()

    def _work(self, micro_batches: Sequence[PackedBatch]) -> Work:
        """Return what whole micro-batches hold; nothing where another rank counts the same ones."""
        if self._slicer is not None and self._slicer.place:
            return Work()
        return count_work(micro_batches, self._config.model, self.shapes["token_embedding.weight"][0])

    def _announce(self, micro_batches: Sequence[PackedBatch], data_wait_s: float, work: Work) -> Window:
        return announce(
            self.world,
            self.towers,
            micro_batches,
            step=self.step + 1,
            absent_modality=self._config.train.absent_modality,
            data_wait_s=data_wait_s,
            task_weights=self._task_weights(micro_batches),
            work=work,
            sources=len(self._sources),
        )

    def _begin_window(self, window: Window) -> None:
        factor = learning_rate_factor(self._config.schedule, self.step + 1, self._config.train.steps)
        for group in self.adamw.param_groups:
            group["lr"] = group["peak_lr"] * factor
        self.adamw.absent = window.skipped
        # ZeRO-3 overwrites its gradient buffer in the first micro-batch and adds in later ones; a tower that the first
        # one does not hold would keep the gradient of the step before, in the sum and in the norm.
        buffer = getattr(self._deepspeed.optimizer, "grad_partitions_flat_buffer", None)
        if buffer is not None:
            buffer.zero_()

    def _loss_scale(self) -> float | None:
        """Have DeepSpeed scale the losses of a step by what fp16 is to be scaled by; None for other precisions."""
        if self._config.train.precision != "fp16":
            return None
        self._deepspeed.optimizer.loss_scaler.cur_scale = self.loss_scale.scale
        return self.loss_scale.scale

    def _task_weights(self, micro_batches: Sequence[PackedBatch]) -> list[float]:
        return [sum(objective_weight(batch, name) for batch in micro_batches) for name in self._objectives]

    def _task_window(self, window: Window) -> TaskWindow:
        """Return what this step trains, with the counts of all ranks; collective."""
        counts = dict(zip(self._objectives, window.task_weights.tolist(), strict=True))
        counts[LANGUAGE_MODEL] = window.supervised
        decision = decide(self.balance, self.step + 1, self.world)
        learnt = self._config.model.joint_loss.weighting == "uncertainty"
        return TaskWindow(self._objectives, decision, counts, self.world, learnt=learnt)

    def _contrastive_window(
        self, micro_batches: Sequence[PackedBatch], window: Window, tasks: TaskWindow
    ) -> ContrastiveWindow | None:
        """Return the step's contrastive loss, solved by a pass without gradient where there are several micro-batches.

        None where the step does not train it. Only micro-batches in which some rank holds segments are passed.
        """
        if CONTRASTIVE not in self._objectives or (tasks.only is not None and CONTRASTIVE not in tasks.only):
            return None
        settings = self._config.model.contrastive
        solver = ContrastiveWindow(
            self.world, window, micro_batches, loss=settings.loss, weight=tasks.weight(CONTRASTIVE)
        )
        if self.accumulation > 1 and solver.holds_segments:
            embeddings = [torch.empty(0, settings.width, device=self.world.device) for _ in micro_batches]
            calibration = None
            with torch.no_grad():
                for index in np.flatnonzero(window.segments.any(axis=0)).tolist():
                    found = self._forward(
                        micro_batches[index],
                        window,
                        index,
                        step=self.step + 1,
                        only=(CONTRASTIVE,),
                        factors=tasks.factors,
                    )
                    embeddings[index], calibration = _pooled(found)
            assert calibration is not None
            solver.solve(embeddings, calibration)
        return solver

    def _accumulate(
        self,
        micro_batches: Sequence[PackedBatch],
        window: Window,
        tasks: TaskWindow,
        contrastive: ContrastiveWindow | None,
    ) -> _Losses:
        """Go forward and back through all micro-batches and return their sums over all ranks; collective."""
        slots = len(self._sources) * MODALITY_SLOTS
        width = 2 + slots + 2 * len(self._objectives)
        sums = torch.zeros(width, dtype=torch.float64, device=self.world.device)
        accurate: set[str] = set()
        for index, batch in enumerate(micro_batches):
            found = self._forward(batch, window, index, step=self.step + 1, only=tasks.only, factors=tasks.factors)
            self._deepspeed.backward(self._minimised(found, tasks, contrastive, index), scale_wrt_gas=False)
            mine = [found.total.detach().view(1), _probe(found), found.by_slot, tasks.sums(found)]
            sums += torch.cat(mine).double()
            accurate |= set(found.hits)
            if index < self.accumulation - 1:
                self._deepspeed.step()
        return self._reduced(sums, accurate)

    def _minimised(
        self, found: LossSums, tasks: TaskWindow, contrastive: ContrastiveWindow | None, index: int
    ) -> torch.Tensor:
        """Return what one micro-batch goes back from; summed over ranks and micro-batches, ranks x the objective."""
        # Not the model's output itself: DeepSpeed 0.19.8 divides its gradient by the accumulation, at stage 0.
        objective = found.total * 1
        if contrastive is not None:
            if self.accumulation == 1 and contrastive.holds_segments:
                contrastive.solve([_pooled(found)[0]], _pooled(found)[1])
            learns = contrastive.surrogate(found, index) * self.world.size
            objective = objective + tasks.precision(found, CONTRASTIVE) * learns
        return objective + tasks.once(found, contrastive.figures if contrastive else None, index)

    def _reduced(self, sums: torch.Tensor, accurate: set[str]) -> _Losses:
        finite_here = bool(sums.isfinite().all())
        if self.world.size > 1:
            noted("all_reduce of the losses", dist.all_reduce)(sums)
        sums = sums.cpu()
        total, _, *rest = sums.tolist()
        slots = len(self._sources) * MODALITY_SLOTS
        return _Losses(
            total=total if sums.isfinite().all() else math.nan,
            by_slot=np.reshape(rest[:slots], (-1, MODALITY_SLOTS)),
            of_tasks=rest[slots:],
            accurate=tuple(accurate),
            finite_here=finite_here,
        )


def _under_deepspeed(model: nn.Module, adamw: TowerAdamW, settings: dict[str, Any]) -> Any:
    import deepspeed

    if offload_device(settings, "offload_optimizer") == "nvme":
        refuse_without_libaio()
    try:
        engine, *_ = deepspeed.initialize(model=model, optimizer=adamw, config=settings, dist_init_required=False)
    except ValueError as error:  # pydantic's validation errors are ValueErrors
        reason = " ".join(str(error).split())
        raise PretrainError(f"DeepSpeed refuses the deepspeed section: {reason}") from error
    keep_gradients(engine.optimizer)
    return engine


def _pooled(found: LossSums) -> tuple[torch.Tensor, torch.Tensor]:
    """Return embeddings and calibration without gradient, of a model that has them."""
    assert found.embeddings is not None
    assert found.calibration is not None
    return found.embeddings.detach(), found.calibration.detach()


def _probe(found: LossSums) -> torch.Tensor:
    """Return [1], not finite where this micro-batch's own part in the contrastive loss is not."""
    if found.embeddings is None:
        return found.total.detach().new_zeros(1)
    embeddings, calibration = _pooled(found)
    return (embeddings.sum() + calibration.sum()).view(1)
