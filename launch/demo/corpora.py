"""What the demo trains on: two Debian corpora mixed by weight, or one synthetic corpus where they cannot be had.

debian   tuxpaint (drawings, captions in 16 languages, spoken captions) and asterisk (studio prompts, 5 languages)
emoji    drawings of OpenMoji with their Unicode names, spoken by eSpeak NG; from the Python registry alone
auto     debian, and emoji where that fails
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from triweave.launch.demo.stage_display import SUMMARY
from triweave.launch.errors import DemoError

AUTO, DEBIAN, EMOJI = "auto", "debian", "emoji"
CHOICES = (AUTO, DEBIAN, EMOJI)
TUXPAINT, ASTERISK = "tuxpaint", "asterisk"
LANGUAGES = ("be", "bg", "ca", "da", "de", "el", "en", "es", "fr", "it", "ja", "lt", "nl", "pt_BR", "ro", "ru")
"""All that were spoken, and some more: enough to be multilingual, few enough to be learned in minutes."""

Tell = Callable[[str], object]


@dataclass(frozen=True, kw_only=True)
class CorpusSet:
    """Corpora that are trained on together.

    sources: corpus, which is also its source -> options of that source.
    vocabulary: tokens of the tokenizer; the names of emoji hold too little text for the other one's.
    words: what it is, in a few words. synthetic: whether the speech is.
    """

    sources: dict[str, dict[str, Any]]
    vocabulary: int
    words: str
    synthetic: bool = False


SETS = {
    DEBIAN: CorpusSet(
        sources={TUXPAINT: {"languages": LANGUAGES}, ASTERISK: {}},
        vocabulary=3072,
        words="Tux Paint's stamps and Asterisk's studio prompts",
    ),
    EMOJI: CorpusSet(
        sources={EMOJI: {}},
        vocabulary=1024,
        words="emoji: OpenMoji drawings, Unicode names, synthetic speech of eSpeak NG",
        synthetic=True,
    ),
}


@dataclass(frozen=True, kw_only=True)
class CorpusChoice:
    """What the user said about corpora.

    corpus: one of CHOICES. given: corpus -> a copy of it (folder or package file) to take instead of a download.
    """

    corpus: str = AUTO
    given: dict[str, Path] = field(default_factory=dict)

    def check(self) -> None:
        """Raise DemoError for choices that do not go together."""
        if self.corpus not in CHOICES:
            raise DemoError(f"--corpus {self.corpus}: must be one of {', '.join(CHOICES)}")
        if self.corpus == EMOJI and self.given:
            name = next(iter(self.given))
            raise DemoError(f"--{name} goes with --corpus debian; leave one of them out")

    def as_json(self) -> Any:
        """Return what the stage depends on."""
        return [self.corpus, {name: str(path.resolve()) for name, path in sorted(self.given.items())}]


def fetch(choice: CorpusChoice, folder: Path, *, update: Callable[[float, float | None, str], None], note: Tell) -> Any:
    """Get the corpora of the choice into `folder/<corpus>`; return the facts of the stage.

    note: gets the one line that says that the demo goes on with another corpus, and why.

    Raises DemoError where no corpus can be had, FetchError where the one that was asked for cannot.
    """
    from triweave.data_pipeline.errors import FetchError

    reason = None
    name = EMOJI if choice.corpus == EMOJI else DEBIAN
    try:
        origins = _fetch_set(name, choice, folder, update)
    except FetchError as error:
        if choice.corpus != AUTO or choice.given:
            raise
        reason = f"{error}"
        name = EMOJI
        note(fallback_line(reason))
        try:
            origins = _fetch_set(name, choice, folder, update)
        except FetchError as second:
            raise DemoError(f"no corpus can be had: the Debian packages are {error}; emoji: {second}") from None
    summary = f"{SETS[name].words}, from {'; '.join(dict.fromkeys(origins.values()))}"
    return {"corpus_set": name, "origins": origins, "fallback_reason": reason, SUMMARY: summary}


def fallback_line(reason: str) -> str:
    """Return the line that says that the Debian corpora were given up."""
    why = reason.partition(": give ")[0]
    return (
        f"The Debian packages of Tux Paint and Asterisk cannot be had ({why}): the demo goes on with the corpus "
        f"{SETS[EMOJI].words}. --corpus debian insists on them; --tuxpaint and --asterisk take copies."
    )


def _fetch_set(
    name: str, choice: CorpusChoice, folder: Path, update: Callable[[float, float | None, str], None]
) -> dict[str, str]:
    """Fetch every corpus of a set; return corpus -> where it came from."""
    from triweave.data_pipeline.fetch.registry import CORPORA

    names = list(SETS[name].sources)
    origins = {}
    for number, corpus in enumerate(names):

        def report(line: str, number: int = number, corpus: str = corpus) -> None:
            update(number, len(names), f"{corpus}: {line}")

        origins[corpus] = CORPORA[corpus](folder / corpus, choice.given.get(corpus), report).origin
    return origins
