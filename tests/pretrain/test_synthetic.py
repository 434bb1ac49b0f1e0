"""The synthetic packs keep the PackedBatch contract; a wrong factory would make every other test here pointless."""

import numpy as np

from triweave.data_pipeline.batch import PADDING_ID


def test_the_same_seed_gives_the_same_batch_and_another_seed_another(make_batch):
    first, again, other = make_batch(seed=1), make_batch(seed=1), make_batch(seed=2)
    np.testing.assert_array_equal(first.tokens, again.tokens)
    np.testing.assert_array_equal(first.payloads["image"].values, again.payloads["image"].values)
    assert not np.array_equal(first.tokens, other.tokens)


def test_rows_hold_the_modalities_asked_for(make_batch):
    batch = make_batch([("image", "audio"), ("image",), ("audio",), (), None])
    held = [set(row) - {PADDING_ID} for row in batch.modality_ids.tolist()]
    assert held == [{0, 1, 2}, {0, 1}, {0, 2}, {0}, set()]
    assert batch.plan_rows.tolist() == [0, 1, 2, 3, -1]
    assert set(make_batch([("image",)]).payloads) == {"image"}


def test_intervals_and_supervision_follow_the_layout(make_batch):
    batch = make_batch()
    tokens, modality = batch.tokens.reshape(-1), batch.modality_ids.reshape(-1)
    document, span = batch.document_ids.reshape(-1), batch.span_ids.reshape(-1)
    np.testing.assert_array_equal(tokens[batch.row_index + 1], batch.targets)
    assert (document[batch.row_index] == document[batch.row_index + 1]).all()
    assert (modality[batch.row_index + 1] == 0).all()
    continued = (document[:-1] == document[1:]) & (document[1:] >= 0) & (modality[1:] == 0)
    assert len(batch.row_index) == continued.sum()
    for row in range(2):
        for query in np.flatnonzero(batch.document_ids[row] >= 0):
            low, high = batch.kv_lo[row, query], batch.kv_hi[row, query]
            seen = np.flatnonzero(
                (batch.document_ids[row] == batch.document_ids[row, query])
                & (
                    (np.arange(64) <= query)
                    | ((batch.span_ids[row] == batch.span_ids[row, query]) & (span[row * 64 + query] >= 0))
                )
            )
            np.testing.assert_array_equal(seen, np.arange(low, high))


def test_payload_rows_and_indices_agree_with_the_spans(make_batch):
    batch = make_batch()
    for name, number in (("image", 1), ("audio", 2)):
        payload = batch.payloads[name]
        assert payload.values.shape[0] == payload.lengths.sum() == len(payload.token_index)
        np.testing.assert_array_equal(payload.grids.prod(1), payload.lengths)
        np.testing.assert_array_equal(np.flatnonzero(batch.modality_ids == number), payload.token_index)
        np.testing.assert_array_equal(np.repeat(payload.item_rows, payload.lengths), payload.token_index // 64)


def test_equal_features_make_towers_of_equal_size(make_batch):
    batch = make_batch(features={"image": 12, "audio": 12})
    assert batch.payloads["image"].values.shape[1] == batch.payloads["audio"].values.shape[1] == 12
