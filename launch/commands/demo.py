"""examples:
  triweave demo                                    about 8 minutes on 2 CPU cores after the downloads (259 MB)
  triweave demo --corpus emoji                     without apt: a synthetic corpus from the Python registry (41 MB)
  triweave demo --tuxpaint tuxpaint-stamps-default_2022.06.04-1_all.deb --asterisk FOLDER
  triweave demo --out /tmp/demo --steps 40 --json
  triweave demo --long                             about an hour: 3 seeds and a control on shuffled pairs
  triweave demo fault                              a minute, no download: towers that DeepSpeed trains silently wrong

Stop it whenever you like: started again it continues. A second run repeats nothing and needs no network.
DIR/report.html shows it, DIR/result.json has the figures, DIR/train the run, DIR/config.yaml its config; --long adds
DIR/long and shares the data. Without apt the demo goes on with the emoji by itself, and says so.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from triweave.launch.demo.short import DemoOptions

CORPUS_CHOICES = ("auto", "debian", "emoji")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "part", nargs="?", choices=("fault",), help="fault: ranks with unlike modalities under DeepSpeed and Triweave"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: runs/demo, or runs/fault for `demo fault`")
    parser.add_argument(
        "--corpus",
        choices=CORPUS_CHOICES,
        default="auto",
        help="debian: Tux Paint and Asterisk; emoji: synthetic, no apt; auto: debian, else emoji (default)",
    )
    parser.add_argument("--tuxpaint", type=Path, metavar="PATH", help="Tux Paint's stamps: a folder or the .deb")
    parser.add_argument("--asterisk", type=Path, metavar="PATH", help="Asterisk's core sounds: a folder")
    parser.add_argument("--steps", type=int, metavar="N", help="optimizer steps (default: those of the shipped config)")
    parser.add_argument("--long", action="store_true", help="train 3 seeds and a control for about an hour")
    parser.add_argument("--json", action="store_true", help="print result.json instead of tables")


def run(arguments: argparse.Namespace) -> int:
    """Run or continue the demo and print its result."""
    if arguments.part == "fault":
        return _run_fault(arguments.out or Path("runs/fault"), as_json=arguments.json)
    from triweave.launch.demo.corpora import CorpusChoice
    from triweave.launch.demo.short import DemoOptions

    named = {"tuxpaint": arguments.tuxpaint, "asterisk": arguments.asterisk}
    given = {name: path for name, path in named.items() if path is not None}
    choice = CorpusChoice(corpus=arguments.corpus, given=given)
    options = DemoOptions(out=arguments.out or Path("runs/demo"), choice=choice, steps=arguments.steps)
    if arguments.long:
        return _run_long(options, as_json=arguments.json)
    return _run_short(options, as_json=arguments.json)


def _run_short(options: DemoOptions, *, as_json: bool) -> int:
    from triweave.launch.demo.short import run_demo
    from triweave.launch.demo.tables import print_result

    result = run_demo(options)
    if as_json:
        print(json.dumps(result))
    else:
        print_result(result)
    return 0


def _run_fault(out: Path, *, as_json: bool) -> int:
    from rich.console import Console

    from triweave.launch.demo.fault import print_fault_result, run_fault_demo

    with Console(stderr=True).status("starting") as status:
        result = run_fault_demo(out, update=status.update)
    if as_json:
        print(json.dumps(result))
    else:
        print_fault_result(result, out)
    return 0


def _run_long(options: DemoOptions, *, as_json: bool) -> int:
    from triweave.launch.demo.long import run_long
    from triweave.launch.demo.tables import print_long_result

    result = run_long(options)
    if as_json:
        print(json.dumps(result))
    else:
        print_long_result(result)
    return 0
