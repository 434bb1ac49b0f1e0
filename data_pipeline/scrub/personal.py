"""Find what identifies a person in a text: addresses, numbers that can be checked by their own check digits.

Every function yields (start, end) in characters, in order, without overlap. Work is linear in the text: each pattern
begins where a token begins and its repetitions are bounded.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator

Spans = Iterator[tuple[int, int]]

_EMAIL = re.compile(
    r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9._%+-]{1,64}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,6}"
    r"(?:[A-Za-z]{2,24}|xn--[A-Za-z0-9-]{2,59})(?![A-Za-z0-9_-])"
)
_RETINA = re.compile(r"@\dx\.", re.IGNORECASE)
"""`icon@2x.png`: a file name of a picture for dense displays."""
_IPV4 = re.compile(r"(?<![\w.-])(?:\d{1,3}\.){3}\d{1,3}(?!\.?[\w-])")
SECTION_NUMBER = 32
_VERSION = re.compile(r"(?:\bversion|\brelease|\bv|\bver\.?)\s{0,2}$", re.IGNORECASE)
_IPV6 = re.compile(r"(?<![\w:.])[0-9A-Fa-f:]{6,41}(?!\w)")
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
_CARD = re.compile(r"(?<![\w.,+-])(?:[2-6]\d{12,18}|[2-6]\d{3}([ -])\d{4,6}\1\d{4,5}(?:\1\d{1,4}){0,3})(?![A-Za-z_\d])")
_CARD_NETWORKS = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})"  # Visa
    r"|(?:5[1-5]\d{2}|222[1-9]|22[3-9]\d|2[3-6]\d{2}|27[01]\d|2720)\d{12}"  # Mastercard
    r"|3[47]\d{13}"  # American Express
    r"|3(?:0[0-5]|[689]\d)\d{11}"  # Diners Club
    r"|(?:6011|64[4-9]\d|65\d{2})\d{12,15}"  # Discover
    r"|35(?:2[89]|[3-8]\d)\d{12}"  # JCB
    r"|62\d{14,17}"  # UnionPay
)
_IBAN = re.compile(r"(?<![A-Za-z0-9])([A-Z]{2})\d{2}(?:[ \u00a0]?[A-Z0-9]){11,30}")
_IBAN_LENGTHS = {
    15: "NO", 16: "BE", 18: "DK FI FK FO GL NL SD", 19: "MK SI", 20: "AT BA EE KZ LT LU MN XK", 21: "CH HR LI LV",
    22: "BG BH CR DE GB GE IE ME RS VA", 23: "AE GI IL IQ OM SO TL", 24: "AD CZ ES MD PK RO SA SE SK TN VG",
    25: "LY PT ST", 26: "IS TR", 27: "BI DJ FR GR IT MC MR SM", 28: "AL AZ BY CY DO GT HN HU LB NI PL SV",
    29: "BR EG PS QA UA", 30: "JO KW", 31: "MT SC", 32: "LC", 33: "RU",
}  # fmt: skip
"""Length -> countries, after the IBAN registry of ISO 13616."""
_IBAN_LENGTH = {country: length for length, countries in _IBAN_LENGTHS.items() for country in countries.split()}
_PHONE_LIKE = re.compile(r"\d(?:[^\w\n]{0,3}\d){6}")


def emails(text: str) -> Spans:
    """Yield e-mail addresses with an ASCII name; `git@host` is where a repository lies."""
    if "@" not in text:
        return
    for match in _EMAIL.finditer(text):
        if not _RETINA.search(match[0]) and not match[0].startswith("git@"):
            yield match.span()


def ipv4_addresses(text: str) -> Spans:
    """Yield public IPv4 addresses; private and reserved ones name nobody, and `version 5.10.104.3` is none.

    Four numbers below SECTION_NUMBER are taken for the number of a section or a release, as all 104 candidates of
    GIMP's manual were; of all addresses 1 in 4,096 is like that, well-known name servers among them.
    """
    for match in _IPV4.finditer(text):
        if max(map(int, match[0].split("."))) < SECTION_NUMBER or _begins_a_heading(text, *match.span()):
            continue
        if _is_public(match[0]) and not _VERSION.search(text[max(0, match.start() - 12) : match.start()]):
            yield match.span()


def _begins_a_heading(text: str, start: int, end: int) -> bool:
    """Return whether a line begins with this number and a full stop, as `6.34.2.1. Properties` does."""
    return text[start - 1 : start] in ("", "\n") and text[end : end + 1] == "." and text[end + 1 : end + 2].isspace()


def ipv6_addresses(text: str) -> Spans:
    """Yield public IPv6 addresses (2000::/3)."""
    for match in _IPV6.finditer(text):
        found = match[0] if match[0].endswith("::") else match[0].removesuffix(":")
        if found.count(":") > 1 and _is_public(found):
            yield match.start(), match.start() + len(found)


def _is_public(address: str) -> bool:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    return parsed.is_global and (parsed.version == 4 or parsed in _GLOBAL_UNICAST)


def credit_cards(text: str) -> Spans:
    """Yield payment card numbers: 13 to 19 digits of a known network, in one piece or in groups, that pass Luhn."""
    for match in _CARD.finditer(text):
        number, gap = match[0], match[1]
        while gap and not _is_card(number) and number.count(gap) > 2:
            number = number.rpartition(gap)[0]  # what follows a card with the same gap is not of it: its date
        if _is_card(number):
            yield match.start(), match.start() + len(number)


def _is_card(number: str) -> bool:
    digits = re.sub(r"\D", "", number)
    return _CARD_NETWORKS.fullmatch(digits) is not None and luhn(digits)


def luhn(digits: str) -> bool:
    """Return whether the last digit is the check digit of those before it (ISO/IEC 7812-1, annex B).

    sum over i from the right, 0 first: d_i for even i, digit sum of 2 d_i for odd i; it must end in 0.
    """
    doubled = "0246813579"
    total = sum(int(doubled[int(digit)]) if place % 2 else int(digit) for place, digit in enumerate(reversed(digits)))
    return total % 10 == 0


def ibans(text: str) -> Spans:
    """Yield account numbers of a country's length whose check digits fit, with or without spaces."""
    start = 0
    while match := _IBAN.search(text, start):
        end = _end_after(match, _IBAN_LENGTH.get(match[1], 0))
        if end and not text[end : end + 1].isalnum() and iban_checks(re.sub(r"\s", "", text[match.start() : end])):
            yield match.start(), end
            start = end
        else:
            start = match.start() + 4


def _end_after(match: re.Match[str], length: int) -> int:
    """Return where `length` letters and digits of a match end, 0 if it has fewer or none are wanted."""
    places = [place for place, character in enumerate(match[0]) if not character.isspace()]
    return match.start() + places[length - 1] + 1 if 0 < length <= len(places) else 0


def iban_checks(iban: str) -> bool:
    """Return whether an IBAN without spaces has the right check digits (ISO 13616, ISO/IEC 7064 MOD 97-10).

    int(iban[4:] + iban[:4]) mod 97 = 1, letters read as A = 10 to Z = 35.
    """
    return int("".join(str(int(character, 36)) for character in iban[4:] + iban[:4])) % 97 == 1


def phone_numbers(text: str, region: str | None) -> Spans:
    """Yield telephone numbers that the numbering plans allow: those with a `+`, and national ones of `region`.

    region: two letters of ISO 3166-1, or None.
    """
    if (region is None and "+" not in text and "\uff0b" not in text) or not _PHONE_LIKE.search(text):
        return
    from phonenumbers import Leniency, PhoneNumberMatcher

    for match in PhoneNumberMatcher(text, region, leniency=Leniency.VALID):
        yield match.start, match.end
