"""The processor and the versions that figures name."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path

from triweave.data_pipeline.machine import installed_versions, processor_name


def test_the_processor_is_the_one_that_linux_names(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel name\t: Abacus 9: fast\nmodel name\t: other\n", encoding="utf-8")
    assert processor_name(info) == "Abacus 9: fast"


def test_without_a_name_the_architecture_stands_in(tmp_path: Path) -> None:
    (tmp_path / "nameless").write_text("processor\t: 0\n", encoding="utf-8")
    fallback = platform.processor() or platform.machine()
    assert [processor_name(tmp_path / name) for name in ("nameless", "missing")] == [fallback, fallback]


def test_versions_are_those_of_the_metadata() -> None:
    found = installed_versions(("numpy", "no-such-package"))
    assert found == {"python": platform.python_version(), "numpy": version("numpy"), "no-such-package": "not installed"}
