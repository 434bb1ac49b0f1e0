"""What a benchmark asks of a loader, in a process of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from triweave.data_pipeline.bench.work import Members, checksum_members, packed
from triweave.data_pipeline.config import DataConfig
from triweave.data_pipeline.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is measured: the shards of `config`, `samples` in all, and an empty folder for a loader's own format.

    store: where the same shards lie in an object store, empty where nothing is read from one.
    """

    config: DataConfig
    samples: int
    folder: Path
    store: str = ""

    @property
    def shards(self) -> Path:
        """The shard folder."""
        return Path(self.config.sources[0].shards)


class Contender(Protocol):
    """A loader. Made in a fresh process, in which nothing else of the benchmark runs.

    `raw` and `full` go through every sample once and return how many they saw. `first_batch` and `resume` make the
    loader from nothing and return with its first pack of the full work; `resume` at the share of an epoch that
    `prepare_resume` was given, which is not timed.
    """

    def __init__(self, setting: Setting) -> None:
        """Import the loader and bring the samples into its format; not timed. Raises ImportError without it."""

    def raw(self) -> int:
        """Read and checksum every sample."""

    def full(self) -> int:
        """Read, tokenise, decode and pack every sample."""

    def first_batch(self) -> None:
        """Make the first pack of an epoch."""

    def prepare_resume(self, share: float) -> None:
        """Get the loader's state behind a share of an epoch."""

    def resume(self) -> None:
        """Make the first pack behind the prepared state."""


class FromStore(Protocol):
    """A loader that can also begin with shards in an object store."""

    def prepare_store(self) -> None:
        """Get ready to begin there with nothing read yet; not timed."""

    def first_batch_from_store(self) -> None:
        """Make the first pack of an epoch from the store."""


class SampleStream(ABC):
    """A loader that yields samples: the work on them is the same for all, only `samples` differs."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.tokenizer = Tokenizer.load(setting.config.tokenizer)
        self.state: Any = None

    @abstractmethod
    def samples(self, state: Any = None) -> Iterator[Members]:
        """Yield the members of every sample of an epoch, or those behind a state."""

    @abstractmethod
    def state_behind(self, count: int) -> Any:
        """Return the loader's state behind `count` samples."""

    def raw(self) -> int:
        """Read and checksum every sample."""
        seen = 0
        for members in self.samples():
            checksum_members(members)
            seen += 1
        return seen

    def full(self) -> int:
        """Read, tokenise, decode and pack every sample."""
        return sum(count for count, _ in packed(self.samples(), self.tokenizer, self.setting.config))

    def first_batch(self) -> None:
        """Make the first pack of an epoch."""
        next(packed(self.samples(), self.tokenizer, self.setting.config))

    def prepare_resume(self, share: float) -> None:
        """Get the loader's state behind a share of an epoch."""
        self.state = self.state_behind(int(self.setting.samples * share))

    def resume(self) -> None:
        """Make the first pack behind the prepared state."""
        next(packed(self.samples(self.state), self.tokenizer, self.setting.config))


def skipped(samples: Iterator[Members], count: int) -> Iterator[Members]:
    """Read past `count` samples: the way back of a loader that has no state."""
    next(islice(samples, count, count), None)
    return samples
