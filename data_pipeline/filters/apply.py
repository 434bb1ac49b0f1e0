"""Apply the thresholds to one document: which of its media go, and whether it goes itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from triweave.data_pipeline.errors import MediaError
from triweave.data_pipeline.filters.figures import Figures, audio_figures, image_figures, text_figures
from triweave.data_pipeline.filters.options import FilterOptions
from triweave.data_pipeline.shards.schema import ANNOTATIONS, Document, MediaPart
from triweave.data_pipeline.sources.base import FilteredError


def filtered(document: Document, options: FilterOptions) -> Document:
    """Return the document without the media that fail a rule; `left_out` says which and why.

    Raises FilteredError where the document itself fails a rule, or where every medium it had has failed one. The
    reason names the rule first, so that a ledger can be counted by it.
    """
    if document.source.get("opt_out") and options.drop_opt_out:
        raise FilteredError("drop_opt_out: its source has opted out")
    for name, wanted, value in (
        ("licenses", options.licenses, document.source.get("license")),
        ("languages", options.languages, document.labels.get("language")),
    ):
        if wanted is not None and value not in wanted:
            raise FilteredError(f"{name}: {'none' if value is None else value}")
    document = _without_bad_media(document, options)
    reason = next(_text_reasons(document, options), "")
    if reason:
        raise FilteredError(reason)
    return document


def _without_bad_media(document: Document, options: FilterOptions) -> Document:
    failed = {
        place: reason
        for place, part in enumerate(document.parts)
        if isinstance(part, MediaPart) and (reason := media_reason(part, options))
    }
    if not failed:
        return document
    kept = tuple(part for place, part in enumerate(document.parts) if place not in failed)
    keep_text = options.keep_without_media and kept
    if not keep_text and not any(isinstance(part, MediaPart) for part in kept):
        raise FilteredError(next(iter(failed.values())))
    note = f"without {len(failed)} media that a filter refused: {'; '.join(sorted(set(failed.values())))}"
    labels = {name: value for name, value in document.labels.items() if name != ANNOTATIONS}  # they count the parts
    return replace(document, parts=kept, labels=labels, left_out="; ".join(filter(None, [document.left_out, note])))


def media_reason(part: MediaPart, options: FilterOptions) -> str:
    """Return why a medium goes, an empty string if it stays. Its bytes are decoded only where a rule asks for it."""
    figures = {"image": image_figures, "audio": audio_figures}.get(part.modality)
    if figures is None:
        return ""
    try:
        return next((rule.reason for rule in _rules(options, figures(part)) if rule.fails), "")
    except MediaError as error:
        return f"damaged: {error}"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One figure against its threshold; a name with `min_` in it is a least value, one with `max_` a largest."""

    name: str
    limit: Any
    value: Any

    @property
    def fails(self) -> bool:
        """Return whether the figure is on the wrong side."""
        return bool(self.value < self.limit if "min_" in self.name else self.value > self.limit)

    @property
    def reason(self) -> str:
        """Return the ledger's reason, without the figure, so that equal reasons count together."""
        return f"{self.name}: {'below' if 'min_' in self.name else 'above'} {self.limit:g}"


def _rules(options: FilterOptions, figures: Figures) -> Iterator[Rule]:
    """Yield the rules that are asked for, computing each figure when its turn comes."""
    for name, figure in figures.items():
        limit = getattr(options, name)
        if limit is not None:
            yield Rule(name=name, limit=limit, value=figure())


def _text_reasons(document: Document, options: FilterOptions) -> Iterator[str]:
    """Yield why a document's text is refused; it is read only where a rule asks for it."""
    if options.has_text_rules:
        yield from (rule.reason for rule in _rules(options, text_figures(document)) if rule.fails)
