from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest

from triweave.launch import deepspeed_launcher
from triweave.launch.deepspeed_launcher import hostfile_command, local_command, remote_argument, train_script
from triweave.launch.errors import LauncherMissingError, LaunchError
from triweave.launch.hostfile import Host, Place, take_ranks
from triweave.launch.machine import Machine

CPU = Machine(cores=8)
GPU = Machine(cores=64, cuda_devices=("2", "3", "5"))
HOSTS = (Host(name="a", slots=2), Host(name="b", slots=2))


@pytest.fixture
def pdsh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed_launcher.shutil, "which", lambda name: f"/usr/bin/{name}")


def test_cpu_ranks_share_the_cores() -> None:
    command = local_command(["run.yaml", "--resume"], machine=CPU, ranks=2, port=4711)
    assert command.environment == {"OMP_NUM_THREADS": "4", "DS_ACCELERATOR": "cpu"}
    assert command.arguments[0].endswith("deepspeed")
    assert "--num_accelerators 2" in str(command)
    assert "--master_port 4711" in str(command)
    assert command.arguments[-3:] == (str(train_script()), "run.yaml", "--resume")
    assert command.remote_hosts == ()


def test_gpu_ranks_get_the_visible_devices() -> None:
    """DeepSpeed takes devices 0 and 1 for --num_gpus 2, whatever CUDA_VISIBLE_DEVICES says."""
    command = local_command(["run.yaml"], machine=GPU, ranks=2, port=1)
    assert "--include localhost:2,3" in str(command)
    assert "DS_ACCELERATOR" not in command.environment


def test_places_that_are_given_up_are_not_started(tmp_path: Path, pdsh: None) -> None:  # noqa: ARG001 - a fixture
    here = Host(name="localhost", slots=3, without=(1,))
    command = local_command(["run.yaml"], machine=GPU, ranks=2, port=1, host=here)
    assert "--include localhost:2,5" in str(command)
    assert command.places == (Place(machine="localhost", slot=0), Place(machine="localhost", slot=2))
    hosts = take_ranks((Host(name="a", slots=2, without=(0,)), Host(name="b", slots=2)), 2)
    assert hosts == (Host(name="a", slots=2, without=(0,)), Host(name="b", slots=1))
    command = build_remote(hosts, tmp_path)
    assert "--include a:1@b:0" in str(command)
    assert (command.ranks, command.places) == (2, (Place(machine="a", slot=1), Place(machine="b", slot=0)))


def test_the_printed_line_is_what_a_shell_needs() -> None:
    command = local_command(["my run.yaml", "data.sources=[{name: a}]"], machine=CPU, ranks=1, port=1)
    words = shlex.split(str(command))
    assert words[-2:] == ["my run.yaml", "data.sources=[{name: a}]"]
    assert words[:2] == ["DS_ACCELERATOR=cpu", "OMP_NUM_THREADS=8"]


def build_remote(hosts: tuple[Host, ...], tmp_path: Path) -> deepspeed_launcher.LaunchCommand:
    return hostfile_command(
        ["run.yaml"], hostfile=tmp_path / "hosts", hosts=hosts, all_hosts=HOSTS, machine=CPU, port=1
    )


@pytest.mark.usefixtures("pdsh")
def test_hostfile_with_all_slots(tmp_path: Path) -> None:
    command = build_remote(HOSTS, tmp_path)
    assert f"--hostfile {tmp_path / 'hosts'}" in str(command)
    assert "--include" not in command.arguments
    assert command.ranks == 4
    assert command.remote_hosts == ("a", "b")
    assert command.environment == {"PDSH_RCMD_TYPE": "ssh"}


@pytest.mark.usefixtures("pdsh")
def test_hostfile_with_some_slots(tmp_path: Path) -> None:
    command = build_remote((HOSTS[0], Host(name="b", slots=1)), tmp_path)
    assert "--include a:0,1@b:0" in str(command)


@pytest.mark.usefixtures("pdsh")
def test_one_other_machine_is_really_reached(tmp_path: Path) -> None:
    """Without --force_multi DeepSpeed would start the ranks here."""
    assert "--force_multi" in build_remote(HOSTS[:1], tmp_path).arguments


def test_a_hostfile_that_means_this_machine_needs_no_ssh(tmp_path: Path) -> None:
    here = (Host(name="localhost", slots=2),)
    command = hostfile_command(["run.yaml"], hostfile=tmp_path, hosts=here, all_hosts=here, machine=CPU, port=1)
    assert command == local_command(["run.yaml"], machine=CPU, ranks=2, port=1)


def test_pdsh_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed_launcher.shutil, "which", lambda _: None)
    with pytest.raises(LauncherMissingError, match="apt-get install pdsh"):
        build_remote(HOSTS, tmp_path)


def after_deepspeed(argument: str) -> str:
    """Return what DeepSpeed's PDSHRunner.parse_user_args makes of an argument (0.19.8)."""
    return '"{}"'.format(argument.replace('"', '\\"')) if " " in argument else argument


@pytest.mark.parametrize(
    "argument",
    [
        "train.steps=3",
        "a=$HOME",
        "a=;rm",
        "a=[1,2]",
        "a=it's",
        "data.sources=[{name: a, shards: b c}]",
        "a=*",
        "a=#1",
        "a=",
        "a=`id`",
    ],
)
def test_arguments_survive_the_remote_shell(argument: str) -> None:
    line = after_deepspeed(remote_argument(argument))
    assert (
        subprocess.run(["sh", "-c", f"printf %s {line}"], capture_output=True, text=True, check=True).stdout == argument
    )


@pytest.mark.parametrize("argument", ["a=b $HOME", "a=`x` y", 'a="b c"', "a=b \\c"])
def test_arguments_that_cannot_survive_are_refused(argument: str) -> None:
    with pytest.raises(LaunchError, match="config file"):
        remote_argument(argument)


@pytest.mark.usefixtures("pdsh")
def test_no_variable_of_this_shell_goes_into_a_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI")
    for command in (build_remote(HOSTS, tmp_path), local_command(["r"], machine=CPU, ranks=1, port=1)):
        assert "wJalrXUtnFEMI" not in str(command)
    assert not (tmp_path / ".deepspeed_env").exists()
