"""Build shards from a source: parallel, resumable after a kill, and the same bytes whatever the number of workers.

    rows (listed by the source, cheap)  ->  build order (keyed permutation)  ->  chunks of 64 rows
    chunk -> spool, by an engine's processes, any order   |   spools -> shards, in this process, in build order

Everything unfinished lives in `OUT/.build`: the fingerprint of input and options, spools, markers of sealed shards.
A run with the same fingerprint continues there; of how it came about the finished folder holds no trace but
`throughput.json`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from triweave.data_pipeline.errors import BuildError, SourceError
from triweave.data_pipeline.filters.options import FilterOptions
from triweave.data_pipeline.media.audio import MAX_AUDIO_RATE_HZ, MIN_AUDIO_RATE_HZ
from triweave.data_pipeline.media.images import MAX_IMAGE_SIDE_PX
from triweave.data_pipeline.shards.assemble import Assembler, require_size
from triweave.data_pipeline.shards.chunks import Chunk, ChunkJob, chunk_seconds, cut_chunks, read_chunk, remove_chunk
from triweave.data_pipeline.shards.earlier_build import EarlierBuild
from triweave.data_pipeline.shards.engines.registry import ENGINES, EngineName
from triweave.data_pipeline.shards.ledger import join_ledgers, read_ledger, reason_counts
from triweave.data_pipeline.shards.manifest import (
    LEDGER_NAME,
    MANIFEST_NAME,
    Manifest,
    file_xxh3,
    write_manifest,
)
from triweave.data_pipeline.shards.media_encoder import MediaOptions
from triweave.data_pipeline.shards.row_encoder import EncodedRow, RowPipeline
from triweave.data_pipeline.shards.schema import document_key
from triweave.data_pipeline.shards.steps import DocumentStep, NearDuplicates
from triweave.data_pipeline.shards.throughput import Throughput, ThroughputMeter, write_throughput
from triweave.data_pipeline.shards.work_folder import (
    RETRIED_FOLDER,
    check_fingerprint,
    locked_finished_folder,
    locked_work_folder,
    prepare_retry,
    put_in_place,
    refuse_other,
    remove_work_folder,
)
from triweave.data_pipeline.sources.base import Row, Source, listing_hash
from triweave.data_pipeline.storage.location import require_local


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """How shards are built. `workers`, `engine`, `ray_address`, `overwrite` and `retry_failed` leave the bytes
    alone."""

    media: MediaOptions = field(default_factory=MediaOptions)
    """Re-encoding of pictures and clips."""
    filters: FilterOptions = field(default_factory=FilterOptions)
    """Which documents and media are good enough."""
    shard_size_bytes: int = 256 << 20
    """A shard is closed before it would pass this many tar bytes; a larger sample gets a shard of its own."""
    shuffle_seed: int | None = 0
    """Seed of the row order, which mixes shards; None keeps the listing's order."""
    steps: tuple[DocumentStep, ...] = ()
    """What is done to a document between the filters and the shard, in this order: scrub, then annotate."""
    deduplicate: bool = True
    """Leave out documents whose parts all equal those of an earlier one."""
    near_duplicates: NearDuplicates | None = None
    """Leave out documents that are nearly an earlier one; None keeps them."""
    workers: int = 1
    """Encoding processes; with 1 and the local engine this process does it."""
    engine: EngineName = "local"
    """Where rows are encoded: processes of this machine, or Ray."""
    ray_address: str | None = None
    """The Ray cluster; None starts Ray on this machine alone."""
    overwrite: bool = False
    """Remove the shards, finished or not, that are in the way."""
    retry_failed: bool = False
    """Build again what is finished there, encoding only the rows that failed; they alone may have changed."""


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

    Raises BuildError when `out` is a URL, holds something else or another process builds there, SourceError for a bad
    input. After an interrupt or a kill the same call continues.
    """
    _check_options(options)
    require_local("--out", out, BuildError, "build into a folder, then `triweave push FOLDER URL`")
    rows = list_rows(source)
    fingerprint = build_fingerprint(source, options, rows)
    if options.retry_failed:
        return _retry(source, rows, out, options, fingerprint, on_progress)
    finished = _finished(out, fingerprint, options.overwrite)
    if finished is not None:
        return finished
    with locked_work_folder(out, options.overwrite) as work:
        check_fingerprint(work, fingerprint)
        manifest = _build_in(out, work, row_pipeline(source, options), rows, options, fingerprint, on_progress)
        remove_work_folder(out)
    return manifest


def _retry(
    source: Source,
    rows: list[Row],
    out: Path,
    options: BuildOptions,
    fingerprint: dict[str, Any],
    on_progress: Callable[[BuildProgress], None] | None,
) -> Manifest:
    """Build beside the finished build, out of its results where it has them; then put the new one in its place."""
    with locked_finished_folder(out) as work:
        retried = work / RETRIED_FOLDER
        if not (retried / MANIFEST_NAME).exists():
            earlier = EarlierBuild.load(Manifest.load(out), row_pipeline(source, options))
            refuse_other(
                out, "finished", earlier.manifest.build | {"input_xxh3": fingerprint["input_xxh3"]}, fingerprint
            )
            earlier.require_same_listing(rows, build_order(rows, options.shuffle_seed))
            inner = prepare_retry(retried, fingerprint)
            _build_in(retried, inner, earlier.pipeline, rows, options, fingerprint, on_progress, earlier)
        put_in_place(out, retried)
        remove_work_folder(out)
    return Manifest.load(out)


def _build_in(
    out: Path,
    work: Path,
    pipeline: RowPipeline,
    rows: list[Row],
    options: BuildOptions,
    fingerprint: dict[str, Any],
    on_progress: Callable[[BuildProgress], None] | None,
    earlier: EarlierBuild | None = None,
) -> Manifest:
    """Build or continue in the folder `out`, whose work folder is ours."""
    assembler = Assembler(
        out,
        work,
        shard_size_bytes=options.shard_size_bytes,
        deduplicate=options.deduplicate,
        near=options.near_duplicates,
    )
    try:
        job = ChunkJob(pipeline=pipeline, folder=work)
        totals = _assemble_all(job, rows, options, assembler, on_progress, earlier)
        write_throughput(out, totals)
        return _write_manifest(out, assembler, fingerprint)
    except OSError as error:  # bad input is a row of the ledger by now; this is the disk of the output
        raise BuildError(
            f"--out {out}: cannot go on ({error}): what is encoded is kept; make room, then run it again"
        ) from None
    finally:
        assembler.close()


def list_rows(source: Source) -> list[Row]:
    """Return the listing of a source as a build sees it. Raises SourceError and BuildError where there is none."""
    try:
        rows = _reject_bad_ids(list(source.rows()))
    except OSError as error:
        raise SourceError(f"--input {source.root}: cannot be listed ({error}): make it readable") from None
    if not rows:
        raise BuildError(f"{source.root}: nothing to build from, the {source.name} source found no rows")
    return rows


def row_pipeline(source: Source, options: BuildOptions) -> RowPipeline:
    """Return what makes a sample of a row of `source`."""
    return RowPipeline(
        source=source,
        media=options.media,
        filters=options.filters,
        steps=options.steps,
        near_duplicates=options.near_duplicates,
    )


def build_order(rows: list[Row], seed: int | None) -> list[int]:
    """Return the order in which rows are built: sorted by xxh3_64(group or id, seed), a keyed permutation.

    Rows of one group stay neighbours in listing order. None keeps the listing's order.
    """
    if seed is None:
        return list(range(len(rows)))
    rank = [xxhash.xxh3_64_intdigest((row.group or row.id).encode(), seed) for row in rows]
    return sorted(range(len(rows)), key=lambda number: (rank[number], number))


def _check_options(options: BuildOptions) -> None:
    if options.retry_failed and options.overwrite:
        raise BuildError("--retry-failed keeps what is there, --overwrite removes it: give one of them")
    for name, value, least, most in (
        ("--workers", options.workers, 1, None),
        ("--shard-size-mb, in bytes", options.shard_size_bytes, 1, None),
        ("--image-max-side", options.media.image_max_side_px, 1, MAX_IMAGE_SIDE_PX),
        ("--audio-rate", options.media.audio_rate_hz, MIN_AUDIO_RATE_HZ, MAX_AUDIO_RATE_HZ),
        ("--shuffle-seed", options.shuffle_seed, 0, 2**64 - 1),
    ):
        if value is not None and value < least:
            raise BuildError(f"{name} {value}: must be at least {least}")
        if value is not None and most is not None and value > most:
            raise BuildError(f"{name} {value}: must be at most {most}")
    if options.ray_address is not None and options.engine != "ray":
        raise BuildError(f"--ray-address {options.ray_address}: belongs to --engine ray, not to {options.engine}")


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


def build_fingerprint(source: Source, options: BuildOptions, rows: list[Row]) -> dict[str, Any]:
    """Return all that decides the bytes of a build, as the manifest holds it."""
    return {
        "source": source.name,
        "source_options": source.options,
        **asdict(options.media),
        **({"filters": asked} if (asked := options.filters.asked()) else {}),
        "shard_size_bytes": options.shard_size_bytes,
        "shuffle_seed": options.shuffle_seed,
        "deduplicate": options.deduplicate,
        **({"steps": {step.name: step.options for step in options.steps}} if options.steps else {}),
        **({"near_duplicates": near.options} if (near := options.near_duplicates) is not None else {}),
        "input_rows": len(rows),
        "input_xxh3": listing_hash(rows),
    }


def _finished(out: Path, fingerprint: dict[str, Any], overwrite: bool) -> Manifest | None:
    """Return the manifest of the same build if it is already done."""
    if overwrite or not (out / MANIFEST_NAME).exists():
        return None
    manifest = Manifest.load(out)
    refuse_other(out, "finished", manifest.build, fingerprint)
    for shard in manifest.shards:
        require_size(out, shard)
    remove_work_folder(out)  # a kill between the manifest and the clean-up leaves it
    return manifest


def _assemble_all(
    job: ChunkJob,
    rows: list[Row],
    options: BuildOptions,
    assembler: Assembler,
    on_progress: Callable[[BuildProgress], None] | None,
    earlier: EarlierBuild | None,
) -> Throughput:
    order = build_order(rows, options.shuffle_seed)
    resume_row = assembler.sealed_rows
    settled = earlier.settled() if earlier is not None else frozenset()
    chunks = (chunk for chunk in cut_chunks(rows, order, settled) if chunk.end_row > resume_row)
    results: Iterator[EncodedRow] | None = None
    spooled: deque[Chunk] = deque()

    def report() -> None:
        if on_progress is not None:
            shards = len(assembler.entries)
            on_progress(BuildProgress(rows_done=assembler.rows_done, rows_total=len(rows), shards=shards))

    report()
    meter = ThroughputMeter(job.folder, options.engine, options.workers)
    engine = ENGINES[options.engine](workers=options.workers, address=options.ray_address)
    with closing(engine.encoded(job, chunks)) as encoded:
        for chunk in encoded:
            start = time.perf_counter()
            if earlier is not None and results is None:
                results = earlier.results(chunk.start_row)
            for position, row in enumerate(read_chunk(job, chunk, results), start=chunk.start_row):
                if position >= resume_row:
                    assembler.add(row)
            write_s = time.perf_counter() - start
            meter.chunk_done(chunk.number, len(chunk.undecided.rows), chunk_seconds(job, chunk.number), write_s)
            spooled.append(chunk)
            while spooled and spooled[0].end_row <= assembler.sealed_rows:
                remove_chunk(job, spooled.popleft().number)
            report()
    assembler.seal()
    meter.totals.tar_bytes = sum(entry.tar_bytes for entry in assembler.entries)
    return meter.totals


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
