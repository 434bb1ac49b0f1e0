"""What the spine costs over a bare DeepSpeed loop: the same model, the same micro-batches, in turns, on every rank.

    python -m torch.distributed.run --standalone --nproc-per-node 2 -m triweave.pretrain.bench.step REQUEST.json

spine   `train.run_steps`, the loop of every run, over windows that are there: announcement, checks of towers and
        gradients, the exact global mean, heartbeats, the ledger of consumed samples, telemetry, the agreements of the
        ranks; no step of it saves
bare    deepspeed.initialize with torch's AdamW; forward, backward and step of each micro-batch's own mean
fsdp2   torch's fully_shard over the decoder's blocks, the same loop with AdamW; it shards as ZeRO 3 does

Windows come from the config's own data and are held in memory; only those are taken in which every rank holds every
modality in every micro-batch, since a bare loop computes something else, or hangs, in the others. Of each engine a few
steps are not counted. The three take turns in one process group; the median of the ratios within a turn counts.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from triweave.data_pipeline.batch import PackedBatch
from triweave.data_pipeline.stream.loader import StepLoader, StepWindow
from triweave.pretrain.batch import to_device
from triweave.pretrain.bench.memory import state_bytes_per_parameter, straddling_bytes, tensor_bytes
from triweave.pretrain.checkpoints.checkpoint import CheckpointSaver
from triweave.pretrain.config import RunConfig, load_config
from triweave.pretrain.engine.config import deepspeed_config
from triweave.pretrain.engine.optimizer import group_parameters
from triweave.pretrain.engine.world import World, close_world, leave, open_world
from triweave.pretrain.engine.zero import Engine
from triweave.pretrain.errors import PretrainError
from triweave.pretrain.model.model import MultimodalTransformer
from triweave.pretrain.objectives.losses import weight_by_slot
from triweave.pretrain.start import build_engine, build_loader, open_heartbeat, open_ledger, open_telemetry
from triweave.pretrain.train import Run, run_steps

WINDOWS_KEPT = 4
WINDOWS_TRIED = 64
ENDLESS_STEPS = 1 << 30
"""`train.steps` of the spine under measurement, which so neither ends nor saves."""
SMALL_BUCKETS = {
    "reduce_bucket_size": 1 << 16,
    "allgather_bucket_size": 1 << 16,
    "stage3_prefetch_bucket_size": 1 << 16,
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
}
"""DeepSpeed's settings while memory is counted: what its buckets hold is no state, and here would be most of it."""


@dataclass(frozen=True, kw_only=True)
class StepFigures:
    """Medians of one ZeRO stage; times of a turn in seconds.

    spine_over_bare: ratio of the times within a turn; fsdp2_over_bare likewise, None below ZeRO 3. bytes_per_param: of
        tensors before the update, on rank 0; formula_bytes_per_param: by `bench.memory.state_bytes_per_parameter`, at
        ZeRO 1 and 2 with the gradients of `bench.memory.straddling_bytes`.
    """

    stage: int
    ranks: int
    parameters: int
    steps: int
    repeats: int
    spine_s: float
    bare_s: float
    spine_over_bare: float
    fsdp2_over_bare: float | None
    bytes_per_param: float
    formula_bytes_per_param: float


def measure(config: RunConfig, world: World, *, steps: int, repeats: int) -> StepFigures:
    """Measure one config's stage; collective. Raises PretrainError where its data has no window to compare on."""
    if config.train.sequence_parallel > 1:
        raise PretrainError(
            f"train.sequence_parallel is {config.train.sequence_parallel}, and the bare loop that the spine is "
            "measured against knows whole rows only; add train.sequence_parallel=1"
        )
    windows, loader = whole_windows(config, world)
    bytes_per_param = _memory(config, world, loader, windows)
    turns: dict[str, Callable[[], None]] = {}
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        turns["bare"] = _bare(config, world, loader, windows, steps)
        spine = _spine(replace(config, run_dir=folder), world, loader, windows, steps)
        turns["spine"] = stack.enter_context(spine)
        if config.train.zero_stage == 3:
            turns["fsdp2"] = _fsdp2(config, world, loader, windows, steps)
        seconds: dict[str, list[float]] = {name: [] for name in turns}
        for repeat in range(-1, repeats):
            for name in list(turns) if repeat % 2 else list(turns)[::-1]:
                dist.barrier(group=world.control)
                began = time.perf_counter()
                turns[name]()
                dist.barrier(group=world.control)
                if repeat >= 0:
                    seconds[name].append(time.perf_counter() - began)

    def over_bare(name: str) -> float:
        return statistics.median(own / bare for own, bare in zip(seconds[name], seconds["bare"], strict=True))

    return StepFigures(
        stage=config.train.zero_stage,
        ranks=world.size,
        parameters=_model(config, loader, world).parameters_total,
        steps=steps,
        repeats=repeats,
        spine_s=statistics.median(seconds["spine"]),
        bare_s=statistics.median(seconds["bare"]),
        spine_over_bare=over_bare("spine"),
        fsdp2_over_bare=over_bare("fsdp2") if "fsdp2" in seconds else None,
        bytes_per_param=bytes_per_param,
        formula_bytes_per_param=_formula(config, world, loader),
    )


def _formula(config: RunConfig, world: World, loader: StepLoader) -> float:
    """Return the bytes per parameter that this rank should hold before an update, when every gradient is reduced."""
    stage = config.train.zero_stage
    state = state_bytes_per_parameter(stage, world.size, config.train.precision)
    if stage not in (1, 2):
        return state
    model = _model(config, loader, world)
    groups = [
        [parameter.numel() for parameter in group["params"]]
        for group in group_parameters(model.named_parameters(), config.optimizer)
    ]
    return state + straddling_bytes(groups, world.size, world.rank) / model.parameters_total


def whole_windows(config: RunConfig, world: World) -> tuple[list[StepWindow], StepLoader]:
    """Return windows in which all ranks hold all modalities in each micro-batch, and their loader; collective."""
    loader = build_loader(config, world, None)
    kept: list[StepWindow] = []
    for _, window in zip(range(WINDOWS_TRIED), loader, strict=False):
        whole = all(set(batch.payloads) == set(loader.media_features) for batch in window.micro_batches)
        if world.gather([float(whole)]).all():
            kept.append(window)
        if len(kept) == WINDOWS_KEPT:
            return kept, loader
    raise PretrainError(
        f"only {len(kept)} of {WINDOWS_TRIED} steps hold {', '.join(loader.media_features)} in every micro-batch of "
        f"every rank, {WINDOWS_KEPT} are wanted; raise data.sequence_length or train.micro_batch_rows"
    )


class _Sized(MultimodalTransformer):
    @property
    def parameters_total(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())


def _model(config: RunConfig, loader: StepLoader, world: World) -> _Sized:
    model = _Sized(
        config.model, vocab_size=loader.tokenizer.vocab_size, media_features=loader.media_features, seed=config.seed
    )
    torch.manual_seed(config.seed + world.rank)
    return model


def _memory(config: RunConfig, world: World, loader: StepLoader, windows: Sequence[StepWindow]) -> float:
    """Return the bytes of tensors per parameter when all gradients of the second step are there."""
    given = config.deepspeed.get("zero_optimization", {})
    small = replace(config, deepspeed={**config.deepspeed, "zero_optimization": {**SMALL_BUCKETS, **given}})
    before = tensor_bytes()
    model = _model(config, loader, world)
    parameters = model.parameters_total
    engine = Engine(model, small, world, accumulation=loader.accumulation)
    seen: list[int] = []
    engine.train_window(windows[0].micro_batches)
    engine.before_update = lambda: seen.append(tensor_bytes(model))
    engine.train_window(windows[1].micro_batches)
    engine.close()
    return (seen[0] - before) / parameters


@contextlib.contextmanager
def _spine(
    config: RunConfig, world: World, loader: StepLoader, windows: Sequence[StepWindow], steps: int
) -> Iterator[Callable[[], None]]:
    """Yield a turn of the loop that every run executes, in a run that never comes to its last step."""
    train = replace(config.train, steps=ENDLESS_STEPS, log_every_steps=ENDLESS_STEPS)
    config = replace(config, train=train, checkpoint=replace(config.checkpoint, every_steps=0))
    engine = build_engine(config, world, loader, None)
    stream = itertools.cycle(windows)
    with (
        open_heartbeat(config, world) as heartbeat,
        open_ledger(config, world, None) as ledger,
        open_telemetry(config, engine) as telemetry,
        CheckpointSaver(engine, config.checkpoint, config.run_dir) as saver,
    ):
        run = Run(
            config=config, engine=engine, heartbeat=heartbeat, ledger=ledger, telemetry=telemetry, saver=saver, stop=()
        )

        def turn() -> None:
            finished = run_steps(run, stream, until=engine.step + steps)
            assert finished, "nobody has asked the spine to stop"

        yield turn


def _bare(
    config: RunConfig, world: World, loader: StepLoader, windows: Sequence[StepWindow], steps: int
) -> Callable[[], None]:
    import deepspeed

    model = _model(config, loader, world)
    settings = deepspeed_config(config, accumulation=loader.accumulation, parameters=model.parameters_total)
    if config.train.zero_stage == 0:
        settings["gradient_clipping"] = config.optimizer.clip_norm  # the spine clips there itself
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=_adamw(model, config), config=settings, dist_init_required=False
    )

    def turn() -> None:
        for number in range(steps):
            for batch in windows[number % len(windows)].micro_batches:
                found = engine(to_device(batch, world.device))
                engine.backward(found.total / _supervised(batch))
                engine.step()

    return turn


def _fsdp2(
    config: RunConfig, world: World, loader: StepLoader, windows: Sequence[StepWindow], steps: int
) -> Callable[[], None]:
    from torch.distributed.fsdp import fully_shard

    model: Any = _model(config, loader, world).to(world.device)  # fully_shard gives it methods of its own
    for block in model.decoder.blocks:
        fully_shard(block)
    fully_shard(model)
    optimizer = _adamw(model, config)
    scale = 1 / loader.accumulation

    def turn() -> None:
        for number in range(steps):
            batches = windows[number % len(windows)].micro_batches
            for place, batch in enumerate(batches):
                model.set_requires_gradient_sync(place == len(batches) - 1)
                (model(to_device(batch, world.device)).total * scale / _supervised(batch)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
            optimizer.step()
            optimizer.zero_grad()

    return turn


def _adamw(model: nn.Module, config: RunConfig) -> torch.optim.AdamW:
    groups = group_parameters(model.named_parameters(), config.optimizer)
    known = [{key: group[key] for key in ("params", "weight_decay")} for group in groups]
    return torch.optim.AdamW(known, lr=config.optimizer.lr, betas=config.optimizer.betas, eps=config.optimizer.eps)


def _supervised(batch: PackedBatch) -> float:
    return max(1.0, float(weight_by_slot(batch).sum()))


def main(argv: Sequence[str]) -> int:
    """Measure what a request file asks for; rank 0 writes the figures beside it."""
    request_path = Path(argv[0])
    request: dict[str, Any] = json.loads(request_path.read_bytes())
    try:
        config = load_config(request["config"], request["overrides"])
        world = open_world(config.train.device, config.train.torch_threads)
        figures = measure(config, world, steps=request["steps"], repeats=request["repeats"])
    except PretrainError as error:
        request_path.with_suffix(".error").write_text(str(error), encoding="utf-8")
        return 2
    finally:
        close_world()
    if world.rank == 0:
        request_path.with_suffix(".figures").write_text(json.dumps(vars(figures)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
