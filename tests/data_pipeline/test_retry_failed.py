"""`--retry-failed`: encodes the rows that failed alone, and ends with the bytes of a fresh build."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import test_build as builds

from triweave.data_pipeline.dedup.near_duplicates import near_duplicate_finder
from triweave.data_pipeline.errors import BuildError
from triweave.data_pipeline.filters.options import FilterOptions
from triweave.data_pipeline.shards import row_encoder
from triweave.data_pipeline.shards.build import BuildOptions, build
from triweave.data_pipeline.shards.ledger import read_ledger
from triweave.data_pipeline.shards.manifest import Manifest
from triweave.data_pipeline.shards.verify import verify
from triweave.data_pipeline.sources.base import Row
from triweave.data_pipeline.sources.folder import FolderSource

SHARD_SIZE_BYTES = 150_000
DAMAGED = (3, 30, 200, 201, 399)
TWINS = {30: 31, 32: 31, 200: 20, 203: 20, 306: 20, 3: 4, 5: 4}
"""Number -> that of a document with the same text; the damaged ones join once they are mended."""


def corpus(folder: Path) -> Path:
    """Write 400 texts, some of which cannot be read because they are not UTF-8."""
    folder.mkdir()
    for number in range(400):
        text = f"number {TWINS.get(number, number)} " + " ".join(
            f"word{TWINS.get(number, number)}-{at}" for at in range(40)
        )
        data = b"\xff\xfe\x80" if number in DAMAGED else text.encode()
        (folder / f"text{number:03d}.txt").write_bytes(data)
    return folder


def mend(folder: Path, numbers: tuple[int, ...] = DAMAGED) -> None:
    for number in numbers:
        same = TWINS.get(number, number)
        text = f"number {same} " + " ".join(f"word{same}-{at}" for at in range(40))
        (folder / f"text{number:03d}.txt").write_text(text)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids of the rows that are encoded in this process."""
    ids: list[str] = []
    plain = row_encoder.RowEncoder.encode

    def encode(self: row_encoder.RowEncoder, number: int, row: Row) -> row_encoder.EncodedRow:
        ids.append(row.id)
        return plain(self, number, row)

    monkeypatch.setattr(row_encoder.RowEncoder, "encode", encode)
    return ids


@pytest.mark.parametrize("near", [None, "text=0.8"])
def test_the_result_is_that_of_a_fresh_build(tmp_path: Path, encoded: list[str], near: str | None) -> None:
    root, out = corpus(tmp_path / "corpus"), tmp_path / "shards"
    options = {"shard_size_bytes": SHARD_SIZE_BYTES, "near_duplicates": near_duplicate_finder(near)}
    first = build(FolderSource(root=root), out, BuildOptions(**options))
    assert first.rows["failed"] == len(DAMAGED)
    assert len(first.shards) > 2
    sidecar = out / f"{first.shards[-1].name}.tokens-0123456789abcdef.parquet"
    sidecar.touch()
    before = builds.ledger_rows(out)
    mend(root, DAMAGED[:4])
    encoded.clear()
    second = build(FolderSource(root=root), out, BuildOptions(**options, retry_failed=True))
    again = {row["id"] for row in before if row["status"] in (("failed",) if near is None else ("failed", "duplicate"))}
    assert set(encoded) == again, "nothing else is encoded"
    assert second.rows == {"kept": 392, "filtered": 0, "failed": 1, "duplicate": 7}
    assert not sidecar.exists(), "token counts of other bytes are gone"
    assert not verify(out).damage
    fresh = tmp_path / "fresh"
    build(FolderSource(root=root), fresh, BuildOptions(**options))
    assert builds.files(out) == builds.files(fresh)
    first_of = {row["id"]: row["duplicate_of"] for row in before if row["status"] == "duplicate"}
    now = {row["id"]: row["duplicate_of"] for row in builds.ledger_rows(out)}
    assert any(now[row] not in ("", first) for row, first in first_of.items()), "a mended row is now the first"


def test_rows_that_fail_again_leave_everything_as_it_was(tmp_path: Path, encoded: list[str]) -> None:
    root, out = corpus(tmp_path / "corpus"), tmp_path / "shards"
    build(FolderSource(root=root), out, BuildOptions(shard_size_bytes=SHARD_SIZE_BYTES))
    before = builds.files(out)
    sidecar = out / "shard-000000.tokens-0123456789abcdef.parquet"
    sidecar.write_bytes(b"counts")
    encoded.clear()
    build(FolderSource(root=root), out, BuildOptions(shard_size_bytes=SHARD_SIZE_BYTES, retry_failed=True))
    assert len(encoded) == len(DAMAGED)
    assert builds.files(out) == before | {sidecar.name: b"counts"}


@pytest.mark.parametrize("stop_at", ["while it builds", "while it takes its place"])
def test_a_retry_that_is_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: str) -> None:
    root, out = corpus(tmp_path / "corpus"), tmp_path / "shards"
    options = BuildOptions(shard_size_bytes=SHARD_SIZE_BYTES)
    build(FolderSource(root=root), out, options)
    before = builds.files(out)
    mend(root)
    retry = BuildOptions(shard_size_bytes=SHARD_SIZE_BYTES, retry_failed=True)
    with monkeypatch.context() as patch:
        if stop_at == "while it builds":
            patch.setattr("triweave.data_pipeline.shards.build._write_manifest", interrupted)
        else:
            plain = Path.replace

            def replace(path: Path, target: Path) -> Path:
                if path.name == "shard-000001.tar" and path.parent.name == "retried":
                    raise KeyboardInterrupt
                return plain(path, target)

            patch.setattr(Path, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            build(FolderSource(root=root), out, retry)
    if stop_at == "while it builds":
        whole = {name: data for name, data in builds.files(out).items() if not name.startswith(".build")}
        assert whole == before, "what is there stays whole until the new build is"
    else:
        assert not (out / "manifest.json").exists(), "half of each is not taken for a finished folder"
    build(FolderSource(root=root), out, retry)
    fresh = tmp_path / "fresh"
    build(FolderSource(root=root), fresh, options)
    assert builds.files(out) == builds.files(fresh)


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_what_did_not_fail_may_not_change(tmp_path: Path) -> None:
    root, out = corpus(tmp_path / "corpus"), tmp_path / "shards"
    build(FolderSource(root=root), out, BuildOptions())
    before, retry = builds.files(out), BuildOptions(retry_failed=True)
    (root / "text005.txt").write_text("another length")
    with pytest.raises(BuildError, match=r"row 'text005' has changed since it was built: .*--overwrite"):
        build(FolderSource(root=root), out, retry)
    (root / "text005.txt").unlink()
    with pytest.raises(BuildError, match="input_rows 400 there, 399 now"):
        build(FolderSource(root=root), out, retry)
    shutil.copy(root / "text006.txt", root / "text005a.txt")
    with pytest.raises(BuildError, match="rows were added, removed or renamed"):
        build(FolderSource(root=root), out, retry)
    with pytest.raises(BuildError, match=r"filters None there, \{'min_words': 3\} now"):
        build(FolderSource(root=root), out, BuildOptions(retry_failed=True, filters=FilterOptions(min_words=3)))
    assert builds.files(out) == before
    with pytest.raises(BuildError, match="holds no finished build"):
        build(FolderSource(root=root), tmp_path / "nothing", retry)
    with pytest.raises(BuildError, match="give one of them"):
        build(FolderSource(root=root), out, BuildOptions(retry_failed=True, overwrite=True))


def test_a_damaged_sample_is_not_copied(tmp_path: Path) -> None:
    root, out = corpus(tmp_path / "corpus"), tmp_path / "shards"
    manifest = build(FolderSource(root=root), out, BuildOptions())
    tar = Manifest.load(out).tar_path(0)
    data = bytearray(tar.read_bytes())
    data[600] ^= 1
    tar.write_bytes(data)
    with pytest.raises(BuildError, match="run `triweave verify"):
        build(FolderSource(root=root), out, BuildOptions(retry_failed=True))
    assert Manifest.load(out) == manifest
    assert len(read_ledger(manifest.ledger_path)) == 400
