"""Repair: every kind of damage back to the very bytes, and refusals that leave everything as it is."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from triweave.data_pipeline.errors import RepairError
from triweave.data_pipeline.shards import repair as repair_module
from triweave.data_pipeline.shards.build import BuildOptions
from triweave.data_pipeline.shards.index import read_index
from triweave.data_pipeline.shards.manifest import Manifest
from triweave.data_pipeline.shards.media_encoder import MediaEncoder, MediaOptions
from triweave.data_pipeline.shards.repair import RepairReport, repair
from triweave.data_pipeline.shards.schema import Document
from triweave.data_pipeline.shards.verify import verify
from triweave.data_pipeline.sources.base import Row
from triweave.data_pipeline.sources.folder import FolderSource
from triweave.launch.cli import main

Change = Callable[[bytes], bytes | None]
OPTIONS = BuildOptions(shard_size_bytes=60_000)
SHARD = 1


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def corpus(tiny_corpus: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_corpus, tmp_path / tiny_corpus.name))


@pytest.fixture
def manifest(tiny_shards: Manifest, tmp_path: Path) -> Manifest:
    return Manifest.load(shutil.copytree(tiny_shards.root, tmp_path / "shards"))


def repaired(manifest: Manifest, corpus: Path) -> RepairReport:
    return repair(FolderSource(root=corpus), manifest.root, OPTIONS)


def flipped(at: int) -> Change:
    return lambda data: data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def gone(_data: bytes) -> None:
    return None


TAR, OFFSETS, INDEX, LEDGER = "shard-000001.tar", "shard-000001.tar.idx", "shard-000001.parquet", "ledger.parquet"
DAMAGES: dict[str, dict[str, Change]] = {
    "a flipped byte": {TAR: flipped(700)},
    "a flipped byte behind the samples": {TAR: lambda data: flipped(len(data) - 5)(data)},
    "a cut tar": {TAR: lambda data: data[: len(data) // 2]},
    "an empty tar": {TAR: lambda _: b""},
    "a longer tar": {TAR: lambda data: data + b"x"},
    "no tar": {TAR: gone},
    "no offsets": {OFFSETS: gone},
    "a changed index": {INDEX: flipped(100)},
    "a changed index and a changed tar": {INDEX: flipped(100), TAR: flipped(700)},
    "a changed ledger": {LEDGER: flipped(100)},
    "no ledger and no tar": {LEDGER: gone, TAR: gone},
    "all gone": {LEDGER: gone, TAR: gone, OFFSETS: gone, INDEX: gone},
}


def damage_file(folder: Path, name: str, change: Change) -> None:
    data = change((folder / name).read_bytes())
    (folder / name).unlink()
    if data is not None:
        (folder / name).write_bytes(data)


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_is_mended_to_the_very_bytes(manifest: Manifest, corpus: Path, damage: str) -> None:
    before = bytes_of(manifest.root)
    for name, change in DAMAGES[damage].items():
        damage_file(manifest.root, name, change)
    assert verify(manifest.root).damage
    result = repaired(manifest, corpus)
    assert not result.report.damage
    assert not result.refused
    assert bytes_of(manifest.root) == before
    assert result.repaired


def test_whole_samples_are_copied_and_only_damaged_ones_made_again(
    manifest: Manifest, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = read_index(manifest, SHARD).to_pylist()[1]
    damage_file(manifest.root, TAR, flipped(row["json_offset"] + 5))
    made: list[str] = []
    document = FolderSource.document

    def note(self: FolderSource, row: Row, encoder: MediaEncoder) -> Document:
        made.append(row.id)
        return document(self, row, encoder)

    monkeypatch.setattr(FolderSource, "document", note)
    result = repaired(manifest, corpus)
    assert made == [row["id"]]
    assert (result.samples_copied, result.samples_encoded) == (manifest.shards[SHARD].samples - 1, 1)
    assert result.repaired == (TAR,)


def test_a_whole_tar_gives_its_lost_index_without_the_source(manifest: Manifest, corpus: Path) -> None:
    damage_file(manifest.root, INDEX, gone)
    result = repaired(manifest, corpus)
    assert (result.samples_copied, result.samples_encoded) == (manifest.shards[SHARD].samples, 0)
    assert result.repaired == (INDEX,)


def test_whole_shards_are_left_alone(manifest: Manifest, corpus: Path) -> None:
    times = {path: path.stat().st_mtime_ns for path in manifest.root.iterdir()}
    assert repaired(manifest, corpus).repaired == ()
    assert {path: path.stat().st_mtime_ns for path in manifest.root.iterdir()} == times


def test_what_a_repair_left_that_was_killed_at_its_end_is_removed(manifest: Manifest, corpus: Path) -> None:
    (manifest.root / ".repair" / "media").mkdir(parents=True)
    assert repaired(manifest, corpus).repaired == ()
    assert not (manifest.root / ".repair").exists()


@pytest.mark.parametrize(
    ("said", "says", "why"), [(". ", ", ", "row 'ROW' gives other bytes now"), ('"number"', '"nombre"', "it comes out")]
)
def test_a_file_that_changed_within_its_size_is_never_put_in(
    manifest: Manifest, corpus: Path, said: str, says: str, why: str
) -> None:
    """The listing cannot see it; the hashes do, and the other shard is repaired all the same."""
    ids = [row["id"] for row in read_index(manifest, SHARD).to_pylist()]
    changed = next(row_id for row_id in ids if (corpus / row_id).with_suffix(".json").is_file())
    victim = (corpus / changed).with_suffix(".json")
    victim.write_text(victim.read_text(encoding="utf-8").replace(said, says), encoding="utf-8")
    for number in (0, SHARD):
        manifest.tar_path(number).unlink()
    before = bytes_of(manifest.root)
    result = repaired(manifest, corpus)
    assert list(result.refused) == ["shard-000001"]
    assert result.refused["shard-000001"].startswith(why.replace("ROW", changed))
    assert result.repaired == ("shard-000000.tar",)
    assert {damage.shard for damage in result.report.damage} == {"shard-000001"}
    after = bytes_of(manifest.root)
    assert after.pop("shard-000000.tar")
    assert after == before


def test_another_source_or_other_options_are_refused(manifest: Manifest, corpus: Path) -> None:
    manifest.tar_path(SHARD).unlink()
    before = bytes_of(manifest.root)
    source = FolderSource(root=corpus)
    with pytest.raises(RepairError, match=r"was built otherwise \(shard_size_bytes 60000 then, 50000 now\)"):
        repair(source, manifest.root, replace(OPTIONS, shard_size_bytes=50_000))
    with pytest.raises(RepairError, match="image_max_side_px None then, 32 now"):
        repair(source, manifest.root, replace(OPTIONS, media=MediaOptions(image_max_side_px=32)))
    (corpus / "more.txt").write_text("A new bird.")
    with pytest.raises(RepairError, match=r"the source has changed since the build \(24 rows then, 25 now"):
        repair(source, manifest.root, OPTIONS)
    (corpus / "more.txt").unlink()
    with pytest.raises(RepairError, match="only a folder of this machine"):
        repair(source, Path("s3://bucket/shards"), OPTIONS)
    (manifest.root / "manifest.json").write_text("{}")
    with pytest.raises(RepairError, match="without its manifest"):
        repair(source, manifest.root, OPTIONS)
    assert bytes_of(manifest.root) | {"manifest.json": b""} == before | {"manifest.json": b""}


def test_an_interrupted_repair_leaves_only_whole_files_and_can_be_begun_again(
    manifest: Manifest, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = bytes_of(manifest.root)
    for number in range(3):
        manifest.tar_path(number).unlink()
    put = repair_module._Repair._put

    def interrupt(self: repair_module._Repair, made: Path, xxh3: str) -> None:
        if made.name == "shard-000001.tar":
            raise KeyboardInterrupt
        put(self, made, xxh3)

    with monkeypatch.context() as patch:
        patch.setattr(repair_module._Repair, "_put", interrupt)
        with pytest.raises(KeyboardInterrupt):
            repaired(manifest, corpus)
    assert all(before[name] == data for name, data in bytes_of(manifest.root).items())
    assert manifest.tar_path(0).is_file()
    (manifest.root / ".repair" / "media").mkdir(parents=True)  # as a kill leaves it
    (manifest.root / ".repair" / "shard-000002.tar.tmp").write_bytes(b"half")
    assert not repaired(manifest, corpus).report.damage
    assert bytes_of(manifest.root) == before


def test_one_repair_at_a_time(manifest: Manifest, corpus: Path) -> None:
    manifest.tar_path(SHARD).unlink()
    with open(manifest.root / "manifest.json", "rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RepairError, match="another process repairs it"):
            repaired(manifest, corpus)


def test_the_command(tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With every kind of step in the build, and from the exit code's point of view."""
    (corpus / "en" / "mail.txt").write_text("Write to anna@site.org.")
    (tmp_path / "list.txt").write_text("word: nothing here")
    how = ["--source", "folder", "--input", str(corpus), "--scrub", "pii", "--annotate", "language,words",
           "--image-max-side", "32", "--blocklist", str(tmp_path / "list.txt"), "--dedup", "image=2"]  # fmt: skip
    shards = tmp_path / "built"
    assert main(["build", *how, "--out", str(shards)]) == 0
    before = bytes_of(shards)
    (shards / "shard-000000.tar").unlink()
    assert main(["verify", str(shards)]) == 1
    assert main(["verify", str(shards), "--repair", *how[:-2]]) == 2
    assert "was built otherwise" in capsys.readouterr().err
    assert main(["verify", str(shards), "--json", "--repair", *how]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["whole"] is True
    assert content["repaired"] == ["shard-000000.tar"]
    assert content["samples_encoded"] == content["samples"]
    assert bytes_of(shards) == before
    with pytest.raises(SystemExit) as wrong:
        main(["verify", str(shards), "--repair", "--no-such-option"])
    assert wrong.value.code == 2
