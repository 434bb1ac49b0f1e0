"""Ray: the tasks of a cluster, or of this machine where no address is given.

A task gets the pipeline and a chunk and returns its two files through the object store, so the machines need the
input under the same path, and this package, but not the output folder. What a lost machine had in work is done again
elsewhere, which changes nothing, because encoding is a function of the row.
"""

from __future__ import annotations

import io
import logging
import os
import socket
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from triweave.data_pipeline.errors import BuildError
from triweave.data_pipeline.shards.chunks import Chunk, ChunkJob, encode_rows, is_complete, store_chunk
from triweave.data_pipeline.shards.row_encoder import RowEncoder, RowPipeline

TASK_RETRIES = 3
"""How often a chunk whose process or machine died is begun again before the build stops."""

CONNECT_S = 10
"""Seconds until a cluster that does not answer is given up."""

_encoders: dict[str, RowEncoder] = {}
"""Job of Ray -> the encoder of this worker process, for its memory of shared media."""


@dataclass(frozen=True, kw_only=True)
class RayEngine:
    """At most `workers` tasks of one CPU each; address: `host:port`, or `auto` on a machine of the cluster."""

    workers: int
    address: str | None = None

    def encoded(self, job: ChunkJob, chunks: Iterator[Chunk]) -> Generator[Chunk, None, None]:
        """Yield the chunks in order, each once its files are there; leaving it cancels what is in work."""
        ray = _import_ray()
        with _connected(ray, self.address, self.workers):
            encode = ray.remote(num_cpus=1, max_retries=TASK_RETRIES)(_encode_in_task)
            pipeline = ray.put(job.pipeline)
            try:
                yield from self._encoded_by_tasks(ray, encode, pipeline, job, chunks)
            except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError, ray.exceptions.NodeDiedError):
                raise BuildError(
                    f"a chunk of rows died {TASK_RETRIES + 1} times on Ray (out of memory?): nothing finished is "
                    "lost; run the same command again, with fewer --workers"
                ) from None
            except ray.exceptions.RayTaskError as error:
                raise error.cause from error

    def _encoded_by_tasks(
        self, ray: Any, encode: Any, pipeline: Any, job: ChunkJob, chunks: Iterator[Chunk]
    ) -> Iterator[Chunk]:
        """Keep `workers` tasks going, and no more results waiting for an earlier one than twice that."""
        pending: deque[tuple[Chunk, Any]] = deque()
        running: list[Any] = []
        try:
            for chunk in chunks:
                if is_complete(job, chunk.number):
                    pending.append((chunk, None))
                else:
                    if len(running) >= self.workers:
                        running = ray.wait(running, num_returns=1)[1]
                    running.append(encode.remote(pipeline, chunk.undecided))
                    pending.append((chunk, running[-1]))
                if len(pending) > 2 * self.workers:
                    yield _stored(ray, job, *pending.popleft())
            while pending:
                yield _stored(ray, job, *pending.popleft())
        finally:
            for _, task in pending:
                if task is not None:
                    ray.cancel(task, force=True)


def _stored(ray: Any, job: ChunkJob, chunk: Chunk, task: Any) -> Chunk:
    if task is not None:
        store_chunk(job, chunk.number, *ray.get(task))
    return chunk


def _encode_in_task(pipeline: RowPipeline, chunk: Chunk) -> tuple[bytes, bytes]:
    """Return the two files of a chunk; runs in a worker process of Ray."""
    import ray

    build_job = ray.get_runtime_context().get_job_id()
    if build_job not in _encoders:
        _encoders[build_job] = RowEncoder(pipeline)
    spool = io.BytesIO()
    entries = encode_rows(_encoders[build_job], chunk, spool)
    return spool.getvalue(), entries


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing about a build is sent anywhere
    try:
        import ray
    except ImportError:
        raise BuildError(
            "--engine ray: Ray is not installed; `pip install triweave[ray]`, or leave --engine out"
        ) from None
    return ray


@contextmanager
def _connected(ray: Any, address: str | None, workers: int) -> Iterator[None]:
    """Join a cluster, or start Ray on this machine for the time of the block; its processes end with this one."""
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address is None:
            ray.init(address="local", num_cpus=workers, include_dashboard=False, **quiet)
        else:
            _require_listener(address)
            ray.init(address=address, **quiet)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        where = f"--ray-address {address}" if address else "--engine ray"
        reason = " ".join(str(error).split())[:200]
        token = ", and a cluster with a token wants RAY_AUTH_TOKEN here" if address else ""
        raise BuildError(f"{where}: cannot be used ({reason}); `ray status` shows what runs{token}") from None
    try:
        yield
    finally:
        ray.shutdown()


def _require_listener(address: str) -> None:
    """Raise OSError where nothing listens at `host:port`: Ray itself would ask for many minutes."""
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if separator:
        socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
