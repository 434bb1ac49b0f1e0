"""media_intervals against walking a pack token by token, against the loader, and where public Flamingos go wrong."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from triweave.data_pipeline.stream.collate import Row, collate
from triweave.data_pipeline.stream.content import Piece
from triweave.kernels import tiles
from triweave.kernels.cross_attention import cross_attention
from triweave.kernels.errors import KernelInputError


def pack(*documents, padding=0):
    """Return (document_ids, span_ids) [1, S] of documents written like `tt2t31`: t is text, a digit a span's length."""
    document_ids, span_ids, spans = [], [], 0
    for number, document in enumerate(documents):
        for part in document:
            count = 1 if part == "t" else int(part)
            document_ids += [number] * count
            span_ids += [-1 if part == "t" else spans] * count
            spans += part != "t"
    ids = np.array([document_ids + [-1] * padding, span_ids + [-1] * padding], dtype=np.int32)
    return ids[:1], ids[1:]


def intervals(ids, **options):
    return [list(pair) for pair in zip(*(x[0].tolist() for x in tiles.media_intervals(*ids, **options)), strict=True)]


def walk(document_ids, span_ids, seen, keys_per_span):
    """One row, token by token; returns the interval of each."""
    keys, key_spans, spans = [], [], []
    for i, (document, span) in enumerate(zip(document_ids, span_ids, strict=True)):
        if document < 0 or span < 0:
            continue
        if i == 0 or (document_ids[i - 1], span_ids[i - 1]) != (document, span):
            spans.append((document, i))
            if keys_per_span is not None:
                key_spans += [len(spans) - 1] * keys_per_span
        if keys_per_span is None:
            key_spans.append(len(spans) - 1)
    for i, (document, span) in enumerate(zip(document_ids, span_ids, strict=True)):
        begun = [n for n, (of, first) in enumerate(spans) if of == document and first <= i]
        if seen == "immediate" or span >= 0:
            begun = begun[-1:]
        own = [j for j, n in enumerate(key_spans) if n in begun]
        keys.append([own[0], own[-1] + 1] if own else [0, 0])
    return keys


DOCUMENT = st.text(alphabet="tttt1234", min_size=1, max_size=8)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(st.lists(DOCUMENT, max_size=4), min_size=1, max_size=3),
    seen=st.sampled_from(["immediate", "preceding"]),
    keys_per_span=st.sampled_from([None, 1, 3]),
)
def test_equals_walking_token_by_token(rows, seen, keys_per_span):
    packs = [pack(*documents) for documents in rows]
    length = 1 + max(x[0].shape[1] for x in packs)
    ids = [
        np.concatenate([np.pad(x[n], ((0, 0), (0, length - x[n].shape[1])), constant_values=-1) for x in packs])
        for n in (0, 1)
    ]
    lo, hi = tiles.media_intervals(*ids, seen=seen, keys_per_span=keys_per_span)
    assert lo.dtype == hi.dtype == np.int32
    for b in range(len(rows)):
        expected = walk(ids[0][b].tolist(), ids[1][b].tolist(), seen, keys_per_span)
        assert [list(x) for x in zip(lo[b].tolist(), hi[b].tolist(), strict=True)] == expected


def test_the_docstring_s_picture():
    ids = pack("t2t2t", "t2t")
    assert intervals(ids, seen="immediate") == [[0, 0]] + [[0, 2]] * 3 + [[2, 4]] * 3 + [[0, 0]] + [[4, 6]] * 3
    want = [[0, 0]] + [[0, 2]] * 3 + [[2, 4]] * 2 + [[0, 4]] + [[0, 0]] + [[4, 6]] * 3
    assert intervals(ids, seen="preceding") == want


def test_the_latents_of_a_resampler_stand_for_a_placeholder():
    ids = pack("t1t1t", "1t", padding=2)
    got = intervals(ids, seen="immediate", keys_per_span=64)
    assert got == [[0, 0], [0, 64], [0, 64], [64, 128], [64, 128], [128, 192], [128, 192], [0, 0], [0, 0]]
    assert intervals(ids, seen="preceding", keys_per_span=64)[4] == [0, 128]


@pytest.mark.parametrize("seen", ["immediate", "preceding"])
def test_media_before_any_text_at_the_pack_s_end_and_side_by_side(seen):
    assert intervals(pack("2t", "13"), seen=seen) == [[0, 2]] * 3 + [[2, 3]] + [[3, 6]] * 3


@pytest.mark.parametrize("seen", ["immediate", "preceding"])
def test_text_without_media_and_an_empty_row(seen):
    assert intervals(pack("ttt", padding=2), seen=seen) == [[0, 0]] * 5
    assert [x.shape for x in tiles.media_intervals(*np.zeros((2, 3, 0), dtype=np.int32), seen=seen)] == [(3, 0)] * 2


def test_preceding_media_are_what_the_loader_s_batches_hold():
    rows = []
    for row, documents in enumerate((["tt4t1tt", "t6t", "ttt"], ["2ttt3", "t"])):
        pieces = []
        for document in documents:
            runs = [(0, 1, 1, 1, 1) if part == "t" else (1, int(part), int(part), 1, 1) for part in document]
            tokens = np.arange(sum(run[1] for run in runs), dtype=np.int32)
            pieces.append(Piece(tokens=tokens, runs=runs, weight=1.0, sample_id=document, sample_hash=1))
        rows.append(Row(row, pieces))
    batch = collate(rows, {}, sequence_length=24, pad_id=0)
    got = tiles.media_intervals(batch.document_ids, batch.span_ids, seen="preceding")
    empty = batch.media_hi <= batch.media_lo
    assert 0 < empty[batch.document_ids >= 0].sum() < (~empty).sum()
    for x, y in zip(got, (batch.media_lo, batch.media_hi), strict=True):
        np.testing.assert_array_equal(x, np.where(empty, 0, y))


@pytest.mark.parametrize("seen", ["immediate", "preceding"])
def test_text_before_the_first_medium_sees_nothing_and_packed_documents_nothing_of_each_other(seen):
    """Both public Flamingos give it uniform weights on all later media, of any document, in their mode of all media."""
    ids = pack("tt2t", "t3t")
    lo, hi = map(torch.from_numpy, tiles.media_intervals(*ids, seen=seen))
    q, k, v = torch.randn(1, 10, 2, 8), torch.randn(1, 5, 2, 8), torch.randn(1, 5, 2, 8)
    out = cross_attention(q, k, v, lo, hi, torch.ones(2))
    assert out[0, [0, 1, 5]].eq(0).all()
    assert out[0, [2, 3, 4, 6, 7, 8, 9]].ne(0).all()
    v[:, :2] += 1
    again = cross_attention(q, k, v, lo, hi, torch.ones(2))
    assert again[0, 2:5].ne(out[0, 2:5]).all()
    assert torch.equal(again[0, 5:], out[0, 5:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seen": "all"}, "use 'immediate' or 'preceding'"),
        ({"seen": "preceding", "keys_per_span": 0}, "at least 1, or None"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(KernelInputError, match=message):
        tiles.media_intervals(*pack("t2t"), **options)
    with pytest.raises(KernelInputError, match=r"must both be \[B, S\]"):
        tiles.media_intervals(np.zeros((1, 2), dtype=np.int32), np.zeros((1, 3), dtype=np.int32), seen="preceding")
