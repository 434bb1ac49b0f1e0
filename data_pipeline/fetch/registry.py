"""The table of corpora: what `triweave fetch` takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from triweave.data_pipeline.fetch.asterisk import ASTERISK
from triweave.data_pipeline.fetch.emoji import fetch_emoji
from triweave.data_pipeline.fetch.packages import FILLETS, GIMP_HELP
from triweave.data_pipeline.fetch.target import Fetched, Report
from triweave.data_pipeline.fetch.tuxpaint import fetch_tuxpaint

CORPORA: dict[str, Callable[[Path, Path | None, Report], Fetched]] = {
    "tuxpaint": fetch_tuxpaint,
    "asterisk": ASTERISK.fetch,
    "fillets": FILLETS.fetch,
    "gimp-help": GIMP_HELP.fetch,
    "emoji": fetch_emoji,
}
"""Name -> function of (out, given, report); raises FetchError."""
