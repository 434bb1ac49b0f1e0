"""The kinds of text that `triweave build --scrub` takes out, in the order in which they are looked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from triweave.data_pipeline.scrub import personal, secrets

Find = Callable[[str, str | None], Iterator[tuple[int, int]]]
"""Takes a text and the region of national telephone numbers; yields (start, end), in order, without overlap."""


def _in_any_region(find: Callable[[str], Iterator[tuple[int, int]]]) -> Find:
    return lambda text, _region: find(text)


KINDS: dict[str, Find] = {
    "private_key": _in_any_region(secrets.private_keys),
    "access_token": _in_any_region(secrets.access_tokens),
    "password": _in_any_region(secrets.passwords),
    "email": _in_any_region(personal.emails),
    "iban": _in_any_region(personal.ibans),
    "credit_card": _in_any_region(personal.credit_cards),
    "ipv6": _in_any_region(personal.ipv6_addresses),
    "ipv4": _in_any_region(personal.ipv4_addresses),
    "phone": personal.phone_numbers,
}
"""Name -> function; the placeholder is `<NAME>`. What an earlier kind has replaced, a later one does not see."""

GROUPS: dict[str, tuple[str, ...]] = {
    "secrets": ("private_key", "access_token", "password"),
    "pii": ("email", "iban", "credit_card", "ipv6", "ipv4", "phone"),
}
"""Name -> the kinds it stands for."""


def placeholder(kind: str) -> str:
    """Return what stands in the text where something of this kind was."""
    return f"<{kind.upper()}>"
