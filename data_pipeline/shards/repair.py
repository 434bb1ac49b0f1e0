"""Repair a shard folder from the source it was built of, so that every file has the bytes the manifest names.

a damaged shard    its samples that are whole are copied, the others made again from their rows; written beside the old
                   files and put in their place only if all three hashes are those of the manifest
a damaged ledger   everything is built again beside the shards, and what is damaged is taken from there

Nothing is replaced by anything but the bytes of the manifest, each file at once; a repair that is killed is begun anew.
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import xxhash

from triweave.data_pipeline.errors import DataError, RepairError
from triweave.data_pipeline.shards.build import BuildOptions, build, build_fingerprint, list_rows, row_pipeline
from triweave.data_pipeline.shards.index import IndexRow, read_index
from triweave.data_pipeline.shards.ledger import read_ledger
from triweave.data_pipeline.shards.manifest import LEDGER_NAME, MANIFEST_NAME, Manifest, file_xxh3, sync_folder
from triweave.data_pipeline.shards.reindex import stored_samples
from triweave.data_pipeline.shards.row_encoder import RowEncoder
from triweave.data_pipeline.shards.verify import VerifyReport, shard_files, verify
from triweave.data_pipeline.shards.writer import EncodedSample, ShardWriter
from triweave.data_pipeline.sources.base import Row, Source
from triweave.data_pipeline.storage.location import is_remote, shown

REPAIR_FOLDER = ".repair"
_CHANGED = "its files, the name of their folder, or the codecs that encode them are not those of the build"
_NOT_THE_SAME = f"it comes out with other bytes: {_CHANGED}"
OnProgress = Callable[[int, int], None]
"""Called with (shards done, shards in all)."""


@dataclass(frozen=True, kw_only=True)
class RepairReport:
    """What was done, and how the folder stands afterwards.

    repaired: names of the files that were put in place.
    refused: shard (or the ledger's name) -> why its bytes could not be made again.
    samples_copied, samples_encoded: samples of repaired shards that were whole, and that came from the source.
    """

    repaired: tuple[str, ...]
    refused: dict[str, str]
    samples_copied: int
    samples_encoded: int
    report: VerifyReport


def repair(source: Source, folder: Path, options: BuildOptions, on_progress: OnProgress | None = None) -> RepairReport:
    """Repair the shards in `folder`, which were built of `source` with `options`.

    Raises RepairError where they were built of something else or otherwise, the source has changed since, the manifest
    itself is damaged, or another process repairs there; DataError for what `build` and `verify` refuse.
    """
    if is_remote(folder):
        raise RepairError(f"{shown(folder)}: only a folder of this machine can be repaired; then push it again")
    report = verify(folder)
    manifest = _manifest_of(folder)
    rows = list_rows(source)
    _refuse_other_build(manifest, build_fingerprint(source, options, rows))
    if not report.damage:
        if (folder / REPAIR_FOLDER).exists():  # of a repair that was killed when all was in place
            with _work_folder(folder):
                pass
        return RepairReport(repaired=(), refused={}, samples_copied=0, samples_encoded=0, report=report)
    with _work_folder(folder) as work:
        job = _Repair(manifest, rows, work)
        if any(LEDGER_NAME in damage.detail for damage in report.damage if not damage.shard):
            job.take_from(build(source, work / "build", options))
        else:
            job.mend(report, RowEncoder(row_pipeline(source, options), work / "media"), on_progress)
    return RepairReport(
        repaired=tuple(job.repaired),
        refused=job.refused,
        samples_copied=job.samples_copied,
        samples_encoded=job.samples_encoded,
        report=verify(folder),
    )


class _Repair:
    """The state of one repair: the files that are in place again, and the shards that cannot be had."""

    def __init__(self, manifest: Manifest, rows: list[Row], work: Path) -> None:
        self.repaired: list[str] = []
        self.refused: dict[str, str] = {}
        self.samples_copied = self.samples_encoded = 0
        self._manifest = manifest
        self._rows = rows
        self._work = work

    def take_from(self, built: Manifest) -> None:
        """Put files of a build in place of those that do not have the hash of the manifest."""
        if (built.hash, built.ledger_xxh3) != (self._manifest.hash, self._manifest.ledger_xxh3):
            self.refused[LEDGER_NAME] = _NOT_THE_SAME
            return
        for entry in built.shards:
            for name, xxh3 in zip(shard_files(entry), (entry.tar_xxh3, entry.idx_xxh3, entry.index_xxh3), strict=True):
                self._put(built.root / name, xxh3)
        self._put(built.root / LEDGER_NAME, built.ledger_xxh3)

    def mend(self, report: VerifyReport, encoder: RowEncoder, on_progress: OnProgress | None) -> None:
        """Make the damaged shards again, one after another."""
        damaged = {damage.shard for damage in report.damage if damage.kind != "unlisted"}
        numbers = [number for number, entry in enumerate(self._manifest.shards) if entry.name in damaged]
        ledger = read_ledger(self._manifest.ledger_path, ["row", "id", "status", "shard", "content_xxh3"])
        for done, number in enumerate(numbers, start=1):
            entry = self._manifest.shards[number]
            kept = ledger.filter(pc.equal(ledger["shard"], entry.name)).to_pylist()
            self._mend_shard(number, kept, encoder)
            if on_progress is not None:
                on_progress(done, len(numbers))

    def _mend_shard(self, number: int, kept: list[dict[str, Any]], encoder: RowEncoder) -> None:
        entry = self._manifest.shards[number]
        copied = 0
        with ShardWriter(self._work, entry.name) as writer:
            for row, found in zip(kept, self._whole_samples(number, len(kept)), strict=True):
                sample = found
                if sample is None:
                    encoded = encoder.encode(row["row"], self._rows[row["row"]])
                    sample = encoded.sample
                    if sample is None or encoded.ledger.content_xxh3 != row["content_xxh3"]:
                        self.refused[entry.name] = f"row {row['id']!r} gives other bytes now: {_CHANGED}"
                        return
                else:
                    copied += 1
                writer.append(sample)
            made = writer.seal()
        if made != entry:
            self.refused[entry.name] = _NOT_THE_SAME
            return
        for name, xxh3 in zip(shard_files(entry), (entry.tar_xxh3, entry.idx_xxh3, entry.index_xxh3), strict=True):
            self._put(self._work / name, xxh3)
        self.samples_copied += copied
        self.samples_encoded += len(kept) - copied

    def _whole_samples(self, number: int, samples: int) -> Iterator[EncodedSample | None]:
        """Yield each sample of a shard that is whole in the old tar, by its index or by the tar's own hash.

        None for the others.
        """
        entry = self._manifest.shards[number]
        path, tar = self._manifest.index_path(number), self._manifest.tar_path(number)
        if not tar.is_file():
            yield from [None] * samples
            return
        if not (path.is_file() and file_xxh3(path) == entry.index_xxh3):
            yield from stored_samples(tar) if file_xxh3(tar) == entry.tar_xxh3 else [None] * samples
            return
        with open(tar, "rb") as file:
            for content in read_index(self._manifest, number).to_pylist():
                row = IndexRow(**content)
                file.seek(row.offset)
                data = file.read(row.size)
                whole = xxhash.xxh3_64_intdigest(data) == row.xxh3
                yield EncodedSample(data=data, row=row.moved_to(0)) if whole else None

    def _put(self, made: Path, xxh3: str) -> None:
        """Put a file in its place, at once and durably, unless the one there is whole."""
        place = self._manifest.root / made.name
        if place.is_file() and file_xxh3(place) == xxh3:
            return
        made.replace(place)
        sync_folder(place.parent)
        self.repaired.append(place.name)


def _manifest_of(folder: Path) -> Manifest:
    try:
        return Manifest.load(folder)
    except DataError as error:
        raise RepairError(f"{error}; without its manifest nothing tells what the shards were") from None


def _refuse_other_build(manifest: Manifest, now: dict[str, Any]) -> None:
    """Raise RepairError where source or options are not those of the build."""
    there = manifest.build
    of_input = ("input_rows", "input_xxh3")
    names = [name for name in dict.fromkeys([*there, *now]) if name not in of_input]
    different = [f"{name} {there.get(name)!r} then, {now.get(name)!r} now" for name in names
                 if there.get(name) != now.get(name)]  # fmt: skip
    if different:
        raise RepairError(
            f"{manifest.root}: was built otherwise ({'; '.join(different)}): give --repair the options of its build"
        )
    if any(there.get(name) != now.get(name) for name in of_input):
        raise RepairError(
            f"{manifest.root}: the source has changed since the build ({there.get('input_rows')} rows then, "
            f"{now['input_rows']} now, or other names and sizes): give the source as it was, or build again"
        )


@contextmanager
def _work_folder(folder: Path) -> Iterator[Path]:
    """Make `FOLDER/.repair` anew, one process at a time; the lock falls with the process."""
    work = folder / REPAIR_FOLDER
    with open(folder / MANIFEST_NAME, "rb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RepairError(f"{folder}: another process repairs it; wait for it") from None
        try:
            shutil.rmtree(work, ignore_errors=True)  # of a repair that was killed
            (work / "media").mkdir(parents=True)
            yield work
        except OSError as error:
            raise RepairError(f"{folder}: cannot go on ({error}): make room, then run it again") from None
        finally:
            shutil.rmtree(work, ignore_errors=True)
