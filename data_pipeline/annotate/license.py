"""The licence of a corpus that does not state it in its files: `--annotate license=CC-BY-SA-4.0`.

    source.license    the SPDX expression that was given, where the document has none

The filter `licenses` sees it, for this step runs before the filters.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from triweave.data_pipeline.errors import ConfigError
from triweave.data_pipeline.shards.schema import Document

_IDENTIFIER = r"[A-Za-z0-9][A-Za-z0-9.-]*\+?"
_EXPRESSION = re.compile(rf"{_IDENTIFIER}( (AND|OR|WITH) {_IDENTIFIER})*")
"""SPDX 2.3, annex D, without brackets; whether an identifier is on SPDX's list is not looked up."""


@dataclass(frozen=True, kw_only=True)
class LicenseStep:
    """State the licence of documents that have none. Raises ConfigError where it has not the form of SPDX."""

    license: str
    name: str = "license"
    before_filters: bool = True

    def __post_init__(self) -> None:
        """Check the form."""
        if not _EXPRESSION.fullmatch(self.license):
            raise ConfigError(
                f"--annotate license={self.license}: must be an SPDX expression, such as CC-BY-SA-4.0 or "
                "'GPL-2.0-only OR MIT'"
            )

    @property
    def options(self) -> dict[str, Any]:
        """Return the licence."""
        return {"license": self.license}

    def apply(self, document: Document) -> Document:
        """Return the document with a licence; what the corpus says goes before."""
        if document.source.get("license"):
            return document
        return replace(document, source=document.source | {"license": self.license})
