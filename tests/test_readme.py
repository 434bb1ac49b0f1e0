"""The README promises only what is there: commands, options, chores, files."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from triweave.launch.cli import COMMANDS
from triweave.launch.commands import bench, checkpoint, kernels

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
README = DOCUMENTS[0].read_text(encoding="utf-8")
SUBCOMMANDS = {
    "tokenizer": ("train",),
    "bench": tuple(bench.ACTIONS),
    "kernels": tuple(kernels.ACTIONS),
    "checkpoint": tuple(checkpoint.ACTIONS),
}


def shell_lines() -> list[list[str]]:
    """Return the commands in the README's shell blocks that start with triweave."""
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines() if line.startswith("triweave ")]


def help_of(*command: str) -> str:
    result = subprocess.run(
        [sys.executable, "-m", "triweave.launch.cli", *command, "--help"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_examples_and_stands_in_the_table(name: str) -> None:
    text = help_of(name)
    assert "examples:" in text
    assert f"triweave {name}" in text
    assert f"| `triweave {name}` |" in README


@pytest.mark.parametrize("line", shell_lines(), ids=" ".join)
def test_options_of_the_examples_exist(line: list[str]) -> None:
    name, rest = line[1], line[2:]
    assert name in COMMANDS
    subcommand = [word for word in rest[:1] if word in SUBCOMMANDS.get(name, ())]
    text = help_of(name, *subcommand)
    assert [word for word in rest if word.startswith("--") and word not in text] == []
    configs = [word for word in rest if word.endswith(".yaml")]
    assert [config for config in configs if not (ROOT / config).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_chores_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    targets = [target for target in re.findall(r"\]\(([^)#]+)", text) if "://" not in target]
    assert [target for target in targets if not (document.parent / target).exists()] == []
    chores = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"`?make ([a-z-]+)", " ".join(re.findall(r"`[^`]+`", text)))) <= chores


def test_the_chores_of_the_makefile_are_the_promised_ones() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    for chore in ("install", "demo", "test", "test-all", "check", "test-gpu", "soak", "clean"):
        assert re.search(rf"^{chore}:", text, re.MULTILINE), chore
