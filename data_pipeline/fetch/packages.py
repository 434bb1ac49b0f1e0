"""Corpora that are parts of Debian packages: by apt, from given .deb files, unpacked ones, or an installation."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from triweave.data_pipeline.errors import FetchError
from triweave.data_pipeline.fetch.debian import apt_download, check_sha256, package_file, unpack
from triweave.data_pipeline.fetch.target import Fetched, Origin, Report, fetch_whole

SYSTEM = Path("/")
_NAMED = 3
"""Packages that a line names; of more the first is named and the others counted."""


@dataclass(frozen=True, kw_only=True)
class PackageCorpus:
    """One such corpus.

    folders: of the packages, without the leading slash, that are unpacked; nothing else of them is.
    megabytes: to download, about.
    help_line: what to do without apt; the end of every error.
    missing: of a tree that the packages were unpacked into, or of what was fetched before, what it lacks, in words;
        empty if nothing.
    copy: (such a tree, empty folder), brings the files into the corpus's layout.
    """

    name: str
    packages: tuple[str, ...]
    folders: tuple[PurePosixPath, ...]
    megabytes: int
    help_line: str
    missing: Callable[[Path], str]
    copy: Callable[[Path, Path], None]

    def fetch(self, out: Path, given: Path | None = None, report: Report = print, system: Path = SYSTEM) -> Fetched:
        """Put the corpus into `out` and return what is there; does nothing when it is already there.

        given: a folder with the .deb files, or one that they were unpacked into; None tries the packages installed
            below `system`, then `apt-get download`.
        report: called with one line for every step.

        Raises FetchError when the target is in use for something else or a part of the corpus cannot be had.
        """
        return fetch_whole(self.name, out, partial(self._prepare, given, report, system), report)

    def _prepare(self, given: Path | None, report: Report, system: Path, corpus: Path, aside: Path) -> Origin:
        if given is None and not self.missing(system):
            given = system
        if given is None:
            report(f"downloading {_listed(self.packages)} with apt-get ({self.megabytes} MB)")
            packages = apt_download(self.packages, aside, self.help_line)
            origin = f"apt-get download: {_listed([package.name for package in packages])}"
        elif not given.is_dir():
            raise FetchError(f"--from {given}: no such folder; {self.help_line}")
        elif next(given.glob("*.deb"), None) is not None:
            packages = [package_file(given, package, self.help_line) for package in self.packages]
            origin = str(given)
        else:
            self._require_whole(given)
            report(f"copying {given}")
            self.copy(given, corpus)
            return Origin(origin="the installed packages" if given == system else str(given))
        report("unpacking")
        unpacked = aside / "unpacked"
        for package in packages:
            check_sha256(package)
            if not unpack(package, {folder: unpacked / folder for folder in self.folders}):
                raise FetchError(f"{package}: holds no {' and no '.join(map(str, self.folders))}: download it again")
        self._require_whole(unpacked)
        self.copy(unpacked, corpus)
        return Origin(origin=origin)

    def _require_whole(self, tree: Path) -> None:
        if lacks := self.missing(tree):
            raise FetchError(f"{tree}: {lacks}; {self.help_line}")


def folder_corpus(
    name: str, packages: tuple[str, ...], folder: str, patterns: tuple[str, ...], megabytes: int
) -> PackageCorpus:
    """Return a corpus that is what `patterns` (globs, each of which must match) find in one folder of the packages."""
    place = PurePosixPath(folder)

    def root(tree: Path) -> Path:
        return tree / place if (tree / place).is_dir() else tree

    def missing(tree: Path) -> str:
        lacking = [pattern for pattern in patterns if next(root(tree).glob(pattern), None) is None]
        return f"holds no {lacking[0]}" if lacking else ""

    def copy(tree: Path, corpus: Path) -> None:
        for pattern in patterns:
            for path in sorted(root(tree).glob(pattern)):
                if path.is_file():
                    target = corpus / path.relative_to(root(tree))
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(path, target)

    return PackageCorpus(
        name=name,
        packages=packages,
        folders=(place,),
        megabytes=megabytes,
        help_line=f"give copies with --from FOLDER (the .deb files of {', '.join(packages)}, or unpacked)",
        missing=missing,
        copy=copy,
    )


FILLETS = folder_corpus(
    "fillets",
    ("fillets-ng-data", "fillets-ng-data-cs"),
    "usr/share/games/fillets-ng",
    ("script/*/*.lua", "images/**/*.png", "sound/**/*.ogg"),
    megabytes=110,
)
GIMP_HELP = folder_corpus(
    "gimp-help", ("gimp-help-en",), "usr/share/gimp/2.0/help", ("en/*.html", "en/images/**/*"), megabytes=50
)


def _listed(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(names) if len(names) <= _NAMED else f"{names[0]} and {len(names) - 1} more"
