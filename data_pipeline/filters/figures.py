"""The figure that each rule compares with its threshold, by the rule's name and computed only when it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from triweave.data_pipeline.filters import media_rules, text_rules
from triweave.data_pipeline.shards.schema import Document, MediaPart, TextPart

Figures = dict[str, Callable[[], Any]]


def image_figures(part: MediaPart) -> Figures:
    """Return the figures of a picture. Those that decode it raise MediaError where its bytes are damaged."""
    assert part.data is not None
    data, info = part.data, part.info
    return {
        "image_min_side_px": lambda: min(info.width, info.height),
        "image_max_aspect": lambda: media_rules.aspect(info),
        "image_min_sharpness": lambda: media_rules.sharpness(data, info),
    }


def audio_figures(part: MediaPart) -> Figures:
    """Return the figures of a clip, decoded once. Those that decode it raise MediaError where it is damaged."""
    assert part.data is not None
    data, info = part.data, part.info

    @cache
    def shares() -> tuple[float, float]:
        return media_rules.silence_and_clipping(data, info)

    return {
        "audio_min_ms": lambda: info.ms,
        "audio_max_ms": lambda: info.ms,
        "audio_max_silence_share": lambda: shares()[0],
        "audio_max_clipped_share": lambda: shares()[1],
    }


def text_figures(document: Document) -> Figures:
    """Return the figures of a document's text, all its parts together; those that make no sense for it are left out."""
    text = "\n".join(part.text for part in document.parts if isinstance(part, TextPart))
    words, lines = text_rules.words_of(text), text_rules.lines_of(text)
    pictures = sum(part.modality == "image" for part in document.parts)
    figures: Figures = {"min_words": lambda: len(words), "max_words": lambda: len(words)}
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
    return figures
