"""One page for one run, or for several side by side: curves, retrieval against floors, sample captions, machine.

examples:
  triweave report runs/demo/train                      writes runs/demo/train/report.html
  triweave report runs/a runs/b --out compare.html
  triweave report runs/demo/train --samples 0          without pictures and sounds

The page is one HTML file that loads nothing and runs no script. It shows what is there: `triweave evaluate RUN` first
adds retrieval and captions. Generated captions are kept in RUN/report_samples.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

DEFAULT_PICTURES = 12
PAGE_NAME = "report.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run, with its metrics.jsonl")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help=f"default: RUN/{PAGE_NAME}; for several runs {PAGE_NAME} here"
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=DEFAULT_PICTURES,
        metavar="N",
        help=f"pictures to show, and half as many sounds; 0 shows none (default: {DEFAULT_PICTURES})",
    )
    parser.add_argument("--json", action="store_true", help="print the verdicts and the page's path as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Write the page and print the verdicts."""
    from triweave.launch.report.write import write_report

    out = arguments.out or (arguments.runs[0] / PAGE_NAME if len(arguments.runs) == 1 else Path(PAGE_NAME))
    written = write_report(arguments.runs, out, pictures=arguments.samples, tell=_tell)
    if arguments.json:
        print(json.dumps(written, ensure_ascii=False))
    else:
        for name, verdict in written["verdicts"].items():
            print(f"{name}: {verdict['answer']} {verdict['sentence']}")
        print(f"{written['out']} ({written['bytes'] / (1 << 20):.1f} MiB)")
    return 0


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
