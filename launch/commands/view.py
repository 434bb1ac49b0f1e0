"""Look at shards in a browser: documents with their pictures and sounds, tokens, and the packs of a config.

examples:
  triweave view shards/tuxpaint
  triweave view shards/tuxpaint shards/asterisk --tokenizer tokenizer.model --port 8800
  triweave view s3://corpora/tuxpaint
  triweave view --config launch/configs/demo_cpu.yaml data.sequence_length=1024
  ssh -L 8765:127.0.0.1:8765 MACHINE                then `triweave view` there, and its address here

The page is served on 127.0.0.1 until Ctrl-C, to every user of this machine, and loads nothing from elsewhere. With
--config also the config's shards and tokenizer are shown, and the packs of each of its plan segments: which pieces a
pack holds, and what their tokens attend to. Press ? in the page for its keys; docs/viewer.md says how to search.
"""

from __future__ import annotations

import argparse
from contextlib import suppress
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from triweave.launch.errors import ViewError

if TYPE_CHECKING:
    from triweave.launch.view.server import ViewServer

DEFAULT_PORT = 8765


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("arguments", nargs="*", metavar="SHARDS", help="shard folders, and key=value with --config")
    parser.add_argument("--tokenizer", metavar="FILE", help="show token boundaries (default: the config's)")
    parser.add_argument("--config", metavar="FILE", help="YAML of a run: show its shards and its packs")
    parser.add_argument(
        "--port", type=int, default=DEFAULT_PORT, help=f"port to listen on, 0: any free one (default {DEFAULT_PORT})"
    )


def run(arguments: argparse.Namespace) -> int:
    """Serve until interrupted."""
    with make_server(arguments) as server:
        print(f"{server.url}  (Ctrl-C ends it)", flush=True)
        with suppress(KeyboardInterrupt):
            server.serve_forever()
    return 0


def make_server(arguments: argparse.Namespace) -> ViewServer:
    """Return the server, listening. Raises ViewError and DataError."""
    from triweave.data_pipeline.config import load_data_config
    from triweave.data_pipeline.text.tokenizer import Tokenizer
    from triweave.launch.train_section import train_number
    from triweave.launch.view.packs import PackBook
    from triweave.launch.view.server import ViewServer
    from triweave.launch.view.shard_folder import ShardFolder

    if not 0 <= arguments.port < 1 << 16:
        raise ViewError(f"--port {arguments.port}: must be from 0 to 65535")
    overrides = [item for item in arguments.arguments if "=" in item and item.startswith(("data.", "train."))]
    locations = [item for item in arguments.arguments if item not in overrides]
    if overrides and not arguments.config:
        raise ViewError(f"{overrides[0]}: overrides a config; name it with --config")
    config = load_data_config(arguments.config, overrides) if arguments.config else None
    packs = PackBook(config, train_number(arguments.config, overrides, "global_batch_rows")) if config else None
    named = {source.name: source.shards for source in config.sources} if config else {}
    named |= {_name(place, named): place for place in locations if place not in named.values()}
    if not named:
        raise ViewError("nothing to show: name a shard folder, or a run's YAML with --config")
    path = arguments.tokenizer or (config.tokenizer if config else None)
    tokenizer = Tokenizer.load(path) if path else None
    folders = [ShardFolder(name, location) for name, location in named.items()]
    return ViewServer(arguments.port, folders, tokenizer=tokenizer, packs=packs)


def _name(location: str, taken: dict[str, str]) -> str:
    """Return the last name of a location, the whole of it where another folder has that."""
    name = PurePosixPath(location).name or location
    return location if name in taken else name
