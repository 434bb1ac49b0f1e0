"""The build step that leaves out what blocklists name, or what a function of the user's decides.

The ledger's reason says which list and line, never what stood there. A listed medium is taken out by the media encoder,
before it is decoded: its document goes on without it where the source can do without (a page), else it goes too.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

from triweave.data_pipeline.errors import ConfigError
from triweave.data_pipeline.scrub.blocklist import Blocklist, fold, hosts_in, read_blocklist
from triweave.data_pipeline.shards.manifest import file_xxh3
from triweave.data_pipeline.shards.schema import Document, TextPart
from triweave.data_pipeline.sources.base import FilteredError

Refuse = Callable[[Document], str | None]
"""Returns why a document is to be left out, None to keep it."""

_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


@dataclass(frozen=True, kw_only=True)
class BlocklistStep:
    """Apply lists, then functions, in their order.

    functions: `module:function`, each a `Refuse`.
    """

    lists: tuple[Blocklist, ...] = ()
    functions: tuple[str, ...] = ()
    name: str = "blocklist"
    before_filters: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Return the hashes of the lists and of the functions' files."""
        return {
            "lists": [[blocklist.name, blocklist.xxh3] for blocklist in self.lists],
            "functions": [[function, _file_hash(function)] for function in self.functions],
        }

    @property
    def media(self) -> dict[str, str]:
        """Return sha256 (hex) -> reason of the listed media."""
        return {
            sha256: f"blocklist: a medium ({blocklist.name}, line {line})"
            for blocklist in reversed(self.lists)
            for sha256, line in blocklist.media.items()
        }

    def apply(self, document: Document) -> Document:
        """Return the document as it is. Raises FilteredError where it is to be left out."""
        texts = list(_texts(document))
        folded = fold("\n".join(texts))
        hosts = sorted({host for text in [*texts, *_origin(document)] for host in hosts_in(text)})
        for blocklist in self.lists:
            line = blocklist.line_of_words(folded)
            if line is not None:
                raise FilteredError(f"blocklist: a word ({blocklist.name}, line {line})")
            line = next((line for host in hosts if (line := blocklist.line_of_host(host)) is not None), None)
            if line is not None:
                raise FilteredError(f"blocklist: a domain ({blocklist.name}, line {line})")
        for function in self.functions:
            reason = load_function(function)(document)
            if reason is not None:
                raise FilteredError(f"blocklist: {reason} ({function})")
        return document


def _texts(document: Document) -> Iterator[str]:
    for part in document.parts:
        text = part.text if isinstance(part, TextPart) else part.alt
        if text:
            yield text


def _origin(document: Document) -> Iterator[str]:
    return (value for value in document.source.values() if isinstance(value, str))


def blocklist_step(asked: Sequence[str]) -> BlocklistStep | None:
    """Return the step for files of entries and `module:function` texts, None when nothing is asked for.

    Raises ConfigError for a file that is no list and a function that cannot be had.
    """
    functions = tuple(item for item in asked if _FUNCTION.fullmatch(item) and not Path(item).exists())
    for function in functions:
        load_function(function)
    lists = tuple(read_blocklist(Path(item)) for item in asked if item not in functions)
    return BlocklistStep(lists=lists, functions=functions) if asked else None


@cache
def load_function(name: str) -> Refuse:
    """Return the function `module:function`; its module may lie in the current folder. Raises ConfigError."""
    module_name, _, attribute = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # last, so that no file there hides an installed module
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"--blocklist {name}: {error}; name a file, or module:function, a module may lie here"
        ) from None
    if not callable(function):
        raise ConfigError(f"--blocklist {name}: is no function; it takes a Document and returns a reason or None")
    return cast(Refuse, function)


def _file_hash(name: str) -> str:
    """Return the hash of the file a function stands in, empty where it has none."""
    module = importlib.import_module(name.partition(":")[0])
    return file_xxh3(Path(module.__file__)) if module.__file__ else ""
