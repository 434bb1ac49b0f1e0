"""Sequence parallelism: slices of a row on several ranks are the row on one, in float64 and through every ZeRO stage.

The comparison in float64 is of gradients without DeepSpeed, to 1e-12; that in float32 is test_parity's. Gradients of
some norms of towers and of cross-attention are sums with so much cancellation that one process's float32 is up to 7e-6
from its float64, and slices, which add in another order, as far in another direction: those cells ask for 1e-5 of
moments, and the float32 of slices is compared with that of one process beside the float64.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from spine_runs import HALF, STEPS, consumed, files_of, metrics

from triweave.data_pipeline.batch import PADDING_ID
from triweave.data_pipeline.config import DataConfig, PackingConfig, SourceConfig
from triweave.pretrain.batch import ATTENTION_TILES, as_read, kernel_tables, to_device
from triweave.pretrain.config import RunConfig
from triweave.pretrain.engine.config import TrainConfig, deepspeed_config
from triweave.pretrain.engine.sequence_parallel import head_shares, shares
from triweave.pretrain.engine.slices import Slicer
from triweave.pretrain.errors import PretrainError
from triweave.pretrain.fusion.config import FusionConfig
from triweave.pretrain.ledger.audit import audit
from triweave.pretrain.model.config import LayoutConfig, ModelConfig

TASKS = Path(__file__).with_name("sequence_parallel_tasks.py")
ROUNDED = 1e-5
FUSED = {"kind": "cross", "cross_every": 2, "scope": "preceding", "resampler_latents": 2, "resampler_layers": 1}
TORN = {"heads": (8, 2)}
"""On 3 ranks a rank's queries read parts of two key/value heads."""
ONE_KEY = {"heads": (5, 1)}
"""On 2 and 3 ranks all read one key/value head."""


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 2), (9, 3), (5, 1), (12, 6)])
def test_heads_are_dealt_out_with_the_keys_they_read(heads, kv_heads, ranks):
    dealt = head_shares(heads, kv_heads, ranks)
    assert [share.first for share in dealt] == [0, *itertools.accumulate(share.count for share in dealt)][:-1]
    assert dealt[-1].end == heads
    for share in dealt:
        assert share.count >= 1
        queries, rest = divmod(share.count, len(share.key_values))
        assert rest == 0
        read = [share.key_values[query // queries] for query in range(share.count)]
        assert read == [head * kv_heads // heads for head in range(share.first, share.end)]
    if kv_heads >= ranks:  # none goes to two ranks
        assert sorted(head for share in dealt for head in share.key_values) == list(range(kv_heads))


def test_shares_are_even_to_one():
    assert shares(7, 3) == (3, 2, 2)
    assert shares(2, 3) == (1, 1, 0)


@pytest.mark.parametrize("ranks", [2, 3, 60])
def test_slices_are_the_whole(make_batch, ranks):
    """Every position, target and media token is in one slice; items are whole where a part of them is."""
    batch = make_batch([("image", "audio"), ("audio",), None], length=49, seed=3)
    batch = replace(batch, row_source=(np.arange(len(batch.row_index)) % 3).astype(np.int16))
    tables = kernel_tables(ModelConfig(), torch.device("cpu"), torch.float32)
    pieces = [Slicer(place=place, ranks=ranks, tables=tables)(batch) for place in range(ranks)]
    for name in ("tokens", "positions", "span_ids"):
        wanted = getattr(batch, name)
        found = np.concatenate([getattr(piece, name) for piece in pieces], axis=1)
        np.testing.assert_array_equal(found[:, : wanted.shape[1]], wanted)
    assert all((piece.kv_hi.shape[1], piece.sample_ids) == (max(49, ranks), batch.sample_ids) for piece in pieces)
    supervised, media = [], {name: [] for name in batch.payloads}
    starts = [0, *itertools.accumulate(piece.tokens.shape[1] for piece in pieces)]
    for piece, start in zip(pieces, starts, strict=False):
        own = to_device(piece, "cpu")
        width = len(own.tokens[0])
        rows, columns = np.divmod(own.row_index.numpy(), width)
        places = (rows * 49 + columns + start).tolist()
        columns_of = (piece.targets, piece.row_weight, piece.row_modality, piece.row_source)
        supervised += zip(places, *(column.tolist() for column in columns_of), strict=True)
        for name, payload in own.payloads.items():
            assert payload.lengths.tolist() == [int(grid.prod()) for grid in payload.grids]
            assert len(payload.values) == int(payload.lengths.sum())
            here = slice(None) if payload.here is None else payload.here
            rows, columns = np.divmod(payload.token_index.numpy(), width)
            places = (rows * 49 + columns + start).tolist()
            media[name] += zip(places, payload.values[here].tolist(), strict=True)
    targets = (batch.row_index, batch.targets, batch.row_weight, batch.row_modality, batch.row_source)
    assert sorted(supervised) == sorted(zip(*(column.tolist() for column in targets), strict=True))
    for name, payload in batch.payloads.items():
        wanted = zip(payload.token_index.tolist(), payload.values.tolist(), strict=True)
        assert sorted(media[name]) == sorted(wanted)


def test_widened_rows_have_the_tables_of_their_modalities(make_batch):
    """More ranks than positions: mmca's tables go by what each key is, padding included."""
    tables = kernel_tables(ModelConfig(fusion=FusionConfig(kind="mmca")), torch.device("cpu"), torch.float32)
    batch = make_batch([("image",), ("audio",)], length=49, seed=3)
    batch.extra.update(tables(batch))
    piece = Slicer(place=0, ranks=60, tables=tables)(batch)
    read = as_read(piece)
    assert (read.modality_ids[:, 49:] == PADDING_ID).all()
    wanted = tables.of(read.kv_lo, read.kv_hi, read.modality_ids)
    assert piece.extra[ATTENTION_TILES].keys() == wanted.keys()
    for name, table in wanted.items():
        np.testing.assert_array_equal(piece.extra[ATTENTION_TILES][name], table, err_msg=name)


@pytest.mark.parametrize(
    ("model", "train", "message"),
    [
        ({"heads": 2, "kv_heads": 2}, {"sequence_parallel": 3}, "model.heads is 2, so some ranks would have none"),
        ({}, {"sequence_parallel": 2, "absent_modality": "align"}, "slices of one row hold unlike media"),
        ({}, {"sequence_parallel": 0}, "train.sequence_parallel is 0; it must be at least 1"),
        ({"objectives": {"language_model": 1.0, "matching": 1.0}}, {"sequence_parallel": 2}, "has matching, whose"),
    ],
)
def test_what_slices_cannot_do_is_refused(model, train, message):
    with pytest.raises(PretrainError) as caught:
        _config(model, **train)
    assert message in str(caught.value)


def test_a_world_is_made_of_whole_groups():
    found = _config({}, sequence_parallel=2, global_batch_rows=3)
    found.check_world(6)
    for ranks, advice in ((3, "start 2, or"), (1, "start 2, or"), (8, "start at most 6 or set")):
        with pytest.raises(PretrainError, match=advice):
            found.check_world(ranks)


def test_deepspeed_is_not_told_of_slices():
    """It would count the ranks of a group once, and the mean over all of them is what the loss is scaled for."""
    told = replace(_config({}, sequence_parallel=2), deepspeed={"sequence_parallel_size": 2})
    with pytest.raises(PretrainError, match=r"sequence_parallel_size is decided by train\.sequence_parallel"):
        deepspeed_config(told, accumulation=1, parameters=1)


def _config(model: dict[str, Any], **train: Any) -> RunConfig:
    packing = PackingConfig(contrastive_share=1.0)
    data = DataConfig(sources=[SourceConfig(name="a", shards="a")], tokenizer="t", packing=packing)
    return RunConfig(run_dir="run", data=data, model=ModelConfig(**model), train=TrainConfig(**train))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "case", "settings"),
    [
        (2, "image_against_audio", {}),
        (3, "all", {}),
        (2, "text_only", ONE_KEY),
        (3, "image_against_audio", ONE_KEY),
        (3, "all", TORN),
        (3, "all", {"heads": (3, 3), "attention": "sdpa"}),
        (2, "all", {"encoder": "attention"}),
        (3, "all", {"encoder": "perceiver"}),
        (3, "all", {"encoder": "convolution"}),
        (2, "image_against_audio", {"activation_checkpointing": True}),
        (2, "all", {"layout": LayoutConfig(positions="sequential", media_attention="causal")}),
        (3, "all", {"qk_norm": False, "tie_embeddings": True}),
        (2, "all", {"fusion": {"kind": "cross", "cross_every": 1}}),
        (3, "all", {"fusion": FUSED}),
        (3, "text_only", {"fusion": FUSED}),
        (3, "all", {"fusion": {"kind": "mmca"}}),
    ],
)
def test_gradients_of_the_slices_add_up_exactly(rank_pool, ranks, case, settings):
    answers = rank_pool.pool(ranks).run(TASKS, "exact_gradients", case=case, settings=settings)
    for answer in answers:
        assert answer["loss"] < 1e-10
        assert max(answer["float64"].values()) < 1e-12, answer["float64"]
        of_one, of_slices = answer["float32"]
        assert of_slices <= 2 * of_one + 1e-7
    if "fusion" not in settings and case == "all":  # items are encoded where they are, not everywhere
        assert len({tuple(sorted(answer["media"].items())) for answer in answers}) > 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "sharing", "case", "accumulation", "stages", "settings", "moments"),
    [
        (2, 2, "image_against_audio", 1, (0, 1, 2, 3), {}, 1e-6),
        (3, 3, "text_only_ranks", 1, (0, 1, 2, 3), TORN, 1e-6),
        (2, 2, "nobody_has_audio", 2, (1, 3), {}, 1e-6),
        (4, 2, "image_against_audio", 1, (2, 3), {}, 1e-6),
        (2, 2, "all", 1, (3,), {"activation_checkpointing": True}, 1e-6),
        (2, 2, "all", 1, (3,), {"fusion": {"kind": "mmca"}}, 1e-6),
        (2, 2, "image_against_audio", 1, (2,), {"fusion": {"kind": "cross", "cross_every": 1}}, 1e-6),
        (2, 2, "text_only_ranks", 2, (3,), {"fusion": FUSED}, ROUNDED),
        (2, 2, "all", 1, (2, 3), {"encoder": "attention"}, ROUNDED),
    ],
)
def test_engine_equals_plain_torch(rank_pool, ranks, sharing, case, accumulation, stages, settings, moments):
    """Losses, norms, weights, moments and step counts after every step; the plain process has one rank a group."""
    tasks, parity = (rank_pool.load(TASKS.with_name(name)) for name in (TASKS.name, "test_parity.py"))
    cell = {"case": case, "accumulation": accumulation}
    with tasks.shared(**settings) as engine:
        expected = engine.reference_case(ranks=ranks // sharing, **cell)
        for stage in stages:
            answers = rank_pool.pool(ranks).run(
                TASKS, "train_shared", sharing=sharing, settings=settings, zero_stage=stage, **cell
            )
            parity.assert_parity(engine, answers, expected, moments=moments)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"loss_norm": "global_documents"}, {"absent_modality": "guard"}])
def test_documents_and_absent_towers_are_those_of_whole_rows(rank_pool, settings):
    """A document that is cut counts as one, and a tower that no slice needs takes its step of zeros."""
    tasks, parity = (rank_pool.load(TASKS.with_name(name)) for name in (TASKS.name, "test_parity.py"))
    cell = {"case": "nobody_has_audio", "accumulation": 1, **settings}
    with tasks.shared() as engine:
        expected = engine.reference_case(ranks=1, **cell)
        answers = rank_pool.pool(2).run(TASKS, "train_shared", sharing=2, settings={}, zero_stage=2, **cell)
        parity.assert_parity(engine, answers, expected)


@pytest.mark.slow
def test_a_rank_keeps_its_slice_only(rank_pool):
    """What waits for the backward pass: 0.60 of the whole on 2 ranks, one of which has 4 of 6 heads; 0.37 on 3."""
    (whole, _), two, three = (
        rank_pool.pool(max(2, sharing)).run(TASKS, "kept_bytes", sharing=sharing, length=512) for sharing in (1, 2, 3)
    )
    assert max(two) < 0.61 * whole
    assert max(three) < 0.38 * whole


@pytest.mark.slow
def test_ranks_that_share_rows_must_hold_the_same_samples(rank_pool):
    """A filler on one of them, for one, would mix two rows into one without anybody noticing."""
    one, other = rank_pool.pool(2).run(TASKS, "other_samples")
    assert one == other
    assert one[0] == ""
    assert one[1].startswith(
        "ParticipationError: rank 1 shares its rows with rank 0 but holds other samples at step 2: synthetic:"
    )


@pytest.mark.slow
def test_a_run_of_slices_is_the_run_of_whole_rows(train, straight, tmp_path):
    """Losses, counts, FLOPs and samples are those of ranks with rows of their own; each row is consumed once."""
    assert train(tmp_path, 2, "train.sequence_parallel=2", f"train.steps={HALF}", f"schedule.total_steps={STEPS}") == [
        "",
        "",
    ]
    for line, wanted in zip(metrics(tmp_path), metrics(straight), strict=False):
        assert abs(line["loss"] - wanted["loss"]) <= 1e-6 * max(1, wanted["loss"]), line["step"]
        for name in ("tokens", "supervised_tokens", "flops", "supervised_by_modality", "lr"):
            assert line[name] == wanted[name], name
    assert consumed(tmp_path) == consumed(straight)[: 4 * HALF]
    assert audit(tmp_path, same_as=straight).exact


@pytest.mark.slow
def test_a_run_goes_on_with_slices_and_without(train, straight, tmp_path):
    """5 + resume + 5 steps are 10 to the bit; then 3 ranks of whole rows, then slices at ZeRO 3, agree to rounding."""
    sliced, rest = "train.sequence_parallel=2", f"schedule.total_steps={STEPS}"
    assert train(tmp_path / "once", 2, sliced, "train.steps=10", rest) == ["", ""]
    assert train(tmp_path / "twice", 2, sliced, "train.steps=5", rest) == ["", ""]
    assert train(tmp_path / "twice", 2, sliced, "train.steps=10", rest, resume=True) == ["", ""]
    assert files_of(tmp_path / "twice") == files_of(tmp_path / "once")
    assert [line["loss"] for line in metrics(tmp_path / "twice")] == [
        line["loss"] for line in metrics(tmp_path / "once")
    ]
    assert train(tmp_path / "twice", 3, "train.steps=15", rest, resume=True) == [""] * 3
    assert train(tmp_path / "twice", 2, sliced, "train.zero_stage=3", "train.steps=20", rest, resume=True) == ["", ""]
    for line, wanted in zip(metrics(tmp_path / "twice"), metrics(straight), strict=True):
        assert abs(line["loss"] - wanted["loss"]) <= 1e-6 * max(1, wanted["loss"]), line["step"]
    assert consumed(tmp_path / "twice") == consumed(straight)
    assert audit(tmp_path / "twice", same_as=straight).exact
