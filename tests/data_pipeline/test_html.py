"""Pages of HTML: what is content, in which order, which pictures, and what hostile pages do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from triweave.data_pipeline.errors import SourceError
from triweave.data_pipeline.shards.build import BuildOptions, build
from triweave.data_pipeline.shards.ledger import read_ledger
from triweave.data_pipeline.shards.media_encoder import MediaEncoder, MediaOptions
from triweave.data_pipeline.shards.schema import Document, MediaPart, TextPart
from triweave.data_pipeline.sources.base import FilteredError
from triweave.data_pipeline.sources.html import HtmlSource, local_reference
from triweave.data_pipeline.sources.html_text import PageImage, PageText, read_page

Media = Callable[..., bytes]

PAGE = """<!DOCTYPE html><html lang="en"><head><title> All  about owls </title><style>p {}</style></head><body>
<div class="navheader"><a href="a">Prev</a> <img src="prev.png"></div>
<ul><li><a href="1">One page</a></li><li><a href="2">Two pages</a></li><li><a href="3">Three</a></li></ul>
<h1>Owls</h1><p>They hunt
 at&nbsp;night, see <a href="x">mice</a>.</p>
<figure><img src="img/owl.png" alt=" An  owl "><figcaption>A barn owl</figcaption></figure>
<ul><li><p>wings</p></li><li>eyes<br>ears</li></ul>
<table><tr><th>Name</th><td>Strix</td></tr></table>
<pre>if owl:
    hoot()</pre>
<p hidden>secret</p><script>alert("no")</script><img src="icon.png"><img src="https://example.org/far.png">
<img src="img/none.png"><img src="data:image/png;base64,AAAA"><img src="../../etc/passwd.png"><p>End.</p>
<div id="footer">Imprint</div></body></html>"""


@pytest.fixture
def pages(tmp_path: Path, picture: Media) -> Path:
    """Return a folder with the page above, its pictures, and a page that has nothing but links."""
    root = tmp_path / "site"
    (root / "en" / "img").mkdir(parents=True)
    (root / "en" / "owl.html").write_text(PAGE, encoding="utf-8")
    (root / "en" / "img" / "owl.png").write_bytes(picture(1))
    (root / "en" / "icon.png").write_bytes(picture(2, width=16, height=16))
    (root / "en" / "img" / "cut.png").write_bytes(picture(3)[:60])
    (root / "index.html").write_text(
        "<p>" + "".join(f"<a href='{n}'>Page {n}</a> " for n in range(9)), encoding="utf-8"
    )
    return root


def document(root: Path, name: str, **options: int) -> Document:
    source = HtmlSource(root=root, **options)  # type: ignore[arg-type]
    row = next(row for row in source.rows() if row.id == name)
    return source.document(row, MediaEncoder(MediaOptions()))


def test_a_page_is_read_in_order_and_without_its_frame(pages: Path) -> None:
    found = document(pages, "en/owl.html")
    first, image, second = found.parts
    assert isinstance(first, TextPart)
    assert isinstance(image, MediaPart)
    assert isinstance(second, TextPart)
    assert first.text == "Owls\n\nThey hunt at night, see mice."
    assert (image.extension, image.alt) == ("png", "An owl")
    assert second.text == "A barn owl\n\n- wings\n\n- eyes\nears\n\nName Strix\n\nif owl:\n    hoot()\n\nEnd."

    assert found.labels == {"title": "All about owls", "language": "en"}


def test_the_ledger_says_which_pictures_are_missing(pages: Path, tmp_path: Path) -> None:
    manifest = build(HtmlSource(root=pages), tmp_path / "shards", BuildOptions())
    rows = {row["id"]: row for row in read_ledger(manifest.ledger_path).to_pylist()}
    kept = rows["en/owl.html"]
    assert kept["status"] == "kept"
    assert kept["reason"].startswith(
        "without 3 media: https://example.org/far.png is not in the folder; en/img/none.png"
    )
    assert "../../etc/passwd.png" in kept["reason"]
    assert rows["index.html"]["reason"] == "no picture and less than 40 characters of text"


def test_a_damaged_picture_is_left_out_and_an_icon_without_a_word(pages: Path) -> None:
    text = "Long enough to be kept without any picture at all."
    page = pages / "cut.html"
    page.write_text(f"<p>{text}</p><img src='en/img/cut.png'><img src='/en/icon.png'>", encoding="utf-8")
    found = document(pages, "cut.html")
    assert [part.modality for part in found.parts] == ["text"]
    assert found.left_out.startswith("without 1 media: en/img/cut.png is damaged")
    assert len(document(pages, "cut.html", min_image_px=0).parts) == 2


def test_a_page_of_links_alone_is_filtered(pages: Path) -> None:
    with pytest.raises(FilteredError, match="less than 40"):
        document(pages, "index.html")


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("a.png", "en/a.png"),
        ("./b%20c.png?x#y", "en/b c.png"),
        ("../d.png", "d.png"),
        ("/e/f.png", "e/f.png"),
        ("../../g.png", None),
        ("//example.org/h.png", None),
        ("https://example.org/i.png", None),
        ("file:///etc/passwd", None),
        ("http://[", None),
        ("", None),
    ],
)
def test_references_stay_in_the_folder(source: str, path: str | None) -> None:
    assert local_reference("en/page.html", source) == path


def test_a_link_out_of_the_folder_is_not_followed(pages: Path, tmp_path: Path, picture: Media) -> None:
    (tmp_path / "outside.png").write_bytes(picture(9))
    (pages / "inside.png").symlink_to(tmp_path / "outside.png")
    (pages / "link.html").write_text("<p>Text that is long enough to be kept for itself.</p><img src='inside.png'>")
    assert [part.modality for part in document(pages, "link.html").parts] == ["text"]


@pytest.mark.parametrize(
    "html",
    [b"", b"\xff\xfe\x00<p", b"<" * 1000, b"<div>" * 10_000 + b"deep",
     pytest.param(b"<div>" * 50_000 + b"deep", marks=pytest.mark.slow), b"<img>" * 10, b"<p>\x00a\x01b</p>", b"<!--"],
    ids=["empty", "bytes", "angles", "deep", "deeper", "bare images", "controls", "comment"],
)  # fmt: skip
def test_any_bytes_are_a_page(html: bytes) -> None:
    page = read_page(html)
    text = "".join(part.text for part in page.parts if isinstance(part, PageText))
    assert not set(text) & {"\0", "\1", "\2", "\3"}
    assert sum(isinstance(part, PageImage) for part in page.parts) == html.count(b"<img>")


def test_paragraphs_of_prose_with_many_links_stay() -> None:
    words = "A sentence that goes on and on so that its links are the smaller part of it"
    links = " ".join(f"<a href='{n}'>word{n}</a>" for n in range(6))
    page = read_page(f"<div><p>{words} {links} {words}</p></div>".encode())
    (part,) = page.parts
    assert isinstance(part, PageText)
    assert "word5" in part.text


def test_two_languages_and_an_empty_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="html takes one"):
        HtmlSource(root=tmp_path, languages=("en", "de"))
    with pytest.raises(SourceError, match="no page in it"):
        list(HtmlSource(root=tmp_path).rows())
