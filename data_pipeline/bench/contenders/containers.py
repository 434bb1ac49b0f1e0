"""A sample as one string of bytes, for loaders whose format wants the same fields in every sample.

uint32 members, then of each: uint32 length of its name, name, uint32 length, bytes        little-endian
"""

from __future__ import annotations

import struct

from triweave.data_pipeline.bench.work import Members

_LENGTH = struct.Struct("<I")


def to_bytes(members: Members) -> bytes:
    """Return the members as one string."""
    fields = [_LENGTH.pack(len(members))]
    for name, content in members.items():
        encoded = name.encode()
        fields += [_LENGTH.pack(len(encoded)), encoded, _LENGTH.pack(len(content)), content]
    return b"".join(fields)


def from_bytes(data: bytes) -> Members:
    """Return the members of `to_bytes`."""
    view, at = memoryview(data), 0
    members: Members = {}

    def taken(count: int) -> memoryview:
        nonlocal at
        at += count
        return view[at - count : at]

    for _ in range(_LENGTH.unpack(taken(4))[0]):
        name = str(taken(_LENGTH.unpack(taken(4))[0]), "utf-8")
        members[name] = bytes(taken(_LENGTH.unpack(taken(4))[0]))
    return members
