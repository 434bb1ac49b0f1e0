"""Which objectives a step trains and with what weight, from their losses so far: a pure function of seed and history.

    loss_rate   r_k = (mean of the last n losses) / (mean of the n before),  weight w_k K exp(r_k/T) / sum_j exp(r_j/T)
    loss        score_k = (mean of the last n losses) / (mean of the first n)
    gap         score_k = max(0, mean of the last n losses / target_k - 1)

loss_rate is dynamic weight averaging (Liu, Johns and Davison 2019) with means over n steps for epochs. With loss and
gap a step draws objectives one after the other, each with probability exp(score / T) over those that are left (Sharma
et al. 2018 sample tasks by their distance to a target). Draws are keyed by (seed, step); the history holds means over
all ranks and goes into checkpoints, so a resumed run decides as the one before did. What it does a second time, behind
the checkpoint, follows the ledger's record: on other ranks losses differ in their last bits, and a draw might too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import xxhash

from triweave.pretrain.errors import CheckpointError
from triweave.pretrain.objectives.config import JointLossConfig, TasksConfig


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What one step does: the weight of each objective that it trains; those that it leaves out are not in it."""

    step: int
    weights: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """Return the line of the ledger."""
        return {"step": self.step, "weights": self.weights}


class TaskBalance:
    """Decides before each step, and is told the means behind it."""

    def __init__(
        self, objectives: Mapping[str, float], joint_loss: JointLossConfig, tasks: TasksConfig, *, seed: int
    ) -> None:
        self.objectives = {name: weight for name, weight in objectives.items() if weight}
        self._joint_loss, self._tasks, self._seed = joint_loss, tasks, seed
        self._history: dict[str, list[float]] = {name: [] for name in self.objectives}
        self._first: dict[str, list[float]] = {name: [] for name in self.objectives}
        self._decided: dict[int, Decision] = {}
        self._settings = {
            "objectives": self.objectives,
            "joint_loss": asdict(joint_loss),
            "tasks": asdict(tasks),
            "seed": seed,
        }

    @property
    def follows_losses(self) -> bool:
        """Whether decisions depend on losses, and so must be rank 0's on every rank."""
        return self._joint_loss.weighting == "loss_rate" or self._tasks.schedule in ("loss", "gap")

    def decide(self, step: int) -> Decision:
        """Return what step `step`, counted from 1, trains."""
        if step in self._decided:
            return self._decided[step]
        chosen = self._chosen(step)
        rates = self._rates()
        return Decision(step=step, weights={name: self.objectives[name] * rates[name] for name in chosen})

    def level(self, means: Mapping[str, float]) -> float:
        """Return a figure that the judge of steps can compare from step to step; `means` are those of this step.

        Where every step trains all it is sum_k w_k L_k, of objectives without rows in the step with their latest loss.
        Otherwise losses come and go, and it is sum_k w_k (latest L_k) / (first L_k).
        """
        latest = {name: kept[-1] for name, kept in self._history.items() if kept} | dict(means)
        if self._tasks.schedule == "all":
            return math.fsum(weight * latest.get(name, 0.0) for name, weight in self.objectives.items())
        first = {name: kept[0] for name, kept in self._first.items() if kept}
        shares = {name: latest[name] / first[name] for name in latest if first.get(name)}
        return math.fsum(weight * shares.get(name, 1.0) for name, weight in self.objectives.items())

    def observe(self, means: Mapping[str, float]) -> None:
        """Take note of the mean losses of a step's objectives; those without rows in it are not among them."""
        for name, mean in means.items():
            self._history[name] = [*self._history[name], mean][-self._kept :]
            if len(self._first[name]) < self._tasks.window_steps:
                self._first[name].append(mean)

    def state(self) -> dict[str, Any]:
        """Return the history and the settings, for a checkpoint; floats come back bit for bit."""
        return {"history": self._history, "first": self._first, "settings": self._settings}

    def restore(self, state: Mapping[str, Any], decided: Sequence[Decision] = ()) -> None:
        """Go on from what `state` returned. Raises CheckpointError where it is of other objectives.

        decided: what steps behind the state have done before, which they do again, on any ranks; unless the settings
        are others now.
        """
        found = {
            key: {name: [float(mean) for mean in means] for name, means in state[key].items()}
            for key in ("history", "first")
        }
        if set(found["history"]) != set(self.objectives):
            raise CheckpointError(
                f"the checkpoint has trained {', '.join(sorted(found['history']))}, model.objectives asks for "
                f"{', '.join(sorted(self.objectives))}; resume with the config of the run that wrote it"
            )
        self._history, self._first = found["history"], found["first"]
        self._decided = {each.step: each for each in decided} if state["settings"] == self._settings else {}

    @property
    def _kept(self) -> int:
        return max(2 * self._joint_loss.window_steps, self._tasks.window_steps)

    def _chosen(self, step: int) -> list[str]:
        tasks = self._tasks
        if tasks.schedule == "all":
            return list(self.objectives)
        if tasks.schedule == "curriculum":
            return [name for name in self.objectives if step >= tasks.from_step.get(name, 1)]
        drawn = [name for name in self.objectives if name not in tasks.always]
        if any(len(self._first[name]) < tasks.window_steps for name in drawn):
            return list(self.objectives)
        taken = _draw([self._score(name) / tasks.temperature for name in drawn], tasks.per_step, self._seed, step)
        winners = {drawn[place] for place in taken}
        return [name for name in self.objectives if name in tasks.always or name in winners]

    def _score(self, name: str) -> float:
        recent = _mean(self._history[name][-self._tasks.window_steps :])
        if self._tasks.schedule == "gap":
            return max(0.0, recent / self._tasks.targets[name] - 1)
        first = _mean(self._first[name])
        return recent / first if first else 0.0

    def _rates(self) -> dict[str, float]:
        """Return what each weight is multiplied by: 1, and with loss_rate numbers whose mean is 1."""
        length = self._joint_loss.window_steps
        enough = all(len(means) >= 2 * length for means in self._history.values())
        if self._joint_loss.weighting != "loss_rate" or not enough:
            return dict.fromkeys(self.objectives, 1.0)
        rates = []
        for means in self._history.values():
            before = _mean(means[-2 * length : -length])
            rates.append(_mean(means[-length:]) / before if before else 1.0)
        highest = max(rates)
        powers = [math.exp((rate - highest) / self._joint_loss.temperature) for rate in rates]
        return {
            name: len(powers) * power / math.fsum(powers) for name, power in zip(self.objectives, powers, strict=True)
        }


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _draw(logits: Sequence[float], count: int, seed: int, step: int) -> list[int]:
    """Return `count` places, drawn without replacement with probabilities exp(logit), by the Gumbel trick."""
    digest = xxhash.xxh3_128_intdigest(f"{seed}\x1ftasks\x1f{step}".encode())
    bits = np.random.Philox(key=digest).random_raw(len(logits))
    noise = [-math.log(-math.log(((int(number) >> 12) + 0.5) / 2**52)) for number in bits]
    keys = [logit + gumbel for logit, gumbel in zip(logits, noise, strict=True)]
    return sorted(range(len(keys)), key=lambda place: (-keys[place], place))[:count]
