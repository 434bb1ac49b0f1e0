"""The Tux Paint source on a small tree of the same layout."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest

from triweave.data_pipeline.errors import SourceError
from triweave.data_pipeline.shards.build import BuildOptions, build
from triweave.data_pipeline.shards.ledger import read_ledger
from triweave.data_pipeline.shards.media_encoder import MediaEncoder, MediaOptions
from triweave.data_pipeline.shards.schema import Document, TextPart
from triweave.data_pipeline.sources.tuxpaint import TuxPaintSource, part_order
from triweave.data_pipeline.splits import SPLITS, normalise_text, split_of

CAPTIONS = "A  small\tcat. x=1\nde.utf8=Eine Katze.\npt_BR.utf8=Um gato.\nfr.utf8=\nzh_TW.utf8=貓\nnonsense\n"


@pytest.fixture
def root(tmp_path: Path, picture: Callable[..., bytes], clip: Callable[..., bytes]) -> Path:
    """One whole stamp with speech in four languages and an effect, and one of every odd case."""
    cats = tmp_path / "stamps" / "animals" / "cats"
    cats.mkdir(parents=True)
    for name, content in {
        "cat.png": picture(1, width=64, height=48),
        "cat.svg": b"<svg/>",
        "cat.dat": b"scale 10%",
        "cat.txt": CAPTIONS.encode(),
        "cat_desc.ogg": clip(1, form="OGG"),
        "cat_desc_de.ogg": clip(2, form="OGG"),
        "cat_desc_pt_BR.wav": clip(3, form="WAV"),
        "cat_desc_zh_tw.ogg": clip(4, form="OGG"),
        "cat_desc_ru.ogg": clip(5, form="OGG"),
        "cat.wav": clip(6, form="WAV"),
        "cat_de.ogg": clip(7, form="OGG"),
        "cat_mirror.png": picture(2),
        "cat_flip.png": picture(3),
        "lonely.png": picture(4),
        "drawn.svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="4"><rect width="8" height="4"/></svg>',
        "drawn.txt": b"A drawing.\nde.utf8=Eine Zeichnung.\n",
        "bare.txt": b"No picture.\n",
        "noise.ogg": clip(8, form="OGG"),
    }.items():
        (cats / name).write_bytes(content)
    return tmp_path


def documents(source: TuxPaintSource) -> dict[str, Document]:
    encoder = MediaEncoder(MediaOptions())
    return {row.id: source.document(row, encoder) for row in source.rows() if not row.is_decided}


def modalities(document: Document) -> list[str]:
    return [part.modality for part in document.parts]


def test_one_document_per_picture_and_language(root: Path) -> None:
    found = documents(TuxPaintSource(root=root, part_order="canonical"))
    assert list(found) == [f"animals/cats/cat:{name}" for name in ("en", "de", "pt_BR", "zh_TW", "effect")]
    english = found["animals/cats/cat:en"]
    assert english.parts[1] == TextPart(text="A small cat. x=1")
    group = english.labels["group"]
    assert english.labels == {
        "category": "animals",
        "language": "en",
        "stem": "animals/cats/cat",
        "kind": "speech",
        "group": group,
        "split": split_of(group),
    }
    assert {document.labels["group"] for document in found.values()} == {group}
    assert english.source == {"corpus": "tuxpaint-stamps", "license": "GPL-2.0-or-later"}
    for name in ("en", "de", "pt_BR", "zh_TW"):
        assert modalities(found[f"animals/cats/cat:{name}"]) == ["image", "text", "audio"]
    effect = found["animals/cats/cat:effect"]
    assert modalities(effect) == ["image", "audio", "text"]
    assert (effect.parts[2], effect.labels["kind"]) == (english.parts[1], "effect")
    assert effect.parts[1] != english.parts[2]


def test_every_other_file_is_accounted_for(root: Path) -> None:
    reasons = {row.id: row.filtered for row in TuxPaintSource(root=root).rows() if row.is_decided}
    cats = "animals/cats"
    assert reasons == {
        f"{cats}/cat:fr": "no caption",
        f"{cats}/drawn:en": "the picture is an SVG (build with --svg)",
        f"{cats}/drawn:de": "the picture is an SVG (build with --svg)",
        f"{cats}/bare:en": "no picture",
        f"file:{cats}/cat_mirror.png": "a mirrored or flipped variant",
        f"file:{cats}/cat_flip.png": "a mirrored or flipped variant",
        f"file:{cats}/lonely.png": "a picture without captions",
        f"file:{cats}/cat_desc_ru.ogg": "speech without a caption in its language",
        f"file:{cats}/cat_de.ogg": "a sound effect in one language",
        f"file:{cats}/noise.ogg": "a sound without a picture",
    }


def test_options_leave_things_out(root: Path) -> None:
    german = documents(TuxPaintSource(root=root, languages=("de",)))
    assert list(german) == ["animals/cats/cat:de"]
    silent = documents(TuxPaintSource(root=root, speech=False, effects=False))
    assert [set(modalities(document)) for document in silent.values()] == [{"image", "text"}] * 4
    assert {document.labels["kind"] for document in silent.values()} == {"caption"}


def test_svg_needs_its_extra_or_is_rendered(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(SourceError, match="needs the package resvg-py"):
        TuxPaintSource(root=root, svg=True)
    monkeypatch.undo()
    pytest.importorskip("resvg_py")
    drawn = documents(TuxPaintSource(root=root, svg=True))["animals/cats/drawn:de"]
    image = next(part for part in drawn.parts if not isinstance(part, TextPart))
    assert (image.info.width, image.info.height, image.extension) == (512, 256, "png")


def test_mixed_order_is_dealt_by_the_id_alone() -> None:
    speech = Counter(part_order(f"stamp {number}", "speech", "mixed") for number in range(3000))
    assert sorted(speech) == [
        ("image", "caption", "speech"), ("image", "speech", "caption"), ("speech", "caption", "image"),
    ]  # fmt: skip
    assert min(speech.values()) > 900
    silent = Counter(part_order(f"stamp {number}", "caption", "mixed") for number in range(3000))
    assert 2100 < silent["image", "caption"] < 2400
    assert silent["caption", "image"] == 3000 - silent["image", "caption"]
    assert part_order("x", "speech", "mixed") == part_order("x", "speech", "mixed")
    assert part_order("x", "effect", "mixed") == ("image", "effect", "caption")


def test_wrong_use(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="triweave fetch tuxpaint"):
        list(TuxPaintSource(root=tmp_path / "nothing").rows())
    with pytest.raises(SourceError, match="no stamps in it"):
        list(TuxPaintSource(root=tmp_path).rows())
    with pytest.raises(SourceError, match="allowed are mixed, canonical"):
        TuxPaintSource(root=tmp_path, part_order="random")  # type: ignore[arg-type]


def test_a_shared_picture_is_encoded_once_for_all_documents(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from triweave.data_pipeline.media import images

    calls: list[int] = []
    plain = images.reencode
    monkeypatch.setattr(images, "reencode", lambda data, side: calls.append(side) or plain(data, side))
    options = BuildOptions(media=MediaOptions(image_max_side_px=32))
    manifest = build(TuxPaintSource(root=root), root / "shards", options)
    assert manifest.samples == 5
    assert calls == [32]
    encoder = MediaEncoder(options.media, root)
    path = root / "stamps" / "animals" / "cats" / "cat.png"
    first = encoder.encode_file(path, shared=True)
    second = MediaEncoder(options.media, root).encode_file(path, shared=True)
    assert first == second
    assert len(calls) == 2, "the second encoder takes it from the folder"
    (stored,) = [file for file in root.iterdir() if file.is_file()]
    stored.write_bytes(stored.read_bytes()[:-9])
    assert MediaEncoder(options.media, root).encode_file(path, shared=True) == first
    assert len(calls) == 3, "a damaged stored picture is made again"


def test_of_equal_captions_the_first_stays_and_every_spoken_one(root: Path) -> None:
    (root / "stamps/animals/cats/cat.txt").write_text("A cat.\nde.utf8=A cat.\nen_GB.utf8=A cat.\nfr.utf8=A cat.\n")
    whole = {row.id: row.filtered for row in TuxPaintSource(root=root).rows() if "/cat:" in row.id}
    assert whole == {
        "animals/cats/cat:en": None,
        "animals/cats/cat:de": None,  # spoken
        "animals/cats/cat:en_GB": "the caption of another language",
        "animals/cats/cat:fr": "the caption of another language",
        "animals/cats/cat:effect": None,
    }
    chosen = TuxPaintSource(root=root, languages=("en_GB", "fr"))
    kept = [row.id for row in chosen.rows() if not row.is_decided]
    assert kept == ["animals/cats/cat:en_GB"], "a language that is not asked for keeps nobody out"
    manifest = build(TuxPaintSource(root=root), root / "shards", BuildOptions())
    assert manifest.rows["duplicate"] == 0
    rows = {row["id"]: row for row in read_ledger(manifest.ledger_path).to_pylist()}
    assert rows["animals/cats/cat:fr"]["reason"] == "the caption of another language"


def write_stamps(folder: Path, stems: int, picture: Callable[..., bytes], clip: Callable[..., bytes]) -> Path:
    """Write stamps that share captions, spoken captions, pictures and clips at random, one in ten, and effects."""
    generator = random.Random(4)
    common = {name: [generator.randrange(1000) for _ in range(6)] for name in ("en", "de", "picture", "clip", "effect")}

    def number(name: str, stem: int, share: float = 0.1) -> int:
        return generator.choice(common[name]) if generator.random() < share else 1000 + stem

    for stem in range(stems):
        path = folder / "stamps" / f"category{stem % 5}" / f"stem{stem}"
        path.parent.mkdir(parents=True, exist_ok=True)
        english, german = number("en", stem), number("de", stem)
        shown = f"Thing {english}." if stem % 2 else f"THING  {english}"
        path.with_suffix(".txt").write_text(f"{shown}\nde.utf8=Ding {german}\nfr.utf8=Chose {stem}\n")
        path.with_suffix(".png").write_bytes(picture(number("picture", stem), width=8, height=8))
        path.with_name(f"stem{stem}_desc_de.wav").write_bytes(clip(number("clip", stem), ms=20, form="WAV"))
        if stem % 4 == 0:
            path.with_suffix(".wav").write_bytes(clip(number("effect", stem, 0.4), ms=30, form="WAV"))
    return folder


def test_no_caption_picture_or_clip_crosses_a_split(
    tmp_path: Path, picture: Callable[..., bytes], clip: Callable[..., bytes]
) -> None:
    root = write_stamps(tmp_path, 150, picture, clip)
    found = documents(TuxPaintSource(root=root))
    splits, groups = defaultdict(set), defaultdict(set)
    for document in found.values():
        for part in document.parts:
            unspoken = isinstance(part, TextPart) and document.labels["language"] == "fr"
            key = normalise_text(part.text) if isinstance(part, TextPart) else part.xxh3
            if not unspoken:
                splits[key].add(document.labels["split"])
                groups[key].add(document.labels["group"])
    assert max(map(len, groups.values())) == max(map(len, splits.values())) == 1
    assert set.union(*splits.values()) == set(SPLITS)
    stems = defaultdict(set)
    for document in found.values():
        stems[document.labels["group"]].add(document.labels["stem"])
    assert 60 < len(stems) < 130, "sharing joins stems, and not all of them"


def test_splits_are_the_same_whatever_is_built(
    tmp_path: Path, picture: Callable[..., bytes], clip: Callable[..., bytes]
) -> None:
    root = write_stamps(tmp_path, 40, picture, clip)
    whole = {name: document.labels["group"] for name, document in documents(TuxPaintSource(root=root)).items()}
    for source in (
        TuxPaintSource(root=root, languages=("fr",)),
        TuxPaintSource(root=root, speech=False, effects=False, part_order="canonical"),
    ):
        some = {name: document.labels["group"] for name, document in documents(source).items()}
        assert len(some) >= 40
        assert some == {name: whole[name] for name in some}
