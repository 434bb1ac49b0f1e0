"""Records of a JSON file, one at a time: an array of objects (.json) or one object a line (.jsonl).

The listing notes where each record lies, so that a worker reads that one only. Listing a .json holds its text in memory
once; a .jsonl is read line by line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from triweave.data_pipeline.errors import SourceError

JSON_ENDINGS = (".json", ".jsonl")
MAX_LINE_BYTES = 256 << 20
"""Longest line of a .jsonl that is read; media are in it as base64."""


@dataclass(frozen=True, kw_only=True)
class JsonRecord:
    """One record: bytes [start, start + size) of the file. value: None and `problem` set where it is no object."""

    number: int
    start: int
    size: int
    value: dict[str, Any] | None
    problem: str = ""


def json_records(path: Path) -> Iterator[JsonRecord]:
    """Yield the records of a file, numbered from 0. Raises SourceError where it is no such file at all."""
    if path.suffix not in JSON_ENDINGS:
        raise SourceError(f"--input {path}: must be a file that ends in {' or '.join(JSON_ENDINGS)}")
    if not path.is_file():
        raise SourceError(f"--input {path}: no such file")
    yield from _lines(path) if path.suffix == ".jsonl" else _array(path)


def read_json_record(path: Path, start: int, size: int) -> dict[str, Any]:
    """Return the record at bytes [start, start + size)."""
    with open(path, "rb") as file:
        file.seek(start)
        record: dict[str, Any] = json.loads(file.read(size))
    return record


def _lines(path: Path) -> Iterator[JsonRecord]:
    start = 0
    with open(path, "rb") as file:
        for number, (line, size) in enumerate(_bounded_lines(file)):
            if len(line) < size:
                problem = f"has {size} bytes, allowed are {MAX_LINE_BYTES}"
                yield JsonRecord(number=number, start=start, size=size, value=None, problem=problem)
            elif line.strip():
                try:
                    value = json.loads(line)
                    yield _record(number, start, size, value)
                except (ValueError, RecursionError) as error:
                    yield JsonRecord(number=number, start=start, size=size, value=None, problem=f"is not JSON: {error}")
            start += size


def _bounded_lines(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Yield (line, its size); of a line beyond MAX_LINE_BYTES only the beginning."""
    while line := file.readline(MAX_LINE_BYTES):
        size = len(line)
        while size >= MAX_LINE_BYTES and not line.endswith(b"\n") and (rest := file.readline(1 << 20)):
            size += len(rest)
            if rest.endswith(b"\n"):
                break
        yield line, size


def _array(path: Path) -> Iterator[JsonRecord]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SourceError(f"--input {path}: is not UTF-8 ({error})") from None
    decoder = json.JSONDecoder()
    position = _skip_space(text, 0)
    if text[position : position + 1] != "[":
        raise SourceError(f"--input {path}: must be a JSON array of objects")
    position = _skip_space(text, position + 1)
    byte, counted, number = 0, 0, 0
    while text[position : position + 1] not in ("]", ""):
        try:
            value, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise SourceError(f"--input {path}: record {number} is not JSON ({error})") from None
        byte += len(text[counted:position].encode())
        size = len(text[position:end].encode())
        yield _record(number, byte, size, value)
        byte, counted, number = byte + size, end, number + 1
        position = _skip_space(text, end)
        if text[position : position + 1] == ",":
            position = _skip_space(text, position + 1)
    if text[position : position + 1] != "]":
        raise SourceError(f"--input {path}: ends in the middle; it is cut short")


def _record(number: int, start: int, size: int, value: Any) -> JsonRecord:
    if isinstance(value, dict):
        return JsonRecord(number=number, start=start, size=size, value=value)
    return JsonRecord(
        number=number, start=start, size=size, value=None, problem=f"is no object but {type(value).__name__}"
    )


def _skip_space(text: str, position: int) -> int:
    while text[position : position + 1] in (" ", "\n", "\r", "\t"):
        position += 1
    return position
