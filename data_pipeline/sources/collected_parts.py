"""Parts gathered in document order from what a corpus names: text as it comes, media from files or bytes.

A page of the web without one of its pictures is still a page. So media that are not there or are damaged are left out,
and said in `Document.left_out`, which goes into the ledger's `reason` of the kept row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from triweave.data_pipeline.errors import BlockedMediaError, MediaError
from triweave.data_pipeline.shards.media_encoder import MediaEncoder
from triweave.data_pipeline.shards.schema import MediaPart, Part, TextPart

_NAMED = 3
"""Media that a ledger line names; further ones are counted."""


@dataclass(kw_only=True)
class CollectedParts:
    """The parts of one document in the making.

    root: folder that all files must lie in; a reference that leads out of it is not followed.
    shared: whether other documents use the same files, as the pages of a site do; they are then encoded once.
    """

    root: Path
    encoder: MediaEncoder
    shared: bool = False
    parts: list[Part] = field(default_factory=list)
    _left_out: list[str] = field(default_factory=list)

    def add_text(self, text: str, role: str | None = None) -> None:
        """Add a text, unless it is blank; one that follows another of its role becomes a further paragraph of it."""
        text = text.strip()
        last = self.parts[-1] if self.parts else None
        if text and isinstance(last, TextPart) and last.role == role:
            self.parts[-1] = replace(last, text=f"{last.text}\n\n{text}")
        elif text:
            self.parts.append(TextPart(text=text, role=role))

    def add_file(
        self, reference: str, modality: str | None = None, *, alt: str | None = None, min_side_px: int = 0
    ) -> bool:
        """Add the medium in the file `reference`, a path relative to the root; return whether it is there and whole.

        min_side_px: leave a picture with a shorter side out, without a note.
        """
        path = file_below(self.root, reference)
        if path is None:
            self._left_out.append(f"{reference} is not there")
            return False
        return self._add(
            lambda: self.encoder.encode_file(path, modality, shared=self.shared), reference, alt, min_side_px
        )

    def add_bytes(self, modality: str, data: bytes, name: str, *, alt: str | None = None) -> bool:
        """Add a medium of which the corpus holds the bytes; return whether it is whole."""
        return self._add(lambda: self.encoder.encode(modality, data), name, alt)

    def leave_out(self, why: str) -> None:
        """Note something that is not in the document."""
        self._left_out.append(why)

    @property
    def media(self) -> int:
        """Return how many media there are."""
        return sum(isinstance(part, MediaPart) for part in self.parts)

    @property
    def left_out(self) -> str:
        """Return what was left out in one line, empty if nothing was."""
        if not self._left_out:
            return ""
        rest = len(self._left_out) - _NAMED
        more = [f"{rest} more"] if rest > 0 else []
        return f"without {len(self._left_out)} media: {'; '.join([*self._left_out[:_NAMED], *more])}"

    def _add(self, encode: Callable[[], MediaPart], name: str, alt: str | None, min_side_px: int = 0) -> bool:
        try:
            part = encode()
        except BlockedMediaError as error:
            self._left_out.append(f"{name} ({error})")
            return False
        except MediaError as error:
            self._left_out.append(f"{name} is damaged ({error})")
            return False
        if part.modality != "image" or min(part.info.width, part.info.height) >= min_side_px:
            self.parts.append(replace(part, alt=alt) if alt else part)
        return True


def file_below(root: Path, reference: str) -> Path | None:
    """Return the file that a corpus names relative to `root`, None where there is no such file inside the root."""
    if not reference or "\0" in reference:
        return None
    path = root / reference
    try:
        inside = path.resolve().is_relative_to(root.resolve())
        return path if inside and path.is_file() else None
    except (OSError, RuntimeError):  # a name too long for the file system, a circle of links
        return None


def file_size(root: Path, reference: str) -> int:
    """Return the size in bytes of a file that a corpus names, -1 where it is not there; for a row's recipe."""
    path = file_below(root, reference)
    return -1 if path is None else path.stat().st_size
