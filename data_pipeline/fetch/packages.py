"""Corpora that are a folder of Debian packages as it is: by apt, from given .deb files, or from an installation.

OUT/...       the contents of the packages' folder, such as usr/share/games/fillets-ng
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from triweave.data_pipeline.errors import FetchError
from triweave.data_pipeline.fetch.debian import apt_download, check_sha256, package_file, unpack
from triweave.data_pipeline.fetch.target import Fetched, Origin, Report, fetch_whole

SYSTEM = Path("/")


@dataclass(frozen=True, kw_only=True)
class PackageCorpus:
    """One such corpus.

    folder: of the packages, without the leading slash; what is below it is the corpus.
    wanted: glob patterns below the folder of what is kept; each must match something.
    megabytes: to download, about.
    """

    name: str
    packages: tuple[str, ...]
    folder: PurePosixPath
    wanted: tuple[str, ...]
    megabytes: int

    def fetch(self, out: Path, given: Path | None = None, report: Report = print, system: Path = SYSTEM) -> Fetched:
        """Put the corpus into `out` and return what is there; does nothing when it is already there.

        given: a folder with the .deb files, or one that they were unpacked into; None tries the packages installed
            below `system`, then `apt-get download`.
        report: called with one line for every step.

        Raises FetchError when the target is in use for something else or the corpus cannot be had.
        """
        return fetch_whole(self.name, out, partial(self._prepare, given, report, system), report)

    @property
    def help_line(self) -> str:
        """Return what a user can do who has no apt."""
        return f"give copies with --from FOLDER (the .deb files of {', '.join(self.packages)}, or unpacked)"

    def _prepare(self, given: Path | None, report: Report, system: Path, corpus: Path, aside: Path) -> Origin:
        if given is None and not self._missing(system / self.folder):
            given = system
        if given is None:
            report(f"downloading {', '.join(self.packages)} with apt-get ({self.megabytes} MB)")
            packages = apt_download(self.packages, aside, self.help_line)
            origin = f"apt-get download: {', '.join(package.name for package in packages)}"
        elif not given.is_dir():
            raise FetchError(f"--from {given}: no such folder; {self.help_line}")
        elif next(given.glob("*.deb"), None) is not None:
            packages = [package_file(given, package, self.help_line) for package in self.packages]
            origin = str(given)
        else:
            tree = given / self.folder if (given / self.folder).is_dir() else given
            report(f"copying {tree}")
            self._copy(tree, corpus)
            return Origin(origin="the installed packages" if given == system else str(given))
        report("unpacking")
        unpacked = aside / "unpacked"
        for package in packages:
            check_sha256(package)
            if not unpack(package, {self.folder: unpacked}):
                raise FetchError(f"{package}: holds no {self.folder}: download it again")
        self._copy(unpacked, corpus)
        return Origin(origin=origin)

    def _missing(self, tree: Path) -> list[str]:
        return [pattern for pattern in self.wanted if next(tree.glob(pattern), None) is None]

    def _copy(self, tree: Path, corpus: Path) -> None:
        if missing := self._missing(tree):
            raise FetchError(f"{tree}: holds no {missing[0]}; {self.help_line}")
        for pattern in self.wanted:
            for path in sorted(tree.glob(pattern)):
                if path.is_file():
                    target = corpus / path.relative_to(tree)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(path, target)


FILLETS = PackageCorpus(
    name="fillets",
    packages=("fillets-ng-data", "fillets-ng-data-cs"),
    folder=PurePosixPath("usr/share/games/fillets-ng"),
    wanted=("script/*/*.lua", "images/**/*.png", "sound/**/*.ogg"),
    megabytes=110,
)
GIMP_HELP = PackageCorpus(
    name="gimp-help",
    packages=("gimp-help-en",),
    folder=PurePosixPath("usr/share/gimp/2.0/help"),
    wanted=("en/*.html", "en/images/**/*"),
    megabytes=50,
)
