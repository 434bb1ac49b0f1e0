"""Builds on Ray: the bytes of a local build, through kills, interrupts, and a cluster that stands elsewhere."""

from __future__ import annotations

import importlib.util
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from types import ModuleType

import pytest
import test_build as builds

from triweave.data_pipeline.errors import BuildError
from triweave.data_pipeline.shards.build import BuildOptions, build
from triweave.data_pipeline.shards.manifest import Manifest
from triweave.data_pipeline.sources.folder import FolderSource
from triweave.launch.machine import free_port

numbers = builds.numbers
expected = builds.expected

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the extra `ray` is not installed")


@pytest.mark.slow
@needs_ray
def test_a_build_killed_on_ray_continues_there_to_the_same_bytes(
    numbers: ModuleType, expected: Path, tmp_path: Path
) -> None:
    out = tmp_path / "shards"
    order = builds.build_order(list(numbers.NumberSource().rows()), 0)
    killer = next(number for number in reversed(order) if number % 50 == 20)
    process = builds.start(out, 2, killer, engine="ray")
    assert process.wait(120) == -signal.SIGKILL
    assert list((out / ".build").glob("0*.json")), "what is encoded is kept"
    assert builds.start(out, 2, killer, engine="ray").wait(120) == 0
    assert builds.files(out) == builds.files(expected)


@pytest.mark.slow
@needs_ray
def test_an_interrupt_on_ray_ends_soon_and_leaves_no_process(expected: Path, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    process = builds.start(out, 2, -1, seconds_per_row=0.01, engine="ray")
    deadline = time.monotonic() + 90
    while not list((out / ".build").glob("0*.json")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(30) == 130
    assert not list(out.glob("*.tmp"))
    while builds.session_processes(process.pid):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert builds.start(out, 1, -1).wait(120) == 0, "another engine goes on where Ray stopped"
    assert builds.files(out) == builds.files(expected)


@pytest.fixture
def cluster() -> Iterator[str]:
    """Start a head of Ray as on a machine of a cluster, and stop that one alone."""
    import ray

    if ray.is_initialized():
        ray.shutdown()
    from ray.cluster_utils import Cluster

    head = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    try:
        yield head.address
    finally:
        head.shutdown()


@pytest.mark.slow
@needs_ray
def test_a_cluster_is_one_option(tiny_corpus: Path, tiny_shards: Manifest, tmp_path: Path, cluster: str) -> None:
    command = [sys.executable, "-m", "triweave.launch.cli", "build", "--source", "folder", "--input", str(tiny_corpus)]
    options = ["--out", str(tmp_path / "shards"), "--shard-size-mb", str(60_000 / 2**20)]
    options += ["--engine", "ray", "--ray-address", cluster, "--workers", "2"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert builds.files(tmp_path / "shards") == builds.files(tiny_shards.root)


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Start a head and a second node with `ray start`, as on two machines, with folders of their own; end both.

    What joins has to show their token. Their folder has a short path, as sockets want it.
    """
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    with tempfile.TemporaryDirectory(prefix="r-", dir="/tmp") as folder, ExitStack() as stack:
        port = free_port()
        address = f"127.0.0.1:{port}"
        places = {"head": ["--head", "--port", str(port), "--include-dashboard", "false"]}
        places["second"] = ["--address", address]
        for name, place in places.items():
            options = ["--node-ip-address", "127.0.0.1", "--num-cpus", "1", "--temp-dir", f"{folder}/{name}", "--block"]
            node = subprocess.Popen(
                [str(Path(sys.executable).with_name("ray")), "start", *place, *options, "--disable-usage-stats"],
                env=os.environ | {"PYTHONPATH": str(builds.SCRIPT.parent), "TEST_NODE": name},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            stack.callback(_end, node)
            _wait_for_node(folder, name, node)
        yield address


def _wait_for_node(folder: str, name: str, node: subprocess.Popen[bytes]) -> None:
    """Wait until a node takes tasks: its raylet has made its socket."""
    deadline = time.monotonic() + 90
    while not list(Path(folder, name).glob("session_2*/sockets/raylet*")):
        assert node.poll() is None, f"{name} ended with {node.returncode}"
        assert time.monotonic() < deadline, f"{name} does not come up"
        time.sleep(0.1)


def _end(node: subprocess.Popen[bytes]) -> None:
    """End a node and all of its processes; `ray stop` would end every Ray of this machine."""
    node.terminate()
    try:
        node.wait(30)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(node.pid, signal.SIGKILL)


@pytest.mark.slow
@needs_ray
def test_two_nodes_make_the_bytes_of_a_local_build(expected: Path, tmp_path: Path, two_nodes: str) -> None:
    """Each has one CPU, so two tasks at a time need both; both have made documents."""
    nodes = tmp_path / "nodes"
    nodes.mkdir()
    out = tmp_path / "shards"
    # in a process of its own: Ray reads the token once, and an earlier test may have had another one
    program = (
        "import sys; from pathlib import Path\n"
        "from slow_source import SHARD_SIZE_BYTES, NumberSource\n"
        "from triweave.data_pipeline.shards.build import BuildOptions, build\n"
        "out, nodes, address = sys.argv[1:]\n"
        "source = NumberSource(seconds_per_row=0.005, nodes=Path(nodes))\n"
        "options = {'engine': 'ray', 'ray_address': address, 'workers': 2, 'shard_size_bytes': SHARD_SIZE_BYTES}\n"
        "build(source, Path(out), BuildOptions(**options))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(out), str(nodes), two_nodes],
        env=os.environ | {"PYTHONPATH": str(builds.SCRIPT.parent)},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert builds.files(out) == builds.files(expected)
    assert sorted(path.name for path in nodes.iterdir()) == ["head", "second"]


def test_ray_that_cannot_be_had_is_one_line(tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = FolderSource(root=tiny_corpus)
    with pytest.raises(BuildError, match="--ray-address head:6379: belongs to --engine ray, not to local"):
        build(source, tmp_path / "out", BuildOptions(ray_address="head:6379"))
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BuildError, match=r"Ray is not installed; `pip install triweave\[ray\]`"):
        build(source, tmp_path / "out", BuildOptions(engine="ray"))


@pytest.mark.slow
@needs_ray
def test_a_cluster_that_does_not_answer_is_one_line(tiny_corpus: Path, tmp_path: Path) -> None:
    options = BuildOptions(engine="ray", ray_address="127.0.0.1:1")
    with pytest.raises(BuildError, match=r"^--ray-address 127\.0\.0\.1:1: cannot be used \(.*\); `ray status`"):
        build(FolderSource(root=tiny_corpus), tmp_path / "out", options)
