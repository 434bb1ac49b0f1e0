"""The engine: one optimizer step over DeepSpeed ZeRO 0-3, exact in the global-token mean.

The loss of a step is  sum over all ranks and micro-batches of the loss sums / global supervised weight.  DeepSpeed
averages gradients over the ranks, so each micro-batch's sum is multiplied by  ranks / global weight  and its division
by the accumulation count is switched off; the result does not depend on how the rows are split. The objective adds the
contrastive mean per positive pair, which is one number of the whole step (`contrastive_window`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from triweave.data_pipeline.batch import PackedBatch
from triweave.pretrain.batch import to_device
from triweave.pretrain.contrastive_window import ContrastiveFigures, ContrastiveWindow
from triweave.pretrain.errors import NonFiniteError, ParticipationError, PretrainError
from triweave.pretrain.fragments import Fragment, fill_optimizer_state, fragments, publish_weights
from triweave.pretrain.losses import MODALITY_SLOTS, LossSums
from triweave.pretrain.optimizer import build_adamw, group_parameters
from triweave.pretrain.participation import TowerWatch, Window, announce, name_samples
from triweave.pretrain.schedule import learning_rate_factor
from triweave.pretrain.train_config import deepspeed_config
from triweave.pretrain.world import World

if TYPE_CHECKING:
    from triweave.pretrain.config import RunConfig

CONTRASTIVE = "contrastive"
"""Name of the objective whose loss is computed over the whole step."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one optimizer step did, the same on every rank.

    loss: the language model's objective (cross-entropy plus z-loss) per supervised token of the step, nats, times its
        weight; whether or not there is a contrastive objective.
    contrastive: figures of the contrastive objective, None where the model has none.
    objective: what the step minimises, loss + weight * contrastive.loss.
    cross_entropy: float64 [MODALITY_SLOTS] sums by what the target follows, nats; window.weights are the denominators.
    grad_norm: global L2 norm before clipping. lr: learning rate of the trunk and all towers. step_s: seconds.
    """

    step: int
    loss: float
    cross_entropy: list[float]
    grad_norm: float
    lr: float
    step_s: float
    window: Window
    objective: float
    contrastive: ContrastiveFigures | None = None


class Engine:
    """A model under DeepSpeed with its optimizer, its participation checks and its named fragments.

    Attributes: `model` (the bare module), `step` (optimizer steps done), `accumulation` (micro-batches per step and
    rank), `world`.
    """

    def __init__(self, model: nn.Module, config: RunConfig, world: World, *, accumulation: int) -> None:
        """Hand the model, on CPU with the same weights on all ranks, over to DeepSpeed; collective.

        Raises PretrainError for a `deepspeed` section with keys of ours or values DeepSpeed does not take.
        """
        import deepspeed

        self.model, self.world, self.accumulation, self.step = model, world, accumulation, 0
        self._config = config
        self._contrastive_weight = config.model.objectives.get(CONTRASTIVE, 0.0)
        self.shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        persistent = sorted(
            set(model.state_dict(keep_vars=True)) - {n for n, _ in model.named_parameters(remove_duplicate=False)}
        )
        assert not persistent, f"checkpoints hold parameters only, but the model has buffers: {persistent}"
        self.towers = tuple(model.get_submodule("towers")._modules)
        self._watch = TowerWatch(model, self.towers, world)
        groups = group_parameters(model.named_parameters(), config.optimizer)
        self.adamw = build_adamw(groups, config.optimizer)
        settings = deepspeed_config(
            config, accumulation=accumulation, parameters=sum(parameter.numel() for parameter in model.parameters())
        )
        try:
            self._deepspeed, *_ = deepspeed.initialize(
                model=model, optimizer=self.adamw, config=settings, dist_init_required=False
            )
        except ValueError as error:  # pydantic's validation errors are ValueErrors
            reason = " ".join(str(error).split())
            raise PretrainError(f"DeepSpeed refuses the deepspeed section: {reason}") from error
        fill_optimizer_state(self._deepspeed.optimizer, self.adamw)

    def train_window(self, micro_batches: Sequence[PackedBatch], *, data_wait_s: float = 0.0) -> StepResult:
        """Take one optimizer step over this rank's micro-batches; collective.

        Towers nobody holds in the window stay bit-unchanged. Raises ParticipationError before any gradient of a
        micro-batch is reduced, NonFiniteError before (loss) or at (gradient) the update, both on all ranks;
        under ZeRO-3 a wrong tower call is raised by its own rank only, since its peers already wait for that gather.
        The engine is not usable after an error.
        """
        started = time.perf_counter()
        assert len(micro_batches) == self.accumulation, (len(micro_batches), self.accumulation)
        window = announce(self.world, self.towers, micro_batches, data_wait_s=data_wait_s)
        self._begin_window(window)
        contrastive = self._contrastive_window(micro_batches, window)
        scale = self.world.size / window.supervised if window.supervised else 0.0
        sums = torch.zeros(2 + MODALITY_SLOTS, dtype=torch.float64, device=self.world.device)
        for index, batch in enumerate(micro_batches):
            found = self._forward(batch, window, index)
            objective = found.total * scale
            if contrastive is not None:
                if self.accumulation == 1 and contrastive.holds_segments:
                    contrastive.solve([_pooled(found)[0]], _pooled(found)[1])
                objective = objective + contrastive.surrogate(found, index) * self.world.size
            self._deepspeed.backward(objective, scale_wrt_gas=False)
            sums += torch.cat([found.total.detach().view(1), _probe(found), found.per_modality]).double()
            if index < self.accumulation - 1:
                self._deepspeed.step()
        loss, _, *cross_entropy = self._reduce_sums(sums, micro_batches).tolist()
        grad_norm = self._update(micro_batches)
        loss = loss / window.supervised if window.supervised else 0.0
        figures = contrastive.figures if contrastive is not None else None
        return StepResult(
            step=self.step,
            loss=loss,
            objective=loss + (self._contrastive_weight * figures.loss if figures else 0.0),
            contrastive=figures,
            cross_entropy=cross_entropy,
            grad_norm=grad_norm,
            lr=self.adamw.param_groups[0]["lr"],
            step_s=time.perf_counter() - started,
            window=window,
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

    def _begin_window(self, window: Window) -> None:
        factor = learning_rate_factor(self._config.schedule, self.step + 1, self._config.train.steps)
        for group in self.adamw.param_groups:
            group["lr"] = self._config.optimizer.lr * factor
        self.adamw.absent = window.absent
        # ZeRO-3 overwrites its gradient buffer in the first micro-batch and adds in later ones; a tower that the first
        # one does not hold would keep the gradient of the step before, in the sum and in the norm.
        buffer = getattr(self._deepspeed.optimizer, "grad_partitions_flat_buffer", None)
        if buffer is not None:
            buffer.zero_()

    def _contrastive_window(self, micro_batches: Sequence[PackedBatch], window: Window) -> ContrastiveWindow | None:
        """Return the step's contrastive loss, solved by a pass without gradient where there are several micro-batches.

        None for a model without that head. Only micro-batches in which some rank holds segments are passed.
        """
        if CONTRASTIVE not in self._config.model.objectives:
            return None
        settings = self._config.model.contrastive
        solver = ContrastiveWindow(
            self.world, window, micro_batches, loss=settings.loss, weight=self._contrastive_weight
        )
        if self.accumulation > 1 and solver.holds_segments:
            embeddings = [torch.empty(0, settings.width, device=self.world.device) for _ in micro_batches]
            calibration = None
            with torch.no_grad():
                for index in np.flatnonzero(window.segments.any(axis=0)).tolist():
                    found = self._forward(micro_batches[index], window, index, only=(CONTRASTIVE,))
                    embeddings[index], calibration = _pooled(found)
            assert calibration is not None
            solver.solve(embeddings, calibration)
        return solver

    def _forward(self, batch: PackedBatch, window: Window, index: int, only: tuple[str, ...] | None = None) -> LossSums:
        guards = window.guards(self.world.rank, index)
        expected = window.held(self.world.rank, index) | guards
        violation: ParticipationError | None = None
        try:
            with self._watch.forward_of(expected, step=self.step + 1, batch=batch):
                found: LossSums = self._deepspeed(to_device(batch, self.world.device), guards, only)
            if torch.is_grad_enabled():
                outputs = [found.total] if found.embeddings is None else [found.total, found.embeddings]
                self._watch.check_gradients(outputs, expected)
        except ParticipationError as error:
            if self._config.train.zero_stage == 3:
                raise
            violation = error
        if self.world.size > 1 or violation:
            self.world.agree(violation)
        return found

    def _reduce_sums(self, sums: torch.Tensor, micro_batches: Sequence[PackedBatch]) -> torch.Tensor:
        finite = bool(sums.isfinite().all())
        if self.world.size > 1:
            dist.all_reduce(sums)
        sums = sums.cpu()
        if not sums.isfinite().all():
            self.world.agree(None if finite else self._non_finite("loss", micro_batches))
        return sums

    def _update(self, micro_batches: Sequence[PackedBatch]) -> float:
        if self._config.train.zero_stage == 0:
            limit = self._config.optimizer.clip_norm or math.inf
            grad_norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), limit))
            if math.isfinite(grad_norm):
                self._deepspeed.step()
        else:
            self._deepspeed.step()  # skips the update by itself where the norm is not finite
            grad_norm = float(self._deepspeed.get_global_grad_norm())
        if not math.isfinite(grad_norm) or grad_norm < 0:
            self.world.agree(self._non_finite("gradient", micro_batches))
        self.step += 1
        return grad_norm

    def _non_finite(self, what: str, micro_batches: Sequence[PackedBatch]) -> NonFiniteError:
        samples = "; ".join(name_samples(batch) for batch in micro_batches)
        return NonFiniteError(
            f"the {what} of step {self.step + 1} is not finite; rank {self.world.rank} held samples {samples}; "
            "lower optimizer.lr, or resume from the last checkpoint without these samples"
        )


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
