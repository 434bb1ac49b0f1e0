"""What importing costs: shards are built on machines without torch, and `triweave --help` answers at once."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from triweave.launch.cli import COMMANDS

DATA_COMMANDS = ("fetch", "build", "push", "verify", "stats", "view", "tokenizer", "tokenize", "plan")
HEAVY = ("torch", "deepspeed", "triton", "webdataset", "transformers", "obstore")
HELP_SECONDS = 0.5


def python(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=120, check=False
    )


LOADED_AFTER_HELP = """
import importlib, sys
from triweave.launch.cli import main
module = importlib.import_module("triweave.launch.commands." + sys.argv[1])
try:
    main([sys.argv[1], "--help"])
except SystemExit:
    pass
print("LOADED", *sorted(sys.modules.keys() & set(sys.argv[2].split(","))))
"""


@pytest.mark.parametrize("command", DATA_COMMANDS)
def test_data_commands_load_nothing_heavy(command: str) -> None:
    result = python(LOADED_AFTER_HELP, command, ",".join(HEAVY))
    assert result.stdout.splitlines()[-1:] == ["LOADED"], result.stdout[-500:] + result.stderr[-2000:]


WITHOUT_TORCH = """
import json, pathlib, sys
for name in sys.argv[2].split(","):
    sys.modules[name] = None  # importing it now raises ImportError
from triweave.launch.cli import main
folder = pathlib.Path(sys.argv[1])
rows, shards, tokenizer, config = (str(folder / name) for name in ("rows.jsonl", "shards", "t.model", "run.yaml"))
texts = [f"Sentence {number} of {number * 7}, with words {number % 9} and more." for number in range(200)]
parts = lambda text: [{"modality": "text", "text": text}]
pathlib.Path(rows).write_text("".join(json.dumps({"id": text, "parts": parts(text)}) + "\\n" for text in texts))
data = {"sources": [{"name": "a", "shards": shards}], "tokenizer": tokenizer, "sequence_length": 64}
pathlib.Path(config).write_text(json.dumps({"data": data}))
if __name__ == "__main__":
    codes = [
        main(["build", "--source", "manifest", "--input", rows, "--out", shards]),
        main(["verify", shards]),
        main(["stats", shards, "--json"]),
        main(["tokenizer", "train", shards, "--vocab-size", "320", "--out", tokenizer]),
        main(["tokenize", shards, "--tokenizer", tokenizer, "--workers", "1"]),
        main(["plan", config, "--json"]),
    ]
    print("CODES", *codes)
"""


def test_shards_are_built_and_planned_on_a_machine_without_torch(tmp_path: Path) -> None:
    result = python(WITHOUT_TORCH, str(tmp_path), ",".join(HEAVY))
    assert result.stdout.splitlines()[-1:] == ["CODES 0 0 0 0 0 0"], result.stdout[-1000:] + result.stderr[-3000:]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_shows_an_example(command: str) -> None:
    module = importlib.import_module(f"triweave.launch.commands.{command}")
    assert f"triweave {command}" in (module.__doc__ or "")
    assert callable(module.add_arguments)
    assert callable(module.run)


def test_top_level_help_is_quick() -> None:
    """CPU time of the best of three, so that a busy machine cannot fail it."""
    seconds = []
    for _ in range(3):
        before = os.times()
        result = subprocess.run(
            [sys.executable, "-m", "triweave.launch.cli", "--help"], capture_output=True, check=True
        )
        after = os.times()
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
        assert all(name.encode() in result.stdout for name in COMMANDS)
    assert min(seconds) < HELP_SECONDS
