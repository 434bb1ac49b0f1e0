"""The console script `triweave`: one table of commands, each loaded only when it is called.

A command is a module in `launch/commands/` with two functions: `add_arguments(parser)` declares its arguments and
`run(arguments) -> int` does the work and returns the exit code. `triweave --help` imports none of them, so it
answers at once, and commands that only touch shards load neither torch nor deepspeed.

Exit codes: 0 done, 1 the thing looked at is damaged or the run failed, 2 the user asked for something that cannot be
done (one line, no traceback), 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

COMMANDS = {
    "fetch": "get a corpus, without root and without changing the system",
    "build": "turn a corpus into WebDataset shards with a Parquet index and a ledger",
    "verify": "re-hash every shard and name every damaged shard, key and member",
    "view": "look at shards in a browser: documents, media, tokens, packs with their attention",
    "stats": "count samples, parts, bytes and durations of a shard folder, or make a page about its build",
    "export": "write shards in a layout that other tools read: OBELICS, LLaVA",
    "push": "copy shards to an object store, s3://bucket/prefix",
    "tokenizer": "train a sentencepiece tokenizer on shards",
    "tokenize": "write the token-count sidecar that planning needs",
    "plan": "show what a config's packs look like: fill, rows, tokens per modality",
    "train": "train inside one rank (what the launcher starts)",
    "import": "take over an open model: a config and a tokenizer that continue a transformers folder",
    "launch": "start ranks here or on a hostfile's machines with the DeepSpeed launcher",
    "checkpoint": "list, verify, prune and export the checkpoints of a run",
    "audit": "prove from a run's ledger that every sample came once and in order",
    "evaluate": "ask a trained model about what it has not seen, beside floors, a control and chance",
    "report": "one self-contained HTML page about one run or several side by side",
    "generate": "let a trained model go on from pictures, sounds and text",
    "demo": "everything on small real corpora: fetch, build, train, kill, resume, evaluate, report",
    "bench": "measure the loader, builds, generation and the kernels against their peers",
    "kernels": "compile, check, model and tune the Triton kernels",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments else ""
    if name not in COMMANDS:
        _top_level_parser().parse_args(arguments or ["--help"])
        return 0
    command = importlib.import_module(f"triweave.launch.commands.{name}")
    parser = argparse.ArgumentParser(
        prog=f"triweave {name}",
        description=COMMANDS[name][0].upper() + COMMANDS[name][1:] + ".",
        epilog=command.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_arguments(parser)
    try:
        return int(command.run(_parse(parser, arguments[1:])))
    except KeyboardInterrupt:
        print("triweave: interrupted", file=sys.stderr)
        return 130
    except user_errors() as error:
        print(f"triweave {name}: {error}", file=sys.stderr)
        return 2


def _parse(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """Parse with `key=value` arguments anywhere between the options, except in a command that has sub-commands."""
    try:
        return parser.parse_intermixed_args(arguments)
    except TypeError:  # what argparse raises at once for sub-commands
        return parser.parse_args(arguments)


def user_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions whose message is meant for the user; everything else is a bug and keeps its traceback."""
    from triweave.data_pipeline.errors import DataError
    from triweave.kernels.errors import KernelError
    from triweave.launch.errors import LaunchError
    from triweave.pretrain.errors import PretrainError

    return (DataError, KernelError, PretrainError, LaunchError)


def _top_level_parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="triweave",
        description="Pretrain transformers on interleaved image, text and audio documents.",
        epilog=f"commands:\n{listing}\n\nexamples:\n  triweave demo\n  triweave build --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="triweave COMMAND [ARGUMENTS ...]",
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of the commands below")
    return parser


def entry() -> NoReturn:
    """Run the console script; a command that has joined a process group leaves it behind as its rank has to.

    Whoever reads the output may stop reading, as `| head` does: exit code 141, as of a program that SIGPIPE ended.
    """
    try:
        try:
            code = main()
        finally:  # --help leaves by SystemExit
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python writes there once more at its end
        code = 128 + signal.SIGPIPE
    world = sys.modules.get("triweave.pretrain.engine.world")
    if world is not None:
        world.leave(code)
    sys.exit(code)


if __name__ == "__main__":
    entry()
