import dataclasses
import pickle
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch

from triweave.data_pipeline.batch import PackedBatch
from triweave.kernels import attention_tiles, backends
from triweave.kernels.errors import KernelUnavailableError
from triweave.kernels.tiles import attention_tables
from triweave.kernels.tuning import pinned
from triweave.pretrain.batch import ATTENTION_TILES, DeviceBatch, kernel_tables, to_device
from triweave.pretrain.model.config import ModelConfig
from triweave.pretrain.model.model import MultimodalTransformer


def test_every_field_arrives_with_its_values_and_dtype(make_batch):
    batch = make_batch([("image", "audio"), None])
    moved = to_device(batch, "cpu")
    packed = {item.name for item in dataclasses.fields(PackedBatch)} - {"payloads", "media_lo", "media_hi"}
    for name in packed & {item.name for item in dataclasses.fields(DeviceBatch)}:
        array = getattr(batch, name)
        assert getattr(moved, name).numpy().dtype == array.dtype
        np.testing.assert_array_equal(getattr(moved, name).numpy(), array)
    assert list(moved.payloads) == list(batch.payloads)
    for name, payload in batch.payloads.items():
        for field in ("values", "lengths", "grids", "token_index"):
            np.testing.assert_array_equal(getattr(moved.payloads[name], field).numpy(), getattr(payload, field))


def test_the_positions_of_segments_are_theirs_one_after_the_other(synthetic):
    text, more = [20, 21], [22]
    rows = [[synthetic.Document(parts=[text, more], alone=True)], [synthetic.Document(parts=[more], alone=True)]]
    moved = to_device(synthetic.pack(rows, 10), "cpu")
    assert moved.segment_index.tolist() == [0, 1, 2, 3, 4, 5, 6, 10, 11, 12]
    assert moved.segment_lengths.tolist() == [4, 3, 3]
    assert moved.segment_modality.tolist() == [0, 0, 0]
    assert to_device(synthetic.pack([[]], 10), "cpu").segment_index.dtype == torch.int64


SMALL = ModelConfig(d_model=32, layers=2, heads=2, kv_heads=1, head_width=16)
CPU = torch.device("cpu")


def test_tables_made_in_the_loader_give_the_loss_that_the_kernel_makes_by_itself(make_batch):
    plain = make_batch([("image", "audio"), ("image",)])
    tabled = dataclasses.replace(plain, extra=kernel_tables(SMALL, CPU, torch.float32)(plain))
    features = {name: payload.values.shape[1] for name, payload in plain.payloads.items()}
    model = MultimodalTransformer(SMALL, vocab_size=int(plain.tokens.max()) + 1, media_features=features)
    assert to_device(tabled, "cpu").tiles is not None
    assert torch.equal(model(to_device(tabled, "cpu")).total, model(to_device(plain, "cpu")).total)

    # they are really used: tables of another mask give another loss
    other = {ATTENTION_TILES: attention_tables(plain.kv_lo, np.minimum(plain.kv_hi, plain.kv_lo + 1))}
    swapped = to_device(dataclasses.replace(plain, extra=other), "cpu")
    assert not torch.equal(model(swapped).total, model(to_device(plain, "cpu")).total)


@pytest.mark.parametrize(
    ("implementation", "override", "wanted"),
    [
        ("auto", "", {"segments"}),
        ("reference", "", {"segments"}),
        ("triton", "", {"tile_lists"}),
        ("auto", "attention=triton", {"tile_lists"}),
        ("triton", "reference", {"segments"}),
        ("triton", "swiglu=reference", {"tile_lists"}),
        ("flex", "", set()),
    ],
)
def test_the_tables_are_those_of_the_implementation_that_serves(
    make_batch, monkeypatch, implementation, override, wanted
):
    pytest.importorskip("triton")
    monkeypatch.setenv(backends.INTERPRET_VARIABLE, "1")
    monkeypatch.setenv(backends.OVERRIDE_VARIABLE, override)
    maker = kernel_tables(dataclasses.replace(SMALL, attention=implementation), CPU, torch.float32)
    batch = make_batch()
    made = pickle.loads(pickle.dumps(maker))(batch)[ATTENTION_TILES]  # a worker gets it so
    assert set(made) == wanted


def test_strips_stay_on_the_host_and_tile_lists_go_to_the_device(make_batch):
    batch = make_batch()
    maker = dataclasses.replace(kernel_tables(SMALL, CPU, torch.float32), tile_lists=True)
    moved = to_device(dataclasses.replace(batch, extra=maker(batch)), "meta")
    assert {name: table.device.type for name, table in moved.tiles.items()} == {"segments": "cpu", "tile_lists": "meta"}


@pytest.mark.parametrize(("dtype", "number_bytes"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_tile_lists_are_for_the_models_heads_and_dtype(make_batch, dtype, number_bytes):
    batch = make_batch(length=160)
    maker = dataclasses.replace(kernel_tables(SMALL, CPU, dtype), strips=False, tile_lists=True)
    wanted = attention_tiles.tile_lists(batch.kv_lo, batch.kv_hi, keys=160, width=16, number_bytes=number_bytes)
    np.testing.assert_array_equal(maker(batch)[ATTENTION_TILES]["tile_lists"], wanted)


def test_a_worker_takes_the_tiles_of_the_devices_architecture(make_batch, monkeypatch):
    maker = dataclasses.replace(kernel_tables(SMALL, CPU, torch.float32), tile_lists=True, architecture="sm_90")
    monkeypatch.setattr(pinned, "_in_use", None)
    in_use = []
    monkeypatch.setattr(attention_tiles, "tile_lists", lambda *_, **__: in_use.append(pinned.in_use()))
    maker(make_batch())
    assert in_use == ["sm_90"]


def test_heads_and_dtypes_that_triton_does_not_serve_get_no_lists(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv(backends.INTERPRET_VARIABLE, "1")
    wide = dataclasses.replace(SMALL, attention="triton", head_width=512)
    assert not kernel_tables(wide, CPU, torch.float32).tile_lists
    assert not kernel_tables(dataclasses.replace(SMALL, attention="triton"), CPU, torch.float64).tile_lists


def test_what_cannot_serve_is_refused_before_any_batch_is_made(monkeypatch):
    monkeypatch.delenv(backends.INTERPRET_VARIABLE, raising=False)
    with pytest.raises(KernelUnavailableError, match=r"TRITON_INTERPRET=1 is in the environment|not installed"):
        kernel_tables(dataclasses.replace(SMALL, attention="triton"), CPU, torch.float32)


def test_the_setting_names_every_implementation():
    assert set(get_args(get_type_hints(ModelConfig)["attention"])) >= {"auto", *backends.IMPLEMENTATIONS["attention"]}


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
