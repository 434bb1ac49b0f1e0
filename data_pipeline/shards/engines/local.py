"""Processes of this machine; a single worker is this process itself."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.synchronize import Event

from triweave.data_pipeline.errors import BuildError
from triweave.data_pipeline.shards.chunks import Chunk, ChunkEncoder, ChunkJob, is_complete
from triweave.data_pipeline.worker_process import prepare_worker


@dataclass(frozen=True, kw_only=True)
class LocalEngine:
    """`workers` processes; an `address` has no meaning here."""

    workers: int
    address: str | None = None

    def encoded(self, job: ChunkJob, chunks: Iterator[Chunk]) -> Generator[Chunk, None, None]:
        """Yield the chunks in order, each once its files are there."""
        if self.workers == 1:
            encoder = ChunkEncoder(job)
            for chunk in chunks:
                if not is_complete(job, chunk.number):
                    encoder.encode(chunk)
                yield chunk
            return
        # fork would copy the threads of pyarrow and of the progress display
        context = multiprocessing.get_context("spawn")
        stop = context.Event()
        job.folder.mkdir(parents=True, exist_ok=True)
        pool = ProcessPoolExecutor(self.workers, mp_context=context, initializer=_start_worker, initargs=(job, stop))
        try:
            yield from _encoded_by_pool(pool, job, chunks, ahead=2 * self.workers)
        except BrokenProcessPool:
            raise BuildError(
                "a build worker was killed (out of memory?): nothing finished is lost; run the same command again, "
                "with fewer --workers"
            ) from None
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)


def _encoded_by_pool(pool: ProcessPoolExecutor, job: ChunkJob, chunks: Iterator[Chunk], ahead: int) -> Iterator[Chunk]:
    """Keep `ahead` chunks in work: bounds the spools that wait for an earlier one."""
    pending: deque[tuple[Chunk, Future[None] | None]] = deque()
    for chunk in chunks:
        future = None if is_complete(job, chunk.number) else pool.submit(_encode_in_worker, chunk.undecided)
        pending.append((chunk, future))
        if len(pending) > ahead:
            yield _wait_for(*pending.popleft())
    while pending:
        yield _wait_for(*pending.popleft())


def _wait_for(chunk: Chunk, future: Future[None] | None) -> Chunk:
    if future is not None:
        future.result()
    return chunk


_encoder: ChunkEncoder | None = None


def _start_worker(job: ChunkJob, stop: Event) -> None:
    """Prepare a worker process."""
    global _encoder
    prepare_worker()
    _encoder = ChunkEncoder(job, stop)


def _encode_in_worker(chunk: Chunk) -> None:
    """Encode a chunk in a prepared worker process."""
    assert _encoder is not None, "_start_worker was not called"
    _encoder.encode(chunk)
