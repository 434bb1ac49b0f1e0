"""The DeepSpeed launcher's command line, for this machine or for the machines of a hostfile.

The real launcher is used as it is; this file only knows its traps (seen on 0.19.8):

- it ignores CUDA_VISIBLE_DEVICES as soon as a number of ranks is given, so the devices are named with --include;
- a hostfile with one machine makes it start the ranks here, whatever the name, unless --force_multi;
- over pdsh the arguments pass through a remote shell, quoted only where they hold a blank;
- the contents of ~/.deepspeed_env and ./.deepspeed_env, and variables that begin with PYTHON, NCCL or UCX, go into the
  remote command line, where every user of the machine can read them: nothing is added to them here.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from triweave.launch.errors import LauncherMissingError, LaunchError
from triweave.launch.hostfile import Host, Place, is_this_machine
from triweave.launch.machine import Machine

SHELL_SAFE = re.compile(r"[\w@%+=:,./-]+")


@dataclass(frozen=True, kw_only=True)
class LaunchCommand:
    """What is started.

    arguments: the command line, the launcher's path first.
    environment: variables set on top of the current ones.
    ranks: processes in all.
    remote_hosts: machines reached over ssh; empty for this machine alone.
    places: where each rank runs, by its number; empty where nobody asks.
    """

    arguments: tuple[str, ...]
    ranks: int
    environment: Mapping[str, str] = field(default_factory=dict)
    remote_hosts: tuple[str, ...] = ()
    places: tuple[Place, ...] = ()

    def __str__(self) -> str:
        """Return the line that a shell would take."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in sorted(self.environment.items())]
        return " ".join([*variables, shlex.join(self.arguments)])


def local_command(
    training: Sequence[str],
    *,
    machine: Machine,
    ranks: int,
    port: int,
    script: Path | None = None,
    host: Host | None = None,
) -> LaunchCommand:
    """Return the command that starts `ranks` ranks here.

    training: arguments of the script, by default train.py. host: this machine with the slots to use, by default the
    first ones.

    Each rank gets an equal share of the cores for its threads unless OMP_NUM_THREADS is set already.
    """
    environment = {"OMP_NUM_THREADS": str(max(1, machine.cores // ranks))}
    host = host or Host(name="localhost", slots=ranks)
    places = tuple(Place(machine=host.name, slot=slot) for slot in host.taken[:ranks])
    if machine.cuda_devices:
        slots = {place.slot for place in places}
        devices = ",".join(device for slot, device in enumerate(machine.cuda_devices) if slot in slots)
        where = ["--include", f"localhost:{devices}"]
    else:
        where = ["--num_accelerators", str(ranks)]
        environment["DS_ACCELERATOR"] = "cpu"
    return LaunchCommand(
        arguments=(find_deepspeed(), *where, *_common(port), str(script or train_script()), *training),
        environment=environment,
        ranks=ranks,
        places=places,
    )


def hostfile_command(
    training: Sequence[str],
    *,
    hostfile: Path,
    hosts: Sequence[Host],
    all_hosts: Sequence[Host],
    machine: Machine,
    port: int,
) -> LaunchCommand:
    """Return the command that starts ranks on machines of a hostfile over pdsh and ssh.

    hosts: the machines and slots to use; all_hosts: everything the hostfile names.

    A hostfile that means this machine alone needs neither pdsh nor ssh and is started locally.
    Raises LauncherMissingError without pdsh, LaunchError for an argument that a remote shell would take apart.
    """
    if len(hosts) == 1 and is_this_machine(hosts[0].name):
        return local_command(training, machine=machine, ranks=len(hosts[0].taken), port=port, host=hosts[0])
    if shutil.which("pdsh") is None:
        raise LauncherMissingError(
            "pdsh is not installed; starting ranks on other machines needs it (Debian: apt-get install pdsh)"
        )
    where = ["--hostfile", str(hostfile.resolve())]
    if tuple(hosts) != tuple(all_hosts):
        where += ["--include", "@".join(f"{host.name}:{','.join(map(str, host.taken))}" for host in hosts)]
    if len(hosts) == 1:
        where.append("--force_multi")
    return LaunchCommand(
        arguments=(find_deepspeed(), *where, *_common(port), str(train_script()), *map(remote_argument, training)),
        environment={"PDSH_RCMD_TYPE": "ssh"},
        ranks=sum(len(host.taken) for host in hosts),
        remote_hosts=tuple(host.name for host in hosts),
        places=tuple(Place(machine=host.name, slot=slot) for host in hosts for slot in host.taken),
    )


def remote_argument(argument: str) -> str:
    """Return an argument so that it arrives unchanged behind DeepSpeed's quoting, pdsh and the remote shell.

    DeepSpeed puts double quotes around what holds a blank; inside them a shell still sees `$`, a backquote and a
    backslash. What holds both a blank and one of these cannot be expressed.
    """
    if SHELL_SAFE.fullmatch(argument):
        return argument
    if " " not in argument:
        return shlex.quote(argument)
    if any(character in argument for character in '$`\\"!\n'):
        raise LaunchError(
            f'argument {argument!r}: no blank together with $ ` \\ " ! over ssh; write it into the config file instead'
        )
    return argument


def find_deepspeed() -> str:
    """Return the path of the `deepspeed` program of the running interpreter, or else the one on PATH.

    Raises LauncherMissingError.
    """
    beside = Path(sys.executable).with_name("deepspeed")
    found = str(beside) if beside.exists() else shutil.which("deepspeed")
    if found is None:
        raise LauncherMissingError(
            f"no deepspeed beside {sys.executable} or on PATH; install it: pip install deepspeed"
        )
    return found


def train_script() -> Path:
    """Return the path of pretrain/train.py without importing it."""
    return script_of("triweave.pretrain.train")


def script_of(module: str) -> Path:
    """Return the path of a module without importing it. Raises LaunchError where it is not installed."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise LaunchError(f"{module} is not installed; install Triweave: pip install -e . (or make install)")
    return Path(spec.origin)


def _common(port: int) -> list[str]:
    return ["--master_port", str(port), "--log_level", "error"]
