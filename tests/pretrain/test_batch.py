import dataclasses

import numpy as np
import pytest
import torch

from triweave.kernels.tiles import attention_tables
from triweave.pretrain.batch import ATTENTION_TILES, DeviceBatch, DevicePayload, kernel_tables, to_device
from triweave.pretrain.model import MultimodalTransformer
from triweave.pretrain.model_config import ModelConfig


def test_every_field_arrives_with_its_values_and_dtype(make_batch):
    batch = make_batch([("image", "audio"), None])
    moved = to_device(batch, "cpu")
    for item in dataclasses.fields(DeviceBatch):
        if item.name not in ("payloads", "tiles") and not item.name.startswith("segment_"):
            array = getattr(batch, item.name)
            assert getattr(moved, item.name).numpy().dtype == array.dtype
            np.testing.assert_array_equal(getattr(moved, item.name).numpy(), array)
    assert list(moved.payloads) == list(batch.payloads)
    for name, payload in batch.payloads.items():
        for item in dataclasses.fields(DevicePayload):
            np.testing.assert_array_equal(getattr(moved.payloads[name], item.name).numpy(), getattr(payload, item.name))


def test_the_positions_of_segments_are_theirs_one_after_the_other(synthetic):
    text, more = [20, 21], [22]
    rows = [[synthetic.Document(parts=[text, more], alone=True)], [synthetic.Document(parts=[more], alone=True)]]
    moved = to_device(synthetic.pack(rows, 10), "cpu")
    assert moved.segment_index.tolist() == [0, 1, 2, 3, 4, 5, 6, 10, 11, 12]
    assert moved.segment_lengths.tolist() == [4, 3, 3]
    assert moved.segment_modality.tolist() == [0, 0, 0]
    assert to_device(synthetic.pack([[]], 10), "cpu").segment_index.dtype == torch.int64


def test_tables_made_in_the_loader_give_the_loss_that_the_kernel_makes_by_itself(make_batch):
    plain = make_batch([("image", "audio"), ("image",)])
    tabled = dataclasses.replace(plain, extra=kernel_tables(plain))
    config = ModelConfig(d_model=32, layers=2, heads=2, kv_heads=1, head_width=16)
    features = {name: payload.values.shape[1] for name, payload in plain.payloads.items()}
    model = MultimodalTransformer(config, vocab_size=int(plain.tokens.max()) + 1, media_features=features)
    assert to_device(tabled, "cpu").tiles is not None
    assert torch.equal(model(to_device(tabled, "cpu")).total, model(to_device(plain, "cpu")).total)

    # they are really used: tables of another mask give another loss
    other = {ATTENTION_TILES: attention_tables(plain.kv_lo, np.minimum(plain.kv_hi, plain.kv_lo + 1))}
    swapped = to_device(dataclasses.replace(plain, extra=other), "cpu")
    assert not torch.equal(model(swapped).total, model(to_device(plain, "cpu")).total)


def test_read_only_arrays_are_copied_not_shared(make_batch):
    batch = make_batch()
    batch.tokens.flags.writeable = False
    moved = to_device(batch, "cpu")
    moved.tokens.add_(1)
    assert not np.array_equal(moved.tokens.numpy(), batch.tokens)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_copies_equal_cpu(make_batch):
    batch = make_batch()
    moved = to_device(batch, "cuda")
    torch.cuda.synchronize()
    np.testing.assert_array_equal(moved.tokens.cpu().numpy(), batch.tokens)
    np.testing.assert_array_equal(moved.payloads["image"].values.cpu().numpy(), batch.payloads["image"].values)
