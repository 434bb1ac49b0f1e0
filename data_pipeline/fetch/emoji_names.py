"""Which emoji make a corpus: single code points with a Unicode name, and the category each belongs to."""

from __future__ import annotations

import unicodedata
from bisect import bisect

_PRESENTATION = "FE0F"
_COMPONENTS = (range(0x1F1E6, 0x1F200), range(0x1F3FB, 0x1F400), range(0x1F9B0, 0x1F9B4))
"""Letters of flags, skin tones and hair: parts of emoji, not emoji."""
_STARTS = """
    0 symbols      231A objects    23CF symbols    23F0 objects    23F8 symbols    2600 weather    2605 symbols
    260E objects   2611 symbols    2614 weather    2615 food       2618 plants     261D body       2620 symbols
    2639 smileys   2640 symbols    2654 activities 2668 symbols    2692 objects    269B symbols    26B0 objects
    26BD sports    26C4 weather    26CE symbols    26CF objects    26D4 symbols    26E9 places     26F3 sports
    26F4 transport 26F7 sports     26FA places     26FD transport  2702 objects    2705 symbols    2708 transport
    2709 objects   270A body       270F objects    2714 symbols    2744 weather    2747 symbols    1F004 activities
    1F10D symbols  1F300 weather   1F32D food      1F330 plants    1F345 food      1F380 activities 1F392 objects
    1F39E activities 1F3BD sports  1F3D4 places    1F3F3 objects   1F3F8 sports    1F3FA objects   1F400 animals
    1F440 body     1F451 clothing  1F463 people    1F484 objects   1F485 body      1F486 people    1F488 objects
    1F48B symbols  1F48D clothing  1F48F people    1F490 plants    1F491 people    1F492 places    1F493 symbols
    1F4A1 objects  1F4A2 symbols   1F4A3 objects   1F4A4 symbols   1F4AA body      1F4AB symbols   1F4B0 objects
    1F500 symbols  1F50B objects   1F517 symbols   1F525 objects   1F52F symbols   1F54A animals   1F54B places
    1F54E objects  1F574 people    1F576 clothing  1F577 animals   1F579 objects   1F57A people    1F587 objects
    1F590 body     1F5A4 symbols   1F5A5 objects   1F5E3 symbols   1F5F3 objects   1F5FB places    1F600 smileys
    1F645 people   1F648 animals   1F64B people    1F680 transport 1F6A9 objects   1F6AB symbols   1F6B2 transport
    1F6B3 symbols  1F6B4 sports    1F6B6 people    1F6B7 symbols   1F6BD objects   1F6BE symbols   1F6BF objects
    1F6C2 symbols  1F6CB objects   1F6D0 symbols   1F6D2 objects   1F6D5 places    1F6DE transport 1F6E0 objects
    1F6E3 places   1F6E5 transport 1F7E0 symbols   1F90C body      1F90D symbols   1F90F body      1F910 smileys
    1F918 body     1F920 smileys   1F930 people    1F938 sports    1F940 plants    1F941 activities 1F942 food
    1F945 sports   1F950 food      1F970 smileys   1F97B clothing  1F980 animals   1F9AF objects   1F9B4 body
    1F9B8 people   1F9BA clothing  1F9BB body      1F9BC objects   1F9BE body      1F9C0 food      1F9CC people
    1F9D0 smileys  1F9D1 people    1F9E0 body      1F9E1 symbols   1F9E2 clothing  1F9E7 objects   1FA70 clothing
    1FA75 symbols  1FA78 objects   1FA80 activities 1FA90 objects  1FAB0 animals   1FAB4 plants    1FAB6 animals
    1FAB7 plants   1FAB8 animals   1FABB plants    1FABD animals   1FAC0 body      1FAC2 people    1FACE animals
    1FAD0 food     1FAE0 smileys   1FAF0 body      1FBC5 people
"""
"""Code point (hexadecimal) from which on, up to the next, emoji are of a category: the subjects of Unicode's charts."""
_WORDS = _STARTS.split()
_CODE_POINTS = [int(word, 16) for word in _WORDS[::2]]
_CATEGORIES = _WORDS[1::2]


def single_code_point(stem: str) -> int | None:
    """Return the code point of a picture's name like `1F600` or `2600-FE0F`; None for sequences and components."""
    try:
        codes = [int(part, 16) for part in stem.split("-") if part != _PRESENTATION]
    except ValueError:
        return None
    if len(codes) != 1 or any(codes[0] in component for component in _COMPONENTS):
        return None
    return codes[0]


def emoji_name(code_point: int) -> str | None:
    """Return the Unicode name in small letters, None where this Python's Unicode has none.

    >>> emoji_name(0x1F600)
    'grinning face'
    """
    if not 0 <= code_point < 0x110000:
        return None
    name = unicodedata.name(chr(code_point), "")
    return name.lower() or None


def emoji_category(code_point: int) -> str:
    """Return the category of an emoji, like `animals`."""
    return _CATEGORIES[bisect(_CODE_POINTS, code_point) - 1]
