"""The benchmark's rows: complete, and of implementations that agree."""

import json

import numpy as np
import pytest
import torch

from triweave.kernels import bench, tiles


def test_rows_are_complete_and_the_implementations_agree(capsys):
    tiny = ["attention", "--sequence-length", "256", "--documents", "2", "--heads", "2", "--repeats", "1", "--json"]
    assert bench.main([*tiny, "--span-percent", "0", "50"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["impl"], row["span_percent"]) for row in rows] == [
        (impl, percent) for percent in (0, 50) for impl in ("triweave", "documents", "dense")
    ]
    for row in rows:
        assert row["ms"] > 0
        assert row["max_difference_from_dense"] < 1e-4


@pytest.mark.parametrize("percent", [0, 25, 50, 75])
def test_masks_hold_the_share_of_span_tokens_they_name(percent):
    shape = bench.AttentionShape(sequence_length=4096, documents=8, heads=1, head_width=16, span_percent=percent)
    lo, hi = shape.intervals()
    in_span = hi != torch.arange(1, 4097)
    last_of_span = 1 / bench.SPAN_TOKENS  # a span's last token sees what a causal one would
    assert in_span.float().mean().item() == pytest.approx(percent / 100 * (1 - last_of_span), abs=0.03)
    assert torch.unique(lo).tolist() == list(range(0, 4096, 512))
    assert tiles.mask_area(lo.numpy(), hi.numpy()) >= np.sum(np.arange(1, 513)) * 8
