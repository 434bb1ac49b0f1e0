"""Annotations that point into a document's text, beside it: the text itself stays as it is.

    labels.annotations = {"words": {"0": [[0, 2, "n"], [2, 3, "p"]]}, "entities": {"2": [[4, 9, "PERSON"]]}}

plug-in -> place of the text part in `parts` -> [start, end, tag], in characters of that part, in order.
They are in the sample's JSON and, for their size, not in the index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from triweave.data_pipeline.shards.schema import ANNOTATIONS, Document, TextPart

Spans = Iterator[tuple[int, int, str]]
"""(start, end, tag) in characters, in order."""


def with_spans(document: Document, name: str, find: Callable[[str], Spans]) -> Document:
    """Return the document with what `find` yields for each of its texts under `name`."""
    found = {
        str(place): [list(span) for span in find(part.text)]
        for place, part in enumerate(document.parts)
        if isinstance(part, TextPart)
    }
    found = {place: spans for place, spans in found.items() if spans}
    if not found:
        return document
    annotations = document.labels.get(ANNOTATIONS, {}) | {name: found}
    return replace(document, labels=document.labels | {ANNOTATIONS: annotations})


def base_language(document: Document) -> str:
    """Return the language of a document without its region (`zh` of `zh_TW`), empty if it is not known."""
    return str(document.labels.get("language", "")).replace("_", "-").partition("-")[0].lower()
