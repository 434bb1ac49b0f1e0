"""Get a corpus without root and without changing the system. A second run finds it there and needs no network.

examples:
  triweave fetch tuxpaint --out corpora/tuxpaint
  triweave fetch tuxpaint --out corpora/tuxpaint --from tuxpaint-stamps-default_2022.06.04-1_all.deb
  triweave fetch tuxpaint --out corpora/tuxpaint --from /mnt/usb/stamps

Without --from: the installed package tuxpaint-stamps-default, else `apt-get download` with lists and cache of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path

from triweave.data_pipeline.fetch import fetch_tuxpaint

CORPORA = {"tuxpaint": fetch_tuxpaint}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("corpus", choices=CORPORA, help="which corpus")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to put it in")
    parser.add_argument("--from", dest="given", type=Path, metavar="PATH", help="a folder or a .deb to take it from")
    parser.add_argument("--json", action="store_true", help="print what was fetched as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Fetch; steps go to standard error."""
    report = partial(print, file=sys.stderr, flush=True)
    fetched = CORPORA[arguments.corpus](arguments.out, arguments.given, report)
    if arguments.json:
        print(json.dumps({"out": str(arguments.out), **vars(fetched)}))
    return 0
