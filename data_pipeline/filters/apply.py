"""Apply the thresholds to one document: which of its media go, and whether it goes itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from triweave.data_pipeline.errors import MediaError
from triweave.data_pipeline.filters import media_rules, text_rules
from triweave.data_pipeline.filters.options import FilterOptions
from triweave.data_pipeline.shards.schema import Document, MediaPart, TextPart
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
    return replace(document, parts=kept, left_out="; ".join(filter(None, [document.left_out, note])))


def media_reason(part: MediaPart, options: FilterOptions) -> str:
    """Return why a medium goes, an empty string if it stays. Its bytes are decoded only where a rule asks for it."""
    rules = {"image": _image_rules, "audio": _audio_rules}.get(part.modality)
    if rules is None:
        return ""
    try:
        return next((rule.reason for rule in rules(part, options) if rule.fails), "")
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


def _rules(options: FilterOptions, figures: dict[str, Callable[[], Any]]) -> Iterator[Rule]:
    """Yield the rules that are asked for, computing each figure when its turn comes."""
    for name, figure in figures.items():
        limit = getattr(options, name)
        if limit is not None:
            yield Rule(name=name, limit=limit, value=figure())


def _image_rules(part: MediaPart, options: FilterOptions) -> Iterator[Rule]:
    assert part.data is not None
    data, info = part.data, part.info
    return _rules(
        options,
        {
            "image_min_side_px": lambda: min(info.width, info.height),
            "image_max_aspect": lambda: media_rules.aspect(info),
            "image_min_sharpness": lambda: media_rules.sharpness(data, info),
        },
    )


def _audio_rules(part: MediaPart, options: FilterOptions) -> Iterator[Rule]:
    assert part.data is not None
    data, info = part.data, part.info
    yield from _rules(options, {"audio_min_ms": lambda: info.ms, "audio_max_ms": lambda: info.ms})
    if options.audio_max_silence_share is not None or options.audio_max_clipped_share is not None:
        silence, clipped = media_rules.silence_and_clipping(data, info)
        yield from _rules(
            options, {"audio_max_silence_share": lambda: silence, "audio_max_clipped_share": lambda: clipped}
        )


def _text_reasons(document: Document, options: FilterOptions) -> Iterator[str]:
    """Yield why a document's text, all its parts together, is refused; it is read only where a rule asks for it."""
    if not options.has_text_rules:
        return
    text = "\n".join(part.text for part in document.parts if isinstance(part, TextPart))
    words, lines = text_rules.words_of(text), text_rules.lines_of(text)
    pictures = sum(part.modality == "image" for part in document.parts)
    figures: dict[str, Callable[[], Any]] = {"min_words": lambda: len(words), "max_words": lambda: len(words)}
    if pictures:
        per_picture = len(words) / pictures
        figures |= {"min_words_per_image": lambda: per_picture, "max_words_per_image": lambda: per_picture}
    if words:
        figures |= {
            "min_mean_word_letters": lambda: text_rules.mean_word_letters(words),
            "max_mean_word_letters": lambda: text_rules.mean_word_letters(words),
            "min_letter_word_share": lambda: text_rules.letter_word_share(words),
            "max_symbols_per_word": lambda: text_rules.symbols_per_word(text, words),
            "max_bullet_line_share": lambda: text_rules.bullet_line_share(lines),
            "max_ellipsis_line_share": lambda: text_rules.ellipsis_line_share(lines),
            "min_terminal_line_share": lambda: text_rules.terminal_line_share(lines),
            "max_duplicate_line_share": lambda: text_rules.duplicate_line_share(lines),
            "max_repeated_words_share": lambda: text_rules.repeated_words_share(words),
        }
        if str(document.labels.get("language", "")).partition("-")[0].partition("_")[0] == "en":
            figures["min_stop_words"] = lambda: text_rules.stop_words(words)
    yield from (rule.reason for rule in _rules(options, figures) if rule.fails)
