"""A folder of HTML pages as interleaved documents: text and pictures in the order a reader meets them.

    help/en/layers.html      ... <p>A layer</p> <img src="images/layer.png" alt="..."> <p>Click it</p> ...

One document per page, id = its path. What counts as content is said in `html_text`. Pictures are files of the folder,
named relative to the page or, with a leading slash, to the folder; those of the network, those that are missing or
damaged are left out, which the ledger's kept row says, and so are icons, of which it does not speak. `alt`
goes into the part. Labels: `title`, and `language` where the page tells it or `language` is given.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from triweave.data_pipeline.errors import SourceError
from triweave.data_pipeline.media.modalities import modality_of_extension
from triweave.data_pipeline.shards.media_encoder import MediaEncoder
from triweave.data_pipeline.shards.schema import Document
from triweave.data_pipeline.sources.base import FilteredError, Row, require_folder, walk_files
from triweave.data_pipeline.sources.collected_parts import CollectedParts
from triweave.data_pipeline.sources.html_text import PageImage, PageText, read_page

ENDINGS = (".html", ".htm", ".xhtml")
MAX_PAGE_BYTES = 32 << 20
MIN_IMAGE_PX = 32
MIN_CHARACTERS = 40


@dataclass(frozen=True, kw_only=True)
class HtmlSource:
    """The pages below `root`.

    languages: at most one, put into the label `language` of pages that do not tell theirs.
    min_image_px: pictures with a shorter side in the shard are icons and left out without a word.
    min_characters: pages with less text and no picture are filtered.
    """

    root: Path
    languages: tuple[str, ...] = ()
    min_image_px: int = MIN_IMAGE_PX
    min_characters: int = MIN_CHARACTERS
    name: str = "html"

    def __post_init__(self) -> None:
        """Refuse two languages."""
        if len(self.languages) > 1:
            raise SourceError(f"--language {','.join(self.languages)}: html takes one, that of pages which tell none")

    @property
    def options(self) -> dict[str, Any]:
        """Return the options that decide what comes out."""
        names = ("languages", "min_image_px", "min_characters")
        return {name: getattr(self, name) if name != "languages" else list(self.languages) for name in names}

    def rows(self) -> Iterator[Row]:
        """List one row per page; other files are not rows, for most are parts of pages."""
        require_folder(self.root, "a folder of .html pages")
        pages = [(path, size) for path, size in walk_files(self.root) if path.lower().endswith(ENDINGS)]
        if not pages:
            raise SourceError(f"--input {self.root}: no page in it; pages end in {', '.join(ENDINGS)}")
        for path, size in pages:
            failed = f"{size} bytes, a page has at most {MAX_PAGE_BYTES}" if size > MAX_PAGE_BYTES else None
            yield Row(id=path, recipe=[path, size], failed=failed)

    def document(self, row: Row, encoder: MediaEncoder) -> Document:
        """Make the document of one page."""
        path = row.recipe[0]
        page = read_page((self.root / path).read_bytes())
        collected = CollectedParts(root=self.root, encoder=encoder, shared=True)
        characters = 0
        for part in page.parts:
            if isinstance(part, PageText):
                collected.add_text(part.text)
                characters += len(part.text)
            else:
                self._add_image(collected, path, part)
        if not collected.media and characters < self.min_characters:
            raise FilteredError(f"no picture and less than {self.min_characters} characters of text")
        language = page.language or next(iter(self.languages), "")
        labels = {"title": page.title, "language": language}
        return Document(
            id=row.id,
            parts=tuple(collected.parts),
            source={"corpus": self.root.name},
            labels={name: value for name, value in labels.items() if value},
            left_out=collected.left_out,
        )

    def _add_image(self, collected: CollectedParts, page: str, image: PageImage) -> None:
        reference = local_reference(page, image.source)
        if reference is None:
            if not image.source.startswith("data:"):
                collected.leave_out(f"{image.source or 'a picture without source'} is not in the folder")
            return
        if modality_of_extension(PurePosixPath(reference).suffix) is None:
            collected.leave_out(f"{reference} is of a kind that no modality takes")
            return
        collected.add_file(reference, alt=image.alt or None, min_side_px=self.min_image_px)


def local_reference(page: str, source: str) -> str | None:
    """Return the path below the folder of what page `page` names as `source`, None if it is not in the folder."""
    try:
        url = urlsplit(source.strip())
    except ValueError:
        return None
    if url.scheme or url.netloc or not url.path:
        return None
    name = unquote(url.path)
    steps = [] if name.startswith("/") else list(PurePosixPath(page).parent.parts)
    for step in name.split("/"):
        if step == "..":
            if not steps:
                return None
            steps.pop()
        elif step not in ("", "."):
            steps.append(step)
    return "/".join(steps)
