"""The work of the ops over media, against masks written out."""

from __future__ import annotations

import numpy as np
import pytest

from triweave.kernels.roofline import media_work, work

SHAPE = {"batch": 2, "sequence_length": 2048, "heads": 4, "key_heads": 2, "width": 64}


def test_spans_of_the_reference_packs_are_its_media() -> None:
    pack = media_work.media_pack(2, 2048)
    assert (pack.document_ids[:, 0] == 0).all()
    for row in range(2):
        spans, counts = np.unique(pack.span_ids[row][pack.span_ids[row] >= 0], return_counts=True)
        assert spans.tolist() == list(range(len(spans)))
        assert set(counts) == {64}
        for span in spans:
            tokens = np.flatnonzero(pack.span_ids[row] == span)
            assert tokens.tolist() == list(range(tokens[0], tokens[0] + 64))
            assert (pack.kv_hi[row][tokens] == tokens[-1] + 1).all()
            assert len(set(pack.document_ids[row][tokens])) == 1


def test_text_sees_its_interval_and_media_the_media_of_theirs() -> None:
    pack = media_work.media_pack(2, 2048)
    is_media = pack.span_ids >= 0
    key = np.arange(2048)
    seen = (key >= pack.kv_lo[:, :, None]) & (key < pack.kv_hi[:, :, None])
    pairs = (seen & (~is_media[:, :, None] | is_media[:, None, :])).sum()
    assert media_work.mmca("fwd", **SHAPE).matrix_flops == 4 * pairs * 4 * 64


def test_cross_attention_sees_64_keys_a_token_or_none() -> None:
    pack = media_work.media_pack(2, 2048)
    some = 0
    for row in range(2):
        for document in np.unique(pack.document_ids[row]):
            tokens = np.flatnonzero(pack.document_ids[row] == document)
            media = np.flatnonzero(pack.span_ids[row][tokens] >= 0)
            some += len(tokens) - media[0] if media.size else 0
    found = media_work.cross_attention("fwd", **SHAPE)
    assert found.matrix_flops == pytest.approx(4 * 64 * some * 4 * 64)
    attention = work.AttentionShape(batch=2, rows=2048, keys=2048, heads=4, key_heads=2, width=64, pairs=int(64 * some))
    assert found.moved_bytes < work.attention("fwd", attention).moved_bytes, "fewer keys than tokens"
