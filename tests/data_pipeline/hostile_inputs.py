"""Mutated tars, JSON, pictures, clips and videos, read as a build reads them; run as a program by test_hostile_input.

    python hostile_inputs.py KIND SEED FIRST COUNT FOLDER

Runs trials FIRST to FIRST + COUNT - 1 of KIND, each drawn from (SEED, KIND, trial) alone, under RLIMIT_AS. Prints one
JSON object: how often each outcome came, the peak of resident memory, the slowest trial. What is neither a result nor
an error for the user, takes longer than TRIAL_SECONDS, or kills the process ends the program with another exit code.
"""

from __future__ import annotations

import faulthandler
import io
import json
import random
import resource
import shutil
import struct
import sys
import tarfile
import time
import zlib
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parent))
from conftest import audio_bytes, image_bytes

from triweave.data_pipeline.errors import DataError, MediaError
from triweave.data_pipeline.media import video
from triweave.data_pipeline.media.geometry import MediaGeometry
from triweave.data_pipeline.media.modalities import MODALITIES
from triweave.data_pipeline.shards.build import BuildOptions, build
from triweave.data_pipeline.shards.ledger import read_ledger
from triweave.data_pipeline.shards.media_encoder import MediaEncoder, MediaOptions
from triweave.data_pipeline.shards.schema import SchemaError, document_from_json
from triweave.data_pipeline.sources.hf_datasets import HfDatasetsSource
from triweave.data_pipeline.sources.manifest import ManifestSource
from triweave.data_pipeline.sources.webdataset import WebDatasetSource

ADDRESS_SPACE_BYTES = 4 << 30
TRIAL_SECONDS = 60
"""Wall time of one trial; the machine may be busy."""
_INTERESTING = (0, 1, 2, 127, 128, 255, 256, 32767, 32768, 65535, 2**31 - 1, 2**31, 2**32 - 1)
_ODD_VALUES: list[Any] = [
    None, True, -1, 0, 2**70, 1e308, float("nan"), float("inf"), "", "\0", "\ud800", "../../x", "a" * 5000, [], {},
    [[]], {"a": {}}, "image", "text", ["text"],
]  # fmt: skip


def mutate(draw: random.Random, data: bytes) -> bytes:
    """Return damaged bytes: one to eight of flips, numbers at the edge of a type, cuts, copies, insertions, headers."""
    content = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 3, 8))):
        if not content:
            break
        most = len(content) if draw.random() < 0.5 else min(len(content), 600)
        start = draw.randrange(most)
        kind = draw.randrange(7)
        if kind == 0:
            content[start] ^= 1 << draw.randrange(8)
        elif kind == 1:
            number = draw.choice(_INTERESTING)
            packed = struct.pack(draw.choice("<>") + "I", number)[: draw.choice((1, 2, 4))]
            content[start : start + len(packed)] = packed
        elif kind == 2:
            del content[start : start + draw.choice((1, 4, 64, 4096))]
        elif kind == 3:
            content[start:start] = draw.randbytes(draw.choice((1, 4, 64, 4096)))
        elif kind == 4:
            end = start + draw.choice((4, 64, 4096))
            content[start:start] = content[start:end] * draw.choice((1, 2, 30))
        elif kind == 5:
            del content[draw.randrange(len(content)) :]
        else:
            end = min(len(content), start + draw.choice((2, 16, 512)))
            content[start:end] = draw.randbytes(end - start)
    return bytes(content)


def with_right_checksums(data: bytes) -> bytes:
    """Return damaged PNG chunks or Ogg pages under checksums that fit, so that the damage reaches the decoder."""
    content = bytearray(data)
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        start = 8
        while start + 12 <= len(content):
            end = start + 8 + int.from_bytes(content[start : start + 4], "big")
            if end + 4 > len(content):
                break
            content[end : end + 4] = zlib.crc32(content[start + 4 : end]).to_bytes(4, "big")
            start = end + 4
    start = content.find(b"OggS")
    while 0 <= start <= len(content) - 27:
        segments = content[start + 27 : start + 27 + content[start + 26]]
        end = start + 27 + len(segments) + sum(segments)
        content[start + 22 : start + 26] = bytes(4)
        content[start + 22 : start + 26] = ogg_crc(content[start:end]).to_bytes(4, "little")
        start = content.find(b"OggS", start + 27)
    return bytes(content)


def ogg_crc(page: bytes) -> int:
    """Return the checksum of an Ogg page whose checksum field is 0: CRC-32 of polynomial 0x04c11db7, not reflected."""
    crc = 0
    for byte in page:
        crc = ((crc << 8) & 0xFFFFFFFF) ^ _OGG_TABLE[(crc >> 24) ^ byte]
    return crc


def _ogg_table() -> list[int]:
    table = []
    for number in range(256):
        crc = number << 24
        for _ in range(8):
            crc = ((crc << 1) ^ (0x04C11DB7 if crc & 0x80000000 else 0)) & 0xFFFFFFFF
        table.append(crc)
    return table


_OGG_TABLE = _ogg_table()


def odd_json(draw: random.Random, value: Any, depth: int = 0) -> Any:
    """Return a JSON value with some of what is in it replaced, removed, doubled or nested."""
    if draw.random() < 0.08:
        odd = draw.choice(_ODD_VALUES)
        return [odd] * draw.choice((1, 3)) if draw.random() < 0.2 else odd
    if isinstance(value, dict):
        kept = {key: odd_json(draw, item, depth + 1) for key, item in value.items() if draw.random() > 0.05}
        return kept | ({draw.choice(list(value)): draw.choice(_ODD_VALUES)} if value and draw.random() < 0.1 else {})
    if isinstance(value, list):
        items = [odd_json(draw, item, depth + 1) for item in value if draw.random() > 0.05]
        return items * draw.choice((1, 1, 1, 2, 40))
    return value


def json_bytes(draw: random.Random, value: Any) -> bytes:
    """Return the text of an odd value, sometimes no JSON at all."""
    text = json.dumps(odd_json(draw, value), ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass")
    way = draw.randrange(6)
    if way == 0:
        return mutate(draw, text)
    if way == 1:
        return b"[" * draw.choice((10, 100_000)) + text
    if way == 2:
        return text.replace(b"1", b"1" * draw.choice((20, 10_000)))
    return text


def odd_tar(draw: random.Random) -> bytes:
    """Return a tar whose headers say odd things under right checksums, or whose bytes are damaged."""
    record = {"v": 1, "parts": [{"modality": "image", "member": "0000.jpg"}, {"modality": "text", "text": "An owl."}]}
    members = {
        "a.jpg": image_bytes(draw.randrange(9), form="JPEG"),
        "a.txt": b"An owl.",
        "b/b.json": json.dumps({"caption": "A jay.", "n": 1}).encode(),
        "b/b.flac": audio_bytes(draw.randrange(9)),
        "own.json": json.dumps(record).encode(),
        "own.0000.jpg": image_bytes(3, form="JPEG"),
        "last.txt": b"The end.",
    }
    file = io.BytesIO()
    form = draw.choice((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for name, data in members.items():
            if name.endswith("json") and draw.random() < 0.3:
                data = json_bytes(draw, json.loads(data))
            member = tarfile.TarInfo(_odd_name(draw, name, form))
            member.size = len(data)
            if form == tarfile.PAX_FORMAT and draw.random() < 0.4:
                member.pax_headers = dict([_odd_record(draw)])
            tar.addfile(member, io.BytesIO(data))
    content = file.getvalue()
    if draw.random() < 0.7:
        content = _odd_header(draw, bytearray(content))
    return mutate(draw, content) if draw.random() < 0.3 else content


def _odd_name(draw: random.Random, name: str, form: int) -> str:
    if draw.random() < 0.8:
        return name
    ending = name.rpartition(".")[2]
    names = [
        f"../../{name}",
        f"/etc/{name}",
        f"{'d/' * 30}{name}",
        f"a\n{name}",
        f".{ending}",
        "a.pkl",
        "a.JPG",
    ]
    names += ["\u202e.txt", f"a.b.c.{ending}", "con.", "a\\b.txt"]
    return draw.choice(names if form == tarfile.USTAR_FORMAT else [*names, name * 9, f"{'x' * 300}.{ending}"])


def _odd_record(draw: random.Random) -> tuple[str, str]:
    return draw.choice(
        (("size", "-512"), ("size", "99999999999999999999"), ("size", "x"), ("path", "p" * 5000 + ".txt"), ("path", ""),
         ("GNU.sparse.major", "1"), ("GNU.sparse.map", "0,9,9"), ("GNU.sparse.size", "-1"), ("mtime", "nan"),
         ("hdrcharset", "BINARY"), ("comment", "1" * 30_000), ("uid", "-1"))
    )  # fmt: skip


def _odd_header(draw: random.Random, content: bytearray) -> bytes:
    """Write something odd into a field of one header block, and make its checksum right again."""
    blocks = [start for start in range(0, len(content) - 512, 512) if content[start + 257 : start + 262] == b"ustar"]
    if not blocks:
        return bytes(content)
    start = draw.choice(blocks)
    fields = [(0, 100), (100, 8), (124, 12), (124, 12), (136, 12), (156, 1), (156, 1), (157, 100), (345, 155)]
    field, size = draw.choice(fields)
    odd = [b"\xff" * size, bytes(size), b"7" * size, b"\x80" + bytes(size - 1), b" " * size, draw.randbytes(size)]
    odd.append(f"{draw.choice(_INTERESTING):0{size - 1}o}\0".encode())
    value = bytes([draw.choice(b"\x00012345679LKSxgXVMNZ")]) if size == 1 else draw.choice(odd)
    content[start + field : start + field + size] = value[:size].ljust(size, b"\0")
    content[start + 148 : start + 156] = b" " * 8
    content[start + 148 : start + 156] = f"{sum(content[start : start + 512]):06o}\0 ".encode()
    return bytes(content)


def one_line(error: DataError, outcome: str = "refused") -> str:
    """Return the outcome of a trial that an error for the user ended."""
    return outcome if "\n" not in str(error) else f"an error of several lines: {error}"


def built(source: Any, out: Path, least: int = 0) -> str:
    """Build and return what became of it; every input row must be in the ledger once, and `least` of them kept."""
    shutil.rmtree(out, ignore_errors=True)
    try:
        manifest = build(source, out, BuildOptions())
    except DataError as error:
        return one_line(error, "refused whole") if not least else f"lost good rows: {error}"
    ledger = read_ledger(manifest.ledger_path)
    assert sum(manifest.rows.values()) == ledger.num_rows == len(list(source.rows()))
    assert manifest.samples == manifest.rows["kept"] >= least
    return "built, none failed" if not manifest.rows["failed"] else "built, some failed"


def try_tar(draw: random.Random, folder: Path) -> str:
    """An odd tar beside a good one."""
    tars = folder / "tars"
    if not tars.exists():
        tars.mkdir()
        with tarfile.open(tars / "good.tar", "w") as tar:
            for number in range(2):
                member = tarfile.TarInfo(f"{number}.txt")
                member.size = 5
                tar.addfile(member, io.BytesIO(b"good%d" % number))
    (tars / "odd.tar").write_bytes(odd_tar(draw))
    return built(WebDatasetSource(root=tars), folder / "out", least=2)


def try_json(draw: random.Random, folder: Path) -> str:
    """Twelve odd lines between two good ones, and the JSON of a stored document."""
    part = {"modality": "image", "bytes": "iVBORw0KGgo=", "alt": "x", "t_ms": [0, 5]}
    lines = []
    for number in range(12):
        text = {"modality": "text", "text": f"owl {number}", "role": "user"}
        record = {"id": f"r{number}", "parts": [text, part], "labels": {"n": 1}, "source": {"license": "MIT"}}
        lines.append(json_bytes(draw, record).replace(b"\n", b" "))
    good = [
        json.dumps({"id": f"good{n}", "parts": [{"modality": "text", "text": f"good {n}"}]}).encode() for n in (0, 1)
    ]
    (folder / "rows.jsonl").write_bytes(b"\n".join([good[0], *lines, good[1]]))
    member = {"modality": "image", "member": "0001.jpg", "mime": "image/jpeg", "bytes": 1, "xxh3": "00"}
    stored = {"v": 1, "id": "a", "parts": [{"modality": "text", "text": "x"}, member], "source": {}, "labels": {}}
    try:
        document_from_json(json_bytes(draw, stored))
    except SchemaError as error:
        one_line(error)
    return built(ManifestSource(root=folder / "rows.jsonl"), folder / "out", least=2)


def try_media(modality: str, whole: Callable[[int], bytes]) -> Callable[[random.Random, Path], str]:
    """Return a trial that probes, checks, re-encodes and decodes one damaged medium."""

    def trial(draw: random.Random, _: Path) -> str:
        data = mutate(draw, whole(draw.randrange(4)))
        if draw.random() < 0.7:
            data = with_right_checksums(data)
        outcomes = set()
        for options in (MediaOptions(), MediaOptions(image_max_side_px=24, audio_rate_hz=8000)):
            try:
                part = MediaEncoder(options).encode(modality, data)
                tokens = MODALITIES[modality].decode(part.data or b"", part.info, MediaGeometry())
                assert len(tokens) == np.prod(MODALITIES[modality].grid(part.info, MediaGeometry()))
                assert np.isfinite(tokens).all()
                outcomes.add("decoded")
            except MediaError as error:
                outcomes.add(one_line(error))
        return " and ".join(sorted(outcomes))

    return trial


def try_video(draw: random.Random, folder: Path) -> str:
    """Damage one of the videos that the test has put into the folder."""
    path = draw.choice(sorted(folder.glob("whole.*")))
    damaged = folder / f"damaged{path.suffix}"
    damaged.write_bytes(mutate(draw, path.read_bytes()))
    try:
        info = video.probe_video(damaged, 60_000)
        pictures = sum(1 for _ in video.frames_on_screen(damaged, 500, info.ms))
        sound, _ = video.decode_sound(damaged)
    except MediaError as error:
        return one_line(error)
    assert pictures <= info.ms // 500 + 1
    assert sound.ndim == 1
    return "decoded"


def try_table(draw: random.Random, folder: Path, form: str) -> str:
    """Damage the Arrow or Parquet file of a saved data set; pyarrow may refuse it whole, and must not crash."""
    features = {"image": {"_type": "Image"}, "text": {"_type": "Value", "dtype": "string"}, "n": {"_type": "Value"}}
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    image = [{"bytes": image_bytes(number), "path": None} for number in range(4)]
    table = pa.table({"image": image, "text": [f"Owl {number}." for number in range(4)], "n": [1, 2, 3, 4]})
    table = table.replace_schema_metadata(metadata)
    saved = folder / form
    saved.mkdir(exist_ok=True)
    target = io.BytesIO()
    if form == "parquet":
        pq.write_table(table, target, row_group_size=2)
    else:
        with pa.ipc.new_stream(target, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
        (saved / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
    data = target.getvalue()
    if form == "parquet" and draw.random() < 0.5:  # the footer says where everything lies
        size = int.from_bytes(data[-8:-4], "little") + 8
        footer = mutate(draw, data[-size:-8])
        data = data[:-size] + footer + len(footer).to_bytes(4, "little") + b"PAR1"
    else:
        data = mutate(draw, data)
    (saved / f"data.{form}").write_bytes(data)
    return built(HfDatasetsSource(root=saved), folder / "out")


KINDS: dict[str, Callable[[random.Random, Path], str]] = {
    "tar": try_tar,
    "json": try_json,
    "jpeg": try_media("image", lambda number: image_bytes(number, form="JPEG")),
    "png": try_media("image", lambda number: image_bytes(number)),
    "flac": try_media("audio", lambda number: audio_bytes(number)),
    "ogg": try_media("audio", lambda number: audio_bytes(number, form="OGG")),
    "video": try_video,
    "arrow": partial(try_table, form="arrow"),
    "parquet": partial(try_table, form="parquet"),
}


def main(kind: str, seed: str, first: str, count: str, folder: str) -> None:
    """Run the trials."""
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_BYTES, ADDRESS_SPACE_BYTES))
    outcomes: Counter[str] = Counter()
    slowest = 0.0
    for number in range(int(first), int(first) + int(count)):
        faulthandler.dump_traceback_later(TRIAL_SECONDS, exit=True)
        began = time.process_time()
        try:
            outcomes[KINDS[kind](random.Random(f"{seed} {kind} {number}"), Path(folder))] += 1
        except BaseException:
            print(f"{kind} trial {number} of seed {seed}", file=sys.stderr)
            raise
        slowest = max(slowest, time.process_time() - began)
    faulthandler.cancel_dump_traceback_later()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    print(json.dumps({"outcomes": outcomes, "peak_bytes": peak, "slowest_cpu_s": round(slowest, 2)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
