"""What this machine has: cores, accelerators, free ports."""

from __future__ import annotations

import os
import random
import socket
from contextlib import suppress
from dataclasses import dataclass

_LISTENING_PORTS = (20_000, 32_768)
"""Up to where net.ipv4.ip_local_port_range begins unless it is set otherwise."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Cores this process may use, and the ids of the CUDA devices it sees, as CUDA_VISIBLE_DEVICES names them."""

    cores: int
    cuda_devices: tuple[str, ...] = ()

    @property
    def most_ranks(self) -> int:
        """One rank per CUDA device, or one per core where there is none."""
        return len(self.cuda_devices) or self.cores

    @property
    def default_ranks(self) -> int:
        """All CUDA devices; on CPU one, since ranks would only share the cores."""
        return len(self.cuda_devices) or 1

    def describe_limit(self) -> str:
        """Say in words what limits the number of ranks."""
        if self.cuda_devices:
            return f"{len(self.cuda_devices)} CUDA device{'s' * (len(self.cuda_devices) > 1)}"
        return f"{self.cores} core{'s' * (self.cores > 1)} and no CUDA device"


def inspect_machine() -> Machine:
    """Look at the machine this runs on.

    Imports torch, which takes seconds, only where there is a GPU driver; DS_ACCELERATOR=cpu and an empty
    CUDA_VISIBLE_DEVICES mean no CUDA.
    """
    cores = len(os.sched_getaffinity(0))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if os.environ.get("DS_ACCELERATOR") == "cpu" or visible == "" or not _has_gpu_driver():
        return Machine(cores=cores)
    import torch

    count = torch.cuda.device_count()
    ids = [name.strip() for name in visible.split(",")] if visible else [str(number) for number in range(count)]
    return Machine(cores=cores, cuda_devices=tuple(ids[:count]))


def _has_gpu_driver() -> bool:
    """Look for what the drivers of NVIDIA (Linux, WSL) and AMD leave in the file system."""
    return any(os.path.exists(path) for path in ("/proc/driver/nvidia", "/dev/nvidiactl", "/dev/dxg", "/dev/kfd"))


def free_port() -> int:
    """Return a TCP port of this machine that nobody listens on at the moment.

    One below those that Linux gives to outgoing connections: seconds pass until it is listened on, and one of those
    that a store or a peer is asked through could take it meanwhile. No seed: two starts of one run are to differ.
    """
    while True:
        port = random.SystemRandom().randrange(*_LISTENING_PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port
