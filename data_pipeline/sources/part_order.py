"""The order of a document's parts, for sources whose parts have none of their own.

Only text is supervised, so with one fixed order either a medium would never come before the text that tells of it, or
no text would stand alone. `mixed` deals orders by a stable hash of the document id; `canonical` is media first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import xxhash

from triweave.data_pipeline.errors import SourceError

PartOrder = Literal["mixed", "canonical"]
PICTURE_CAPTION_AND_SPEECH = ("image speech caption", "speech caption image", "image caption speech")
"""The orders that `mixed` deals to a picture with a caption and its speech."""
PICTURE_AND_CAPTION = ("image caption", "image caption", "image caption", "caption image")
"""The orders that `mixed` deals to a picture with a caption: three in four put the caption where it learns from it."""


def require_part_order(order: str) -> None:
    """Raise SourceError unless `order` is one of PartOrder."""
    if order not in get_args(PartOrder):
        raise SourceError(f"part order {order!r}: allowed are {', '.join(get_args(PartOrder))}")


def deal_order(document_id: str, orders: Sequence[str]) -> tuple[str, ...]:
    """Return the part names of one of `orders` (names between spaces), the same one for an id for ever.

    >>> deal_order("a", ["image caption"])
    ('image', 'caption')
    """
    return tuple(orders[xxhash.xxh3_64_intdigest(document_id.encode()) % len(orders)].split())
