"""A page of HTML as what a reader sees of it: runs of text and pictures, in document order, without the page's frame.

Left out as frame: elements that never hold content (scripts, navigation, footers, forms), elements whose class, id or
role says so (`navheader`, `breadcrumbs`, `toc`), and blocks of links: at least MIN_LINKS links that make up more than
MAX_LINK_SHARE of the block's letters (Kohlschuetter et al. 2010, Boilerplate Detection using Shallow Text Features).
Trees of any depth are walked without recursion. Parsed by selectolax (lexbor).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from selectolax.lexbor import LexborHTMLParser

MIN_LINKS = 3
MAX_LINK_SHARE = 0.7

_NEVER_CONTENT = frozenset([
    "script", "style", "noscript", "template", "head", "nav", "footer", "aside", "form", "button", "select",
    "textarea", "iframe", "object", "svg", "math", "audio", "video", "canvas", "dialog"
])  # fmt: skip
_FRAME_NAME = re.compile(
    r"(nav(bar|header|footer|igation)?|menu|breadcrumbs?|sidebar|footer|header|toc|cookies?|advert\w*|ads|banner|share|"
    r"social|related|comments?)"
)
_FRAME_ROLES = frozenset({"navigation", "banner", "contentinfo", "search", "complementary", "dialog"})
_PARAGRAPHS = frozenset([
    "p", "div", "section", "article", "main", "h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "dl", "table",
    "blockquote", "pre", "figure", "figcaption", "header", "details", "hr", "center", "caption", "body"
])  # fmt: skip
_LINES = frozenset(["li", "dt", "dd", "tr", "br", "summary"])
_CELLS = frozenset({"td", "th"})
_LINK_BLOCKS = frozenset(["div", "section", "ul", "ol", "dl", "table", "p"])
_SPACES = re.compile(r"[ \t\r\n\f\xa0]+")
_SPACES_ALONE = re.compile(r" {2,}")
_BREAKS = re.compile(r" *[\n\v][ \n\v]*")
_EMPTY_ITEM = re.compile(r"(?:^|\n)-\s+(?=\S)")
_CONTROLS = dict.fromkeys((*range(9), 11, 12, *range(14, 32)))
_PROTECTED = {ord(" "): "\1", ord("\n"): "\2", ord("\t"): "\3", ord("\r"): None}
"""Preformatted white space while the rest is tidied; text holds no such characters of its own."""
_UNPROTECTED = {1: " ", 2: "\n", 3: "\t"}

Event = Literal["open", "text", "close"]


@dataclass(frozen=True, kw_only=True)
class PageText:
    """A run of text: paragraphs parted by an empty line, lines of lists and tables by a line break."""

    text: str


@dataclass(frozen=True, kw_only=True)
class PageImage:
    """A picture: `source` as the page writes it, `alt` its description or an empty string."""

    source: str
    alt: str


@dataclass(frozen=True, kw_only=True)
class Page:
    """What a page holds. title: of its head, language: of its root element; empty where there is none."""

    parts: tuple[PageText | PageImage, ...]
    title: str
    language: str


def read_page(html: bytes) -> Page:
    """Return the content of a page; any bytes are a page, damaged ones a short one."""
    tree = LexborHTMLParser(html)
    root = tree.root
    if root is None or tree.body is None:
        return Page(parts=(), title="", language="")
    title = tree.css_first("title")
    attributes = root.attributes
    return Page(
        parts=tuple(_parts(tree.body, _frame(tree.body))),
        title=_SPACES.sub(" ", title.text()).strip() if title is not None else "",
        language=(attributes.get("lang") or attributes.get("xml:lang") or "").strip(),
    )


def _walk(root: Any) -> Iterator[tuple[Event, Any]]:
    """Yield (event, node) in document order, elements twice."""
    node, going_down, last = root, True, root.mem_id  # `==` would compare the HTML of both
    while True:
        if going_down:
            is_text = node.tag == "-text"
            yield ("text" if is_text else "open"), node
            if not is_text and node.first_child is not None:
                node = node.first_child
                continue
        if node.tag != "-text":
            yield "close", node
        if node.mem_id == last:
            return
        if node.next is not None:
            node, going_down = node.next, True
        else:
            node, going_down = node.parent, False


def _frame(body: Any) -> set[int]:
    """Return the nodes that belong to the page's frame."""
    frame: set[int] = set()
    counts: list[list[int]] = []  # of the open elements: letters, letters in links, links
    links = 0
    for event, node in _walk(body):
        if event == "open":
            counts.append([0, 0, 0])
            links += node.tag == "a"
            if _is_named_frame(node):
                frame.add(node.mem_id)
        elif event == "text":
            letters = len(_SPACES.sub("", node.text_content or ""))
            counts[-1][0] += letters
            counts[-1][1] += letters if links else 0
        else:
            mine = counts.pop()
            links -= node.tag == "a"
            mine[2] += node.tag == "a"
            if node.tag in _LINK_BLOCKS and mine[2] >= MIN_LINKS and mine[1] > MAX_LINK_SHARE * mine[0]:
                frame.add(node.mem_id)
            if counts and node.mem_id not in frame:
                counts[-1] = [total + part for total, part in zip(counts[-1], mine, strict=True)]
    return frame


def _is_named_frame(node: Any) -> bool:
    if node.tag in _NEVER_CONTENT:
        return True
    attributes = node.attributes
    names = f"{attributes.get('class') or ''} {attributes.get('id') or ''}".lower().split()
    hidden = "hidden" in attributes or attributes.get("aria-hidden") == "true"
    role = (attributes.get("role") or "").lower()
    return hidden or role in _FRAME_ROLES or any(_FRAME_NAME.fullmatch(name) for name in names)


def _parts(body: Any, frame: set[int]) -> Iterator[PageText | PageImage]:
    pieces: list[str] = []
    skipped = preformatted = 0
    for event, node in _walk(body):
        if event == "text":
            if not skipped:
                content = (node.text_content or "").translate(_CONTROLS)
                pieces.append(content.translate(_PROTECTED) if preformatted else _SPACES.sub(" ", content))
            continue
        step = 1 if event == "open" else -1
        if skipped or node.mem_id in frame:
            skipped += step * (node.mem_id in frame)
            continue
        preformatted += step * (node.tag == "pre")
        pieces.append(_break(node.tag, event))
        if event == "open" and node.tag == "img":
            if text := _tidy(pieces):
                yield PageText(text=text)
            pieces.clear()
            attributes = node.attributes
            alt = _SPACES.sub(" ", attributes.get("alt") or "").strip()
            yield PageImage(source=attributes.get("src") or "", alt=alt)
    if text := _tidy(pieces):
        yield PageText(text=text)


def _break(tag: str | None, event: Event) -> str:
    """Return what parts the text before a tag from that after it: "\\n" for a paragraph, "\\v" for a line."""
    if tag in _PARAGRAPHS:
        return "\n"
    if tag in _LINES:
        return "\v- " if tag == "li" and event == "open" else "\v"
    return " " if tag in _CELLS else ""


def _tidy(pieces: list[str]) -> str:
    text = _SPACES_ALONE.sub(" ", "".join(pieces))
    text = _BREAKS.sub(lambda match: "\n\n" if "\n" in match[0] else "\n", text)
    text = _EMPTY_ITEM.sub("\n- ", text)
    return text.strip().translate(_UNPROTECTED)
