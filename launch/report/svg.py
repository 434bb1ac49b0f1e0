"""From a matplotlib figure to an SVG that lives in the page: it takes the page's colours and fonts, and nothing else.

The page's policy forbids style attributes and inline style sheets, so what matplotlib says in them becomes presentation
attributes; a role's stand-in colour becomes a class (`f-` fills, `s-` strokes) that the style sheet colours for light
and dark. Ids that nothing points to go, the others get the plot's name in front.
"""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SERIES_COLOURS = 6
"""Series beyond so many take the colours again, with another dash pattern."""
ROLES = ("ink", "muted", "rule", *(f"c{number}" for number in range(SERIES_COLOURS)))
STAND_INS = {role: f"#0101{number + 1:02x}" for number, role in enumerate(ROLES)}
"""Role -> the colour that plots draw it with; no role looks like it on the page."""

_ROLE_OF = {colour: role for role, colour in STAND_INS.items()}
_HREF = "{http://www.w3.org/1999/xlink}href"
_DROPPED_STYLES = ("font-family", "stroke-linejoin", "stroke-linecap")
_REFERENCE = re.compile(r"url\(#([^)]+)\)")


def figure_svg(figure: Figure, *, name: str, title: str, description: str) -> str:
    """Return the figure as an `<svg>` element: the same text for the same figure.

    name: unique in the page, [a-z0-9-]. title, description: what a screen reader says.
    """
    import matplotlib

    target = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(target, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    root = ElementTree.fromstring(target.getvalue())
    _strip(root)
    _unify_ids(root, name)
    for element in root.iter():
        _move_styles(element)
    for attribute in ("width", "height", "version"):
        root.attrib.pop(attribute, None)
    root.attrib |= {"role": "img", "aria-labelledby": f"{name}-title {name}-about", "class": "plot"}
    for position, (tag, text) in enumerate((("title", title), ("desc", description))):
        element = ElementTree.Element(tag, {"id": f"{name}-{'about' if position else 'title'}"})
        element.text = text
        root.insert(position, element)
    return ElementTree.tostring(root, encoding="unicode")


def _strip(element: ElementTree.Element) -> None:
    """Remove name spaces, metadata and style sheets."""
    element.tag = element.tag.rpartition("}")[2]
    if reference := element.attrib.pop(_HREF, None):
        element.set("href", reference)
    for child in list(element):
        if child.tag.rpartition("}")[2] in ("metadata", "style"):
            element.remove(child)
        else:
            _strip(child)


def _unify_ids(root: ElementTree.Element, name: str) -> None:
    used = set()
    for element in root.iter():
        for key, value in element.attrib.items():
            if key == "href":
                used.add(value.removeprefix("#"))
                element.set(key, f"#{name}-{value.removeprefix('#')}")
            elif match := _REFERENCE.search(value):
                used.add(match[1])
                element.set(key, _REFERENCE.sub(rf"url(#{name}-\1)", value))
    for element in root.iter():
        own = element.attrib.pop("id", None)
        if own in used:
            element.set("id", f"{name}-{own}")


def _move_styles(element: ElementTree.Element) -> None:
    """Turn the style attribute into presentation attributes and role classes."""
    style = element.attrib.pop("style", "")
    if element.tag == "text" and "fill" not in style:  # matplotlib leaves black out
        raise AssertionError("a text without a role's colour")
    for declaration in filter(None, (item.strip() for item in style.split(";"))):
        key, _, value = (part.strip() for part in declaration.partition(":"))
        if key == "font":
            size = re.search(r"([\d.]+)px", value)
            key, value = "font-size", size[1] if size else "11"
        if key == "font-size":
            value = value.removesuffix("px")
        if key not in _DROPPED_STYLES:
            element.set(key, value)
    classes = []
    for key in ("fill", "stroke"):
        if role := _ROLE_OF.get(element.get(key, "")):
            del element.attrib[key]
            classes.append(f"{key[0]}-{role}")
    if classes:
        element.set("class", " ".join(classes))
