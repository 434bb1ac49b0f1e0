"""The tars that a wids index names (the JSON of webdataset's indexed data sets).

    {"wids_version": 1, "name": "birds", "shardlist": [{"url": "birds-0.tar", "nsamples": 50, "filesize": 901120}]}

`url` is a path relative to the index. A shard elsewhere, by a scheme or a pipe, is neither fetched nor run; it is a
failed row, and so is a shard whose size, md5 or number of samples differs from what the index says. The samples are
those of the source `webdataset`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from triweave.data_pipeline.errors import SourceError
from triweave.data_pipeline.shards.media_encoder import MAX_TEXT_BYTES, MediaEncoder
from triweave.data_pipeline.shards.schema import Document
from triweave.data_pipeline.sources.base import Row
from triweave.data_pipeline.sources.collected_parts import file_below
from triweave.data_pipeline.sources.tar_samples import sample_document, tar_rows


@dataclass(frozen=True, kw_only=True)
class WidsSource:
    """The samples of the shards that the index `root`, a .json file, lists."""

    root: Path
    name: str = "wids"

    @property
    def options(self) -> dict[str, Any]:
        """Return no options."""
        return {}

    def rows(self) -> Iterator[Row]:
        """List the samples of every shard of the index, in its order."""
        listed: set[str] = set()
        for number, shard in enumerate(self._shards()):
            url = shard.get("url") if isinstance(shard, dict) else None
            if not isinstance(url, str) or not url:
                yield Row(id=f"shard:{number}", failed=f"entry {number} of the shardlist has no url")
            elif url in listed:
                yield Row(id=f"shard:{number}", failed=f"{url} is in the shardlist twice")
            else:
                listed.add(url)
                yield from self._shard_rows(url, shard)

    def document(self, row: Row, encoder: MediaEncoder) -> Document:
        """Make the document of one sample."""
        return sample_document(row.id, self.root.parent, row.recipe, encoder)

    def _shards(self) -> list[Any]:
        if not self.root.is_file() or self.root.stat().st_size > MAX_TEXT_BYTES:
            raise SourceError(f"--input {self.root}: must be a wids index, a .json of at most {MAX_TEXT_BYTES} bytes")
        try:
            index = json.loads(self.root.read_bytes())
        except (ValueError, RecursionError) as error:
            raise SourceError(f"--input {self.root}: is not JSON ({error})") from None
        shards = index.get("shardlist") if isinstance(index, dict) else None
        if not isinstance(shards, list) or not shards:
            raise SourceError(f"--input {self.root}: has no shardlist, so it is no wids index")
        return shards

    def _shard_rows(self, url: str, shard: dict[str, Any]) -> Iterator[Row]:
        """Yield the samples of one shard, all of them failed where it is not the file that the index means."""
        name = PurePosixPath(url).as_posix()
        problem = self._problem(name, shard)
        if problem is not None:
            yield Row(id=f"file:{url}", failed=problem)
            return
        rows = list(tar_rows(self.root.parent, name))
        samples = sum(row.recipe is not None for row in rows)
        promised = shard.get("nsamples")
        yield from rows
        if promised is not None and promised != samples:
            yield Row(id=f"count:{url}", failed=f"the index promises {promised} samples, the tar has {samples}")

    def _problem(self, name: str, shard: dict[str, Any]) -> str | None:
        path = file_below(self.root.parent, name)
        if path is None:
            return f"{name} is no file beside the index: fetch it there, and make the url its path"
        size = path.stat().st_size
        if shard.get("filesize") not in (None, size):
            return f"{name} has {size} bytes, the index says {shard['filesize']}: fetch it again"
        if shard.get("md5sum") is not None:
            with open(path, "rb") as file:
                found = hashlib.file_digest(file, "md5").hexdigest()
            if found != shard["md5sum"]:
                return f"{name} has the md5 {found}, the index says {shard['md5sum']}: fetch it again"
        return None
