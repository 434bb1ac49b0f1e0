"""Sources that read a published layout: conversations, interleaved Parquet, captions, questions, speech, dialogues."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from triweave.data_pipeline.errors import FetchError, MediaError, SourceError
from triweave.data_pipeline.fetch.packages import folder_corpus
from triweave.data_pipeline.shards.media_encoder import MediaEncoder, MediaOptions
from triweave.data_pipeline.shards.schema import Document, TextPart
from triweave.data_pipeline.sources.base import FilteredError, Source
from triweave.data_pipeline.sources.captions import CocoSource, Flickr30kSource
from triweave.data_pipeline.sources.chat import ChatSource
from triweave.data_pipeline.sources.fillets import FilletsSource, read_lines
from triweave.data_pipeline.sources.interleaved import InterleavedSource
from triweave.data_pipeline.sources.json_records import json_records, read_json_record
from triweave.data_pipeline.sources.speech import CommonVoiceSource, LibriSpeechSource
from triweave.data_pipeline.sources.vqa import VqaSource

Media = Callable[..., bytes]


def outcomes(source: Source) -> dict[str, Document | str]:
    """Return row id -> document, or why there is none; the recipe goes through JSON, as it does in a build."""
    encoder = MediaEncoder(MediaOptions())
    result: dict[str, Document | str] = {}
    for row in source.rows():
        assert json.loads(json.dumps(row.recipe)) == row.recipe
        try:
            result[row.id] = row.filtered or row.failed or source.document(row, encoder)
        except (FilteredError, SourceError, MediaError, ValueError, OSError) as error:
            result[row.id] = str(error)
    return result


def shape(document: Document | str) -> list[str]:
    assert isinstance(document, Document), document
    return [
        f"{part.role or ''}:{part.text}" if isinstance(part, TextPart) else f"{part.modality}.{part.extension}"
        for part in document.parts
    ]


def labels(document: Document | str) -> dict[str, Any]:
    assert isinstance(document, Document), document
    return document.labels


def write(path: Path, content: bytes | str | Any) -> Path:
    """Write bytes, text, or anything else as JSON, with the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, (bytes, str)):
        content = json.dumps(content, ensure_ascii=False)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


CHATS: list[Any] = [
    {
        "id": "7",
        "image": "pictures/a.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWas ist das – ein Vogel?"},
            {"from": "gpt", "value": "An owl."},
        ],
    },
    {
        "id": 8,
        "images": ["pictures/a.png", "pictures/b.png"],
        "audio": "c.flac",
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": [{"type": "text", "text": "Look:"}, {"type": "image"}, {"type": "audio"}]},
            {"role": "assistant", "content": "Two."},
        ],
    },
    {"id": "9", "image": "pictures/none.png", "conversations": [{"from": "human", "value": "<image> ?"}]},
    {"id": "10", "conversations": [{"from": "human", "value": "<image> ?"}]},
    {"id": "11", "conversations": [{"from": "narrator", "value": "Hm."}]},
    {"id": "12"},
    "no object",
]


@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_conversations(tmp_path: Path, picture: Media, clip: Media, ending: str) -> None:
    for name, content in {"pictures/a.png": picture(1), "pictures/b.png": picture(2), "c.flac": clip(3)}.items():
        write(tmp_path / "media" / name, content)
    text = json.dumps(CHATS, indent=1, ensure_ascii=False)
    if ending == "jsonl":
        text = "".join(json.dumps(chat, ensure_ascii=False) + "\n" for chat in CHATS) + "{cut\n"
    source = ChatSource(root=write(tmp_path / f"chats.{ending}", text), media=tmp_path / "media")
    found = outcomes(source)
    assert shape(found["7#0"]) == ["image.png", "user:Was ist das – ein Vogel?", "assistant:An owl."]
    assert shape(found["8#1"]) == [
        "image.png", "system:Be kind.", "user:Look:", "image.png", "audio.flac", "assistant:Two."
    ]  # fmt: skip
    assert found["9#2"] == "without 1 media: pictures/none.png is not there"
    assert found["10#3"] == "1 markers <image> for 0 paths in 'image'"
    assert "unknown speaker 'narrator'; known are human" in str(found["11#4"])
    assert "has no turns" in str(found["12#5"])
    assert found["record:6"] == "record 6 is no object but str"
    assert len(found) == len(CHATS) + (ending == "jsonl")


@pytest.mark.parametrize(
    ("text", "says"),
    [("{}", "must be a JSON array"), ('[{"a": 1}, {"b"', "record 1 is not JSON"), ('[{"a": 1}', "cut short")],
)
def test_a_file_that_is_no_array_of_records_is_refused(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(SourceError, match=says):
        list(json_records(write(tmp_path / "a.json", text)))


def test_records_are_found_again_by_their_bytes(tmp_path: Path) -> None:
    values = [{"é": "ß" * n, "n": [n, {"日": None}]} for n in range(5)]
    path = write(tmp_path / "a.json", "\ufeff"[:0] + json.dumps(values, indent=2, ensure_ascii=False))
    assert [read_json_record(path, record.start, record.size) for record in json_records(path)] == values


def test_interleaved_pages(tmp_path: Path, picture: Media) -> None:
    urls = {name: f"https://example.org/{name}" for name in ("a.jpg", "b.png", "gone.png")}
    hashes = {name: hashlib.sha256(url.encode()).hexdigest() for name, url in urls.items()}
    media = tmp_path / "media"
    write(media / f"{hashes['a.jpg']}.jpg", picture(1, form="JPEG"))
    write(media / hashes["b.png"][:2] / f"{hashes['b.png']}.png", picture(2))
    rows = [
        {
            "texts": ["Owls", None, None, "hunt.", None],
            "images": [None, urls["a.jpg"], urls["gone.png"], None, urls["b.png"]],
            "metadata": json.dumps([None, {"alt_text": "an owl"}, None, None, None]),
            "general_metadata": json.dumps({"url": "https://example.org/page"}),
        },
        {"texts": [None], "images": [urls["gone.png"]], "metadata": "no JSON", "general_metadata": None},
        {"texts": None, "images": None, "metadata": None, "general_metadata": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pages.parquet", row_group_size=2)
    found = outcomes(InterleavedSource(root=tmp_path / "pages.parquet", media=media))
    page = found["pages.parquet:0:0"]
    assert shape(page) == [":Owls", "image.jpg", ":hunt.", "image.png"]
    assert isinstance(page, Document)
    assert page.parts[1].alt == "an owl"  # type: ignore[union-attr]
    assert page.source == {"corpus": "pages", "url": "https://example.org/page"}
    assert page.left_out == f"without 1 media: {urls['gone.png']} is not there"
    assert found["pages.parquet:0:1"] == f"without 1 media: {urls['gone.png']} is not there"
    assert found["pages.parquet:1:0"] == "no text and no picture"
    write(tmp_path / "cut.parquet", (tmp_path / "pages.parquet").read_bytes()[:-20])
    without = outcomes(InterleavedSource(root=tmp_path, media=None))
    assert shape(without["pages.parquet:0:0"]) == [":Owls\n\nhunt."]
    assert "is no whole Parquet file" in str(without["file:cut.parquet"])


def test_interleaved_pages_with_their_pictures_in_the_rows(tmp_path: Path, picture: Media) -> None:
    rows = [{"texts": ["x", None], "images": [None, {"bytes": picture(1), "path": "a.png"}]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "m.parquet")
    found = outcomes(InterleavedSource(root=tmp_path / "m.parquet"))
    assert shape(found["m.parquet:0:0"]) == [":x", "image.png"]
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "other.parquet")
    with pytest.raises(SourceError, match="has no column 'texts'"):
        list(InterleavedSource(root=tmp_path / "other.parquet").rows())


def test_coco(tmp_path: Path, picture: Media) -> None:
    images = [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}, {"id": 3, "file_name": "c.jpg"}]
    notes = [
        {"id": 10, "image_id": 1, "caption": " An\nowl. "},
        {"id": 11, "image_id": 1, "caption": "A bird."},
        {"id": 12, "image_id": 2, "caption": "A jay."},
        {"id": 13, "image_id": 9, "caption": "?"},
        {"id": 14, "image_id": 3, "caption": "  "},
    ]
    write(tmp_path / "annotations/captions_val2017.json", {"images": images, "annotations": notes})
    write(tmp_path / "val2017/a.jpg", picture(1, form="JPEG"))
    write(tmp_path / "images/c.jpg", picture(3, form="JPEG"))
    found = outcomes(CocoSource(root=tmp_path))
    assert shape(found["val2017/10"]) == ["image.jpg", ":An owl."]
    assert labels(found["val2017/10"])["group"] == labels(found["val2017/11"])["group"]
    assert found["val2017/12"] == "b.jpg is in none of the folders val2017, images"
    assert found["val2017/13"] == "image 9 is not listed"
    assert found["val2017/14"] == "an empty caption"


@pytest.mark.parametrize("file", ["results_20130124.token", "results.csv"])
def test_flickr30k(tmp_path: Path, picture: Media, file: str) -> None:
    lines = {
        "results_20130124.token": "1.jpg#0\tTwo dogs .\n1.jpg#1\tDogs .\nnonsense\n",
        "results.csv": "image_name| comment_number| comment\n1.jpg| 0| Two dogs .\n1.jpg| 1| Dogs .\nnonsense\n",
    }
    write(tmp_path / file, lines[file])
    write(tmp_path / "flickr30k-images/1.jpg", picture(1, form="JPEG"))
    found = outcomes(Flickr30kSource(root=tmp_path))
    assert shape(found["1.jpg#0"]) == ["image.jpg", ":Two dogs ."]
    assert labels(found["1.jpg#0"])["split"] == labels(found["1.jpg#1"])["split"]
    assert [text for text in found.values() if isinstance(text, str)] == [
        f"line {3 if file.endswith('token') else 4} is not a picture's name, a number and a caption"
    ]


def test_vqa(tmp_path: Path, picture: Media) -> None:
    questions = [{"question_id": n, "image_id": 9 if n < 3 else 8, "question": f"What is {n}?"} for n in (1, 2, 3)]
    answer = {
        "multiple_choice_answer": "owl",
        "answers": [{"answer": "owl"}, {"answer": "bird"}],
        "answer_type": "other",
    }
    write(tmp_path / "v2_OpenEnded_mscoco_train2014_questions.json", {"questions": questions})
    write(
        tmp_path / "v2_mscoco_train2014_annotations.json",
        {"annotations": [{"question_id": n, "question_type": "what is", **answer} for n in (1, 3)]},
    )
    write(tmp_path / "train2014/COCO_train2014_000000000009.jpg", picture(1, form="JPEG"))
    found = outcomes(VqaSource(root=tmp_path))
    assert shape(found["train2014/1"]) == ["image.jpg", "user:What is 1?", "assistant:owl"]
    assert labels(found["train2014/1"])["answers"] == ["owl", "bird"]
    assert found["train2014/2"] == "no answer"
    assert found["train2014/3"] == "COCO_train2014_000000000008.jpg is in neither train2014 nor images"


def test_librispeech(tmp_path: Path, clip: Media) -> None:
    folder = tmp_path / "dev-clean/84/121"
    write(folder / "84-121.trans.txt", "84-121-0000 GO  DO\n84-121-0001 YOU HEAR\n84-121-0002\n")
    for number in (0, 2):
        write(folder / f"84-121-000{number}.flac", clip(number))
    found = outcomes(LibriSpeechSource(root=tmp_path))
    assert shape(found["84-121-0000"]) == ["audio.flac", ":GO DO"]
    assert labels(found["84-121-0000"])["speaker"] == "84"
    assert labels(found["84-121-0000"])["subset"] == "dev-clean"
    assert found["84-121-0001"] == "dev-clean/84/121/84-121-0001.flac is not there"
    assert found["84-121-0002"] == "no transcript"


def test_common_voice(tmp_path: Path, clip: Media) -> None:
    header = "client_id\tpath\tsentence\tup_votes\tlocale"
    lines = ['aaaabbbbccccddddeeee\tx.mp3\tHe said "no.\t2\ten', "b\ty\tMissing.\t2\ten", "c\t../../z.mp3\tOut.\t2\ten"]
    write(tmp_path / "validated.tsv", "\n".join([header, *lines]) + "\n")
    write(tmp_path / "clips/x.mp3", clip(1))
    write(tmp_path.parent / "z.mp3", clip(2))
    found = outcomes(CommonVoiceSource(root=tmp_path))
    assert shape(found["x.mp3"]) == ["audio.flac", ':He said "no.']
    assert labels(found["x.mp3"])["speaker"] == "aaaabbbbccccdddd"
    assert labels(found["x.mp3"])["language"] == "en"
    assert found["y.mp3"] == "clips/y.mp3 is not there"
    assert found["../../z.mp3"] == "clips/../../z.mp3 is not there"
    (tmp_path / "validated.tsv").write_text("a\tb\n")
    with pytest.raises(SourceError, match="has no column 'client_id'"):
        list(CommonVoiceSource(root=tmp_path).rows())


@pytest.fixture
def game(tmp_path: Path, picture: Media, clip: Media) -> Path:
    root = tmp_path / "game"
    write(root / "script/reef/models.lua", 'createRoom(45, 27, "images/"..codename.."/reef-p.png")')
    write(
        root / "script/reef/dialogs_en.lua", 'dialogId("a", "font_big", "Look!")\ndialogId("b", "f", "Say \\"no\\".")'
    )
    write(root / "script/reef/dialogs_cs.lua", 'dialogId("a", "font_big", "Look!")\ndialogStr(\n"Hle!")')
    write(root / "script/reef/dialogs_de.lua", 'dialogId("a", "font_big", "Look!")\ndialogStr("Schau!")')
    write(root / "script/share/bore_dialogs_cs.lua", 'dialogId("j", "font_big", "Joke")\ndialogStr("Vtip")')
    write(root / "script/reef/demo_dialogs_cs.lua", 'dialogId("d", "f", "Demo")')
    write(root / "images/reef/reef-p.png", picture(1))
    for path in ("sound/reef/en/b", "sound/reef/cs/a", "sound/share/borejokes/cs/j"):
        write(root / f"{path}.ogg", clip(len(path), form="OGG"))
    return root


def test_fillets(game: Path) -> None:
    found = outcomes(FilletsSource(root=game))
    assert shape(found["reef/en"]) == ["image.png", ":Look!", "audio.ogg", ':Say "no".']
    assert shape(found["reef/cs"]) == ["image.png", "audio.ogg", ":Hle!"]
    assert shape(found["share/borejokes/cs"]) == ["audio.ogg", ":Vtip"]
    assert found["reef/de"] == "no line is voiced"
    assert len(found) == 4
    assert labels(found["reef/en"])["group"] == labels(found["reef/cs"])["group"]
    only = outcomes(FilletsSource(root=game, languages=("cs",)))
    assert only["reef/en"] == "language is not among those asked for"


def test_a_script_is_read_and_not_run() -> None:
    assert read_lines('os.execute("rm") dialogId("a" , "f", "x\\ny")')[0].text == "x\ny"
    assert read_lines('dialogStr("before any line")') == []


def test_a_corpus_of_packages_is_copied_from_an_unpacked_tree(game: Path, tmp_path: Path) -> None:
    corpus = folder_corpus("game", ("p",), "usr/game", ("script/**/*.lua",), megabytes=1)
    fetched = corpus.fetch(tmp_path / "out", game, lambda _: None)
    assert (fetched.corpus, fetched.files) == ("game", 6)
    assert not (tmp_path / "out" / "images").exists()
    again = corpus.fetch(tmp_path / "out", None, lambda _: None)
    assert again.files == 6
    with pytest.raises(FetchError, match=r"holds no script/.*give copies with --from FOLDER \(the .deb files of p"):
        corpus.fetch(tmp_path / "none", tmp_path / "out" / "script", lambda _: None)


def test_the_source_that_the_docs_show_how_to_add(tmp_path: Path, picture: Media) -> None:
    """The code is cut out of docs/corpora.md as it stands there."""
    text = (Path(__file__).parents[2] / "docs" / "corpora.md").read_text(encoding="utf-8")
    section = text.partition("## How to add a source\n")[2].partition("\n## ")[0]
    code = "\n".join(line[4:] for line in section.splitlines() if line.startswith("    ") or not line.strip())
    names: dict[str, Any] = {}
    modules = "base import Row, walk_files", "collected_parts import CollectedParts"
    header = "from dataclasses import dataclass\nfrom pathlib import Path\nfrom typing import Any, Iterator\n"
    header += "".join(f"from triweave.data_pipeline.sources.{line}\n" for line in modules)
    header += "from triweave.data_pipeline.shards.media_encoder import MediaEncoder\n"
    header += "from triweave.data_pipeline.shards.schema import Document\n"
    exec(header + code, names)
    write(tmp_path / "owl.jpg", picture(1, form="JPEG"))
    write(tmp_path / "cut.jpg", picture(2, form="JPEG")[:300])
    found = outcomes(names["PostcardSource"](root=tmp_path))
    assert shape(found["owl.jpg"]) == ["image.jpg", ":A postcard."]
    assert isinstance(found["cut.jpg"], Document)
    assert "cut.jpg is damaged" in found["cut.jpg"].left_out
