"""The shape of the code base, checked on its syntax trees: who imports whom, and the few rules a linter has not got."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

ARROWS = {
    "kernels": set(),
    "data_pipeline": set(),
    "pretrain": {"kernels", "data_pipeline"},
    "launch": {"kernels", "data_pipeline", "pretrain"},
}
"""Folder -> folders of ours it may import beside itself."""

OBJECT_STORE_FILE = "data_pipeline/storage/client.py"
CODEC_LIBRARIES = {"simplejpeg", "PIL", "soundfile", "soxr", "resvg_py", "av"}
CODEC_FILES = {f"data_pipeline/media/{name}.py" for name in ("images", "audio", "video")}
FORBIDDEN_NAMES = {"utils", "util", "common", "helpers", "helper", "misc"}
LONGEST_FILE_LINES = 500

SOURCES = sorted(path for folder in ARROWS for path in (ROOT / folder).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported_modules(text: str) -> Iterator[str]:
    """Yield the dotted names that a file imports anywhere, `from a import b` as `a.b`, relative ones with dots."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module}.{alias.name}" for alias in node.names)


def violations(name: str, text: str) -> list[str]:
    """Return what a source file (named from the repository's root) imports against the rules."""
    folder = name.split("/")[0]
    found = []
    for module in imported_modules(text):
        top, _, rest = module.partition(".")
        if not top:
            found.append(f"{name} imports {module}: write imports in full, triweave.<folder>")
        elif top in ARROWS:
            found.append(f"{name} imports {module}: write triweave.{module}")
        elif top == "triweave" and rest.split(".")[0] not in ARROWS[folder] | {folder}:
            found.append(f"{name} imports {module}: {folder} may import of ours {sorted(ARROWS[folder]) or 'nothing'}")
        elif top == "triton" and not name.endswith("_triton.py"):
            found.append(f"{name} imports {module}: only *_triton.py may")
        elif top == "deepspeed" and folder != "pretrain":
            found.append(f"{name} imports {module}: only pretrain/ may")
        elif top == "obstore" and name != OBJECT_STORE_FILE:
            found.append(f"{name} imports {module}: only {OBJECT_STORE_FILE} may")
        elif top in CODEC_LIBRARIES and name not in CODEC_FILES:
            found.append(f"{name} imports {module}: only {sorted(CODEC_FILES)} may")
    return found


def test_imports_follow_the_arrows() -> None:
    assert [line for path in SOURCES for line in violations(relative(path), path.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("kernels/a.py", "from triweave.data_pipeline import batch"),
        ("data_pipeline/a.py", "import triweave.pretrain.model.model"),
        ("pretrain/a.py", "from triweave.launch.cli import main"),
        ("pretrain/a.py", "from kernels import attention"),
        ("pretrain/a.py", "from . import config"),
        ("pretrain/a.py", "from ..errors import PretrainError"),
        ("kernels/attention.py", "import triton.language as tl"),
        ("launch/a.py", "def late():\n    import deepspeed"),
        ("data_pipeline/a.py", "from PIL import Image"),
        ("data_pipeline/a.py", "import obstore"),
    ],
)
def test_the_rules_catch_a_violation(name: str, line: str) -> None:
    assert len(violations(name, line)) == 1


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("kernels/attention_triton.py", "import triton"),
        ("pretrain/engine/zero.py", "import deepspeed"),
        ("launch/a.py", "from triweave.pretrain.config import load_config"),
        ("data_pipeline/media/images.py", "import simplejpeg"),
    ],
)
def test_the_rules_allow_what_they_should(name: str, line: str) -> None:
    assert violations(name, line) == []


def test_folders_are_namespace_packages() -> None:
    assert [relative(path) for path in SOURCES + TESTS if path.name == "__init__.py"] == []
    assert all((ROOT / folder / "py.typed").exists() for folder in ARROWS)


UNFINISHED = re.compile(r"\b(" + "TO" + "DO|FIX" + "ME|X" + r"XX)\b")
"""Put together here so that this file does not hold the words."""


def broken_house_rules(path: Path) -> list[str]:
    """Return what is wrong with a file beside its imports."""
    text = path.read_text(encoding="utf-8")
    wrong = {
        "is too long: split it": len(text.splitlines()) > LONGEST_FILE_LINES,
        "says nothing with its name: name a module for what it does": path.stem in FORBIDDEN_NAMES,
        "is unfinished: file an issue instead": UNFINISHED.search(text),
        "holds an absolute path of a machine": re.search(r"[\"'](/home/|/work/|/root/|/Users/)", text),
    }
    return [f"{path} {said}" for said, found in wrong.items() if found]


def test_files_keep_the_rules_of_the_house() -> None:
    assert [line for path in SOURCES + TESTS for line in broken_house_rules(path)] == []


@pytest.mark.parametrize(
    ("name", "text"),
    [("long.py", "\n" * 501), ("utils.py", ""), ("a.py", "# TO" + "DO"), ("a.py", "'" + "/ho" + "me/me'")],
)
def test_a_broken_house_rule_is_found(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert len(broken_house_rules(tmp_path / name)) == 1


def test_pretrain_hides_no_standard_module() -> None:
    """`deepspeed pretrain/train.py` puts pretrain/ first on sys.path."""
    import sys

    assert {path.stem for path in (ROOT / "pretrain").glob("*.py")} & set(sys.stdlib_module_names) == set()


def test_the_spine_stays_short() -> None:
    spine = ROOT / "pretrain" / "train.py"
    assert len(spine.read_text(encoding="utf-8").splitlines()) <= 200
