"""Commands that have several actions, `triweave kernels compile` for one: a module per action, in one folder.

An action's module has the two functions of a command, `add_arguments(parser)` and `run(arguments) -> int`, and its
docstring is the end of its `--help`. All modules of the folder are imported when the command is, so they import what is
heavy inside `run`.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Mapping


def add_actions(parser: argparse.ArgumentParser, folder: str, actions: Mapping[str, str]) -> None:
    """Declare `actions`, name -> what it does; their modules lie in `triweave.launch.<folder>`."""
    choices = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, what in actions.items():
        module = importlib.import_module(f"triweave.launch.{folder}.{name}")
        action = choices.add_parser(
            name,
            help=what,
            description=what[0].upper() + what[1:] + ".",
            epilog=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(action)
        action.set_defaults(run_action=module.run)


def run_action(arguments: argparse.Namespace) -> int:
    """Run the action that was asked for and return its exit code."""
    return int(arguments.run_action(arguments))
