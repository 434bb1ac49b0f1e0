"""The build job: same bytes for any number of workers and after any kill, and a ledger that adds up."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from triweave.data_pipeline.errors import BuildError, SourceError
from triweave.data_pipeline.shards.build import BuildOptions, BuildProgress, build, build_order, row_pipeline
from triweave.data_pipeline.shards.chunks import ChunkEncoder, ChunkJob
from triweave.data_pipeline.shards.index import read_index
from triweave.data_pipeline.shards.ledger import read_ledger
from triweave.data_pipeline.shards.manifest import Manifest
from triweave.data_pipeline.shards.media_encoder import MediaOptions
from triweave.data_pipeline.shards.throughput import THROUGHPUT_NAME
from triweave.data_pipeline.shards.verify import verify
from triweave.data_pipeline.shards.writer import EncodedSample, ShardWriter
from triweave.data_pipeline.sources.base import Row
from triweave.data_pipeline.sources.folder import FolderSource

SCRIPT = Path(__file__).with_name("slow_source.py")


@pytest.fixture(scope="module")
def numbers() -> ModuleType:
    """The module of the test source, imported by path as worker processes will."""
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        import slow_source
    finally:
        sys.path.pop(0)
    return slow_source


@pytest.fixture(scope="module")
def expected(numbers: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shards of the test source, built by one process without any trouble."""
    out = tmp_path_factory.mktemp("expected") / "shards"
    build(numbers.NumberSource(), out, BuildOptions(shard_size_bytes=numbers.SHARD_SIZE_BYTES))
    return out


def files(folder: Path) -> dict[str, bytes]:
    """Return relative path -> bytes of everything but the throughput, the one file that says how a build went."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != THROUGHPUT_NAME]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def start(
    out: Path, workers: int, kill_at: int, seconds_per_row: float = 0.0, engine: str = "local"
) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(SCRIPT), str(out), str(workers), str(kill_at), str(seconds_per_row), engine]
    return subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)


def ledger_rows(folder: Path) -> list[dict[str, Any]]:
    return list(read_ledger(folder / "ledger.parquet").to_pylist())


def test_one_and_four_workers_write_the_same_bytes(expected: Path, tmp_path: Path) -> None:
    assert len(Manifest.load(expected).shards) >= 4
    assert start(tmp_path / "shards", 4, -1).wait(120) == 0
    assert files(tmp_path / "shards") == files(expected)


@pytest.mark.parametrize(
    ("workers", "kill_at"),
    [pytest.param(1, 700, marks=pytest.mark.slow), pytest.param(2, 100, marks=pytest.mark.slow), (2, 1300)],
)
def test_a_killed_build_continues_to_the_same_bytes(expected: Path, tmp_path: Path, workers: int, kill_at: int) -> None:
    out = tmp_path / "shards"
    assert start(out, workers, kill_at).wait(120) == -signal.SIGKILL
    assert not (out / "manifest.json").exists()
    assert start(out, 2, kill_at).wait(120) == 0
    assert files(out) == files(expected)


def test_finished_shards_are_not_built_again(numbers: ModuleType, expected: Path, tmp_path: Path) -> None:
    """Kill late, note which tars are sealed, continue: their inodes stay."""
    out = tmp_path / "shards"
    order = build_order(list(numbers.NumberSource().rows()), 0)
    killer = next(number for number in reversed(order) if number % 50 == 20)
    assert start(out, 1, killer).wait(120) == -signal.SIGKILL
    sealed = {path.name: path.stat().st_ino for path in out.glob("shard-*.tar")}
    assert len(sealed) >= 3
    assert start(out, 1, killer).wait(120) == 0
    assert {name: (out / name).stat().st_ino for name in sealed} == sealed
    assert files(out) == files(expected)


def test_workers_do_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    process = start(tmp_path / "shards", 2, -1, seconds_per_row=0.02)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "shards" / ".build").glob("*.tar.*.tmp")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    while (left := session_processes(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


def session_processes(session: int) -> list[int]:
    """Return the processes of a session that are still running."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(status.parent.name))
    return found


def test_a_worker_that_outlives_its_build_a_moment_leaves_no_trace(
    numbers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where another run has finished, it neither brings the work folder back nor writes there while it goes."""
    out = tmp_path / "shards"
    straggler = ChunkJob(pipeline=row_pipeline(numbers.NumberSource(), BuildOptions()), folder=out / ".build")
    plain = shutil.rmtree

    def rmtree(path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            (out / ".build" / "00000009.tar.1.tmp").touch()
        plain(path)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    build(numbers.NumberSource(rows_total=100), out, BuildOptions())
    with pytest.raises(FileNotFoundError):
        ChunkEncoder(straggler)
    assert sorted(path.name for path in out.iterdir() if path.name.startswith(".")) == []


def test_an_interrupt_while_a_shard_is_opened_leaves_no_file(
    tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(folder: Path, name: str) -> None:
        ShardWriter(folder, name)._file.close()
        raise KeyboardInterrupt

    monkeypatch.setattr("triweave.data_pipeline.shards.assemble.ShardWriter", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(FolderSource(root=tiny_corpus), tmp_path / "shards", BuildOptions())
    assert not list((tmp_path / "shards").glob("*.tmp"))


def test_an_interrupt_ends_soon_and_keeps_what_is_done(expected: Path, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    process = start(out, 2, -1, seconds_per_row=0.005)
    deadline = time.monotonic() + 60
    while not list((out / ".build").glob("0*.json")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(30) == 130
    assert not list(out.glob("*.tmp"))
    assert list((out / ".build").glob("*.json"))
    assert start(out, 1, -1).wait(120) == 0
    assert files(out) == files(expected)


def test_the_ledger_accounts_for_every_row(numbers: ModuleType, expected: Path) -> None:
    manifest = Manifest.load(expected)
    rows = ledger_rows(expected)
    assert sorted(row["row"] for row in rows) == list(range(numbers.ROWS))
    assert Counter(row["status"] for row in rows) == manifest.rows
    assert manifest.rows == {"kept": 1288, "filtered": 56, "failed": 28, "duplicate": 28}
    by_id = {row["id"]: row for row in rows}
    assert by_id["row 49"]["reason"] == "a fiftieth"
    assert by_id["row 57"]["reason"] == "a seventh"
    assert by_id["row 61"]["reason"] == "MediaError: number 61 is damaged"
    keys = {}
    for number, shard in enumerate(manifest.shards):
        for sample in read_index(manifest, number, ["key", "id"]).to_pylist():
            keys[sample["id"]] = (shard.name, sample["key"])
    assert {row["id"]: (row["shard"], row["key"]) for row in rows if row["status"] == "kept"} == keys


def test_exactly_one_of_a_pair_of_copies_is_kept(expected: Path) -> None:
    by_id = {row["id"]: row for row in ledger_rows(expected)}
    for number in range(13, 1400, 50):
        pair = [by_id[f"row {number - 1}"], by_id[f"row {number}"]]
        assert sorted(row["status"] for row in pair) == ["duplicate", "kept"]
        copy, kept = sorted(pair, key=lambda row: row["status"])
        assert copy["duplicate_of"] == kept["id"]
        assert copy["content_xxh3"] == kept["content_xxh3"]


def test_copies_stay_when_asked(numbers: ModuleType, tmp_path: Path) -> None:
    manifest = build(numbers.NumberSource(rows_total=100), tmp_path / "shards", BuildOptions(deduplicate=False))
    assert manifest.rows["duplicate"] == 0
    assert manifest.samples == 94


def test_build_order_is_a_keyed_permutation() -> None:
    rows = [Row(id=str(number), group="pair" if number in (3, 70) else "") for number in range(100)]
    first, second = build_order(rows, 0), build_order(rows, 1)
    assert sorted(first) == sorted(second) == list(range(100))
    assert first != second != list(range(100))
    assert build_order(rows, None) == list(range(100))
    assert first.index(70) == first.index(3) + 1


def test_a_second_run_returns_what_is_there(tiny_corpus: Path, tiny_shards: Manifest) -> None:
    before = {path: path.stat().st_mtime_ns for path in tiny_shards.root.iterdir()}
    again = build(FolderSource(root=tiny_corpus), tiny_shards.root, BuildOptions(shard_size_bytes=60_000, workers=3))
    assert again == tiny_shards
    assert {path: path.stat().st_mtime_ns for path in tiny_shards.root.iterdir()} == before


def test_other_options_or_inputs_are_refused_until_overwritten(
    tiny_corpus: Path, tiny_shards: Manifest, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(tiny_shards.root, tmp_path / "shards"))
    options = BuildOptions(shard_size_bytes=60_000, media=MediaOptions(audio_rate_hz=8000))
    with pytest.raises(BuildError, match="audio_rate_hz None there, 8000 now"):
        build(FolderSource(root=tiny_corpus), out, options)
    corpus = Path(shutil.copytree(tiny_corpus, tmp_path / "corpus"))
    (corpus / "extra.txt").write_text("one more")
    with pytest.raises(BuildError, match="input_rows 24 there, 25 now"):
        build(FolderSource(root=corpus), out, BuildOptions(shard_size_bytes=60_000))
    assert Manifest.load(out).hash == tiny_shards.hash
    (out / f"{tiny_shards.shards[0].name}.tokens-0123456789abcdef.parquet").touch()
    rebuilt = build(FolderSource(root=corpus), out, BuildOptions(overwrite=True))
    assert rebuilt.samples == 25
    assert sorted(path.name for path in out.iterdir()) == [
        "ledger.parquet", "manifest.json", "shard-000000.parquet", "shard-000000.tar", "shard-000000.tar.idx",
        "throughput.json",
    ]  # fmt: skip
    assert not verify(out).damage


def test_a_half_built_folder_is_not_mixed_with_something_else(numbers: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    assert start(out, 1, 700).wait(120) == -signal.SIGKILL
    with pytest.raises(BuildError, match="half-finished build of something else"):
        build(numbers.NumberSource(), out, BuildOptions(shard_size_bytes=numbers.SHARD_SIZE_BYTES, shuffle_seed=1))


def test_a_damaged_spool_is_encoded_again(expected: Path, numbers: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    order = build_order(list(numbers.NumberSource().rows()), 0)
    killer = next(number for number in order[1000:] if number % 50 == 20)
    assert start(out, 1, killer).wait(120) == -signal.SIGKILL
    for spool in (out / ".build").glob("0*.tar"):
        spool.write_bytes(spool.read_bytes()[:-7])
    assert start(out, 1, killer).wait(120) == 0
    assert files(out) == files(expected)


def test_a_full_disk_is_one_line_and_loses_nothing(
    expected: Path, numbers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, options = numbers.NumberSource(), BuildOptions(shard_size_bytes=numbers.SHARD_SIZE_BYTES)
    plain = ShardWriter.append

    def append(writer: ShardWriter, sample: EncodedSample) -> None:
        if writer.name == "shard-000002" and writer.tar_bytes > 100_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        plain(writer, sample)

    monkeypatch.setattr(ShardWriter, "append", append)
    with pytest.raises(BuildError, match="No space left on device"):
        build(source, tmp_path / "shards", options)
    assert not list((tmp_path / "shards").glob("*.tmp"))
    monkeypatch.undo()
    calls: list[BuildProgress] = []
    build(source, tmp_path / "shards", options, calls.append)
    assert files(tmp_path / "shards") == files(expected)
    assert (calls[0].shards, calls[-1].rows_done) == (2, numbers.ROWS)
    assert calls[0].rows_done > 0


def test_a_lost_finished_shard_is_named(expected: Path, numbers: ModuleType, tmp_path: Path) -> None:
    out = Path(shutil.copytree(expected, tmp_path / "shards"))
    (out / "shard-000002.tar").unlink()
    with pytest.raises(BuildError, match=r"shard-000002\.tar was finished and is gone"):
        build(numbers.NumberSource(), out, BuildOptions(shard_size_bytes=numbers.SHARD_SIZE_BYTES))


def test_only_one_process_builds_in_a_folder(numbers: ModuleType, tmp_path: Path) -> None:
    process = start(tmp_path / "shards", 1, -1, seconds_per_row=0.05)
    deadline = time.monotonic() + 60
    while not (tmp_path / "shards" / ".build" / "build.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    try:
        with pytest.raises(BuildError, match="another process builds there"):
            build(numbers.NumberSource(), tmp_path / "shards", BuildOptions())
    finally:
        process.kill()
        process.wait()


def test_repeated_ids_fail_by_name(tmp_path: Path) -> None:
    from triweave.data_pipeline.sources.manifest import ManifestSource

    record = {"id": "same", "parts": [{"modality": "text", "text": "first"}]}
    other = {"id": "same", "parts": [{"modality": "text", "text": "second"}]}
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(record)}\n{json.dumps(other)}\n")
    manifest = build(ManifestSource(root=path), tmp_path / "shards", BuildOptions())
    assert manifest.rows == {"kept": 1, "filtered": 0, "failed": 1, "duplicate": 0}
    (failed,) = [row for row in ledger_rows(tmp_path / "shards") if row["status"] == "failed"]
    assert failed["reason"] == "id 'same' is already that of row 0"


def test_the_ledger_depends_on_the_corpus_alone(tmp_path: Path) -> None:
    """No absolute path, memory address or unprintable name of one machine gets into it."""
    ledgers = []
    for place in ("here", "there/deeper"):
        corpus = tmp_path / place / "corpus"
        corpus.mkdir(parents=True)
        (corpus / "fine.txt").write_text("fine")
        (corpus / "cut.png").write_bytes(b"?")
        (corpus / "locked.json").symlink_to("/proc/self/mem")
        (corpus / "wrong.json").write_text("{")
        (corpus / os.fsdecode(b"latin-\xe9.txt")).write_text("accent")
        build(FolderSource(root=corpus), tmp_path / place / "out", BuildOptions())
        ledgers.append(ledger_rows(tmp_path / place / "out"))
    assert ledgers[0] == ledgers[1]
    reasons = {row["id"]: row["reason"] for row in ledgers[0]}
    assert reasons["latin-\\udce9"] == "the name is not UTF-8: rename it"
    assert reasons["fine"] == ""
    assert sum(row["status"] == "failed" for row in ledgers[0]) == 4
    assert not any("0x" in reason or "here" in reason for reason in reasons.values())


def test_wrong_use_is_one_line(tiny_corpus: Path, tmp_path: Path) -> None:
    source = FolderSource(root=tiny_corpus)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.doc").touch()
    with pytest.raises(BuildError, match="holds other files"):
        build(source, tmp_path / "used", BuildOptions(overwrite=True))
    with pytest.raises(BuildError, match="is not a folder"):
        build(source, tmp_path / "used" / "thesis.doc", BuildOptions())
    with pytest.raises(BuildError, match="--workers 0: must be at least 1"):
        build(source, tmp_path / "out", BuildOptions(workers=0))
    with pytest.raises(BuildError, match="--image-max-side -5"):
        build(source, tmp_path / "out", BuildOptions(media=MediaOptions(image_max_side_px=-5)))
    with pytest.raises(SourceError, match="no such folder"):
        build(FolderSource(root=tmp_path / "nothing"), tmp_path / "out", BuildOptions())
    (tmp_path / "empty").mkdir()
    with pytest.raises(BuildError, match="found no rows"):
        build(FolderSource(root=tmp_path / "empty"), tmp_path / "out", BuildOptions())
    assert not (tmp_path / "out").exists()


def test_nothing_kept_is_an_error_that_says_why(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(3):
        (corpus / f"{number}.png").write_bytes(b"not a picture")
    with pytest.raises(BuildError, match=r"3 of 3 were failed: MediaError"):
        build(FolderSource(root=corpus), tmp_path / "out", BuildOptions())


def test_reencoding_is_an_option(tiny_corpus: Path, tmp_path: Path) -> None:
    media = MediaOptions(image_max_side_px=24, audio_rate_hz=8000)
    manifest = build(FolderSource(root=tiny_corpus), tmp_path / "shards", BuildOptions(media=media))
    rows = read_index(manifest, 0).to_pylist()
    sides = [max(size) for row in rows for size in zip(row["part_width"], row["part_height"], strict=True) if max(size)]
    assert sides
    assert max(sides) == 24
    assert {rate for row in rows for rate in row["part_rate"]} == {0, 8000}


def test_the_build_folder_of_another_tool_is_left_alone(tmp_path: Path) -> None:
    corpus, out = tmp_path / "corpus", tmp_path / "project"
    corpus.mkdir()
    (corpus / "a.txt").write_text("A bird.")
    (out / ".build").mkdir(parents=True)
    (out / ".build" / "product").write_text("of a compiler")
    for overwrite in (False, True):
        with pytest.raises(BuildError, match="holds other files"):
            build(FolderSource(root=corpus), out, BuildOptions(overwrite=overwrite))
    assert (out / ".build" / "product").read_text() == "of a compiler"
    (out / ".build" / "product").unlink()  # as a kill right after the folder was made leaves it
    assert build(FolderSource(root=corpus), out, BuildOptions()).samples == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (BuildOptions(media=MediaOptions(audio_rate_hz=1_000_000_000)), "--audio-rate 1000000000: must be at most"),
        (BuildOptions(media=MediaOptions(image_max_side_px=10**9)), "--image-max-side 1000000000: must be at most"),
        (BuildOptions(shuffle_seed=2**64), "--shuffle-seed 18446744073709551616: must be at most"),
    ],
)
def test_options_without_bounds_would_eat_all_memory(tmp_path: Path, options: BuildOptions, message: str) -> None:
    with pytest.raises(BuildError, match=message):
        build(FolderSource(root=tmp_path), tmp_path / "out", options)


def test_an_input_that_cannot_be_listed_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr("triweave.data_pipeline.sources.base.os.scandir", refuse)
    with pytest.raises(SourceError, match=r"cannot be listed .*Permission denied"):
        build(FolderSource(root=tmp_path), tmp_path / "out", BuildOptions())
