"""Checksums by block, so that whoever reads a range of a file can check what it reads and nothing else."""

from __future__ import annotations

import xxhash

BLOCK_BYTES = 4 << 20
"""Bytes that one checksum is of; the last block of a file may be shorter."""


def block_digests(data: memoryview) -> list[str]:
    """Return the xxh3_64, hex, of every block of a file's bytes; other threads run meanwhile."""
    return [xxhash.xxh3_64_hexdigest(data[start : start + BLOCK_BYTES]) for start in range(0, len(data), BLOCK_BYTES)]


def is_block(data: memoryview | bytes, digest: str) -> bool:
    """Return whether these are the bytes of a block."""
    return bool(xxhash.xxh3_64_hexdigest(data) == digest)
