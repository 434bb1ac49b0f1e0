"""Find what would stop a run before any process starts: ranks take ten seconds to come up, then all say it at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from triweave.launch.errors import PreflightError
from triweave.launch.hostfile import Host
from triweave.launch.machine import Machine

if TYPE_CHECKING:
    from triweave.data_pipeline.shards.manifest import Manifest
    from triweave.pretrain.config import RunConfig


def check_ranks(ranks: int, *, machine: Machine, oversubscribe: bool) -> None:
    """Raise PreflightError where this machine cannot take so many ranks."""
    if ranks < 1:
        raise PreflightError(f"--num-ranks {ranks}: must be at least 1")
    if ranks > machine.most_ranks and (machine.cuda_devices or not oversubscribe):
        advice = "" if machine.cuda_devices else ", or add --oversubscribe to share cores"
        raise PreflightError(
            f"--num-ranks {ranks}: too many for this machine, which has {machine.describe_limit()}; "
            f"use at most {machine.most_ranks}{advice}"
        )


def check_slots(ranks: int, hosts: tuple[Host, ...]) -> None:
    """Raise PreflightError where a hostfile offers fewer slots than ranks."""
    slots = sum(host.slots for host in hosts)
    if not 1 <= ranks <= slots:
        raise PreflightError(
            f"--num-ranks {ranks}: the hostfile's {len(hosts)} machines offer {slots} slots; "
            f"use 1 to {slots} or add machines"
        )


def check_run(config: RunConfig, *, ranks: int) -> None:
    """Check that the shards, their token counts and the tokenizer of a run are there and that its batch fits the ranks.

    Looks at names and sizes only; `triweave verify` re-hashes.
    Raises DataError, PretrainError or PreflightError, each naming what is missing and the command that makes it.
    """
    from triweave.data_pipeline.shards.manifest import Manifest
    from triweave.data_pipeline.storage.files import file_names
    from triweave.data_pipeline.storage.location import shown
    from triweave.data_pipeline.text.token_counts import token_counts_path
    from triweave.data_pipeline.text.tokenizer import Tokenizer

    config.check_world(ranks)
    tokenizer = Tokenizer.load(config.data.tokenizer)
    for source in config.data.sources:
        manifest = Manifest.load(source.shards)
        names = file_names(manifest.root)
        _check_files(manifest, names)
        for number in range(len(manifest.shards)):
            sidecar = token_counts_path(manifest, number, tokenizer.hash)
            if sidecar.name not in names:
                raise PreflightError(
                    f"{shown(sidecar)}: no token counts of {config.data.tokenizer} for this shard; run `triweave "
                    f"tokenize {manifest.location} --tokenizer {config.data.tokenizer}`"
                )


def _check_files(manifest: Manifest, names: dict[str, int]) -> None:
    """Check the names and sizes of a folder's files. Raises PreflightError."""
    from triweave.data_pipeline.storage.location import shown

    advice = f"restore it or build the shards again (triweave verify {manifest.location} checks all of them)"
    for number, shard in enumerate(manifest.shards):
        tar = manifest.tar_path(number)
        for path in (tar, manifest.index_path(number)):
            if path.name not in names:
                raise PreflightError(f"{shown(path)}: this shard file is missing; {advice}")
        if names[tar.name] != shard.tar_bytes:
            raise PreflightError(f"{shown(tar)}: {names[tar.name]} bytes, not {shard.tar_bytes}; {advice}")
