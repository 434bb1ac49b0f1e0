"""What `triweave demo fault` runs in its ranks: one model and one data set under three training loops.

    deepspeed --num_accelerators 2 pretrain/bench/fault_demo.py plain OUT 1 2         a plain DeepSpeed loop
    deepspeed --num_accelerators 2 pretrain/bench/fault_demo.py triweave OUT 0 1 2 3  Triweave's engine
    deepspeed --num_accelerators 2 pretrain/bench/fault_demo.py broken OUT 1 2 3      of a model that never guards

The numbers are the ZeRO stages to train at.

Rank 0 holds pictures only and rank 1 sounds only, as data loaders deal them out now and then. A picture token and a
sound token both have 768 numbers, so the two towers are of equal size. Each stage writes OUT/LOOP-zeroN.safetensors
with the weights behind the last step and OUT/LOOP-zeroN.json with what happened. `train_one_process` is the truth:
plain torch, one process, the batches of both ranks.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from triweave.data_pipeline.batch import PackedBatch
from triweave.data_pipeline.config import DataConfig, SourceConfig
from triweave.data_pipeline.media.geometry import MediaGeometry
from triweave.data_pipeline.media.modalities import MODALITIES
from triweave.data_pipeline.stream.collate import Row, collate
from triweave.data_pipeline.stream.content import Piece
from triweave.pretrain.batch import DeviceBatch, kernel_tables, to_device
from triweave.pretrain.config import RunConfig
from triweave.pretrain.engine.config import TrainConfig
from triweave.pretrain.engine.optimizer import OptimizerConfig
from triweave.pretrain.engine.schedule import ScheduleConfig
from triweave.pretrain.engine.world import AGREED, World, close_world, leave, open_world
from triweave.pretrain.engine.zero import Engine
from triweave.pretrain.errors import ParticipationError
from triweave.pretrain.model.config import ModelConfig
from triweave.pretrain.model.model import MultimodalTransformer
from triweave.pretrain.objectives.losses import LossSums

RANKS = 2
HELD = ("image", "audio")
"""What rank 0 and rank 1 hold."""
STEPS = 20
GEOMETRY = MediaGeometry(image_patch_px=16, audio_mel_bins=96, audio_frames_per_token=8)
FEATURES = {name: MODALITIES[name].features(GEOMETRY) for name in HELD}
VOCAB_SIZE = 64
BOS, EOS, FIRST_WORD = 1, 2, 16
CLASSES = 16
"""Colours of pictures and pitches of tones; the last word of each caption names one."""
ROWS, DOCUMENTS = 2, 4
"""Rows of a rank's batch, documents in each."""
MODEL = ModelConfig(d_model=64, layers=2, heads=4, kv_heads=2, head_width=16)
OPTIMIZER = OptimizerConfig(lr=1e-3, eps=1e-5, clip_norm=0.0)
"""A small eps amplifies the rounding of any two layouts of the work; see docs/participation.md."""


def batch_of(step: int, rank: int) -> PackedBatch:
    """Return what a rank holds at a step: pictures of one colour each with captions, or tones with captions."""
    generator = np.random.default_rng([step, rank])
    kind = MODALITIES[HELD[rank]]
    draw, grid = (_picture, (1, 2, 2)) if kind.name == "image" else (_tone, (6, 1, 1))
    media, rows = [], []
    for row in range(ROWS):
        pieces = []
        for document in range(DOCUMENTS):
            label = int(generator.integers(CLASSES))
            media.append(draw(generator, label, int(np.prod(grid))))
            pieces.append(_captioned(f"{kind.name}s:{step}:{row}-{document}", kind.id, label, grid))
        rows.append(Row(step * ROWS + row, pieces))
    length = max(sum(len(piece.tokens) for piece in row.pieces) for row in rows)
    values = {kind.id: np.concatenate(media).astype(kind.dtype)}
    return collate(rows, values, sequence_length=length, pad_id=0)


def _captioned(sample_id: str, kind: int, label: int, grid: tuple[int, int, int]) -> Piece:
    """Return `[bos] [start] media words label [eos]`."""
    count = int(np.prod(grid))
    words = [FIRST_WORD + kind, FIRST_WORD + 4 + kind, FIRST_WORD + 8 + label]
    tokens = [BOS, 2 * kind + 1, *[2 * kind + 2] * count, *words, EOS]
    return Piece(
        tokens=np.array(tokens, np.int32),
        runs=[(0, 2, 2, 1, 1), (kind, count, *grid), (0, len(words) + 1, len(words) + 1, 1, 1)],
        weight=1.0,
        sample_id=f"{sample_id}:0:{len(tokens)}",
        sample_hash=0,
    )


def _picture(generator: np.random.Generator, colour: int, patches: int) -> np.ndarray[Any, Any]:
    """Return noisy patches of one colour [patches, 768], uint8 values."""
    rgb = np.array([colour & 3, colour >> 2 & 3, (colour * 7) & 3]) * 80.0
    pixels = rgb + generator.normal(0, 12, (patches, GEOMETRY.image_patch_px**2, 3))
    return pixels.clip(0, 255).reshape(patches, -1)


def _tone(generator: np.random.Generator, pitch: int, tokens: int) -> np.ndarray[Any, Any]:
    """Return noisy log-mel frames with energy in the bands of one pitch [tokens, 768]."""
    mel = generator.normal(-11, 1, (tokens, GEOMETRY.audio_frames_per_token, GEOMETRY.audio_mel_bins))
    mel[:, :, 6 * pitch : 6 * pitch + 6] += 10
    return mel.reshape(tokens, -1)


class NeverGuards(MultimodalTransformer):
    """The model as one writes it for one process: it calls a tower where the batch has something for it, only there."""

    def forward(
        self,
        batch: DeviceBatch,
        guards: AbstractSet[str] = frozenset(),  # noqa: ARG002 - this is the breach
        *others: Any,
        **options: Any,
    ) -> LossSums:
        """Return the loss sums of one micro-batch, whatever the other ranks hold."""
        return super().forward(batch, frozenset(), *others, **options)


def build_model(kind: type[MultimodalTransformer] = MultimodalTransformer) -> MultimodalTransformer:
    """Return the model, with the same weights in every process."""
    return kind(MODEL, vocab_size=VOCAB_SIZE, media_features=FEATURES, seed=0)


def train_one_process(steps: int = STEPS) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Return (weights, losses) of plain torch in one process over the batches of both ranks."""
    model = build_model()
    optimizer = _adamw(model)
    losses = []
    for step in range(steps):
        batches = [batch_of(step, rank) for rank in range(RANKS)]
        weight = sum(float(batch.row_weight.sum()) for batch in batches)
        loss = sum(model(_prepared(batch)).total for batch in batches) / weight
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return {name: value.detach().clone() for name, value in model.named_parameters()}, losses


def train_plain_deepspeed(world: World, stage: int) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Return (weights, losses) of the loop that DeepSpeed's documentation shows; a careful one.

    The loss is the mean over the tokens of both ranks, so that nothing but the participation differs from one process.
    """
    import deepspeed

    model = build_model()
    settings = {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=_adamw(model), config=settings, dist_init_required=False)
    losses = []
    for step in range(STEPS):
        batch = batch_of(step, world.rank)
        weight = float(world.gather([float(batch.row_weight.sum())]).sum())
        total = engine(_prepared(batch)).total
        engine.backward(total * (world.size / weight))
        engine.step()
        losses.append(float(world.gather([float(total.detach())]).sum()) / weight)
    return _whole_weights(model), losses


def train_triweave(
    world: World, stage: Literal[0, 1, 2, 3], run_dir: str, kind: type[MultimodalTransformer] = MultimodalTransformer
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Return (weights, losses) of Triweave's engine. Raises ParticipationError where the model breaks the contract.

    run_dir: where a rank that ends alone leaves its last words.
    """
    config = RunConfig(
        run_dir=run_dir,
        data=DataConfig(sources=[SourceConfig(name="drawn", shards="none")], tokenizer="none"),
        model=MODEL,
        optimizer=OPTIMIZER,
        schedule=ScheduleConfig(kind="wsd", warmup_steps=0),
        train=TrainConfig(
            steps=STEPS, global_batch_rows=RANKS * ROWS, micro_batch_rows=ROWS, zero_stage=stage, device="cpu"
        ),
    )
    engine = Engine(build_model(kind), config, world, accumulation=1)
    losses = []
    for step in range(STEPS):
        batch = batch_of(step, world.rank)
        batch.extra.update(_tables()(batch))
        losses.append(engine.train_window([batch]).loss)
    return _whole_weights(engine.model), losses


def main(arguments: Sequence[str]) -> int:
    """Run one loop at the given stages; return 0, or 2 after the one line of a broken contract."""
    loop, out, *stages = (word for word in arguments if not word.startswith("--local_rank"))
    loops: dict[str, Callable[[World, Any], tuple[dict[str, torch.Tensor], list[float]]]] = {
        "plain": train_plain_deepspeed,
        "triweave": lambda world, stage: train_triweave(world, stage, out),
        "broken": lambda world, stage: train_triweave(world, stage, out, NeverGuards),
    }
    world = open_world("cpu", torch_threads=1)
    code = 0
    for stage in map(int, stages):
        path = Path(out) / f"{loop}-zero{stage}.safetensors"
        try:
            weights, losses = loops[loop](world, stage)
        except ParticipationError as error:
            code = 2
            if world.rank == 0 or AGREED not in getattr(error, "__notes__", ()):
                path.with_suffix(".json").write_text(json.dumps({"error": str(error)}))
                print(f"triweave demo fault: {error}", file=sys.stderr, flush=True)
            continue
        if world.rank == 0:
            save_file(weights, path)
            path.with_suffix(".json").write_text(json.dumps({"losses": losses}))
    close_world()
    return code


def _adamw(model: torch.nn.Module) -> torch.optim.AdamW:
    """Return AdamW over two groups, matrices decayed and the rest not."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": OPTIMIZER.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=OPTIMIZER.lr, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps)


def _tables() -> Callable[[PackedBatch], dict[str, Any]]:
    return kernel_tables(MODEL, torch.device("cpu"), torch.float32)


def _prepared(batch: PackedBatch) -> DeviceBatch:
    batch.extra.update(_tables()(batch))
    return to_device(batch, "cpu")


def _whole_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return copies of all parameters on rank 0, gathered where they are sharded; collective."""
    import deepspeed

    parameters = dict(model.named_parameters())
    with deepspeed.zero.GatheredParameters([p for p in parameters.values() if hasattr(p, "ds_id")]):
        weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    dist.barrier()
    return weights


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
