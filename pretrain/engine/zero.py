"""The engine: one optimizer step over DeepSpeed ZeRO 0-3, exact in the global-token mean.

The loss of a step is  sum over all ranks and micro-batches of the loss sums / global supervised weight.  DeepSpeed
averages gradients over the ranks, so each micro-batch's sum is multiplied by  ranks / global weight  and its division
by the accumulation count is switched off; the result does not depend on how the rows are split. So are the sums of the
other objectives by the counts of their own rows (`objectives.window`), while the contrastive mean per positive pair is
one number of the whole step (`contrastive_window`).
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from triweave.data_pipeline.batch import PackedBatch
from triweave.pretrain.batch import to_device
from triweave.pretrain.checkpoints.fragments import Fragment, fill_optimizer_state, fragments, publish_weights
from triweave.pretrain.engine.config import deepspeed_config, offloads
from triweave.pretrain.engine.last_words import last_words, leave_words
from triweave.pretrain.engine.loss_norm import normalised
from triweave.pretrain.engine.optimizer import TRUNK, build_adamw, freeze, group_parameters, tower_of
from triweave.pretrain.engine.participation import TowerWatch, Window, announce, name_samples
from triweave.pretrain.engine.schedule import learning_rate_factor
from triweave.pretrain.engine.world import World
from triweave.pretrain.errors import HealthError, NonFiniteError, ParticipationError, PretrainError
from triweave.pretrain.health.heartbeat import mark_phase, noted
from triweave.pretrain.health.judge import HEALTHY, StepJudge, Verdict
from triweave.pretrain.model.flops import count_flops
from triweave.pretrain.objectives.balance import Decision, TaskBalance
from triweave.pretrain.objectives.contrastive_window import ContrastiveFigures, ContrastiveWindow
from triweave.pretrain.objectives.losses import MODALITY_SLOTS, LossSums
from triweave.pretrain.objectives.rows import objective_weight
from triweave.pretrain.objectives.window import CONTRASTIVE, LANGUAGE_MODEL, TaskFigures, TaskWindow, decide

if TYPE_CHECKING:
    from triweave.pretrain.config import RunConfig

NAMED_RANKS = 4
"""A verdict on a bad step names the samples of at most so many ranks."""


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
    grad_norm: global L2 norm before clipping, NaN or infinite where a gradient is. lr: learning rate of the trunk and
        all towers. step_s: seconds.
    verdict: whether the weights were updated, and why not; the figures of a bad step may be NaN.
    precision: what it computed in.
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
    contrastive: ContrastiveFigures | None = None
    verdict: Verdict = HEALTHY
    precision: Literal["fp32", "bf16"] = "fp32"


class Engine:
    """A model under DeepSpeed with its optimizer, its participation checks and its named fragments.

    Attributes: `model` (the bare module), `step` (windows trained on, those included whose update was left out),
    `accumulation` (micro-batches per step and rank), `world`, `judge` (of the health of steps), `balance` (of the
    objectives).
    """

    def __init__(self, model: nn.Module, config: RunConfig, world: World, *, accumulation: int) -> None:
        """Hand the model, on CPU with the same weights on all ranks, over to DeepSpeed; collective.

        Raises PretrainError for a `deepspeed` section with keys of ours or values DeepSpeed does not take.
        """
        import deepspeed

        self.model, self.world, self.accumulation, self.step = model, world, accumulation, 0
        self._config = config
        self.before_update: Callable[[], None] = lambda: None
        self.judge = StepJudge(config.health)
        self._objectives = config.model.objective_names
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
        freeze(model, config.optimizer)
        trained = {tower_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._frozen_trunk = TRUNK not in trained
        self.towers = tuple(model.get_submodule("towers")._modules)
        self._watch = TowerWatch(model, self.towers, world)
        groups = group_parameters(model.named_parameters(), config.optimizer)
        self.adamw = build_adamw(groups, config.optimizer)
        settings = deepspeed_config(
            config, accumulation=accumulation, parameters=sum(parameter.numel() for parameter in model.parameters())
        )
        # A gradient in host memory begins anew with the first micro-batch and reaches the optimizer with the last one,
        # for parameters that have one in these: towers that the step holds anywhere then take part in all.
        self._offloads = offloads(settings)
        try:
            self._deepspeed, *_ = deepspeed.initialize(
                model=model, optimizer=self.adamw, config=settings, dist_init_required=False
            )
        except ValueError as error:  # pydantic's validation errors are ValueErrors
            reason = " ".join(str(error).split())
            raise PretrainError(f"DeepSpeed refuses the deepspeed section: {reason}") from error
        self._watch.refuse_lone_gathers()
        fill_optimizer_state(self._deepspeed.optimizer, self.adamw)

    def train_window(self, micro_batches: Sequence[PackedBatch], *, data_wait_s: float = 0.0) -> StepResult:
        """Take one optimizer step over this rank's micro-batches; collective.

        Towers nobody holds in the window stay bit-unchanged, and so does everything after a step that the judge of the
        run's health finds bad. Raises ParticipationError before any gradient of a micro-batch is reduced, and on all
        ranks NonFiniteError or HealthError where the judge ends the run;
        under ZeRO-3 a wrong tower call is raised by its own rank first, since its peers already wait for a gather; they
        raise it when that rank's process has ended (`last_words`).
        The engine is not usable after an error.
        """
        started = time.perf_counter()
        assert len(micro_batches) == self.accumulation, (len(micro_batches), self.accumulation)
        micro_batches = [normalised(batch, self._config.train.loss_norm) for batch in micro_batches]
        window = announce(
            self.world,
            self.towers,
            micro_batches,
            step=self.step + 1,
            absent_modality=self._config.train.absent_modality,
            data_wait_s=data_wait_s,
            task_weights=self._task_weights(micro_batches),
            flops=self._flops(micro_batches),
        )
        self._begin_window(window)
        tasks = self._task_window(window)
        contrastive = self._contrastive_window(micro_batches, window, tasks)
        width = 2 + MODALITY_SLOTS + 2 * len(self._objectives)
        sums = torch.zeros(width, dtype=torch.float64, device=self.world.device)
        accurate: set[str] = set()
        for index, batch in enumerate(micro_batches):
            found = self._forward(batch, window, index, tasks.only, tasks.factors)
            self._deepspeed.backward(self._minimised(found, tasks, contrastive, index), scale_wrt_gas=False)
            mine = [found.total.detach().view(1), _probe(found), found.per_modality, tasks.sums(found)]
            sums += torch.cat(mine).double()
            accurate |= set(found.hits)
            if index < self.accumulation - 1:
                self._deepspeed.step()
        (total, _, *reduced), finite_here = self._reduce_sums(sums)
        pairs = contrastive.figures if contrastive is not None else None
        figures = tasks.figures(reduced[MODALITY_SLOTS:], tuple(accurate), pairs)
        means = {name: figure.loss for name, figure in figures.items()}
        level = self.balance.level(means) if math.isfinite(total) else math.nan
        grad_norm, verdict = self._update(level, finite_here, micro_batches)
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
            cross_entropy=reduced[:MODALITY_SLOTS],
            grad_norm=grad_norm,
            lr=self.adamw.param_groups[0]["lr"],
            step_s=time.perf_counter() - started,
            window=window,
            verdict=verdict,
            precision=self._config.train.precision,
        )

    def fragments(self) -> list[Fragment]:
        """Return live fp32 views of the weights and moments this rank owns, by parameter name."""
        return fragments(self._deepspeed, self.adamw, self.shapes, self.world)

    def publish(self) -> None:
        """Derive the weights the model computes with from the fragments; collective, after they were overwritten."""
        publish_weights(self._deepspeed)

    def close(self) -> None:
        """Release DeepSpeed's hooks and buffers."""
        self._deepspeed.destroy()

    def _flops(self, micro_batches: Sequence[PackedBatch]) -> float:
        config, vocab_size = self._config.model, self.shapes["token_embedding.weight"][0]
        return float(sum(count_flops(batch, config, vocab_size).training for batch in micro_batches))

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
                    found = self._forward(micro_batches[index], window, index, (CONTRASTIVE,), tasks.factors)
                    embeddings[index], calibration = _pooled(found)
            assert calibration is not None
            solver.solve(embeddings, calibration)
        return solver

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

    def _forward(
        self,
        batch: PackedBatch,
        window: Window,
        index: int,
        only: tuple[str, ...] | None,
        factors: Mapping[str, float],
    ) -> LossSums:
        guards = window.guards(self.world.rank, index)
        if self._offloads:
            guards |= window.present - window.held(self.world.rank, index)
        if self._frozen_trunk:  # or a micro-batch of text would have nothing to go back to
            guards = frozenset(self.towers) - window.held(self.world.rank, index)
        expected = window.held(self.world.rank, index) | guards
        mark_phase(f"forward {index + 1}/{self.accumulation}")
        violation: ParticipationError | None = None
        try:
            try:
                with self._watch.forward_of(expected, step=self.step + 1, batch=batch):
                    found: LossSums = self._deepspeed(to_device(batch, self.world.device), guards, only, factors)
            except ParticipationError as error:
                if self._config.train.zero_stage == 3:  # peers wait for gathers, not for an agreement
                    leave_words(error)
                    raise
                violation = error
            else:
                violation = self._wrong_gradients(found, expected)
            if self.world.size > 1 or violation:
                self.world.agree(violation)
        except RuntimeError as error:
            if (reason := last_words()) is not None:
                raise reason from error
            raise
        mark_phase(f"backward {index + 1}/{self.accumulation}")
        return found

    def _wrong_gradients(self, found: LossSums, expected: frozenset[str]) -> ParticipationError | None:
        if not torch.is_grad_enabled():
            return None
        outputs = [found.total] if found.embeddings is None else [found.total, found.embeddings]
        try:
            self._watch.check_gradients(outputs, expected)
        except ParticipationError as error:
            return error
        return None

    def _reduce_sums(self, sums: torch.Tensor) -> tuple[list[float], bool]:
        """Return the sums over all ranks, the first NaN where any is not finite, and whether this rank's are finite."""
        finite_here = bool(sums.isfinite().all())
        if self.world.size > 1:
            noted("all_reduce of the losses", dist.all_reduce)(sums)
        sums = sums.cpu()
        if not sums.isfinite().all():
            sums[0] = math.nan
        return sums.tolist(), finite_here

    def _update(
        self, objective: float, finite_here: bool, micro_batches: Sequence[PackedBatch]
    ) -> tuple[float, Verdict]:
        """Take the optimizer step unless the judge objects, and count the window; return the gradient norm as well.

        The judge is asked by the client optimizer, which DeepSpeed calls behind its norm and before any weight changes;
        where it does not call it, it has found an overflow and dropped the gradients itself.
        """
        mark_phase("update")
        self.before_update()
        norms: list[float] = []
        verdicts: list[Verdict] = []

        def allowed() -> bool:
            if not verdicts:
                norms.append(self._gradient_norm(clipped))
                verdicts.append(self._judge(objective, norms[0]))
            return verdicts[0].action == "update"

        clipped = math.nan
        if self._config.train.zero_stage == 0:
            limit = self._config.optimizer.clip_norm or math.inf
            clipped = float(nn.utils.clip_grad_norm_(self.model.parameters(), limit))
        self.adamw.allowed = allowed
        self._deepspeed.step()
        if not verdicts:
            norms.append(math.nan)
            verdicts.append(self._judge(objective, math.nan))
        verdict = verdicts[0]
        if verdict.action != "update":
            verdict = self._with_samples(verdict, finite_here, micro_batches)
        self.step += 1
        return norms[0], verdict

    def _gradient_norm(self, clipped: float) -> float:
        """Return the global norm that DeepSpeed has just computed; `clipped` at stage 0, where we did."""
        return clipped if self._config.train.zero_stage == 0 else float(self._deepspeed.optimizer._global_grad_norm)

    def _judge(self, objective: float, grad_norm: float) -> Verdict:
        figures = self.world.gather([objective, grad_norm]).max(axis=0)  # NaN of any rank stays
        return self.judge.judge(self.step + 1, *figures.tolist())

    def _with_samples(self, verdict: Verdict, finite_here: bool, micro_batches: Sequence[PackedBatch]) -> Verdict:
        """Return the verdict with the samples of the ranks at fault, of all where none is; raise `stop` on all."""
        mine = "; ".join(name_samples(batch) for batch in micro_batches)
        faults = [flag == 0 for flag in self.world.gather([float(finite_here)])[:, 0]]
        held = [
            f"rank {rank} held samples {text}"
            for rank, text in enumerate(self.world.texts(mine))
            if faults[rank] or not any(faults)
        ]
        samples = "; ".join(held[:NAMED_RANKS]) + (f"; and {len(held) - NAMED_RANKS} more" * (len(held) > NAMED_RANKS))
        if verdict.action == "stop":
            kind = HealthError if verdict.finite else NonFiniteError
            self.world.agree(kind(f"{verdict.reason}; {samples}; {self.judge.advice()}"))
        return dataclasses.replace(verdict, samples=samples)


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
