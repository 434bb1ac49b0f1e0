"""What pages are made of, and how they become one HTML file that loads nothing.

Every text goes through the template's escaping; the style sheet is named by its hash in the page's policy, which allows
nothing else but data: pictures and sounds. Equal inputs give equal bytes.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from triweave.data_pipeline.storage.location import require_local
from triweave.launch.errors import ReportError
from triweave.launch.report.figures import Plot
from triweave.launch.report.sections import Table

if TYPE_CHECKING:
    from markupsafe import Markup

STYLE_NAME = "page.css"


@dataclass(frozen=True, kw_only=True)
class Caption:
    """What one run writes under a sample."""

    run: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Card:
    """A sample with the captions of all runs that have it."""

    modality: str
    uri: str
    truth: str
    about: str
    captions: Sequence[Caption]


@dataclass(frozen=True, kw_only=True)
class CardGroup:
    """Cards under a heading."""

    title: str
    cards: Sequence[Card]


@dataclass(frozen=True, kw_only=True)
class Folded:
    """A text that opens on demand."""

    title: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page; what is empty does not show."""

    id: str
    title: str
    paragraphs: Sequence[str] = ()
    plots: Sequence[Plot] = ()
    tables: Sequence[Table] = ()
    samples: Sequence[CardGroup] = ()
    folded: Sequence[Folded] = field(default_factory=tuple)


def render(template: str, **values: Any) -> str:
    """Return a page of `base.html.j2`; values are what the template names: title, kind, sections and its own."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    folder = Path(__file__).parent
    css = (folder / STYLE_NAME).read_text(encoding="utf-8")
    environment = Environment(loader=FileSystemLoader(folder), autoescape=True, undefined=StrictUndefined)
    environment.filters["code"] = _with_code
    return environment.get_template(template).render(policy=content_policy(css), css=Markup(css), **values)


def _with_code(text: str) -> Markup:
    """Return the text, escaped, with what stands between `backticks` as code."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def content_policy(css: str) -> str:
    """Return the page's Content-Security-Policy: this style sheet, data: pictures and sounds, nothing else."""
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    allowed = (f"style-src 'sha256-{digest}'", "img-src data:", "media-src data:")
    return "; ".join(["default-src 'none'", *allowed, "base-uri 'none'", "form-action 'none'"])


def write_page(out: Path, page: bytes) -> None:
    """Write a page in one act. Raises ReportError where that cannot be."""
    require_local("the page", out, ReportError, "copy it there when it is written")
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(page)
        temporary.replace(out)
    except OSError as error:
        raise ReportError(f"{out}: cannot be written ({error.strerror}); name another file") from None
