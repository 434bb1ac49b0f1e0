"""Read a run's ledger of consumed samples, and nothing else, and say whether every planned row came once and in order.

examples:
  triweave audit runs/demo/train
  triweave audit runs/eight-ranks --same-as runs/one-rank
  triweave audit runs/demo/train --json

However often the run was killed, stopped and resumed, and on however many ranks: nothing may be lost or repeated. Exit
code 1 if something was.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("run", metavar="RUN", type=Path, help="the run_dir of a run that has trained")
    parser.add_argument(
        "--same-as", metavar="RUN", type=Path, help="a run of the same plan that must have the same rows"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Audit and print."""
    from triweave.pretrain.ledger.audit import audit

    found = audit(arguments.run, arguments.same_as)
    if arguments.json:
        print(json.dumps(dataclasses.asdict(found), indent=1))
    else:
        ranks = ", ".join(map(str, found.world_sizes))
        print(
            f"{arguments.run}: {found.consumed:,} pieces in {found.rows:,} rows and {found.steps:,} steps, starts on "
            f"{ranks} rank(s)\nlost {found.lost}, repeated {found.repeated}, skipped {found.skipped}, filled "
            f"{found.filled}, replayed {found.replayed}; order {'equal' if found.order_equal else 'NOT equal'}"
        )
        for problem in found.problems:
            print(f"  {problem}")
    return 0 if found.exact else 1
