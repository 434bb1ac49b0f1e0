"""The demo's training: two ranks, a kill in the middle, a resume on one rank, and the score."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from triweave.launch.deepspeed_launcher import local_command
from triweave.launch.demo.stage_display import SUMMARY
from triweave.launch.errors import DemoError
from triweave.launch.machine import Machine, free_port
from triweave.launch.metrics import mean_loss_by_modality, read_metrics
from triweave.launch.processes import Outcome, group_members, run_to_end

POLL_S = 0.2
KILLED = 128 + signal.SIGKILL

Update = Callable[[float, float | None, str], None]


class DemoTraining:
    """Runs the launcher for the demo's stages and watches its metrics."""

    def __init__(self, config_path: Path, *, machine: Machine, update: Update) -> None:
        """`update(done, total, words)` moves the progress display."""
        from triweave.pretrain.config import load_config

        self.config_path = config_path
        self.config = load_config(config_path)
        self.run_dir = Path(self.config.run_dir)
        self._machine = machine
        self._update = update

    @property
    def kill_step(self) -> int:
        """The step after which a rank is killed: at two thirds of the run, halfway between two checkpoints."""
        every = self.config.checkpoint.every_steps
        return self.config.train.steps * 2 // 3 // every * every + every // 2

    def train_until_killed(self, ranks: int) -> dict[str, Any]:
        """Train until a rank is killed; return the losses that were logged before."""
        from triweave.pretrain.checkpoints.checkpoint import newest_checkpoint

        outcome = self._launch(ranks, kill_after_step=self.kill_step)
        if outcome.exit_code != KILLED:
            raise DemoError(
                f"training ended with exit code {outcome.exit_code} before it was killed; {self._log_tail()}"
            )
        losses = {str(step): entry["loss"] for step, entry in read_metrics(self.run_dir).items()}
        last, checkpoint_step = max(map(int, losses)), newest_checkpoint(self.run_dir)
        words = f"{ranks} ranks, rank {ranks - 1} killed (SIGKILL) after step {last}"
        return {"losses_before_kill": losses, "checkpoint_step": checkpoint_step, SUMMARY: words}

    def resume(self, ranks: int, losses_before_kill: dict[str, float], checkpoint_step: int) -> dict[str, Any]:
        """Continue from the newest checkpoint on other ranks to the end; compare the steps that were run twice."""
        steps = self.config.train.steps
        outcome = self._launch(ranks, kill_after_step=None)
        if outcome.exit_code != 0:
            raise DemoError(f"the resumed training ended with exit code {outcome.exit_code}; {self._log_tail()}")
        metrics = read_metrics(self.run_dir)
        repeated = [step for step in map(int, losses_before_kill) if step > checkpoint_step]
        difference = max(abs(metrics[step]["loss"] - losses_before_kill[str(step)]) for step in repeated)
        words = f"{ranks} rank from step {checkpoint_step} to {steps}; "
        words += f"{len(repeated)} repeated steps differ by {difference:.1e}"
        return {
            "steps": steps,
            "resume_max_abs_diff": difference,
            "resume_compared_steps": len(repeated),
            SUMMARY: words,
        }

    def score(self, mean_steps: int) -> dict[str, Any]:
        """Return the losses at the end, and those of the best unigram model on the same tokens."""
        from triweave.data_pipeline.media.modalities import MODALITIES
        from triweave.data_pipeline.stream.plan import Planner
        from triweave.launch.demo.unigram import state_after, unigram_losses
        from triweave.pretrain.model.model import MultimodalTransformer

        config, metrics = self.config, read_metrics(self.run_dir)
        steps, rows = config.train.steps, config.train.global_batch_rows
        planner = Planner(config.data)
        state = state_after(planner, steps=steps - mean_steps, global_batch_rows=rows)
        unigram, tokens = unigram_losses(config.data, global_batch_rows=rows, steps=mean_steps, state=state)
        last = [metrics[step] for step in range(steps - mean_steps + 1, steps + 1)]
        loss = mean_loss_by_modality(last)
        everything = list(metrics.values())
        model = MultimodalTransformer(
            config.model,
            vocab_size=planner.tokenizer.vocab_size,
            media_features={name: kind.features(config.data.geometry) for name, kind in MODALITIES.items()},
            seed=config.seed,
        )
        step_seconds = sum(entry["step_s"] for entry in everything)
        return {
            "loss_first": metrics[1]["loss"],
            "loss_last": sum(entry["loss"] for entry in last) / len(last),
            "loss_by_modality": loss,
            "unigram_by_modality": unigram,
            "supervised_tokens_by_modality": tokens,
            "data_wait_fraction": sum(entry["data_wait_s"] for entry in everything) / step_seconds,
            "tokens_per_s": sum(entry["tokens"] for entry in everything) / step_seconds,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            SUMMARY: ", ".join(f"{name} {loss[name]:.2f} (unigram {unigram[name]:.2f})" for name in loss),
        }

    def _launch(self, ranks: int, *, kill_after_step: int | None) -> Outcome:
        """Train to the end or until the kill. Raises KeyboardInterrupt where the user stopped it."""
        self.run_dir.mkdir(parents=True, exist_ok=True)
        training = [str(self.config_path.resolve()), "--resume"]
        command = local_command(training, machine=self._machine, ranks=ranks, port=free_port())
        with (self.run_dir / "launch.log").open("ab") as log, self._watch(ranks, kill_after_step) as started:
            outcome = run_to_end(command, log=log, show=lambda _: None, started=started)
        if outcome.stopped_by is not None:
            raise KeyboardInterrupt
        return outcome

    @contextmanager
    def _watch(self, ranks: int, kill_after_step: int | None) -> Iterator[Callable[[int], None]]:
        """Follow the metrics in a thread; the yielded function tells it the launcher's process group."""
        ended = threading.Event()
        groups: list[int] = []
        target = kill_after_step or self.config.train.steps

        def follow() -> None:
            first = max(read_metrics(self.run_dir), default=0)
            killed = False
            while not ended.wait(POLL_S):
                metrics = read_metrics(self.run_dir)
                step = max(metrics, default=0)
                if step != first:
                    first = -1
                    words = (
                        f"step {step}, loss {metrics[step]['loss']:.3f}, {metrics[step]['tokens_per_s']:,.0f} tokens/s"
                    )
                    self._update(step, target, words)
                else:
                    self._update(step, target, f"{ranks} ranks are starting" if ranks > 1 else "1 rank is starting")
                if kill_after_step is not None and step >= kill_after_step and groups and not killed:
                    killed = kill_rank(groups[0], ranks - 1)

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield groups.append
        finally:
            ended.set()
            thread.join()

    def _log_tail(self) -> str:
        lines = (self.run_dir / "launch.log").read_text(encoding="utf-8", errors="replace").splitlines()
        return f"last line: {lines[-1] if lines else 'none'}; all of them: {self.run_dir / 'launch.log'}"


def kill_rank(group: int, rank: int) -> bool:
    """Send SIGKILL to one rank of a launcher's process group; return whether it was found.

    The rank's reading processes have its environment too: the rank is the one whose parent is not of that rank.
    """
    members = [process for process in group_members(group) if _environment(process).get("RANK") == str(rank)]
    for process in members:
        if _parent(process) not in members:
            os.kill(process, signal.SIGKILL)
            return True
    return False


def _environment(process: int) -> dict[str, str]:
    with contextlib.suppress(OSError):
        text = Path(f"/proc/{process}/environ").read_bytes().decode(errors="replace")
        return dict(item.split("=", 1) for item in text.split("\0") if "=" in item)
    return {}


def _parent(process: int) -> int:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    return 0
