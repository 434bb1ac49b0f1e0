"""Token counts: a sidecar beside every shard, so that planning never tokenises.

`shard-000000.tokens-HASH16.parquet`, HASH16 = the first 16 digits of the tokenizer's hash; one row per sample, in the
order of the index: `key`, and `part_tokens` (list<int32>) with the text tokens of each part, 0 for media. Its schema
metadata names the full tokenizer hash and the hash of the shard's index, so a sidecar of other shards is not reused.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from triweave.data_pipeline.errors import DataError
from triweave.data_pipeline.shards.manifest import Manifest, sync_folder
from triweave.data_pipeline.storage.files import read_file
from triweave.data_pipeline.storage.location import is_remote, shown
from triweave.data_pipeline.text.shard_texts import SampleTexts, read_texts
from triweave.data_pipeline.text.tokenizer import Tokenizer
from triweave.data_pipeline.worker_process import prepare_worker

TOKEN_COUNTS_SCHEMA = pa.schema([("key", pa.string()), ("part_tokens", pa.list_(pa.int32()))])
_TOKENIZER_KEY = b"triweave.tokenizer"
_INDEX_KEY = b"triweave.index_xxh3"
_BATCH_SAMPLES = 1024


@dataclass(frozen=True, kw_only=True)
class TokenizeReport:
    """Sums over all shards: `written` and `reused` count shards, `texts` and `tokens` the text parts."""

    written: int
    reused: int
    samples: int
    texts: int
    tokens: int


def token_counts_path(manifest: Manifest, shard_number: int, tokenizer_hash: str) -> Path:
    """Return the path of a shard's sidecar for one tokenizer."""
    return manifest.root / f"{manifest.shards[shard_number].name}.tokens-{tokenizer_hash[:16]}.parquet"


def write_token_counts(
    manifest: Manifest, tokenizer_path: Path, *, workers: int = 1, progress: Callable[[int], None] | None = None
) -> TokenizeReport:
    """Count the text tokens of every shard and write the sidecars; whole ones that are already there are reused.

    Each sidecar is written atomically, so a killed run loses at most the shards it was at; what it left half-written is
    removed. `workers` processes share the shards; the result does not depend on their number. `progress` is called with
    the samples of each shard done.

    Raises DataError where the tokenizer or a shard cannot be read, or the folder is remote or cannot be written.
    """
    if is_remote(manifest.root):
        raise DataError(
            f"{manifest.location}: token counts are written beside local shards; tokenize the folder that was pushed, "
            "then `triweave push` it again, which sends what is new"
        )
    tokenizer = Tokenizer.load(tokenizer_path)
    missing = [number for number in range(len(manifest.shards)) if not _is_whole(manifest, number, tokenizer.hash)]
    reused = len(manifest.shards) - len(missing)
    for number in missing:
        for leftover in manifest.root.glob(f"{token_counts_path(manifest, number, tokenizer.hash).name}.tmp-*"):
            leftover.unlink(missing_ok=True)
    if progress is not None and reused:
        progress(manifest.samples - sum(manifest.shards[number].samples for number in missing))
    for number in _run(manifest, tokenizer, missing, workers):
        if progress is not None:
            progress(manifest.shards[number].samples)
    texts, tokens = 0, 0
    for number in range(len(manifest.shards)):
        counts = read_token_counts(manifest, number, tokenizer.hash).column("part_tokens").combine_chunks().flatten()
        values = counts.to_numpy(zero_copy_only=False)
        texts += int((values > 0).sum())
        tokens += int(values.sum())
    return TokenizeReport(written=len(missing), reused=reused, samples=manifest.samples, texts=texts, tokens=tokens)


def read_token_counts(manifest: Manifest, shard_number: int, tokenizer_hash: str) -> pa.Table:
    """Return the sidecar of a shard: `key`, `part_tokens`, aligned row by row with the index.

    Raises DataError where it is missing, damaged, or of other shards, with the command that writes it.
    """
    path = shown(token_counts_path(manifest, shard_number, tokenizer_hash))
    advice = f"run `triweave tokenize {manifest.location} --tokenizer FILE`"
    if is_remote(path):
        advice = "run `triweave tokenize SHARDS --tokenizer FILE` on the local folder, and `triweave push` it again"
    try:
        data = pa.BufferReader(read_file(path))
        table = pq.ParquetFile(data, page_checksum_verification=True).read(use_threads=False)
    except FileNotFoundError:
        raise DataError(f"no token counts for tokenizer {tokenizer_hash[:16]} at {path}: {advice}") from None
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"token counts {path} are damaged ({' '.join(str(error).split())}): {advice}") from None
    if table.schema.remove_metadata() != TOKEN_COUNTS_SCHEMA or table.schema.metadata != _metadata(
        manifest, shard_number, tokenizer_hash
    ):
        raise DataError(f"token counts {path} belong to other shards or another tokenizer: {advice}")
    if table.num_rows != manifest.shards[shard_number].samples:  # the footer has no checksum
        raise DataError(f"token counts {path} are damaged (not as many as samples): {advice}")
    return table


def _metadata(manifest: Manifest, shard_number: int, tokenizer_hash: str) -> dict[bytes, bytes]:
    return {_TOKENIZER_KEY: tokenizer_hash.encode(), _INDEX_KEY: manifest.shards[shard_number].index_xxh3.encode()}


def _is_whole(manifest: Manifest, shard_number: int, tokenizer_hash: str) -> bool:
    try:
        read_token_counts(manifest, shard_number, tokenizer_hash)
    except DataError:
        return False
    return True


def _run(manifest: Manifest, tokenizer: Tokenizer, shard_numbers: list[int], workers: int) -> Iterator[int]:
    """Write the sidecars of the given shards and yield each shard's number when it is done."""
    if workers <= 1 or len(shard_numbers) <= 1:
        for number in shard_numbers:
            yield _write_shard(manifest, tokenizer, number)
        return
    # Not fork: the progress display of the calling process runs a thread.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(shard_numbers)), mp_context=context, initializer=prepare_worker)
    try:
        waiting = [pool.submit(_write_shard, manifest, tokenizer, number) for number in shard_numbers]
        for done in as_completed(waiting):
            yield done.result()
    except BrokenProcessPool:
        raise DataError(
            f"a worker counting tokens of {manifest.root} was killed (out of memory?): whole shards are kept; run "
            f"the same command again, with fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _write_shard(manifest: Manifest, tokenizer: Tokenizer, shard_number: int) -> int:
    """Count one shard and write its sidecar atomically."""
    schema = TOKEN_COUNTS_SCHEMA.with_metadata(_metadata(manifest, shard_number, tokenizer.hash))
    path = token_counts_path(manifest, shard_number, tokenizer.hash)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with pq.ParquetWriter(temporary, schema, compression="zstd", write_page_checksum=True) as writer:
            for keys, part_tokens in _count(read_texts(manifest, shard_number), tokenizer):
                writer.write_table(pa.table([keys, pa.array(part_tokens, pa.list_(pa.int32()))], schema=schema))
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise DataError(f"token counts {path} cannot be written ({error.strerror}): make room for it") from None
    finally:
        temporary.unlink(missing_ok=True)
    return shard_number


def _count(samples: Iterator[SampleTexts], tokenizer: Tokenizer) -> Iterator[tuple[list[str], list[list[int]]]]:
    """Yield (keys, tokens of each part) in batches, which sentencepiece encodes faster than single texts."""
    while batch := list(itertools.islice(samples, _BATCH_SAMPLES)):
        encoded = iter(tokenizer.encode_many([text for sample in batch for text in sample.texts if text is not None]))
        counts = [[0 if text is None else len(next(encoded)) for text in sample.texts] for sample in batch]
        yield [sample.key for sample in batch], counts
