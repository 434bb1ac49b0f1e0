"""`triweave launch` as a user meets it: dry runs, refusals of one line, real starts of the DeepSpeed launcher."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from triweave.launch.cli import main
from triweave.launch.machine import free_port
from triweave.launch.metrics import read_metrics

LAUNCH = (sys.executable, "-m", "triweave.launch.cli", "launch")
ENVIRONMENT = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def cpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*LAUNCH, *map(str, arguments)], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def launch(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*LAUNCH, *map(str, arguments)], env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False
    )


def test_dry_run_prints_the_line_and_starts_nothing(tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", str(tiny_run), "--num-ranks", "1", "train.steps=3", "--resume", "--dry-run"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert "deepspeed --num_accelerators 1 --master_port" in line
    assert line.endswith(f"pretrain/train.py {tiny_run} train.steps=3 --resume")
    assert not (tiny_run.parent / "run").exists()


def remove_tar(folder: Path) -> None:
    next(folder.joinpath("shards").glob("*.tar")).unlink()


def cut_tar(folder: Path) -> None:
    tar = next(folder.joinpath("shards").glob("*.tar"))
    tar.write_bytes(tar.read_bytes()[:-512])


def remove_token_counts(folder: Path) -> None:
    next(folder.joinpath("shards").glob("*.tokens-*")).unlink()


def remove_tokenizer(folder: Path) -> None:
    folder.joinpath("tokenizer.model").unlink()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["model.layer=2"], "did you mean model.layers"),
        (["train.steps=many"], "train.steps"),
        (["data.tokenizer=/nowhere/t.model"], "/nowhere/t.model"),
        (["data.sources=[{name: a, shards: /nowhere}]"], "/nowhere"),
        (["--num-ranks", "5000"], "at most"),
        (["--num-ranks", "0"], "at least 1"),
        (["--num-ranks", "1000", "--oversubscribe"], "train.global_batch_rows"),
        (["--hostfile", "/nowhere/hosts"], "/nowhere/hosts"),
    ],
)
def test_what_cannot_work_is_one_line(
    tiny_run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    assert main(["launch", str(tiny_run), *arguments]) == 2
    assert_one_line(capsys, says)


def assert_one_line(capsys: pytest.CaptureFixture[str], says: str) -> None:
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("triweave launch: ")
    assert says in line


def test_a_missing_config_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", str(tmp_path / "no.yaml")]) == 2
    assert_one_line(capsys, "no.yaml")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (remove_tar, ".tar: this shard file is missing"),
        (cut_tar, "bytes, not"),
        (remove_token_counts, "triweave tokenize"),
        (remove_tokenizer, "tokenizer.model"),
    ],
)
def test_missing_data_is_one_line(
    tiny_run: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: object, says: str
) -> None:
    copy = tmp_path / "data"
    shutil.copytree(tiny_data, copy)
    damage(copy)  # type: ignore[operator]
    tree = yaml.safe_load(tiny_run.read_text(encoding="utf-8"))
    tree["data"]["sources"][0]["shards"] = str(copy / "shards")
    tree["data"]["tokenizer"] = str(copy / "tokenizer.model")
    tiny_run.write_text(yaml.safe_dump(tree), encoding="utf-8")
    assert main(["launch", str(tiny_run)]) == 2
    assert_one_line(capsys, says)


def test_two_ranks_train(tiny_run: Path) -> None:
    result = launch(tiny_run, "--num-ranks", "2", "--oversubscribe")
    assert result.returncode == 0, result.stderr
    metrics = read_metrics(tiny_run.parent / "run")
    assert sorted(metrics) == [1, 2, 3, 4]
    log = (tiny_run.parent / "run" / "launch.log").read_text(encoding="utf-8")
    assert "step 4/4" in log
    assert log.count("kernels: attention: auto chose sdpa: ") == 1


def ranks_of(run_dir: Path) -> list[int]:
    """Return the processes, of any session, whose command line has this run's config."""
    config = str(run_dir.parent / "tiny.yaml").encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if config in words:
                found.append(int(entry.name))
    return found


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 180
    while max(read_metrics(run_dir), default=0) < step:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopping_leaves_no_process_and_a_checkpoint(tiny_run: Path, number: int, code: int) -> None:
    run_dir = tiny_run.parent / "run"
    process = start(tiny_run, "--num-ranks", "2", "--oversubscribe", "train.steps=100000", "data.workers=1")
    wait_for_step(run_dir, 3, process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == code
    assert errors.splitlines()[-1].startswith("triweave launch: stopped by")
    assert ranks_of(run_dir) == []
    assert any(run_dir.joinpath("checkpoints").iterdir())


@pytest.mark.slow
def test_a_killed_rank_ends_the_others_and_gives_its_code(tiny_run: Path) -> None:
    run_dir = tiny_run.parent / "run"
    result = subprocess.run(
        [*LAUNCH, str(tiny_run), "--num-ranks", "2", "--oversubscribe"],
        env={**ENVIRONMENT, "TRIWEAVE_KILL_AT_STEP": "3"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 128 + signal.SIGKILL
    assert "launch.log" in result.stderr.splitlines()[-1]
    assert ranks_of(run_dir) == []


@pytest.mark.slow
def test_plain_deepspeed_gives_the_same_losses_and_a_second_launch_is_refused_in_one_line(tiny_run: Path) -> None:
    """Also with key=value behind --resume; that the run_dir is taken only the ranks can find."""
    run_dir = tiny_run.parent / "run"
    assert launch(tiny_run, "--num-ranks", "2", "--oversubscribe").returncode == 0
    losses = {step: entry["loss"] for step, entry in read_metrics(run_dir).items()}
    script = Path(__file__).parents[2] / "pretrain" / "train.py"
    other = run_dir.parent / "plain"
    command = [Path(sys.executable).with_name("deepspeed"), "--num_accelerators", "2"]
    words = ["--master_port", str(free_port()), script, tiny_run, "--resume", f"run_dir={other}"]
    subprocess.run([*command, *words], env=ENVIRONMENT, check=True, timeout=300)
    assert {step: entry["loss"] for step, entry in read_metrics(other).items()} == losses
    again = launch(tiny_run, "--num-ranks", "1")
    assert again.returncode == 2
    (line,) = again.stderr.splitlines()
    assert "--resume" in line


@pytest.mark.slow
def test_two_hosts_give_the_losses_of_one(tiny_run: Path, two_hosts, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """ZeRO-3 over ssh and pdsh between two network namespaces; then Ctrl-C, which must end the ranks over there."""
    zero3 = ("train.zero_stage=3",)
    one = launch(tiny_run, "--num-ranks", "2", "--oversubscribe", *zero3)
    assert one.returncode == 0, one.stderr
    expected = {step: entry["loss"] for step, entry in read_metrics(tmp_path / "run").items()}
    hostfile = tmp_path / "hosts"
    hostfile.write_text("".join(f"{address} slots=1\n" for address in two_hosts.addresses), encoding="utf-8")
    settings = "GLOO_SOCKET_IFNAME=eth0\nOMP_NUM_THREADS=1\nDS_ACCELERATOR=cpu\n"
    (tmp_path / ".deepspeed_env").write_text(settings, encoding="utf-8")
    command = [*two_hosts.prefix, *LAUNCH, str(tiny_run), "--hostfile", str(hostfile), *zero3]
    environment = {**two_hosts.environment, "DS_ACCELERATOR": "cpu"}

    over_two = tmp_path / "two"
    result = subprocess.run(
        [*command, f"run_dir={over_two}"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert {step: entry["loss"] for step, entry in read_metrics(over_two).items()} == expected
    log = (over_two / "launch.log").read_text(encoding="utf-8")
    assert all(f"{address}: " in log for address in two_hosts.addresses)

    endless = tmp_path / "endless"
    process = subprocess.Popen(
        [*command, f"run_dir={endless}", "train.steps=100000"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_step(endless, 2, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert ranks_of(endless) == []


def test_metrics_of_a_run_can_be_read_while_they_are_written(tmp_path: Path) -> None:
    lines = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "loss": 2.5}]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "lo'
    (tmp_path / "metrics.jsonl").write_text(text, encoding="utf-8")
    assert {step: entry["loss"] for step, entry in read_metrics(tmp_path).items()} == {1: 3.0, 2: 2.5}
    assert read_metrics(tmp_path / "none") == {}
