"""What a save costs the training: ours in the background beside DeepSpeed's two ways and torch's asynchronous DCP.

One process trains a random text model at ZeRO 1 and saves the same state in turns. Of a save in the background the cost
is the extra wall time of all steps from its call to its commit, against steps without one: what it blocks and what it
slows down. Our commit has every byte forced to disk; DeepSpeed and DCP leave theirs in the page cache.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from triweave.data_pipeline.batch import PackedBatch
from triweave.data_pipeline.config import DataConfig, SourceConfig
from triweave.data_pipeline.stream.collate import Row, collate
from triweave.data_pipeline.stream.content import Piece
from triweave.pretrain.batch import kernel_tables
from triweave.pretrain.checkpoints.config import CheckpointConfig
from triweave.pretrain.checkpoints.saver import CheckpointSaver
from triweave.pretrain.config import RunConfig
from triweave.pretrain.engine.config import TrainConfig
from triweave.pretrain.engine.world import open_world
from triweave.pretrain.engine.zero import Engine
from triweave.pretrain.errors import PretrainError
from triweave.pretrain.model.config import ModelConfig
from triweave.pretrain.model.model import MultimodalTransformer

VOCAB_SIZE = 4096
FAST_WRITER = {"checkpoint": {"writer": {"type": "fast", "decoupled": False, "data_parallel": "REPLICA"}}}


@dataclass(frozen=True, kw_only=True)
class CheckpointCost:
    """Medians over the repeats, seconds; `bytes` of one checkpoint of ours.

    step_s: of a step without a save. blocked_s, slowdown_s: of our saves but the first, whose memory is new
    (first_blocked_s, first_slowdown_s). commit_s: from the call to the commit. deepspeed_sync_s, deepspeed_fast_s: of
    the call. dcp_async_s: blocked and slowed together. ratio: (blocked_s + slowdown_s) / deepspeed_sync_s.
    cpu_s, deepspeed_sync_cpu_s: processor time of our thread, and of DeepSpeed's call; they hold on a busy machine too.
    deepspeed_fast_error: why it could not be measured, else empty.
    """

    parameters: int
    bytes: int
    repeats: int
    threads: int
    step_s: float
    first_blocked_s: float
    first_slowdown_s: float
    blocked_s: float
    slowdown_s: float
    commit_s: float
    deepspeed_sync_s: float
    deepspeed_fast_s: float | None
    deepspeed_fast_error: str
    dcp_async_s: float
    ratio: float
    cpu_s: float
    deepspeed_sync_cpu_s: float


def bench_checkpoint(
    *,
    d_model: int = 512,
    layers: int = 8,
    tokens: int = 512,
    repeats: int = 5,
    threads: int = 1,
    folder: Path | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> CheckpointCost:
    """Measure all of them in turns, `repeats` times after a first save of each; writes below `folder` and cleans up.

    Raises PretrainError where a number is below 1 or the model cannot be.
    """
    if min(d_model, layers, tokens, repeats, threads) < 1:
        raise PretrainError(f"{repeats} repeats, {threads} threads, {tokens} tokens: all must be at least 1")
    with tempfile.TemporaryDirectory(prefix="bench-checkpoint-", dir=folder) as scratch:
        bench = _Bench(Path(scratch), d_model=d_model, layers=layers, tokens=tokens, threads=threads)
        return bench.measure(repeats, progress)


class _Bench:
    def __init__(self, scratch: Path, *, d_model: int, layers: int, tokens: int, threads: int) -> None:
        self._scratch = scratch
        self._threads = threads
        world = open_world("cpu", threads)
        model = ModelConfig(d_model=d_model, layers=layers, heads=max(1, d_model // 64), kv_heads=1, head_width=64)
        config = RunConfig(
            run_dir=str(scratch),
            data=DataConfig(sources=[SourceConfig(name="none", shards="none")], tokenizer="none"),
            model=model,
            train=TrainConfig(steps=1_000_000, global_batch_rows=1, device="cpu", zero_stage=1),
            checkpoint=CheckpointConfig(keep=1),
        )
        self._config = config
        module = MultimodalTransformer(model, vocab_size=VOCAB_SIZE, media_features={}, seed=0)
        self._batch = _batch(config, tokens)
        self._engine = Engine(module, config, world, accumulation=1)
        self._deepspeed: Any = self._engine._deepspeed
        self._saver = CheckpointSaver(self._engine, config.checkpoint, scratch)
        self._step_s = 0.0

    def measure(self, repeats: int, progress: Callable[[str], None]) -> CheckpointCost:
        progress("steps without a save")
        for _ in range(3):
            self._step()
        self._step_s = statistics.median(self._step() for _ in range(3 + 2 * repeats))
        fast, fast_error = self._fast_engine()
        ours: list[tuple[float, float, float]] = []
        seconds: dict[str, list[float]] = {"sync": [], "sync_cpu": [], "fast": [], "dcp": []}
        for repeat in range(repeats + 1):
            progress(f"repeat {repeat} of {repeats}: in the background")
            ours.append(self._ours())
            progress(f"repeat {repeat} of {repeats}: DeepSpeed")
            for name, value in zip(
                ("sync", "sync_cpu"), self._deepspeed_save(self._deepspeed.checkpoint_engine), strict=True
            ):
                seconds[name].append(value)
            if fast is not None:
                seconds["fast"].append(self._deepspeed_save(fast)[0])
            progress(f"repeat {repeat} of {repeats}: DCP")
            seconds["dcp"].append(self._dcp())
            self._step_s = statistics.median([self._step_s, *(self._step() for _ in range(4))])
        with self._saver:
            pass
        later = {name: statistics.median(values[1:]) for name, values in seconds.items() if values}
        blocked, slowdown, commit = (statistics.median(column) for column in zip(*ours[1:], strict=True))
        return CheckpointCost(
            parameters=sum(parameter.numel() for parameter in self._engine.model.parameters()),
            bytes=self._saver.times[-1].bytes,
            repeats=repeats,
            threads=self._threads,
            step_s=self._step_s,
            first_blocked_s=ours[0][0],
            first_slowdown_s=ours[0][1],
            blocked_s=blocked,
            slowdown_s=slowdown,
            commit_s=commit,
            deepspeed_sync_s=later["sync"],
            deepspeed_fast_s=later.get("fast"),
            deepspeed_fast_error=fast_error,
            dcp_async_s=later["dcp"],
            ratio=(blocked + slowdown) / later["sync"],
            cpu_s=statistics.median(times.cpu_s for times in self._saver.times[1:]),
            deepspeed_sync_cpu_s=later["sync_cpu"],
        )

    def _step(self) -> float:
        began = time.perf_counter()
        self._engine.train_window([self._batch])
        return time.perf_counter() - began

    def _ours(self) -> tuple[float, float, float]:
        """Return the seconds blocked and slowed down, and those until the commit."""
        began = time.perf_counter()
        self._saver.save(state={}, config_yaml="")
        steps = self._until(lambda: not self._saver.busy)
        extra = time.perf_counter() - began - steps * self._step_s
        self._saver.finish()
        times = self._saver.times[-1]
        return times.blocked_s, extra - times.blocked_s, times.background_s

    def _deepspeed_save(self, checkpoint_engine: Any) -> tuple[float, float]:
        """Return the seconds of the call, and its processor time."""
        usual = self._deepspeed.checkpoint_engine
        with self._emptied() as folder:
            self._deepspeed.checkpoint_engine = checkpoint_engine
            began, cpu = time.perf_counter(), time.process_time()
            with redirect_stdout(sys.stderr):  # its fast writer prints sizes
                self._deepspeed.save_checkpoint(str(folder), tag="it")
            seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
            self._deepspeed.checkpoint_engine = usual
        return seconds, cpu

    def _dcp(self) -> float:
        """Return the extra wall time of the steps from the call to the end of an asynchronous save."""
        from torch.distributed.checkpoint import async_save

        state = {
            f"{kind}:{part.name}": values for part in self._engine.fragments() for kind, values in part.tensors.items()
        }
        with self._emptied() as folder:
            began = time.perf_counter()
            future: Any = async_save(state, checkpoint_id=str(folder))
            steps = self._until(future.done)
            seconds = time.perf_counter() - began - steps * self._step_s
            future.result()
        return seconds

    def _until(self, done: Callable[[], bool]) -> int:
        """Train until `done` after a step; return the steps."""
        steps = 0
        while steps == 0 or not done():
            self._step()
            steps += 1
        return steps

    def _fast_engine(self) -> tuple[Any, str]:
        """Return DeepSpeed's fast engine, or None and why it cannot be had here."""
        from deepspeed.runtime.checkpoint_engine import utils
        from deepspeed.runtime.config import DeepSpeedConfig
        from deepspeed.utils import groups

        os.environ.update(CROSS_SIZE="1", CROSS_RANK="0")  # what only DeepSpeed's launcher sets
        settings = {"train_batch_size": 1, "zero_optimization": {"stage": 1}, **FAST_WRITER}
        try:
            made = utils.create_checkpoint_engine(
                config_params=DeepSpeedConfig(settings),
                groups=groups,
                zero_stage=1,
                has_moe_layers=False,
                optimize_dp_state=True,
            )
            self._deepspeed_save(made)
        except Exception as error:  # its extension is compiled at first use, and fails in as many ways as compilers do
            return None, " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return made, ""

    @contextmanager
    def _emptied(self) -> Iterator[Path]:
        folder = self._scratch / "other"
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder)


def _batch(config: RunConfig, tokens: int) -> PackedBatch:
    """Return one row of random text."""
    text = np.random.default_rng(0).integers(4, VOCAB_SIZE, tokens).astype(np.int32)
    piece = Piece(tokens=text, runs=[(0, tokens, tokens, 1, 1)], weight=1.0, sample_id="text", sample_hash=0)
    batch = collate([Row(0, [piece])], {}, sequence_length=tokens, pad_id=0)
    return dataclasses.replace(batch, extra=kernel_tables(config.model, torch.device("cpu"), torch.float32)(batch))
