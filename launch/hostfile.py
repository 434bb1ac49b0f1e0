"""Hostfiles: which machines a run takes and how many ranks each.

    # comments and empty lines are ignored
    worker-0 slots=8
    worker-1 slots=8

The same file serves `deepspeed --hostfile`. It is parsed here first because DeepSpeed ignores a file that does not
exist and trains on this machine alone, and because its errors name no line.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from triweave.launch.errors import HostfileError

LINE = re.compile(r"(?P<name>\S+)\s+slots=(?P<slots>\d+)\s*(#.*)?")
HOST_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
"""What is handed to pdsh and ssh; a leading dash would be an option there."""


@dataclass(frozen=True, kw_only=True)
class Host:
    """One machine.

    name: what ssh is called with.
    slots: ranks it takes, at least 1.
    without: numbers of slots that are not used.
    """

    name: str
    slots: int
    without: tuple[int, ...] = ()

    @property
    def taken(self) -> tuple[int, ...]:
        """Numbers of the slots that are used."""
        return tuple(slot for slot in range(self.slots) if slot not in self.without)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a rank runs: a slot of a machine by its number."""

    machine: str
    slot: int


def parse_hostfile(path: Path) -> tuple[Host, ...]:
    """Return the machines of a hostfile in its order.

    Raises HostfileError naming the file, the line and what is allowed there.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise HostfileError(f"hostfile {path}: {reason}; name a file with lines like `worker-0 slots=8`") from None
    hosts: dict[str, Host] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        content = line.strip()
        if content and not content.startswith("#"):
            host = _parse_line(f"{path}:{number}", content)
            if host.name in hosts:
                raise HostfileError(
                    f"{path}:{number}: {host.name} stands here twice; give it one line with all its slots"
                )
            hosts[host.name] = host
    if not hosts:
        raise HostfileError(f"hostfile {path}: names no machine; add lines like `worker-0 slots=8`")
    return tuple(hosts.values())


def _parse_line(where: str, content: str) -> Host:
    match = LINE.fullmatch(content)
    if match is None:
        raise HostfileError(f"{where}: {content!r} is not `NAME slots=N`; write for example `worker-0 slots=8`")
    if not HOST_NAME.fullmatch(match["name"]):
        raise HostfileError(f"{where}: {match['name']!r} is no host name; use letters, digits, dots and dashes")
    slots = int(match["slots"])
    if slots < 1:
        raise HostfileError(f"{where}: slots=0; give {match['name']} at least 1 or remove the line")
    return Host(name=match["name"], slots=slots)


def take_ranks(hosts: Sequence[Host], ranks: int) -> tuple[Host, ...]:
    """Return the machines that the first `ranks` slots lie on, the last one cut to what is left for it."""
    taken: list[Host] = []
    for host in hosts:
        if ranks > 0:
            slots = host.taken[:ranks]
            last = slots[-1]
            without = tuple(slot for slot in host.without if slot < last)
            taken.append(Host(name=host.name, slots=last + 1, without=without))
            ranks -= len(slots)
    return tuple(taken)


def is_this_machine(name: str) -> bool:
    """Tell whether a host name means the machine this runs on, without asking the network."""
    return name in {"localhost", "127.0.0.1", socket.gethostname(), socket.gethostname().split(".")[0]}
