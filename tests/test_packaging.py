"""The package as it is installed: ours is triweave.<folder>, and the registry's `kernels` stays what it was.

The installs go into a fresh virtual environment that sees this one's site-packages through a .pth file: the real
`kernels` package and all dependencies are there, this checkout is not, and no network is used.
"""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("kernels", "data_pipeline", "pretrain", "launch")


def call(*arguments: str | Path, cwd: Path) -> str:
    result = subprocess.run(
        [str(argument) for argument in arguments], cwd=cwd, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """Return a copy of what a clone holds of the package, so that building leaves nothing in the checkout."""
    copy = tmp_path / "clone"
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture
def fresh_python(tmp_path: Path) -> Path:
    """Return the interpreter of a virtual environment with our dependencies but without us."""
    environment = tmp_path / "venv"
    call(sys.executable, "-m", "venv", "--without-pip", environment, cwd=tmp_path)
    python = environment / "bin" / "python"
    purelib = call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    # a path named in a .pth file is searched, but its own .pth files (our editable install) are not read
    (Path(purelib) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return python


@pytest.fixture
def install(fresh_python: Path, tmp_path: Path) -> Callable[..., None]:
    def run(*what: str | Path) -> None:
        pip = (sys.executable, "-m", "pip", "--python", fresh_python, "install", "--quiet", "--no-deps")
        call(*pip, "--no-build-isolation", "--no-index", *what, cwd=tmp_path)

    return run


def build_wheel(sources: Path, out: Path) -> Path:
    call(
        *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"),
        *("--wheel-dir", out, sources),
        cwd=out.parent,
    )
    (wheel,) = out.glob("*.whl")
    return wheel


IMPORT_BOTH = """
import importlib.util, kernels, triweave.kernels.errors, triweave.data_pipeline.batch, triweave.launch.cli
print(kernels.__file__)
print(hasattr(kernels, "get_kernel"))
print(triweave.kernels.errors.__file__)
"""


def assert_both_import(python: Path, cwd: Path, ours_below: Path) -> None:
    theirs, is_the_real_one, ours = call(python, "-c", IMPORT_BOTH, cwd=cwd).split()
    assert Path(theirs).parent == Path(sysconfig.get_path("purelib")) / "kernels"
    assert is_the_real_one == "True"
    assert ours_below in Path(ours).parents


def test_the_wheel_holds_only_triweave(sources: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(build_wheel(sources, tmp_path / "out")) as wheel:
        names = wheel.namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"triweave"}
    code = {f"triweave/{path.relative_to(sources)}" for folder in FOLDERS for path in (sources / folder).rglob("*.py")}
    assert code <= set(names)
    assert {f"triweave/{folder}/py.typed" for folder in FOLDERS} <= set(names)
    assert "triweave/launch/configs/demo_cpu.yaml" in names
    assert "triweave/launch/report/page.html.j2" in names
    assert {f"triweave/launch/view/{name}" for name in ("page.html", "view.css", "view.js", "packs.js")} <= set(names)
    assert [name for name in names if name.endswith("__init__.py")] == []


@pytest.mark.slow
def test_wheel_beside_the_real_kernels(
    sources: Path, fresh_python: Path, install: Callable[..., None], tmp_path: Path
) -> None:
    install(build_wheel(sources, tmp_path / "out"))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for cwd in (elsewhere, sources):  # in the checkout the bare folder kernels/ stands first on sys.path
        assert_both_import(fresh_python, cwd, ours_below=fresh_python.parents[1])
    assert "triweave demo" in call(fresh_python.with_name("triweave"), "--help", cwd=elsewhere)


@pytest.mark.slow
def test_editable_beside_the_real_kernels(
    sources: Path, fresh_python: Path, install: Callable[..., None], tmp_path: Path
) -> None:
    install("--editable", sources)
    for cwd in (tmp_path, sources):
        assert_both_import(fresh_python, cwd, ours_below=sources)
    (sources / "kernels" / "brand_new.py").write_text("ANSWER = 42\n", encoding="utf-8")
    assert (
        call(fresh_python, "-c", "from triweave.kernels.brand_new import ANSWER; print(ANSWER)", cwd=tmp_path) == "42\n"
    )


def requirement_names(requirements: list[str]) -> list[str]:
    return [match[0] for item in requirements if (match := re.match(r"[A-Za-z0-9_.-]+", item))]


def direct_requirements() -> list[str]:
    """Return the requirements of setup.py, extras included, by evaluating its two literals."""
    import ast

    found: list[str] = []
    for node in ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            if node.targets[0].id == "INSTALL_REQUIRES":
                found += ast.literal_eval(node.value)
            elif node.targets[0].id == "EXTRAS":
                found += [item for extra in ast.literal_eval(node.value).values() for item in extra]
    return requirement_names(found)


def stated_licence(package: str) -> str | None:
    """Return the licence that an installed package's metadata states, None where it is not installed or states none."""
    try:
        metadata = importlib.metadata.metadata(package)
    except importlib.metadata.PackageNotFoundError:
        return None
    classifiers = [item for item in metadata.get_all("Classifier") or [] if item.startswith("License ::")]
    name_or_text = metadata.get("License") or ""  # some packages put the whole text there
    name = None if "\n" in name_or_text else name_or_text
    return metadata.get("License-Expression") or name or next(iter(classifiers), None)


def same_licence(one: str, other: str) -> bool:
    """Compare names of licences; releases of one package differ in words, `MIT` or `License :: OSI Approved :: MIT`."""
    plain = [re.sub(r"license|software|osi approved|[^a-z0-9.+]", "", name.lower()) for name in (one, other)]
    return plain[0] == plain[1]


def test_third_party_lists_every_requirement_with_its_licence() -> None:
    rows = re.findall(r"^\| (\S+) \| ([^|]+) \|", (ROOT / "THIRD_PARTY.md").read_text(encoding="utf-8"), re.MULTILINE)
    listed = {name: licence.strip() for name, licence in rows}
    requirements = direct_requirements()
    assert len(requirements) > 20
    assert [name for name in requirements if name not in listed] == []
    wrong = {
        name: (listed[name], stated)
        for name in requirements
        if (stated := stated_licence(name)) is not None and not same_licence(listed[name], stated)
    }
    assert wrong == {}


def test_constraints_pin_what_is_required_and_leave_the_build_of_torch_open() -> None:
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    )
    normalised = {re.sub(r"[-_.]+", "-", name).lower() for name in pins}
    left_open = {"triton", "flash-attn", "setuptools"}
    left_open |= {
        "megatron-energon",
        "litdata",
        "mosaicml-streaming",
    }  # the extra `bench`: elsewhere
    required = {re.sub(r"[-_.]+", "-", name).lower() for name in direct_requirements()}
    assert required - normalised <= left_open
    assert pins["torch"] == "2.13.0"
    assert [name for name, version in pins.items() if "+" in version or name.startswith("nvidia")] == []
