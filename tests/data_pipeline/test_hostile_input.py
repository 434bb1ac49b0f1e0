"""Input made to hang, to fill the memory or to kill: refused with an entry in the ledger, and nothing good is lost.

The mutations run in processes of their own (hostile_inputs.py) under a limit of address space and a deadline. By hand:
make soak, SOAK_MUTATIONS trials of each kind (default 1,000) drawn from SOAK_SEED (default 0).
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import time
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from triweave.data_pipeline.errors import MediaError
from triweave.data_pipeline.media import audio, images
from triweave.data_pipeline.shards import media_encoder
from triweave.data_pipeline.shards.build import BuildOptions, build
from triweave.data_pipeline.shards.ledger import read_ledger
from triweave.data_pipeline.shards.media_encoder import MediaEncoder, MediaOptions
from triweave.data_pipeline.sources import json_records, tar_samples
from triweave.data_pipeline.sources.manifest import ManifestSource
from triweave.data_pipeline.sources.webdataset import WebDatasetSource

Media = Callable[..., bytes]
PROGRAM = Path(__file__).parent / "hostile_inputs.py"
MUTATIONS = int(os.environ.get("SOAK_MUTATIONS", "1000"))
SEED = int(os.environ.get("SOAK_SEED", "0"))
KINDS = ("tar", "json", "jpeg", "png", "flac", "ogg", "video", "arrow", "parquet")
PEAK_BYTES = 1 << 30
CPU_SECONDS = 10.0
"""Of one refusal; the machine may be busy, so not wall time."""
GOOD = "good.txt"


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    member = tarfile.TarInfo(name)
    member.type = kind
    block = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)  # type: ignore[attr-defined]
    block[148:156] = b" " * 8
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def pax(*records: tuple[str, str]) -> bytes:
    """Return a pax header with these records."""
    lines = b""
    for name, value in records:
        body = f" {name}={value}\n".encode()
        length = len(body) + len(str(len(body) + len(str(len(body)))))
        lines += f"{length}".encode() + body
    return header("pax", len(lines), tarfile.XHDTYPE) + padded(lines)


def endless_digits(size: int) -> bytes:
    return header("pax", size, tarfile.XHDTYPE) + padded(b"1" * size)


ENDLESS: dict[str, tuple[bytes, str]] = {
    "a pax header that takes Python's parser quadratic time": (endless_digits(4 << 20), "a header of 4194304 bytes"),
    "a sparse map without end": (
        pax(("GNU.sparse.major", "1"), ("GNU.sparse.minor", "0")) + header("a.txt", 512) + b"9" * 512, "stored sparse"
    ),
    "a sparse map in a header": (pax(("GNU.sparse.map", "0,1")) + header("a.txt", 1) + padded(b"x"), "stored sparse"),
    "long names of long names": (header("././@LongLink", 0, tarfile.GNUTYPE_LONGNAME) * 2000, "headers without end"),
    "a size below zero in a pax header": (pax(("size", "-1024")) + header("a.txt", 512) + bytes(512), "-1024 bytes"),
    "a size beyond the file": (pax(("size", str(1 << 60))) + header("a.txt", 512) + bytes(512), "ends at byte"),
}  # fmt: skip


@pytest.mark.parametrize("name", ENDLESS)
def test_an_archive_made_to_hang_is_one_failed_row(tmp_path: Path, name: str) -> None:
    hostile, says = ENDLESS[name]
    good = header(GOOD, 5) + padded(b"whole") + header("last.txt", 4) + padded(b"last")
    (tmp_path / "x.tar").write_bytes(good + hostile + bytes(10240))
    began = time.process_time()
    manifest = build(WebDatasetSource(root=tmp_path / "x.tar"), tmp_path / "out", BuildOptions())
    assert time.process_time() - began < CPU_SECONDS
    rows = {row["id"]: row for row in read_ledger(manifest.ledger_path).to_pylist()}
    assert rows["x/good"]["status"] == "kept"
    assert rows["file:x.tar"]["status"] == "failed"
    assert says in rows["file:x.tar"]["reason"]


def test_the_longest_pax_header_that_is_read_costs_little(tmp_path: Path) -> None:
    longest = endless_digits(tar_samples.MAX_HEADER_BYTES) + header(GOOD, 5) + padded(b"whole")
    (tmp_path / "x.tar").write_bytes(longest + bytes(10240))
    began = time.process_time()
    assert [row.id for row in WebDatasetSource(root=tmp_path / "x.tar").rows()] == ["x/good"]
    assert time.process_time() - began < CPU_SECONDS


def test_a_tar_of_too_many_members_is_read_up_to_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_samples, "MAX_MEMBERS", 3)
    (tmp_path / "x.tar").write_bytes(b"".join(header(f"{n}.txt", 1) + padded(b"x") for n in range(5)) + bytes(10240))
    rows = {row.id: row.failed for row in WebDatasetSource(root=tmp_path / "x.tar").rows()}
    assert rows["x/0"] is rows["x/1"] is None
    assert "more than 3 members" in str(rows["file:x.tar"])


def test_listing_a_tar_holds_its_samples_and_not_its_headers(tmp_path: Path) -> None:
    """tarfile itself keeps about a kilobyte of each member."""
    members = 4000
    (tmp_path / "x.tar").write_bytes(header("folder", 0, tarfile.DIRTYPE) * members + bytes(10240))
    tracemalloc.start()
    try:
        assert not list(WebDatasetSource(root=tmp_path / "x.tar").rows())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 200 * members


def test_members_and_lines_beyond_memory_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files are sparse: 3 GiB that take no space."""
    size = 3 << 30
    with open(tmp_path / "x.tar", "wb") as file:
        for name in ("a.jpg", "b.txt", "c.bin"):
            file.write(header(name, size))
            file.seek(size, os.SEEK_CUR)
        file.write(header("c.txt", 5) + padded(b"whole") + bytes(10240))
    rows = {row.id: row for row in WebDatasetSource(root=tmp_path / "x.tar").rows()}
    assert rows["x/a"].failed == f"member .jpg has {size} bytes, allowed are {1 << 30}: split it"
    assert rows["x/b"].failed == f"member .txt has {size} bytes, allowed are {64 << 20}: split it"
    document = WebDatasetSource(root=tmp_path / "x.tar").document(rows["x/c"], MediaEncoder(MediaOptions()))
    assert len(document.parts) == 1, "a member that is not read does not count"
    monkeypatch.setattr(media_encoder, "MAX_MEDIA_BYTES", 1000)
    (tmp_path / "big.jpg").write_bytes(bytes(1001))
    with pytest.raises(MediaError, match="has 1001 bytes, allowed are 1000"):
        MediaEncoder(MediaOptions()).encode_file(tmp_path / "big.jpg")
    monkeypatch.setattr(json_records, "MAX_LINE_BYTES", 200)
    good = json.dumps({"id": "good", "parts": [{"modality": "text", "text": "whole"}]})
    long = good.replace("good", "long").replace("whole", "whole" * 1000)
    (tmp_path / "rows.jsonl").write_text(f"{good}\n{long}\n{good.replace('good', 'more')}")
    manifest = build(ManifestSource(root=tmp_path / "rows.jsonl"), tmp_path / "out", BuildOptions())
    assert manifest.rows == {"kept": 1, "filtered": 0, "failed": 1, "duplicate": 1}


def png_claiming(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    pixels = zlib.compress(bytes(min(width * 3 + 1, 1 << 20) * min(height, 200)))
    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def test_decompression_bombs_are_refused_from_their_header(clip: Media) -> None:
    for data in (png_claiming(60_000, 60_000), png_claiming(2**31 - 1, 1), png_claiming(0, 5)):
        with pytest.raises(MediaError):
            images.probe(data)
    flac = bytearray(clip(1))
    start = 4 + 4 + 13  # marker, block header, and STREAMINFO's last nibble before its 36-bit sample count
    flac[start] |= 0x0F
    flac[start + 1 : start + 5] = b"\xff" * 4
    with pytest.raises(MediaError, match=f"allowed are 1 to {audio.MAX_AUDIO_SAMPLES}"):
        audio.probe(bytes(flac))


def test_a_pickle_in_a_tar_never_runs_and_is_in_the_ledger(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (Path(tmp_path / "ran").touch, ())

    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, data in {"a.pyd": pickle.dumps(Bomb()), "a.txt": b"x", "b.PKL": pickle.dumps(Bomb()), "c.txt": b"y"}.items():  # fmt: skip  # noqa: E501
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    manifest = build(WebDatasetSource(root=tmp_path / "x.tar"), tmp_path / "out", BuildOptions())
    rows = {row["id"]: row for row in read_ledger(manifest.ledger_path).to_pylist()}
    assert [rows[name]["status"] for name in ("x/a", "x/b", "x/c")] == ["failed", "failed", "kept"]
    assert "reading it would run code" in rows["x/b"]["reason"]
    assert not (tmp_path / "ran").exists()


def mutated(kind: str, first: int, count: int, folder: Path) -> dict[str, Any]:
    """Run trials of one kind in a process of their own; a crash, a hang or a wrong exception fails here."""
    if kind == "video":
        pytest.importorskip("av")
        from test_video import write_video

        for ending in ("mp4", "webm", "mkv", "avi"):
            write_video(folder / f"whole.{ending}")
    command = [sys.executable, str(PROGRAM), kind, str(SEED), str(first), str(count), str(folder)]
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr[-4000:]}"
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert sum(result["outcomes"].values()) == count
    assert not [outcome for outcome in result["outcomes"] if "lines" in outcome or "lost" in outcome]
    assert result["peak_bytes"] < PEAK_BYTES
    return result


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_mutations_neither_crash_nor_hang_nor_fill_the_memory(tmp_path: Path, kind: str) -> None:
    mutated(kind, 0, 30 if kind in ("tar", "json", "arrow", "parquet") else 100, tmp_path)


@pytest.mark.soak
@pytest.mark.timeout(0)
@pytest.mark.parametrize("kind", KINDS)
def test_thousands_of_mutations(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    result = mutated(kind, 0, MUTATIONS, tmp_path)
    with capsys.disabled():
        counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(result["outcomes"].items()))
        print(
            f"\n{kind}: {MUTATIONS} mutations ({counts}), peak {result['peak_bytes'] >> 20} MiB, slowest "
            f"{result['slowest_cpu_s']} s of CPU, {time.monotonic() - began:.0f} s, SOAK_SEED={SEED}"
        )
