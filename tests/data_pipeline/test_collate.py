"""Collation against a reference that walks token by token, on random packs."""

from __future__ import annotations

import numpy as np
import pytest

from triweave.data_pipeline.batch import PackedBatch
from triweave.data_pipeline.stream.collate import Row, collate
from triweave.data_pipeline.stream.content import Piece

S, PAD = 60, 0
GRIDS = {1: [(1, 2, 3), (1, 1, 1), (1, 4, 1), (1, 1, 3), (2, 2, 2)], 2: [(3, 1, 1), (5, 1, 1)]}
FEATURES = {1: 4, 2: 3}


Item = tuple[int, np.ndarray]


def random_piece(generator: np.random.Generator, name: str, weight: float) -> tuple[Piece, list[Item]]:
    runs, media, tokens = [], [], []
    text = int(generator.integers(1, 5))
    for _ in range(generator.integers(0, 4)):
        kind = int(generator.integers(1, 3))
        t, h, w = GRIDS[kind][generator.integers(len(GRIDS[kind]))]
        if text:
            runs.append((0, text, text, 1, 1))
        runs.append((kind, t * h * w, t, h, w))
        media.append((kind, generator.random((t * h * w, FEATURES[kind])).astype(np.float32)))
        text = int(generator.integers(0, 4))
    if text:
        runs.append((0, text, text, 1, 1))
    for kind, length, *_ in runs:
        tokens.append(np.full(length, 900 + kind) if kind else generator.integers(10, 99, length))
    row = np.concatenate(tokens).astype(np.int32)
    sample_hash = int(generator.integers(1 << 40))
    return Piece(tokens=row, runs=runs, weight=weight, sample_id=name, sample_hash=sample_hash), media


def random_rows(seed: int, rows: int = 3) -> tuple[list[Row], list[Item], dict[int, np.ndarray]]:
    """Rows, their media items in order, and the same joined by modality."""
    generator = np.random.default_rng(seed)
    result, items = [], []
    for number in range(rows):
        pieces, room = [], S
        while True:
            piece, media = random_piece(generator, f"{number}:{room}", float(generator.random() < 0.7))
            if piece.tokens.size > room:
                break
            pieces.append(piece)
            items += media
            room -= piece.tokens.size
        result.append(Row(100 + number, pieces))
    joined = {
        kind: np.concatenate([values for k, values in items if k == kind]) for kind in {kind for kind, _ in items}
    }
    return [*result, Row(-1, [])], items, joined


def check_row(batch: PackedBatch, b: int, row: Row) -> dict[int, tuple[int, float, int]]:
    """Walk one row token by token; returns its supervised positions: flat -> (target, weight, modality followed)."""
    supervised = {}
    place = spans = media_seen = 0
    for number, piece in enumerate(row.pieces):
        start, document_media = place, media_seen
        kinds = [(kind, offset, run) for run in piece.runs for kind, offset in ((run[0], o) for o in range(run[1]))]
        t0 = followed = 0
        for i, (kind, offset, (_, length, t, h, w)) in enumerate(kinds):
            assert batch.tokens[b, place] == piece.tokens[i]
            assert batch.modality_ids[b, place] == kind
            assert batch.document_ids[b, place] == number
            assert batch.kv_lo[b, place] == start
            if kind:
                if offset == 0:
                    spans += 1
                    own_media = media_seen
                followed = kind
                assert batch.span_ids[b, place] == spans - 1
                assert batch.kv_hi[b, place] == place - offset + length
                assert batch.media_index[b, media_seen] == place
                assert batch.key_modality[b, media_seen] == kind
                assert (batch.media_lo[b, place], batch.media_hi[b, place]) == (own_media, own_media + length)
                media_seen += 1
            else:
                assert batch.span_ids[b, place] == -1
                assert batch.kv_hi[b, place] == place + 1
                assert (batch.media_lo[b, place], batch.media_hi[b, place]) == (document_media, media_seen)
            one_dimensional = h == w == 1
            expected = (offset,) * 3 if one_dimensional else (offset // (h * w), offset // w % h, offset % w)
            assert batch.positions[b, place].tolist() == [t0 + value for value in expected]
            if offset == length - 1:
                t0 += length if one_dimensional else max(t, h, w)
            if i + 1 < len(kinds) and kinds[i + 1][0] == 0:
                supervised[b * S + place] = (int(piece.tokens[i + 1]), piece.weight, followed)
            place += 1
    assert (batch.tokens[b, place:] == PAD).all()
    assert (batch.modality_ids[b, place:] == -1).all()
    assert (batch.document_ids[b, place:] == -1).all()
    assert not batch.kv_lo[b, place:].any()
    assert not batch.kv_hi[b, place:].any()
    assert not batch.positions[b, place:].any()
    assert (batch.media_index[b, media_seen:] == -1).all()
    assert (batch.key_modality[b, media_seen:] == -1).all()
    return supervised


@pytest.mark.parametrize("seed", range(12))
def test_every_field_against_walking_token_by_token(seed: int) -> None:
    rows, media, joined = random_rows(seed)
    batch = collate(rows, joined, sequence_length=S, pad_id=PAD, contrastive_group_rows=50)
    supervised: dict[int, tuple[int, float, int]] = {}
    for b, row in enumerate(rows):
        supervised |= check_row(batch, b, row)
    assert batch.row_index.tolist() == sorted(supervised)
    expected = [supervised[position] for position in sorted(supervised)]
    assert batch.targets.tolist() == [target for target, _, _ in expected]
    assert batch.row_weight.tolist() == [weight for _, weight, _ in expected]
    assert batch.row_modality.tolist() == [followed for _, _, followed in expected]
    assert batch.plan_rows.tolist() == [100, 101, 102, -1]
    assert batch.contrastive_group.tolist() == [2, 2, 2, -1]
    assert batch.supervised_tokens == sum(weight for _, weight, _ in expected)
    assert batch.sample_ids == [[piece.sample_id for piece in row.pieces] for row in rows]
    for kind, name in ((1, "image"), (2, "audio")):
        runs = [(b, run) for b, row in enumerate(rows) for piece in row.pieces for run in piece.runs if run[0] == kind]
        items = [(*place, values) for place, (_, values) in zip(runs, [i for i in media if i[0] == kind], strict=True)]
        if not items:
            assert name not in batch.payloads
            continue
        payload = batch.payloads[name]
        assert np.array_equal(payload.values, np.concatenate([values for *_, values in items]))
        assert payload.lengths.tolist() == [run[1] for _, run, _ in items]
        assert payload.grids.tolist() == [list(run[2:]) for _, run, _ in items]
        assert payload.item_rows.tolist() == [b for b, *_ in items]
        assert payload.token_index.tolist() == np.flatnonzero(batch.modality_ids.reshape(-1) == kind).tolist()
    assert batch.planned_tokens == {
        name: int((batch.modality_ids == kind).sum()) for kind, name in enumerate(("text", "image", "audio"))
    }
    kept = sum(piece.tokens.size for row in rows for piece in row.pieces if piece.weight)
    assert sum(batch.actual_tokens.values()) == kept


def test_types_are_those_of_the_contract() -> None:
    rows, _, joined = random_rows(0)
    batch = collate(rows, joined, sequence_length=S, pad_id=PAD)
    int32 = ("tokens", "document_ids", "span_ids", "positions", "kv_lo", "kv_hi", "media_lo", "media_hi")
    expected = dict.fromkeys((*int32, "contrastive_group"), np.int32)
    expected |= dict.fromkeys(("media_index", "row_index", "targets", "plan_rows"), np.int64)
    expected |= dict.fromkeys(("modality_ids", "key_modality", "row_modality"), np.int8)
    for name, dtype in {**expected, "row_weight": np.float32, "row_source": np.int16}.items():
        assert getattr(batch, name).dtype == dtype, name
    assert batch.tokens.shape == (4, S)
    assert batch.positions.shape == (4, S, 3)


def test_rows_of_nothing_supervise_nothing() -> None:
    batch = collate([Row(-1, []), Row(-1, [])], {}, sequence_length=S, pad_id=PAD)
    assert batch.row_index.size == batch.targets.size == batch.row_weight.size == 0
    assert batch.supervised_tokens == 0
    assert batch.payloads == {}
    assert batch.media_index.shape == (2, 0)
    assert (batch.tokens == PAD).all()
    assert set(batch.planned_tokens.values()) == {0}


def test_a_row_that_is_too_long_is_refused() -> None:
    rows, _, joined = random_rows(1)
    crowded = Row(5, [*rows[0].pieces, *rows[1].pieces])
    with pytest.raises(ValueError, match="does not fit"):
        collate([crowded], joined, sequence_length=S, pad_id=PAD)
