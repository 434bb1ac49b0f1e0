"""One micro-batch's forward pass under the participation contract: no gradient is reduced of a pass that broke it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from triweave.data_pipeline.batch import PackedBatch
from triweave.pretrain.batch import to_device
from triweave.pretrain.engine.last_words import LastWords
from triweave.pretrain.engine.participation import TowerWatch, Window
from triweave.pretrain.engine.world import World
from triweave.pretrain.errors import ParticipationError
from triweave.pretrain.health.heartbeat import mark_phase
from triweave.pretrain.objectives.losses import LossSums


class WatchedForward:
    """A model under DeepSpeed, called with the guards that a window asks for and checked against what was announced."""

    def __init__(
        self,
        deepspeed_engine: Any,
        watch: TowerWatch,
        world: World,
        *,
        words: LastWords | None,
        offloads: bool,
        frozen_trunk: bool,
        sources: int,
    ) -> None:
        """words: where others stand in a collective when a rank stops within its forward pass.

        offloads: whether gradients live in host memory (`engine.config.offloads`).
        frozen_trunk: nothing but towers is trained. sources: of the run.
        """
        self._deepspeed, self._watch, self._world = deepspeed_engine, watch, world
        self._words, self._offloads, self._frozen_trunk = words, offloads, frozen_trunk
        self._sources = sources

    def __call__(
        self,
        batch: PackedBatch,
        window: Window,
        index: int,
        *,
        step: int,
        only: tuple[str, ...] | None,
        factors: Mapping[str, float],
    ) -> LossSums:
        """Return the sums of micro-batch `index` of the step; collective.

        only, factors: heads that compute and what their sums are multiplied by (`objectives.window.TaskWindow`).

        Raises ParticipationError on all ranks before any gradient is reduced; where peers wait, under ZeRO-3 or with
        sequence parallelism, a wrong tower call is raised by its own rank first (`last_words`).
        """
        expected, guards = self._towers_of(window, index)
        accumulation = window.calls.shape[1]
        mark_phase(f"forward {index + 1}/{accumulation}")
        violation: ParticipationError | None = None
        try:
            try:
                with self._watch.forward_of(expected, step=step, batch=batch):
                    found: LossSums = self._deepspeed(
                        to_device(batch, self._world.device, sources=self._sources), guards, only, factors
                    )
            except ParticipationError as error:
                if self._words:  # peers wait, for a gather or an exchange of heads, not for an agreement
                    self._words.leave(error)
                    raise
                violation = error
            else:
                violation = self._wrong_gradients(found, expected)
            if self._world.size > 1 or violation:
                self._world.agree(violation)
        except RuntimeError as error:
            if self._words and (reason := self._words.found()):
                raise reason from error
            raise
        mark_phase(f"backward {index + 1}/{accumulation}")
        return found

    def _towers_of(self, window: Window, index: int) -> tuple[frozenset[str], frozenset[str]]:
        """Return the towers that this rank enters in a micro-batch, and those of them that it guards."""
        held = window.held(self._world.rank, index)
        guards = window.guards(self._world.rank, index)
        if self._offloads:
            # A gradient in host memory begins anew with the first micro-batch and reaches the optimizer with the last
            # one, for parameters that have one in these: towers that the step holds anywhere then take part in all.
            guards |= window.present - held
        if self._frozen_trunk:  # or a micro-batch of text would have nothing to go back to
            guards = frozenset(window.towers) - held
        return held | guards, guards

    def _wrong_gradients(self, found: LossSums, expected: frozenset[str]) -> ParticipationError | None:
        if not torch.is_grad_enabled():
            return None
        outputs = [found.total] if found.embeddings is None else [found.total, found.embeddings]
        try:
            self._watch.check_gradients(outputs, expected)
        except ParticipationError as error:
            return error
        return None
