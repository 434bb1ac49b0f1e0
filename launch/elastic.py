"""Elastic restarts: what is left of the machines of a run for its next start, and how many ranks that start takes.

A place is a slot of a machine: a device, or on CPU a process. It is lost for good when its machine no longer answers,
or when the supervisor has seen its rank fail in two starts running (`RankWatch.failed_rank`).
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

from triweave.launch.errors import PreflightError
from triweave.launch.hostfile import Host, Place, is_this_machine

if TYPE_CHECKING:
    from triweave.pretrain.config import RunConfig

ANSWER_S = 10
"""Seconds that a machine has to accept a connection."""
UNREACHABLE = 255
"""Exit code by which ssh says that it has not come to the machine."""


def hosts_left(hosts: Sequence[Host], lost: Sequence[Place]) -> tuple[Host, ...]:
    """Return the machines that answer to ssh, without lost slots; one without any slot is left out."""
    with ThreadPoolExecutor(max_workers=32) as pool:
        answering = list(pool.map(lambda host: answers(host.name), hosts))
    return tuple(
        left for host, there in zip(hosts, answering, strict=True) if there and (left := without(host, lost)).taken
    )


def without(host: Host, lost: Sequence[Place]) -> Host:
    """Return a machine without the lost ones of its slots."""
    return replace(host, without=tuple(sorted(place.slot for place in lost if place.machine == host.name)))


def answers(name: str) -> bool:
    """Return whether a machine can be reached over ssh; this one always can."""
    if is_this_machine(name):
        return True
    asked = subprocess.run(
        ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={ANSWER_S}", name, "true"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )
    return asked.returncode != UNREACHABLE


def ranks_left(config: RunConfig, *, most: int, least: int) -> int:
    """Return the largest number of ranks, from `least` to `most`, that the config can have.

    Raises PreflightError where there is none.
    """
    from triweave.pretrain.errors import PretrainError

    reason = f"{most} are left"
    for ranks in range(most, least - 1, -1):
        try:
            config.check_world(ranks)
        except PretrainError as error:
            reason = str(error)
        else:
            return ranks
    raise PreflightError(
        f"--min-ranks {least}: the run cannot go on with so many ranks: {reason}; mend what has failed and start it "
        "again with --resume, or with a smaller --min-ranks"
    )
