"""No pickle is read anywhere in a run: reading one runs code that is in it.

A training, its checkpoints and its resume run under an audit hook that sees every class an unpickler looks up, whoever
calls it. What processes of one run send each other is apart: loader workers (`data.workers`) hand batches over a pipe.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import spine_runs as spine

ROOT = Path(__file__).parents[2]
FOLDERS = ("kernels", "data_pipeline", "pretrain", "launch")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
PIPES = {"data_pipeline/stream/transport.py"}
"""Files that may unpickle: what a process of the same run has sent."""
READERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}

PROGRAM = """
import sys
seen = []
def watch(event, arguments):
    if event in ("pickle.find_class", "marshal.load"):
        seen.append(f"{event} {arguments}")
import torch, numpy, deepspeed, torch.utils.tensorboard
from triweave.pretrain.train import main
real = torch.load
def load(*arguments, **options):
    if options.get("weights_only") is not True:
        seen.append("torch.load without weights_only=True")
    return real(*arguments, **options)
torch.load = load
if sys.argv[1] == "planted":
    import pickle
    plant = pickle.dumps(Exception)
sys.addaudithook(watch)
if sys.argv[1] == "planted":
    pickle.loads(plant)
    code = 0
else:
    code = main(sys.argv[2:])
print("".join(f"seen {line}\\n" for line in sorted(set(seen))), end="")
sys.stdout.flush()
import os
os._exit(code)
"""


def run(kind: str, *words: str) -> list[str]:
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, kind, *words],
        env=clean,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if line.startswith("seen ")]


@pytest.mark.slow
def test_a_run_and_its_resume_unpickle_nothing(run_config, tmp_path):
    words = (str(run_config), f"run_dir={tmp_path}", "checkpoint.every_steps=1", "schedule.total_steps=4")
    assert run("run", *words, "train.steps=2") == []
    assert run("run", *words, "train.steps=4", "train.zero_stage=3", "train.compile=true", "--resume") == []
    assert len(spine.metrics(tmp_path)) == 4


@pytest.mark.slow
def test_the_hook_sees_a_pickle():
    assert any("pickle.find_class" in line for line in run("planted"))


def violations(name: str, text: str) -> list[str]:
    """Return where a source file could read a pickle."""
    found = []
    for node in ast.walk(ast.parse(text)):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
        found += [f"{name}:{node.lineno} imports {module}" for module in modules
                  if module.split(".")[0] in READERS and name not in PIPES]  # fmt: skip
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            options = {option.arg: option.value for option in node.keywords}
            called = ast.unparse(node.func)
            if called == "torch.load" and not is_true(options.get("weights_only")):
                found.append(f"{name}:{node.lineno} calls torch.load without weights_only=True")
            if called in ("np.load", "numpy.load") and is_true(options.get("allow_pickle")):
                found.append(f"{name}:{node.lineno} calls np.load with allow_pickle=True")
    return found


def is_true(value: ast.expr | None) -> bool:
    return isinstance(value, ast.Constant) and value.value is True


def test_no_source_file_reads_a_pickle():
    found = [
        line for path in SOURCES for line in violations(path.relative_to(ROOT).as_posix(), path.read_text("utf-8"))
    ]
    assert found == []


@pytest.mark.parametrize(
    "line",
    ["import pickle", "from pickle import loads", "torch.load(path)", "torch.load(path, weights_only=False)",
     "np.load(path, allow_pickle=True)"],
)  # fmt: skip
def test_the_rule_catches_a_reader(line):
    assert len(violations("pretrain/a.py", line)) == 1


@pytest.mark.parametrize("line", ["torch.load(path, weights_only=True)", "np.load(path)", "import json"])
def test_the_rule_allows_what_it_should(line):
    assert violations("pretrain/a.py", line) == []
