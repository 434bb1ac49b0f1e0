"""Which documents and media are good enough to train on: the thresholds, all off unless asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from triweave.data_pipeline.config import check_keys, read_yaml
from triweave.data_pipeline.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class FilterOptions:
    """Thresholds; None switches a rule off. A share is a number from 0 to 1."""

    drop_opt_out: bool = True
    """Leave out documents whose source says `opt_out`."""
    keep_without_media: bool = False
    """Keep the text of a document whose every medium was refused, as suits pages; pairs go with their medium."""
    licenses: tuple[str, ...] | None = None
    """Keep only documents of these licences (`source.license`, SPDX); one without a licence goes."""
    languages: tuple[str, ...] | None = None
    """Keep only documents whose label `language` is one of these; one without the label goes."""
    min_words: int | None = None
    """Fewest words of a document's text; a character of Chinese, Japanese or Korean counts as one."""
    max_words: int | None = None
    """Most words of a document's text."""
    min_words_per_image: float | None = None
    """Fewest words for each picture of a document that has one."""
    max_words_per_image: float | None = None
    """Most words for each picture of a document that has one."""
    min_mean_word_letters: float | None = None
    """Least mean length of a word in characters."""
    max_mean_word_letters: float | None = None
    """Largest mean length of a word in characters."""
    min_letter_word_share: float | None = None
    """Least share of words that hold a letter."""
    max_symbols_per_word: float | None = None
    """Most `#` and ellipses for each word."""
    max_bullet_line_share: float | None = None
    """Largest share of lines that begin with a bullet."""
    max_ellipsis_line_share: float | None = None
    """Largest share of lines that end in an ellipsis."""
    min_terminal_line_share: float | None = None
    """Least share of lines that end in a punctuation mark of a sentence."""
    min_stop_words: int | None = None
    """Fewest different words of: the be to of and that have with. For documents whose label `language` is English."""
    max_duplicate_line_share: float | None = None
    """Largest share of lines that are copies of an earlier one."""
    max_repeated_words_share: float | None = None
    """Largest share of words inside a run of five words that came before."""
    image_min_side_px: int | None = None
    """Shorter side of a picture, at least."""
    image_max_aspect: float | None = None
    """Longer side over shorter side, at most."""
    image_min_sharpness: float | None = None
    """Variance of the Laplacian of the grey picture at 256 px (Pech-Pacheco et al. 2000), at least."""
    audio_min_ms: float | None = None
    """Length of a clip, at least."""
    audio_max_ms: float | None = None
    """Length of a clip, at most."""
    audio_max_silence_share: float | None = None
    """Largest share of 20 ms frames below -50 dB of full scale."""
    audio_max_clipped_share: float | None = None
    """Largest share of samples at full scale."""

    def __post_init__(self) -> None:
        """Refuse thresholds that no number meets."""
        for name, value in self.asked().items():
            if isinstance(value, (int, float)) and not isinstance(value, bool) and not 0 <= value < float("inf"):
                raise ConfigError(f"filter {name}={value}: must be a finite number of at least 0")
            if name.endswith("_share") and value > 1:
                raise ConfigError(f"filter {name}={value}: is a share, from 0 to 1")

    @property
    def has_text_rules(self) -> bool:
        """Return whether a rule about words or lines is asked for."""
        return any(name.startswith(("min_", "max_")) for name in self.asked())

    def asked(self) -> dict[str, Any]:
        """Return the options that differ from their default, as JSON values."""
        values = {
            item.name: getattr(self, item.name) for item in fields(self) if getattr(self, item.name) != item.default
        }
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


PRESETS: dict[str, dict[str, Any]] = {
    "gopher": {
        "min_words": 50,
        "max_words": 100_000,
        "min_mean_word_letters": 3,
        "max_mean_word_letters": 10,
        "min_letter_word_share": 0.8,
        "max_symbols_per_word": 0.1,
        "max_bullet_line_share": 0.9,
        "max_ellipsis_line_share": 0.3,
        "min_stop_words": 2,
        "max_duplicate_line_share": 0.3,
        "max_repeated_words_share": 0.15,
    },
    "c4": {"min_words": 15, "min_terminal_line_share": 0.5},
    "pictures": {"image_min_side_px": 64, "image_max_aspect": 4, "image_min_sharpness": 20},
    "speech": {
        "audio_min_ms": 300,
        "audio_max_ms": 30_000,
        "audio_max_silence_share": 0.8,
        "audio_max_clipped_share": 0.01,
    },
}
"""Name -> thresholds. gopher: Rae et al. 2021, table A1 and A2 (the run of five words for its n-gram rules). c4: after
Raffel et al. 2020, who drop such lines instead of the page. pictures, speech: ours, a place to begin."""


def filter_options(asked: Sequence[str], file: Path | None = None) -> FilterOptions:
    """Return the options of presets and `key=value` texts; the later ones win, and all win over those of a YAML file.

    Raises ConfigError for an unknown name and a value of another type.
    """
    values: dict[str, Any] = dict(read_yaml(file)) if file is not None else {}
    for item in asked:
        name, separator, value = item.partition("=")
        if not separator:
            if name not in PRESETS:
                raise ConfigError(f"--filter {item}: give key=value or one of the presets {', '.join(PRESETS)}")
            values |= PRESETS[name]
        else:
            values[name] = value
    check_keys(FilterOptions, values, "filter")
    types = get_type_hints(FilterOptions)
    return FilterOptions(**{name: _value(name, value, str(types[name])) for name, value in values.items()})


def _value(name: str, value: Any, kind: str) -> Any:
    """Return a value from YAML or the command line as what the option wants."""
    if value is None or value == "null":
        return None
    try:
        if "tuple" in kind:
            items = value.split(",") if isinstance(value, str) else value
            return tuple(str(item).strip() for item in items if str(item).strip())
        if "bool" in kind:
            return {"true": True, "false": False}[str(value).lower()]
        return int(str(value)) if "int" in kind else float(str(value))
    except (KeyError, TypeError, ValueError):
        wanted = "true or false" if "bool" in kind else "a whole number" if "int" in kind else "a number"
        raise ConfigError(f"filter {name}={value!r}: must be {wanted}") from None
