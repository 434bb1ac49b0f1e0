"""A tiny run that starts in seconds, and two machines on one.

The machines are network namespaces joined by a bridge, an sshd in each, pdsh from a third:

    front (launcher)  bridge 10.77.0.1 ──┬── eth0 10.77.0.2  first host
                                         └── eth0 10.77.0.3  second host

Nothing outside the namespaces is changed: the ssh client gets its config from a wrapper that comes first on PATH, since
ssh looks into the home folder of the password file whatever HOME says.
"""

from __future__ import annotations

import io
import json
import os
import random
import re
import shutil
import subprocess
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from PIL import Image

SUBNET = "10.77.0"
PROGRAMS = ("ip", "sshd", "ssh", "ssh-keygen", "pdsh")
SYSTEM_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


TINY_RUN = {
    "data": {
        "sequence_length": 64,
        "workers": 0,
        "geometry": {"image_patch_px": 8, "image_max_tokens": 4},
    },
    "model": {"d_model": 32, "layers": 1, "heads": 2, "kv_heads": 1, "head_width": 16},
    "schedule": {"warmup_steps": 2},
    "train": {"steps": 4, "global_batch_rows": 4, "micro_batch_rows": 1, "zero_stage": 2, "device": "cpu"},
    "checkpoint": {"every_steps": 2},
}
DOCUMENTS = 120


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with shards/ and tokenizer.model, made of pictures of one colour and sentences about it."""
    from triweave.data_pipeline.shards.build import BuildOptions, build
    from triweave.data_pipeline.shards.manifest import Manifest
    from triweave.data_pipeline.sources.manifest import ManifestSource
    from triweave.data_pipeline.text.token_counts import write_token_counts
    from triweave.data_pipeline.text.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("tiny")
    draw = random.Random(0)
    with open(folder / "rows.jsonl", "w", encoding="utf-8") as rows:
        for number in range(DOCUMENTS):
            colour = tuple(draw.randrange(256) for _ in range(3))
            picture = io.BytesIO()
            Image.new("RGB", (16, 16), colour).save(picture, "PNG")
            text = f"Picture {number} has red {colour[0]}, green {colour[1]} and blue {colour[2]}."
            parts = [{"modality": "image", "bytes": b64encode(picture.getvalue()).decode()}] if number % 2 else []
            parts.append({"modality": "text", "text": text})
            rows.write(json.dumps({"id": f"row-{number}", "parts": parts}) + "\n")
    build(ManifestSource(root=folder / "rows.jsonl"), folder / "shards", BuildOptions(shard_size_bytes=100_000))
    manifest = Manifest.load(folder / "shards")
    train_tokenizer([manifest], 320, folder / "tokenizer.model")
    write_token_counts(manifest, folder / "tokenizer.model")
    return folder


@pytest.fixture
def tiny_run(tiny_data: Path, tmp_path: Path) -> Path:
    """Return the config of a run of seconds; its run_dir is tmp_path/run."""
    tree = {**TINY_RUN, "run_dir": str(tmp_path / "run")}
    places = {
        "sources": [{"name": "tiny", "shards": str(tiny_data / "shards")}],
        "tokenizer": str(tiny_data / "tokenizer.model"),
    }
    tree["data"] = {**TINY_RUN["data"], **places}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def train_alone(rank_pool: ModuleType) -> Callable[[Path], None]:
    """Return a function that trains the run of a config on one rank of the session's pool."""
    tasks = Path(__file__).parents[1] / "pretrain" / "checkpoint_tasks.py"

    def train(config: Path) -> None:
        assert rank_pool.pool(1).run(tasks, "run_spine", config=str(config), overrides=[], resume=False) == [""]

    return train


@dataclass(frozen=True, kw_only=True)
class TwoHosts:
    """The launcher's view of two machines.

    addresses: what stands in the hostfile.
    prefix: run a command line behind it to be in the launcher's namespace.
    environment: for commands there; its PATH leads to the ssh wrapper.
    """

    addresses: tuple[str, str]
    prefix: tuple[str, ...]
    environment: dict[str, str]


def ip(*arguments: str) -> None:
    subprocess.run([find("ip"), *arguments], check=True, capture_output=True, text=True)


def find(program: str) -> str:
    path = shutil.which(program, path=SYSTEM_PATH)
    assert path is not None
    return path


@pytest.fixture
def two_hosts(tmp_path: Path) -> Iterator[TwoHosts]:
    missing = [program for program in PROGRAMS if shutil.which(program, path=SYSTEM_PATH) is None]
    if missing:
        pytest.skip(f"two hosts need {', '.join(missing)}: run tests/launch/install_system_packages.sh")
    if os.geteuid() != 0:
        pytest.skip("two hosts need root, to make network namespaces")
    delete_abandoned_namespaces()
    front, *hosts = (f"triweave-{os.getpid()}-{name}" for name in ("front", "a", "b"))
    addresses = (f"{SUBNET}.2", f"{SUBNET}.3")
    with ExitStack() as cleanup:
        for namespace in (front, *hosts):
            try:
                ip("netns", "add", namespace)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"this machine lets nobody make network namespaces: {error.stderr.strip()}")
            cleanup.callback(ip, "netns", "delete", namespace)
            ip("-n", namespace, "link", "set", "lo", "up")
        ip("-n", front, "link", "add", "bridge", "type", "bridge")
        ip("-n", front, "address", "add", f"{SUBNET}.1/24", "dev", "bridge")
        ip("-n", front, "link", "set", "bridge", "up")
        ssh_folder = make_ssh_folder(tmp_path)
        for number, (host, address) in enumerate(zip(hosts, addresses, strict=True)):
            port = f"port{number}"
            ip("-n", front, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", host)
            ip("-n", front, "link", "set", port, "master", "bridge", "up")
            ip("-n", host, "address", "add", f"{address}/24", "dev", "eth0")
            ip("-n", host, "link", "set", "eth0", "up")
            cleanup.callback(stop, start_sshd(host, ssh_folder))
        environment = {**os.environ, "PATH": f"{ssh_folder / 'bin'}{os.pathsep}{SYSTEM_PATH}", "HOME": str(tmp_path)}
        prefix = (find("ip"), "netns", "exec", front)
        for address in addresses:
            wait_for_ssh(prefix, environment, address)
        yield TwoHosts(addresses=addresses, prefix=prefix, environment=environment)


def delete_abandoned_namespaces() -> None:
    """Delete what a test process that was killed could not."""
    listing = subprocess.run([find("ip"), "netns", "list"], capture_output=True, text=True, check=True).stdout
    for line in listing.splitlines():
        owner = re.match(r"triweave-(\d+)-", line)
        if owner and not Path(f"/proc/{owner[1]}").exists():
            ip("netns", "delete", line.split()[0])


def make_ssh_folder(tmp_path: Path) -> Path:
    """Write keys, the two configs and the client's wrapper."""
    folder = tmp_path / "ssh"
    (folder / "bin").mkdir(parents=True)
    for key in ("host_key", "user_key"):
        subprocess.run([find("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
    shutil.copy(folder / "user_key.pub", folder / "authorized_keys")
    (folder / "sshd_config").write_text(
        f"HostKey {folder}/host_key\nAuthorizedKeysFile {folder}/authorized_keys\nPidFile none\nStrictModes no\n"
        "PermitRootLogin prohibit-password\nPasswordAuthentication no\nUsePAM no\n",
        encoding="utf-8",
    )
    (folder / "ssh_config").write_text(
        f"Host {SUBNET}.*\n  IdentityFile {folder}/user_key\n  IdentitiesOnly yes\n  StrictHostKeyChecking no\n"
        "  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n",
        encoding="utf-8",
    )
    wrapper = folder / "bin" / "ssh"
    wrapper.write_text(f'#!/bin/sh\nexec {find("ssh")} -F {folder}/ssh_config "$@"\n', encoding="utf-8")
    wrapper.chmod(0o755)
    return folder


def start_sshd(namespace: str, folder: Path) -> subprocess.Popen[bytes]:
    Path("/run/sshd").mkdir(exist_ok=True)  # sshd separates its privileges there
    command = [find("ip"), "netns", "exec", namespace, find("sshd"), "-D", "-e", "-f", str(folder / "sshd_config")]
    with open(folder / f"{namespace}.log", "wb") as log:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    process.wait(timeout=10)


def wait_for_ssh(prefix: tuple[str, ...], environment: dict[str, str], address: str) -> None:
    deadline = time.monotonic() + 15
    while True:
        result = subprocess.run(
            [*prefix, "ssh", address, "true"], env=environment, capture_output=True, text=True, timeout=15, check=False
        )
        if result.returncode == 0:
            return
        if time.monotonic() > deadline:
            pytest.fail(f"no ssh to {address}: {result.stderr}")
        time.sleep(0.2)
