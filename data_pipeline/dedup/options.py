"""How near is too near: the thresholds of near-duplicate removal, all off unless asked for."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from triweave.data_pipeline.config import check_keys
from triweave.data_pipeline.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DedupOptions:
    """Thresholds by modality; None: this modality is not compared.

    A document is a near duplicate where everything that is compared is near in the same earlier document.
    """

    text: float | None = None
    """Least Jaccard similarity of the word 5-grams, as MinHash estimates it."""
    image: int | None = None
    """Most different bits of the 64 of a perceptual hash, for every picture."""
    audio: float | None = None
    """Largest share of different bits of the 256 of a clip's fingerprint, for every clip."""

    def __post_init__(self) -> None:
        """Refuse thresholds at which the lookup would miss pairs or find everything."""
        for name, (least, most) in RANGES.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise ConfigError(f"--dedup {name}={value}: must be from {least:g} to {most:g}")

    def asked(self) -> dict[str, Any]:
        """Return the thresholds that are on."""
        return {item.name: value for item in fields(self) if (value := getattr(self, item.name)) is not None}


RANGES: dict[str, tuple[float, float]] = {"text": (0.5, 1), "image": (0, 11), "audio": (0, 0.25)}
"""Modality -> least and largest threshold. Images: radius 2 in blocks of 16 bits finds every pair up to 11 bits."""
DEFAULTS: dict[str, float | int] = {"text": 0.8, "image": 6, "audio": 0.2}
"""Modality -> threshold where only its name is given."""


def dedup_options(asked: str) -> DedupOptions:
    """Return the thresholds of a text like `text=0.8,image=6,audio`; a name alone takes its default.

    Raises ConfigError for an unknown name, a value of another type, and an empty text.
    """
    values: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in asked.split(","))):
        name, separator, value = item.partition("=")
        check_keys(DedupOptions, {name: value}, "dedup")
        if name in values:
            raise ConfigError(f"--dedup {asked}: names {name} twice")
        try:
            values[name] = (int(value) if name == "image" else float(value)) if separator else DEFAULTS[name]
        except ValueError:
            wanted = "a whole number" if name == "image" else "a number"
            raise ConfigError(f"--dedup {item}: must be {wanted}, for example {name}={DEFAULTS[name]}") from None
    if not values:
        raise ConfigError(f"--dedup {asked!r}: name at least one of {', '.join(RANGES)}, for example text=0.8,image=6")
    return DedupOptions(**values)
