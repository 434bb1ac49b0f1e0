"""The process group: opened from the launcher's environment, or a world of one without a launcher."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import socket
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from triweave.data_pipeline.errors import DataError
from triweave.kernels.errors import KernelError
from triweave.pretrain.errors import PretrainError
from triweave.pretrain.health.heartbeat import noted

Result = TypeVar("Result")

AGREED = "all ranks raise this"
"""Note on an error that came out of `World.agree`: one rank may print it for all."""
ALONE = "not all ranks raise this"
"""Note on an error that `open_world` raises on some ranks only: each of them has to print it."""
LAUNCHER_VARIABLES = ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_set_for_one: dict[str, str] = {}
"""What `open_world` put into the environment of a process without a launcher."""
_joined: list[int] = []
"""This process's rank in every world it has opened."""
COLLECTIVES = (
    "all_reduce", "all_reduce_coalesced", "all_gather", "all_gather_into_tensor", "all_gather_coalesced", "reduce",
    "reduce_scatter", "reduce_scatter_tensor", "all_to_all_single", "all_to_all", "broadcast", "barrier",
)  # fmt: skip
"""Methods of DeepSpeed's communication backend that a heartbeat names."""
NOT_DETERMINISTIC = "does not have a deterministic implementation"
"""What torch says of an operation that `open_world(deterministic=True)` forbids."""
MESSAGE_BYTES = 4096
"""An error message that travels between ranks is cut to this many UTF-8 bytes."""


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among all ranks.

    control: group over gloo for small host-side messages; on CUDA it never waits for the device.
    """

    rank: int
    size: int
    device: torch.device
    control: Any

    def gather(self, values: Sequence[float] | npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Return every rank's vector, float64 [size, len(values)]; collective, all vectors of one length."""
        mine = torch.tensor(np.asarray(values, dtype=np.float64))
        if self.size == 1:
            return mine.numpy()[None]
        return torch.stack(self._all_gather(mine)).numpy()

    def texts(self, text: str) -> list[str]:
        """Return every rank's text, cut to MESSAGE_BYTES; collective."""
        mine = _as_bytes(text)
        return [_as_text(row) for row in (self._all_gather(mine) if self.size > 1 else [mine])]

    def agree(self, error: BaseException | None = None, *, stop: bool = False) -> bool:
        """Return whether any rank wants to stop; raise on every rank if any rank has an error. Collective.

        The rank with the error raises it; the others raise the same class (PretrainError for foreign classes) with
        the first such rank's message, so that no rank is left waiting in a collective.
        """
        flags = self.gather([float(error is not None), float(stop)])
        if flags[:, 0].any():
            message = self._first_message(error, int(np.flatnonzero(flags[:, 0])[0]))
            if error is None:
                name, _, text = message.partition("\n")
                error = next((kind for kind in _subclasses(PretrainError) if kind.__name__ == name), PretrainError)(
                    text
                )
            error.add_note(AGREED)
            raise error
        return bool(flags[:, 1].any())

    def together(self, action: Callable[[], Result]) -> Result:
        """Return this rank's `action()`; raise on every rank if it ends in a user's error on any. Collective."""
        result: list[Result] = []
        error: Exception | None = None
        try:
            result.append(action())
        except (PretrainError, DataError, KernelError) as caught:
            error = caught
        self.agree(error)
        return result[0]

    def _all_gather(self, mine: torch.Tensor) -> list[torch.Tensor]:
        rows = [torch.empty_like(mine) for _ in range(self.size)]
        noted("gather of the ranks", dist.all_gather)(rows, mine, group=self.control)
        return rows

    def _first_message(self, error: BaseException | None, source: int) -> str:
        payload = _as_bytes(f"{type(error).__name__}\n{error}")
        if self.size > 1:
            noted("broadcast of an error", dist.broadcast)(payload, src=source, group=self.control)
        return _as_text(payload)


def open_world(
    device: Literal["auto", "cpu", "cuda"] = "auto", torch_threads: int = 0, *, deterministic: bool = False
) -> World:
    """Join the process group and return this process's place in it.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; without RANK the world is this process on a free
    port. gloo on CPU, NCCL on CUDA with one device per local rank. deterministic: torch refuses, from here on, every
    operation whose result can differ between two runs. Raises PretrainError when there are too few devices.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if "RANK" not in os.environ:
        _set_for_one.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=_free_port())
        os.environ.update(_set_for_one)
    if missing := [name for name in LAUNCHER_VARIABLES if name not in os.environ]:
        half = PretrainError(
            f"RANK is set but {missing[0]} is not; start ranks with `triweave launch` or `deepspeed`, or unset RANK to "
            "train in this process alone"
        )
        half.add_note(ALONE)
        raise half
    rank, size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if device == "cuda" and local_rank >= torch.cuda.device_count():
        too_many = PretrainError(
            f"local rank {local_rank} has no CUDA device, there are {torch.cuda.device_count()}; "
            "start fewer ranks per host, or set train.device=cpu"
        )
        too_many.add_note(ALONE)
        raise too_many
    if torch_threads:
        torch.set_num_threads(torch_threads)
    _choose_algorithms(deterministic)
    _quieten_deepspeed(device)
    place = torch.device(device, local_rank) if device == "cuda" else torch.device("cpu")
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo", rank=rank, world_size=size)
    _joined.append(rank)
    _join_deepspeed()
    control = dist.new_group(backend="gloo") if place.type == "cuda" else dist.group.WORLD
    return World(rank=rank, size=size, device=place, control=control)


def _as_bytes(text: str) -> torch.Tensor:
    """Return uint8 [MESSAGE_BYTES], the text's UTF-8 and zeros."""
    # a path that is not UTF-8 holds surrogates, which strict encoding refuses
    encoded = text.encode(errors="backslashreplace")[:MESSAGE_BYTES]
    payload = torch.zeros(MESSAGE_BYTES, dtype=torch.uint8)
    if encoded:
        payload[: len(encoded)] = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
    return payload


def _as_text(payload: torch.Tensor) -> str:
    return bytes(payload.numpy().tobytes()).rstrip(b"\0").decode(errors="replace")


def world_is_open() -> bool:
    """Return whether this process has joined the process group."""
    return dist.is_initialized()


def close_world() -> None:
    """Leave the process group, and take back what a world of one put into the environment.

    Otherwise a child process would take itself for rank 0 at a port that is in use.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    while _set_for_one:
        os.environ.pop(_set_for_one.popitem()[0], None)


def leave(code: int) -> NoReturn:
    """End a process that may have joined a process group, with exit code `code`; never returns.

    gloo's threads drop finished work a moment after its result is there, and DeepSpeed keeps the groups beyond
    `destroy_process_group`. A thread that does so while Python is being taken down is unwound through C++ code that
    must not throw, and the process dies of SIGABRT after all its work is done (torch 2.13, Python 3.11). So after what
    Python does at exit the process ends here, without taking the interpreter down.
    """
    if _joined:
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # whoever read them is gone; what they say at exit, too
                stream.flush()
        os._exit(code)
    sys.exit(code)


def _choose_algorithms(deterministic: bool) -> None:
    """Let torch, cuDNN and cuBLAS compute the same bits from the same inputs every time, or whatever is fastest."""
    if deterministic:  # cuBLAS reads it when it is first used; without it some of its sums depend on the stream
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = False


def _quieten_deepspeed(device: str) -> None:
    """Let DeepSpeed choose our device and log errors only; its warnings repeat what our checks refuse or intend."""
    os.environ["DS_ACCELERATOR"] = device
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # names DeepSpeed still uses
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    for handler in logger.handlers:
        handler.setLevel(logging.ERROR)


def _join_deepspeed() -> None:
    """Hand our process group to DeepSpeed.

    Its shared-memory all-reduce serves inference only, yet every start on CPU would compile or load it with a C++
    compiler; it is declared incompatible instead.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_init_required=False, auto_mpi_discovery=False, verbose=False)
    backend = deepspeed.comm.comm.cdb
    for name in COLLECTIVES:
        if name not in vars(backend):  # which outlives a world
            setattr(backend, name, noted(name, getattr(backend, name)))


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def _subclasses(kind: type[PretrainError]) -> list[type[PretrainError]]:
    return [kind, *(below for child in kind.__subclasses__() for below in _subclasses(child))]
