"""Build shards from a source: parallel, resumable after a kill, and the same bytes whatever the number of workers.

    rows (listed by the source, cheap)  ->  build order (keyed permutation)  ->  chunks of 256 rows
    chunk -> spool, in worker processes, any order   |   spools -> shards, in this process, in build order

Everything unfinished lives in `OUT/.build`: the fingerprint of input and options, spools, markers of sealed shards.
A run with the same fingerprint continues there; the finished folder holds no trace of how it came about.
"""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import shutil
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import xxhash

from triweave.data_pipeline.errors import BuildError, SourceError
from triweave.data_pipeline.filters.options import FilterOptions
from triweave.data_pipeline.media.audio import MAX_AUDIO_RATE_HZ, MIN_AUDIO_RATE_HZ
from triweave.data_pipeline.media.images import MAX_IMAGE_SIDE_PX
from triweave.data_pipeline.shards.assemble import Assembler, require_size
from triweave.data_pipeline.shards.chunks import (
    Chunk,
    ChunkEncoder,
    ChunkJob,
    cut_chunks,
    encode_in_worker,
    is_complete,
    read_chunk,
    remove_chunk,
    start_worker,
)
from triweave.data_pipeline.shards.ledger import join_ledgers, read_ledger, reason_counts
from triweave.data_pipeline.shards.manifest import (
    LEDGER_NAME,
    MANIFEST_NAME,
    Manifest,
    file_xxh3,
    write_atomically,
    write_manifest,
)
from triweave.data_pipeline.shards.media_encoder import MediaOptions
from triweave.data_pipeline.shards.schema import document_key
from triweave.data_pipeline.sources.base import Row, Source, listing_hash

BUILD_FOLDER = ".build"
_FINGERPRINT_NAME = "build.json"
_LOCK_NAME = "lock"
_CODECS = ("simplejpeg", "pillow", "soundfile", "soxr", "pyarrow")


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """How shards are built. Only `workers` and `overwrite` leave the bytes alone."""

    media: MediaOptions = field(default_factory=MediaOptions)
    """Re-encoding of pictures and clips."""
    filters: FilterOptions = field(default_factory=FilterOptions)
    """Which documents and media are good enough."""
    shard_size_bytes: int = 256 << 20
    """A shard is closed before it would pass this many tar bytes; a larger sample gets a shard of its own."""
    shuffle_seed: int | None = 0
    """Seed of the row order, which mixes shards; None keeps the listing's order."""
    deduplicate: bool = True
    """Leave out documents whose parts all equal those of an earlier one."""
    workers: int = 1
    """Encoding processes; with 1 this process does it."""
    overwrite: bool = False
    """Remove the shards, finished or not, that are in the way."""


@dataclass(frozen=True, kw_only=True)
class BuildProgress:
    """Where a build stands: rows encoded (not yet in a shard, some of them), rows in all, shards sealed."""

    rows_done: int
    rows_total: int
    shards: int


def build(
    source: Source,
    out: Path,
    options: BuildOptions,
    on_progress: Callable[[BuildProgress], None] | None = None,
) -> Manifest:
    """Build `source` into the shard folder `out`, or continue, or return what is already there.

    Raises BuildError when `out` holds something else or another process builds there, SourceError for a bad input.
    After an interrupt or a kill the same call continues.
    """
    _check_options(options)
    try:
        rows = _reject_bad_ids(list(source.rows()))
    except OSError as error:
        raise SourceError(f"--input {source.root}: cannot be listed ({error}): make it readable") from None
    if not rows:
        raise BuildError(f"{source.root}: nothing to build from, the {source.name} source found no rows")
    fingerprint = _fingerprint(source, options, rows)
    finished = _finished(out, fingerprint, options.overwrite)
    if finished is not None:
        return finished
    with _locked_work_folder(out, options.overwrite) as work:
        _check_fingerprint(work, fingerprint)
        job = ChunkJob(source=source, media=options.media, filters=options.filters, folder=work)
        assembler = Assembler(out, work, shard_size_bytes=options.shard_size_bytes, deduplicate=options.deduplicate)
        try:
            _assemble_all(job, rows, options, assembler, on_progress)
            manifest = _write_manifest(out, assembler, fingerprint)
        except OSError as error:  # bad input is a row of the ledger by now; this is the disk of the output
            raise BuildError(
                f"--out {out}: cannot go on ({error}): what is encoded is kept; make room, then run it again"
            ) from None
        finally:
            assembler.close()
        _remove_work_folder(out)
    return manifest


def build_order(rows: list[Row], seed: int | None) -> list[int]:
    """Return the order in which rows are built: sorted by xxh3_64(group or id, seed), a keyed permutation.

    Rows of one group stay neighbours in listing order. None keeps the listing's order.
    """
    if seed is None:
        return list(range(len(rows)))
    rank = [xxhash.xxh3_64_intdigest((row.group or row.id).encode(), seed) for row in rows]
    return sorted(range(len(rows)), key=lambda number: (rank[number], number))


def _check_options(options: BuildOptions) -> None:
    for name, value, least, most in (
        ("--workers", options.workers, 1, None),
        ("--shard-size-mb in bytes", options.shard_size_bytes, 1, None),
        ("--image-max-side", options.media.image_max_side_px, 1, MAX_IMAGE_SIDE_PX),
        ("--audio-rate", options.media.audio_rate_hz, MIN_AUDIO_RATE_HZ, MAX_AUDIO_RATE_HZ),
        ("--shuffle-seed", options.shuffle_seed, 0, 2**64 - 1),
    ):
        if value is not None and value < least:
            raise BuildError(f"{name} {value}: must be at least {least}")
        if value is not None and most is not None and value > most:
            raise BuildError(f"{name} {value}: must be at most {most}")


def _reject_bad_ids(rows: list[Row]) -> list[Row]:
    """Turn rows whose id is not Unicode (a file name in another encoding), or whose KEY is taken, into failed rows."""
    first: dict[str, int] = {}
    for number, row in enumerate(rows):
        try:
            earlier = first.setdefault(document_key(row.id), number)
        except UnicodeEncodeError:
            printable = row.id.encode("utf-8", "backslashreplace").decode()
            rows[number] = Row(id=printable, failed="the name is not UTF-8: rename it", group=row.group)
            continue
        if earlier != number:
            rows[number] = Row(id=row.id, failed=f"id {row.id!r} is already that of row {earlier}", group=row.group)
    return rows


def _fingerprint(source: Source, options: BuildOptions, rows: list[Row]) -> dict[str, Any]:
    return {
        "source": source.name,
        "source_options": source.options,
        **asdict(options.media),
        **({"filters": asked} if (asked := options.filters.asked()) else {}),
        "shard_size_bytes": options.shard_size_bytes,
        "shuffle_seed": options.shuffle_seed,
        "deduplicate": options.deduplicate,
        "input_rows": len(rows),
        "input_xxh3": listing_hash(rows),
    }


def _finished(out: Path, fingerprint: dict[str, Any], overwrite: bool) -> Manifest | None:
    """Return the manifest of the same build if it is already done."""
    if overwrite or not (out / MANIFEST_NAME).exists():
        return None
    manifest = Manifest.load(out)
    _refuse_other(out, "finished", manifest.build, fingerprint)
    for shard in manifest.shards:
        require_size(out, shard)
    _remove_work_folder(out)  # a kill between the manifest and the clean-up leaves it
    return manifest


def _remove_work_folder(out: Path) -> None:
    """Take `OUT/.build` out of reach, then delete it: a worker of a killed build may live a moment longer, and write.

    What cannot be deleted is no part of the finished folder; the next run tries again.
    """
    removed = out / f"{BUILD_FOLDER}-removed"
    with suppress(OSError):
        if removed.exists():
            shutil.rmtree(removed)
        if (out / BUILD_FOLDER).exists():
            (out / BUILD_FOLDER).rename(removed)
            shutil.rmtree(removed)


def _refuse_other(out: Path, state: str, there: dict[str, Any], wanted: dict[str, Any]) -> None:
    different = [
        f"{name} {there.get(name)!r} there, {wanted.get(name)!r} now"
        for name in dict.fromkeys([*wanted, *there])
        if there.get(name) != wanted.get(name)
    ]
    if different:
        raise BuildError(
            f"{out} holds a {state} build of something else ({'; '.join(different)}): choose another --out, or "
            "--overwrite"
        )


@contextmanager
def _locked_work_folder(out: Path, overwrite: bool) -> Iterator[Path]:
    """Make or take over `OUT/.build`, one process at a time; the lock falls with the process."""
    work = out / BUILD_FOLDER
    if out.exists() and not out.is_dir():
        raise BuildError(f"--out {out}: is not a folder")
    if _holds_other_files(out, work) and not (overwrite and (out / MANIFEST_NAME).exists()):
        raise BuildError(f"--out {out}: holds other files; choose an empty or a new folder")
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BuildError(f"--out {out}: cannot be written ({error.strerror})") from None
    with open(work / _LOCK_NAME, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BuildError(
                f"--out {out}: another process builds there; wait for it or choose another folder"
            ) from None
        if overwrite:
            _remove_build(out, work)
        yield work


def _holds_other_files(out: Path, work: Path) -> bool:
    """Return whether `out` holds anything while no build began there; the `.build` of another tool is not ours."""
    if not out.is_dir() or (work / _LOCK_NAME).is_file():
        return False
    # A build killed in its first moment leaves an empty work folder.
    return any(path != work or not path.is_dir() or any(path.iterdir()) for path in out.iterdir())


def _remove_build(out: Path, work: Path) -> None:
    """Remove everything a build writes, the manifest first: without it nobody takes the rest for whole."""
    (out / MANIFEST_NAME).unlink(missing_ok=True)
    for path in (*out.glob("shard-*.tar*"), *out.glob("shard-*.parquet*"), out / LEDGER_NAME):
        path.unlink(missing_ok=True)
    for path in work.iterdir():
        if path.name != _LOCK_NAME:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _check_fingerprint(work: Path, fingerprint: dict[str, Any]) -> None:
    """Record what is built in this work folder, or refuse to mix it with something else.

    Codec versions count here, because a half-built folder must not mix their outputs; a finished one is just data.
    """
    wanted = fingerprint | {"codecs": {name: version(name) for name in _CODECS}}
    path = work / _FINGERPRINT_NAME
    if path.exists():
        _refuse_other(work.parent, "half-finished", json.loads(path.read_bytes()), wanted)
    else:
        write_atomically(path, json.dumps(wanted).encode())


def _assemble_all(
    job: ChunkJob,
    rows: list[Row],
    options: BuildOptions,
    assembler: Assembler,
    on_progress: Callable[[BuildProgress], None] | None,
) -> None:
    order = build_order(rows, options.shuffle_seed)
    resume_row = assembler.sealed_rows
    chunks = (chunk for chunk in cut_chunks(rows, order) if chunk.end_row > resume_row)
    spooled: deque[Chunk] = deque()

    def report() -> None:
        if on_progress is not None:
            shards = len(assembler.entries)
            on_progress(BuildProgress(rows_done=assembler.rows_done, rows_total=len(rows), shards=shards))

    report()
    with closing(_encoded(job, chunks, options.workers)) as encoded:
        for chunk in encoded:
            for position, (row, sample) in enumerate(read_chunk(job, chunk), start=chunk.start_row):
                if position >= resume_row:
                    assembler.add(row, sample)
            spooled.append(chunk)
            while spooled and spooled[0].end_row <= assembler.sealed_rows:
                remove_chunk(job, spooled.popleft().number)
            report()
    assembler.seal()


def _encoded(job: ChunkJob, chunks: Iterator[Chunk], workers: int) -> Generator[Chunk, None, None]:
    """Yield the chunks in order, each once its files are there."""
    if workers == 1:
        encoder = ChunkEncoder(job)
        for chunk in chunks:
            if not is_complete(job, chunk.number):
                encoder.encode(chunk)
            yield chunk
        return
    context = multiprocessing.get_context("spawn")  # fork would copy the threads of pyarrow and of the progress display
    stop = context.Event()
    job.folder.mkdir(parents=True, exist_ok=True)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker, initargs=(job, stop))
    try:
        yield from _encoded_by_pool(pool, job, chunks, ahead=2 * workers)
    except BrokenProcessPool:
        raise BuildError(
            "a build worker was killed (out of memory?): nothing finished is lost; run the same command again, with "
            "fewer --workers"
        ) from None
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


def _encoded_by_pool(pool: ProcessPoolExecutor, job: ChunkJob, chunks: Iterator[Chunk], ahead: int) -> Iterator[Chunk]:
    """Keep `ahead` chunks in work: bounds the spools that wait for an earlier one."""
    pending: deque[tuple[Chunk, Future[None] | None]] = deque()
    for chunk in chunks:
        future = None if is_complete(job, chunk.number) else pool.submit(encode_in_worker, chunk.undecided)
        pending.append((chunk, future))
        if len(pending) > ahead:
            yield _wait_for(*pending.popleft())
    while pending:
        yield _wait_for(*pending.popleft())


def _wait_for(chunk: Chunk, future: Future[None] | None) -> Chunk:
    if future is not None:
        future.result()
    return chunk


def _write_manifest(out: Path, assembler: Assembler, fingerprint: dict[str, Any]) -> Manifest:
    """Write the ledger, then the manifest, which makes the folder a finished one."""
    ledger = out / LEDGER_NAME
    temporary = ledger.with_name(f"{LEDGER_NAME}.tmp")
    counts = join_ledgers(assembler.ledger_pieces(), temporary)
    temporary.replace(ledger)
    if not counts["kept"]:
        top = reason_counts(read_ledger(ledger), limit=1)[0]
        raise BuildError(
            f"{out}: no row became a sample; {top['rows']} of {sum(counts.values())} were {top['status']}: "
            f"{top['reason']} (all reasons: {ledger})"
        )
    manifest = Manifest(
        root=out,
        shards=assembler.entries,
        rows=counts,
        ledger_xxh3=file_xxh3(ledger),
        build=fingerprint,
    )
    write_manifest(manifest)
    return manifest
