"""Loss norms: the weights w' of each, on batches of known documents."""

from __future__ import annotations

import numpy as np
import pytest

from triweave.pretrain.engine.loss_norm import normalised

WEIGHTS = {
    "global_tokens": lambda tokens, batch_tokens: 1.0,  # noqa: ARG005
    "global_square_root": lambda tokens, batch_tokens: tokens**-0.5,  # noqa: ARG005
    "global_documents": lambda tokens, batch_tokens: 1 / tokens,  # noqa: ARG005
    "micro_batch_tokens": lambda tokens, batch_tokens: 1 / batch_tokens,  # noqa: ARG005
}


@pytest.fixture
def batch(synthetic):
    """Documents of 4 and 2 words in one row and 3 in the other: 5, 3 and 4 supervised tokens; the last one a filler."""
    documents = [synthetic.Document(parts=[[20] * words]) for words in (4, 2)]
    filler = synthetic.Document(parts=[[20] * 3], weight=0.0)
    return synthetic.pack([documents, [filler]], 16)


@pytest.mark.parametrize("norm", WEIGHTS)
def test_weights_follow_the_formula(batch, norm):
    found = normalised(batch, norm).row_weight
    wanted = [WEIGHTS[norm](5, 8)] * 5 + [WEIGHTS[norm](3, 8)] * 3 + [0.0] * 4
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_sums_count_documents_or_micro_batches(batch):
    assert normalised(batch, "global_documents").supervised_tokens == pytest.approx(2.0)
    assert normalised(batch, "micro_batch_tokens").supervised_tokens == pytest.approx(1.0)


def test_a_batch_without_weight_is_left_alone(synthetic):
    nothing = synthetic.pack([[]], 16)
    assert normalised(nothing, "micro_batch_tokens") is nothing
