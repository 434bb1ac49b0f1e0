"""One rank's fragments copied to host memory, laid out there as the safetensors files they are written to.

    buffer   | file 0                                         | file 1 ...
             | header, padded | weights | exp_avg | exp_avg_sq | (RNG states) | to the next page

The layout depends on names and shapes only, so headers are written once and a later snapshot is one pass of copying
into the same memory. Files are at most FILE_BYTES, so that an upload which fails is repeated in small parts; kinds lie
together, so that who wants the weights alone reads one range of each file.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from triweave.pretrain.checkpoints.fragments import KINDS, Fragment

FILE_BYTES = 256 << 20
PAGE_BYTES = 4096
"""Files begin at multiples of it in memory, and tensors in a file: what unbuffered writing asks for."""
RNG_PREFIX = "rng:"
"""Prefix of the random-number states (uint8) in a rank's first file; they are no fragments."""


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """Elements [start, end) of fragment number `fragment`; offset: of the first one in the whole parameter."""

    fragment: int
    name: str
    start: int
    end: int
    offset: int
    kinds: tuple[str, ...]

    @property
    def numel(self) -> int:
        return self.end - self.start


@dataclass(kw_only=True)
class SnapshotFile:
    """A file's place in the buffer. note: its fragments and RNG states with their byte positions, for the manifest."""

    number: int
    pieces: list[_Piece]
    header: bytes
    begin: int = 0
    size: int = 0
    positions: dict[str, int] = field(default_factory=dict)
    note: dict[str, Any] = field(default_factory=dict)


class Snapshot:
    """Memory for a copy of a rank's fragments, 12 bytes an owned element, used again by every save."""

    def __init__(self, fragments: Sequence[Fragment], rng: Mapping[str, torch.Tensor]) -> None:
        """Lay out the files of these fragments and of random-number states of this form; nothing is copied yet."""
        self._form = _form(fragments, rng)
        self._files = [_lay_out(number, pieces, rng if number == 0 else {})
                       for number, pieces in enumerate(_divide(fragments))]  # fmt: skip
        total = 0
        for file in self._files:
            file.begin = total
            total += -(-file.size // PAGE_BYTES) * PAGE_BYTES
        self._memory = mmap.mmap(-1, total, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._memory.madvise(mmap.MADV_DONTFORK)  # or a worker's birth makes the next save copy every page first
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        self.buffer: npt.NDArray[np.uint8] = np.frombuffer(self._memory, dtype=np.uint8)
        self._pin(fragments)
        for file in self._files:
            self.buffer[file.begin : file.begin + len(file.header)] = np.frombuffer(file.header, dtype=np.uint8)

    @property
    def files(self) -> list[tuple[memoryview, dict[str, Any]]]:
        """The bytes of each file, padded to whole pages behind its `bytes`, and its note for the manifest."""
        view = memoryview(self._memory)
        return [
            (view[file.begin : file.begin + -(-file.size // PAGE_BYTES) * PAGE_BYTES], file.note | {"bytes": file.size})
            for file in self._files
        ]

    def fits(self, fragments: Sequence[Fragment], rng: Mapping[str, torch.Tensor]) -> bool:
        """Return whether these have the layout this snapshot was made for."""
        return self._form == _form(fragments, rng)

    def copy(self, fragments: Sequence[Fragment], rng: Mapping[str, torch.Tensor]) -> None:
        """Copy the fragments' present values; on a device after all work that it has been given so far.

        May run in a thread of its own: other threads run meanwhile, and the copy takes no other core.
        """
        for file in self._files:
            for name, state in rng.items() if file.number == 0 else ():
                self._place(file, RNG_PREFIX + name, state.numel(), np.uint8)[:] = state.numpy()
            for piece in file.pieces:
                tensors = fragments[piece.fragment].tensors
                for kind in piece.kinds:
                    place = self._place(file, _key(kind, piece), piece.numel, np.float32)
                    source = tensors[kind][piece.start : piece.end]
                    if source.device.type == "cpu" and source.dtype == torch.float32:
                        np.copyto(place, source.numpy())
                    else:
                        torch.from_numpy(place).copy_(source, non_blocking=source.device.type == "cuda")
        if any(values.is_cuda for fragment in fragments for values in fragment.tensors.values()):
            torch.cuda.current_stream().synchronize()

    def _place(self, file: SnapshotFile, key: str, numel: int, dtype: Any) -> npt.NDArray[Any]:
        begin = file.begin + file.positions[key]
        return self.buffer[begin : begin + numel * np.dtype(dtype).itemsize].view(dtype)

    def _pin(self, fragments: Sequence[Fragment]) -> None:
        """Tell CUDA to keep the memory in place, so that copies from the device run beside its work."""
        if any(values.is_cuda for fragment in fragments for values in fragment.tensors.values()):
            torch.cuda.cudart().cudaHostRegister(self.buffer.ctypes.data, self.buffer.nbytes, 0)


def _form(fragments: Sequence[Fragment], rng: Mapping[str, torch.Tensor]) -> list[Any]:
    states = [(name, state.numel()) for name, state in rng.items()]
    return [states, [(part.name, part.offset, part.owned, tuple(part.tensors)) for part in fragments]]


def _divide(fragments: Sequence[Fragment]) -> list[list[_Piece]]:
    """Return the pieces of each file; there is one file at least, for the random-number states."""
    files: list[list[_Piece]] = [[]]
    room = FILE_BYTES
    for number, fragment in enumerate(fragments):
        kinds = tuple(kind for kind in KINDS if kind in fragment.tensors)
        start, end = fragment.owned
        while start < end:
            if room < 4 * len(kinds):
                files.append([])
                room = FILE_BYTES
            stop = min(end, start + room // (4 * len(kinds)))
            piece = _Piece(fragment=number, name=fragment.name, start=start, end=stop,
                           offset=fragment.offset + start, kinds=kinds)  # fmt: skip
            files[-1].append(piece)
            room -= 4 * len(kinds) * piece.numel
            start = stop
    return files


def _lay_out(number: int, pieces: list[_Piece], rng: Mapping[str, torch.Tensor]) -> SnapshotFile:
    entries: dict[str, Any] = {}
    place = 0

    def put(key: str, dtype: str, numel: int, item_bytes: int) -> None:
        nonlocal place
        entries[key] = {"dtype": dtype, "shape": [numel], "data_offsets": [place, place + numel * item_bytes]}
        place += numel * item_bytes

    for kind in KINDS:
        for piece in pieces:
            if kind in piece.kinds:
                put(_key(kind, piece), "F32", piece.numel, 4)
    for name, state in rng.items():
        put(RNG_PREFIX + name, "U8", state.numel(), 1)
    header = json.dumps(entries, separators=(",", ":")).encode()
    padded = header + b" " * (-(8 + len(header)) % PAGE_BYTES)
    file = SnapshotFile(number=number, pieces=pieces, header=len(padded).to_bytes(8, "little") + padded)
    file.size = len(file.header) + place
    file.positions = {key: len(file.header) + entry["data_offsets"][0] for key, entry in entries.items()}
    file.note["fragments"] = [
        [piece.name, piece.offset, piece.numel, {kind: file.positions[_key(kind, piece)] for kind in piece.kinds}]
        for piece in pieces
    ]
    if rng:
        file.note["rng"] = {name: [file.positions[RNG_PREFIX + name], state.numel()] for name, state in rng.items()}
    return file


def _key(kind: str, piece: _Piece) -> str:
    return f"{kind}:{piece.name}:{piece.offset}"


def rng_states() -> dict[str, torch.Tensor]:
    """Return copies of torch's random-number states, of the device too where it is used."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():  # not by a run on CPU, even where there is a device
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_rng_states(states: Mapping[str, torch.Tensor]) -> None:
    """Go on drawing where `rng_states` was taken."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(states["cuda"])
