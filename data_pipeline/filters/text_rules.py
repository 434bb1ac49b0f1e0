"""Figures of a text that tell prose from lists, keywords and copies. Sources: see `options.PRESETS`."""

from __future__ import annotations

import re
from collections.abc import Sequence

STOP_WORDS = frozenset(["the", "be", "to", "of", "and", "that", "have", "with"])
RUN_WORDS = 5
_WORD = re.compile(
    r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af]|[^\s\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af]+"
)
_BULLETS = ("-", "*", "•", "‣", "▪", "●", "◦", "–")
_ELLIPSES = ("...", "…")
_TERMINALS = (".", "!", "?", '"', "'", "”", "’", "»", ")", "。", "！", "？", "」", "।", "؟", "۔")


def words_of(text: str) -> list[str]:
    """Return the words: what white space parts, and every character of scripts that write without it."""
    return _WORD.findall(text)


def lines_of(text: str) -> list[str]:
    """Return the lines that hold something, without white space around them."""
    return [stripped for line in text.splitlines() if (stripped := line.strip())]


def mean_word_letters(words: Sequence[str]) -> float:
    """Return the mean length of a word in characters."""
    return _share(sum(map(len, words)), len(words))


def letter_word_share(words: Sequence[str]) -> float:
    """Return the share of words that hold a letter of any script."""
    return _share(sum(any(character.isalpha() for character in word) for word in words), len(words))


def symbols_per_word(text: str, words: Sequence[str]) -> float:
    """Return `#` and ellipses for each word."""
    return _share(text.count("#") + sum(text.count(ellipsis) for ellipsis in _ELLIPSES), len(words))


def bullet_line_share(lines: Sequence[str]) -> float:
    """Return the share of lines that begin with a bullet."""
    return _share(sum(line.startswith(_BULLETS) for line in lines), len(lines))


def ellipsis_line_share(lines: Sequence[str]) -> float:
    """Return the share of lines that end in an ellipsis."""
    return _share(sum(line.endswith(_ELLIPSES) for line in lines), len(lines))


def terminal_line_share(lines: Sequence[str]) -> float:
    """Return the share of lines that end as a sentence does."""
    return _share(sum(line.endswith(_TERMINALS) for line in lines), len(lines))


def stop_words(words: Sequence[str]) -> int:
    """Return how many different English stop words there are."""
    return len(STOP_WORDS & {word.lower().strip(".,;:!?\"'()") for word in words})


def duplicate_line_share(lines: Sequence[str]) -> float:
    """Return the share of lines that are copies of an earlier one."""
    return _share(len(lines) - len(set(lines)), len(lines))


def repeated_words_share(words: Sequence[str]) -> float:
    """Return the share of words that lie in a run of RUN_WORDS words which came before, in any letter case."""
    lowered = [word.lower() for word in words]
    seen: set[tuple[str, ...]] = set()
    repeated = covered = 0
    for start in range(len(lowered) - RUN_WORDS + 1):
        run = tuple(lowered[start : start + RUN_WORDS])
        if run in seen:
            end = start + RUN_WORDS
            repeated += end - max(start, covered)
            covered = end
        seen.add(run)
    return _share(repeated, len(words))


def _share(part: float, whole: int) -> float:
    return part / whole if whole else 0.0
