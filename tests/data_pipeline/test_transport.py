"""Worker processes: whole arrays through shared memory or the pipe, and none left when their rank ends."""

from __future__ import annotations

import itertools
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits

from triweave.data_pipeline.batch import PackedBatch
from triweave.data_pipeline.config import DataConfig, SourceConfig
from triweave.data_pipeline.media.geometry import MediaGeometry
from triweave.data_pipeline.stream import loader as loader_module
from triweave.data_pipeline.stream import transport
from triweave.data_pipeline.stream.loader import StepLoader
from triweave.data_pipeline.stream.transport import unwrap, wrap


@pytest.mark.parametrize("shared", [True, False])
def test_a_parcel_brings_equal_arrays_that_may_be_written(shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not shared:
        monkeypatch.setattr(transport, "_free_shared_bytes", lambda: 100)
    content = {
        "a": np.arange(7, dtype=np.int8),
        "empty": np.empty((0, 3), np.float32),
        "b": [np.arange(12.0).reshape(3, 4), "text"],
    }
    parcel = wrap(content)
    assert isinstance(parcel.memory, torch.Tensor) == shared
    if not shared:
        parcel = pickle.loads(pickle.dumps(parcel))
    copy = unwrap(parcel)
    assert copy.keys() == content.keys()
    assert np.array_equal(copy["a"], content["a"])
    assert copy["empty"].shape == (0, 3)
    assert np.array_equal(copy["b"][0], content["b"][0])
    assert copy["b"][1] == "text"
    assert len(parcel.pickled) < 1000, "the arrays belong into the memory, not into the pickle"
    copy["b"][0][0, 0] = 5.0
    assert copy["b"][0].ctypes.data % 8 == 0
    assert content["b"][0][0, 0] == 0.0


def test_a_process_set_up_for_batches_ends_quietly() -> None:
    """Triton, which spawned workers import with the rank's program, tells at the end what it still holds."""
    code = "import triton; from triweave.data_pipeline.stream.transport import tune_memory; tune_memory()"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert ended.stderr == ""


@pytest.mark.slow
def test_a_fork_server_gives_the_same_stream(stream_data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The start method where the rank has a CUDA context, in which a fork would be unsafe."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert transport.start_method() == "forkserver"
    ids = []
    for workers in (0, 1):
        config = DataConfig(
            sources=[SourceConfig(name="birds", shards=str(stream_data.birds))],
            tokenizer=str(stream_data.tokenizer),
            sequence_length=64,
            geometry=MediaGeometry(image_patch_px=8, image_max_tokens=400),
            workers=workers,
        )
        iterator = iter(StepLoader(config, rank=0, world_size=1, global_batch_rows=3, micro_batch_rows=3))
        ids.append([w.micro_batches[0].sample_hashes for w in itertools.islice(iterator, 4)])
        iterator.close()
    assert ids[0] == ids[1]


def test_workers_are_forked_where_nothing_speaks_against_it() -> None:
    assert loader_module.start_method() == "fork"


def blas_threads(_: PackedBatch) -> dict[str, Any]:
    """Return how many threads the matrix products of this process may use."""
    return {"blas": [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]}


def test_a_worker_multiplies_on_one_thread_and_its_rank_as_before(stream_data: Any) -> None:
    config = DataConfig(
        sources=[SourceConfig(name="birds", shards=str(stream_data.birds))],
        tokenizer=str(stream_data.tokenizer),
        sequence_length=64,
        geometry=MediaGeometry(image_patch_px=8, image_max_tokens=400),
        workers=1,
    )
    with threadpool_limits(limits=2, user_api="blas"):
        loader = StepLoader(
            config, rank=0, world_size=1, global_batch_rows=2, micro_batch_rows=2, post_pack=blas_threads
        )
        iterator = iter(loader)
        assert set(next(iterator).micro_batches[0].extra["blas"]) == {1}
        assert {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"} == {2}
        iterator.close()


ENDLESS = """
import sys
from triweave.data_pipeline.config import DataConfig, SourceConfig
from triweave.data_pipeline.media.geometry import MediaGeometry
from triweave.data_pipeline.stream.loader import StepLoader
config = DataConfig(sources=[SourceConfig(name="birds", shards=sys.argv[1])], tokenizer=sys.argv[2], workers=2,
    sequence_length=64, geometry=MediaGeometry(image_patch_px=8, image_max_tokens=400))
for window in StepLoader(config, rank=0, world_size=1, global_batch_rows=2, micro_batch_rows=2):
    print(window.end_row, flush=True)
"""


STEADFAST = """
import signal
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(1))
""" + ENDLESS.replace(
    "    print(window.end_row, flush=True)",
    """
    print(window.end_row, len(told), flush=True)
    if len(told) and window.end_row > 40:
        break
""",
)


def children_of(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def blocks_sigterm(process: int) -> bool:
    """Return whether a process blocks SIGTERM, which a loader worker does first of all."""
    (mask,) = re.findall(r"^SigBlk:\s*(\w+)$", Path(f"/proc/{process}/status").read_text(), re.MULTILINE)
    return bool(int(mask, 16) & 1 << (signal.SIGTERM - 1))


@pytest.mark.parametrize("ending", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_no_worker_outlives_its_rank(stream_data: Any, ending: signal.Signals) -> None:
    command = [sys.executable, "-c", ENDLESS, str(stream_data.birds), str(stream_data.tokenizer)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "2\n"
        workers = children_of(process.pid)
        assert len(workers) == 2
        # Ctrl-C goes to the whole group, a kill to the rank alone.
        (os.killpg if ending is signal.SIGINT else os.kill)(process.pid, ending)
        process.wait(timeout=20)
        deadline = time.monotonic() + 15
        while any(map(alive, workers)) and time.monotonic() < deadline:
            time.sleep(0.1)
        left = [worker for worker in workers if alive(worker)]
        for worker in left:
            os.kill(worker, signal.SIGKILL)
        assert not left, "orphan workers"
        if ending is signal.SIGINT:
            assert process.stderr.read().count("Traceback") == 1, "workers must not print tracebacks of their own"


def test_a_sigterm_to_everybody_leaves_the_workers_to_their_rank(stream_data: Any) -> None:
    command = [sys.executable, "-c", STEADFAST, str(stream_data.birds), str(stream_data.tokenizer)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "2 0\n"
        deadline = time.monotonic() + 60
        while not all(map(blocks_sigterm, children_of(process.pid))):
            assert time.monotonic() < deadline, "workers are not prepared"
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGTERM)
        rows = [int(line.split()[0]) for line in process.stdout]
        assert process.wait(timeout=30) == 0, process.stderr.read()
        assert rows[-1] > 40
        assert rows == list(range(4, rows[-1] + 2, 2)), "the stream goes on as if nothing had happened"
