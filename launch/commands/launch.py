"""examples:
  triweave launch launch/configs/demo_cpu.yaml --num-ranks 2
  triweave launch run.yaml --resume                          all GPUs of this machine, from the newest checkpoint
  triweave launch run.yaml optimizer.lr=3e-4 train.steps=500
  triweave launch run.yaml --hostfile hosts --num-ranks 16   first 16 slots of the hostfile, over pdsh and ssh
  triweave launch run.yaml --restarts 3                      ranks that die or stand still are started again
  triweave launch run.yaml --restarts 3 --min-ranks 6        and without a machine or device that is gone for good
  triweave launch run.yaml --num-ranks 8 --dry-run           print the command line and stop

A hostfile has lines like `worker-0 slots=8`. Who prefers the plain tool types
  deepspeed --hostfile hosts pretrain/train.py run.yaml
SIGUSR1 ends the run with a checkpoint. Exit code: 0 done, 2 the run cannot work (one line says why), 75 stopped with a
checkpoint (start it again with --resume), 124 it stood still, 130 interrupted, else the code of the rank that failed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from triweave.launch.errors import LaunchError

if TYPE_CHECKING:
    from triweave.launch.deepspeed_launcher import LaunchCommand
    from triweave.launch.hostfile import Place
    from triweave.pretrain.config import RunConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("config", type=Path, help="YAML of the run; see launch/configs")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted keys to set on top of the YAML")
    parser.add_argument(
        "--num-ranks",
        type=int,
        metavar="N",
        help="processes in all (default: one per GPU, 1 without; all slots of a hostfile)",
    )
    parser.add_argument("--hostfile", type=Path, metavar="FILE", help="machines to use, lines of `NAME slots=N`")
    parser.add_argument("--resume", action="store_true", help="continue from the newest complete checkpoint in run_dir")
    parser.add_argument(
        "--restarts",
        type=int,
        default=0,
        metavar="N",
        help="start again from the newest checkpoint up to N times when a rank dies or all stand still (default: 0)",
    )
    parser.add_argument(
        "--min-ranks",
        type=int,
        metavar="M",
        help="with --restarts: go on with fewer ranks, at least M, without machines that no longer answer and without "
        "a slot whose rank has failed twice in a row (default: always as many as at first)",
    )
    parser.add_argument("--oversubscribe", action="store_true", help="on CPU, allow more ranks than cores")
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, print the command line, start nothing"
    )


def run(arguments: argparse.Namespace) -> int:
    """Check the run, start its ranks, wait for them."""
    from triweave.pretrain.config import load_config

    if arguments.restarts < 0:
        raise LaunchError(f"--restarts {arguments.restarts}: must be 0 or above")
    if arguments.min_ranks is not None:
        _check_min_ranks(arguments)
    config = load_config(arguments.config, arguments.overrides)
    command = plan_command(arguments, config)
    if arguments.min_ranks is not None and arguments.min_ranks > command.ranks:
        raise LaunchError(
            f"--min-ranks {arguments.min_ranks}: the run starts with {command.ranks} ranks; ask for at most so many"
        )
    if arguments.dry_run:
        print(command)
        return 0
    return start(command, arguments, config)


def _check_min_ranks(arguments: argparse.Namespace) -> None:
    if arguments.min_ranks < 1:
        raise LaunchError(f"--min-ranks {arguments.min_ranks}: must be at least 1")
    if not arguments.restarts:
        raise LaunchError(
            f"--min-ranks {arguments.min_ranks} is of restarts, and --restarts is 0; add --restarts N as well"
        )


def plan_command(
    arguments: argparse.Namespace, config: RunConfig, lost: Sequence[Place] | None = None
) -> LaunchCommand:
    """Check ranks, machines and data, and return what to start. Raises LaunchError, DataError or PretrainError.

    lost: places that have been given up, for a start that may take fewer ranks than `--num-ranks`; None asks for all.
    """
    from triweave.launch.deepspeed_launcher import hostfile_command, local_command
    from triweave.launch.elastic import hosts_left, ranks_left, without
    from triweave.launch.hostfile import Host, parse_hostfile, take_ranks
    from triweave.launch.machine import free_port, inspect_machine
    from triweave.launch.preflight import check_ranks, check_run, check_slots

    machine = inspect_machine()
    training = [str(arguments.config.resolve()), *arguments.overrides, *["--resume"] * arguments.resume]
    if arguments.hostfile is None:
        ranks = machine.default_ranks if arguments.num_ranks is None else arguments.num_ranks
        here = Host(name="localhost", slots=ranks)
        if lost is not None:
            present = min(ranks, len(machine.cuda_devices)) if machine.cuda_devices else ranks
            here = without(Host(name="localhost", slots=present), lost)
            ranks = ranks_left(config, most=len(here.taken), least=arguments.min_ranks)
        check_ranks(ranks, machine=machine, oversubscribe=arguments.oversubscribe)
        command = local_command(training, machine=machine, ranks=ranks, port=free_port(), host=here)
    else:
        all_hosts = parse_hostfile(arguments.hostfile)
        ranks = sum(host.slots for host in all_hosts) if arguments.num_ranks is None else arguments.num_ranks
        check_slots(ranks, all_hosts)
        hosts = all_hosts
        if lost is not None:
            hosts = hosts_left(take_ranks(all_hosts, ranks), lost)
            ranks = ranks_left(config, most=sum(len(host.taken) for host in hosts), least=arguments.min_ranks)
        command = hostfile_command(
            training,
            hostfile=arguments.hostfile,
            hosts=take_ranks(hosts, ranks),
            all_hosts=all_hosts,
            machine=machine,
            port=free_port(),
        )
    check_run(config, ranks=ranks)
    return command


def start(command: LaunchCommand, arguments: argparse.Namespace, config: RunConfig) -> int:
    """Run the command to its end with a log in run_dir; return the exit code, after one line where it is not 0."""
    from triweave.launch.supervisor import STALLED, supervise, tell
    from triweave.pretrain.health.signals import REQUEUE

    run_dir = Path(config.run_dir)
    log_path = run_dir / "launch.log"

    def again(lost: Sequence[Place]) -> LaunchCommand:
        resumed = argparse.Namespace(**{**vars(arguments), "resume": True, "num_ranks": command.ranks})
        return plan_command(resumed, config, None if arguments.min_ranks is None else lost)

    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        log = log_path.open("ab")
    except OSError as error:
        raise LaunchError(
            f"run_dir {run_dir}: {error.strerror}; choose a folder that can be written: run_dir=DIR"
        ) from None
    with log:
        outcome = supervise(
            command,
            again,
            run_dir=run_dir,
            log=log,
            stall_s=config.health.stall_s,
            restarts=arguments.restarts,
            elastic=arguments.min_ranks is not None,
        )
    if outcome.stopped_by is not None:
        tell(f"stopped by {outcome.stopped_by.name}; all ranks have ended")
        return 128 + outcome.stopped_by
    if outcome.exit_code == REQUEUE:
        tell("stopped with a checkpoint before the last step; go on with --resume")
    elif outcome.exit_code == STALLED:
        tell(f"the run stood still and was ended; go on with --resume, or with --restarts; output: {log_path}")
    elif outcome.exit_code not in (0, 2):  # the line of a user error (2) has been shown already
        code = f"{outcome.exit_code}" + (f" (signal {outcome.exit_code - 128})" if outcome.exit_code > 128 else "")
        tell(f"a rank failed with exit code {code}; its output is in {log_path}")
    return outcome.exit_code
