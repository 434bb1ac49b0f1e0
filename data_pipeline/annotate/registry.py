"""The table of annotators: what `triweave build --annotate` takes. One file each; a new one is one line here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import NamedTuple

from triweave.data_pipeline.annotate.entities import EntitiesStep, load_pipeline
from triweave.data_pipeline.annotate.language import LanguageStep
from triweave.data_pipeline.annotate.license import LicenseStep
from triweave.data_pipeline.annotate.words import WordsStep
from triweave.data_pipeline.errors import ConfigError
from triweave.data_pipeline.shards.steps import DocumentStep


class Annotator(NamedTuple):
    """How a step is made: `make` takes the value of `name=value`; package, extra: what it needs and what brings it."""

    make: Callable[[str], DocumentStep]
    package: str = ""
    extra: str = ""
    takes: str = ""


def _entities(model: str) -> DocumentStep:
    load_pipeline(model)
    return EntitiesStep(model=model)


ANNOTATORS: dict[str, Annotator] = {
    "license": Annotator(lambda spdx: LicenseStep(license=spdx), takes="the SPDX expression of the corpus"),
    "language": Annotator(lambda _: LanguageStep(), "py3langid", "annotate"),
    "words": Annotator(lambda _: WordsStep(), "jieba", "annotate"),
    "entities": Annotator(_entities, "spacy", "entities", "the name of an installed spaCy model"),
}
"""Name -> annotator, in the order in which they work."""


def annotation_steps(asked: Sequence[str]) -> tuple[DocumentStep, ...]:
    """Return the steps for texts such as `words,language` and `entities=en_core_web_sm`.

    Raises ConfigError for an unknown name, a value too many or too few, and a library or model that is not there.
    """
    chosen: dict[str, str] = {}
    for item in (item.strip() for text in asked for item in text.split(",") if item.strip()):
        name, _, value = item.partition("=")
        if name not in ANNOTATORS:
            raise ConfigError(f"--annotate {item}: known are {', '.join(ANNOTATORS)}")
        if chosen.setdefault(name, value) != value:
            raise ConfigError(f"--annotate {item}: {name} can be asked for once")
    return tuple(_step(name, chosen[name]) for name in ANNOTATORS if name in chosen)


def _step(name: str, value: str) -> DocumentStep:
    annotator = ANNOTATORS[name]
    if bool(value) != bool(annotator.takes):
        wanted = f"needs {annotator.takes}, {name}=NAME" if annotator.takes else "takes no value"
        raise ConfigError(f"--annotate {name}: {wanted}")
    if annotator.package and find_spec(annotator.package) is None:
        raise ConfigError(f"--annotate {name}: needs {annotator.package}; pip install 'triweave[{annotator.extra}]'")
    return annotator.make(value)
