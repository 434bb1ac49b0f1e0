"""The build step that replaces personal data and secrets by placeholders, everywhere a document holds text.

text, alt texts, strings in labels and source    "write to bob@site.org" -> "write to <EMAIL>"
labels.scrubbed                                  {"email": 1}: how many of each kind, never what
the ledger's reason                              "scrubbed 1 email"

Annotations that an earlier build made go, for they count characters of the text as it was.
A document's id stays, for it is the name of the row, and so do pictures and clips.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from triweave.data_pipeline.errors import ConfigError
from triweave.data_pipeline.scrub.kinds import GROUPS, KINDS, placeholder
from triweave.data_pipeline.shards.schema import ANNOTATIONS, Document, Part, TextPart

LABEL = "scrubbed"


@dataclass(frozen=True, kw_only=True)
class ScrubStep:
    """Replace what belongs to `kinds`.

    phone_region: country (ISO 3166-1, two letters) whose telephone numbers are also found without `+`, or None.
    """

    kinds: tuple[str, ...]
    phone_region: str | None = None
    name: str = "scrub"
    before_filters: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Return what decides the result; the numbering plans change with the version of phonenumbers."""
        chosen: dict[str, Any] = {"kinds": list(self.kinds)}
        if "phone" in self.kinds:
            from importlib.metadata import version

            chosen |= {"phone_region": self.phone_region, "phonenumbers": version("phonenumbers")}
        return chosen

    def apply(self, document: Document) -> Document:
        """Return the document with placeholders; one that holds nothing of the kinds comes back as it is."""
        found: Counter[str] = Counter()
        parts = tuple(self._part(part, found) for part in document.parts)
        source, labels = self._value(document.source, found), self._value(document.labels, found)
        if not found:
            return document
        counts = {kind: found[kind] for kind in KINDS if found[kind]}
        note = f"scrubbed {', '.join(f'{number} {kind}' for kind, number in counts.items())}"
        return replace(
            document,
            parts=parts,
            source=source,
            labels={name: value for name, value in labels.items() if name != ANNOTATIONS} | {LABEL: counts},
            left_out="; ".join(filter(None, [document.left_out, note])),
        )

    def clean(self, text: str) -> str:
        """Return a text with placeholders."""
        return self._text(text, Counter())

    def _part(self, part: Part, found: Counter[str]) -> Part:
        if isinstance(part, TextPart):
            return replace(part, text=self._text(part.text, found))
        return part if part.alt is None else replace(part, alt=self._text(part.alt, found))

    def _value(self, value: Any, found: Counter[str]) -> Any:
        """Return a JSON value with every string in it scrubbed."""
        if isinstance(value, str):
            return self._text(value, found)
        if isinstance(value, dict):
            return {self._value(name, found): self._value(item, found) for name, item in value.items()}
        return [self._value(item, found) for item in value] if isinstance(value, (list, tuple)) else value

    def _text(self, text: str, found: Counter[str]) -> str:
        for kind in self.kinds:
            pieces, end = [], 0
            for start, stop in KINDS[kind](text, self.phone_region):
                pieces += [text[end:start], placeholder(kind)]
                end = stop
            if pieces:
                found[kind] += len(pieces) // 2
                text = "".join([*pieces, text[end:]])
        return text


def scrub_step(asked: Sequence[str]) -> ScrubStep | None:
    """Return the step for texts such as `pii`, `secrets`, `email,phone` and `phone=DE`, None when nothing is asked for.

    Raises ConfigError for an unknown kind or region.
    """
    chosen: set[str] = set()
    region = None
    for item in (item.strip() for text in asked for item in text.split(",") if item.strip()):
        kind, separator, value = item.partition("=")
        if kind not in KINDS and kind not in GROUPS:
            raise ConfigError(f"--scrub {item}: give {', '.join(GROUPS)}, or some of {', '.join(KINDS)}")
        if separator:
            region = _region(item, kind, value)
        chosen |= set(GROUPS.get(kind, (kind,)))
    return ScrubStep(kinds=tuple(kind for kind in KINDS if kind in chosen), phone_region=region) if chosen else None


def _region(item: str, kind: str, value: str) -> str:
    from phonenumbers import SUPPORTED_REGIONS

    region = value.upper()
    if kind != "phone" or region not in SUPPORTED_REGIONS:
        raise ConfigError(f"--scrub {item}: only phone takes a value, a country such as phone=DE or phone=US")
    return region
