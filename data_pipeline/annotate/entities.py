"""Named entities by a spaCy pipeline that the user has installed.

    labels.annotations.entities = {"0": [[8, 15, "GPE"], ...]}      the labels of the model

Only documents in the model's language, or without the label `language`; a model of `xx` takes all.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import xxhash

from triweave.data_pipeline.annotate.standoff import Spans, base_language, with_spans
from triweave.data_pipeline.errors import ConfigError
from triweave.data_pipeline.shards.manifest import file_xxh3
from triweave.data_pipeline.shards.schema import Document

PIECE_CHARACTERS = 50_000
"""Longer texts are read piece by piece, cut at a line's end where there is one: bounds the memory."""
_NOT_NEEDED = ("parser", "tagger", "morphologizer", "attribute_ruler", "lemmatizer", "trainable_lemmatizer", "senter")


@dataclass(frozen=True, kw_only=True)
class EntitiesStep:
    """Tag entities.

    model: name of an installed spaCy package, or a folder that holds a pipeline.
    """

    model: str
    name: str = "entities"
    before_filters: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Return the model by its own name and version, a folder by the hash of its files."""
        meta = load_pipeline(self.model).meta
        folder = Path(self.model)
        return {
            "model": f"{meta['lang']}_{meta['name']} {meta['version']}",
            **({"xxh3": _folder_hash(folder)} if folder.is_dir() else {}),
            "spacy": version("spacy"),
        }

    def apply(self, document: Document) -> Document:
        """Return the document with its entities."""
        pipeline = load_pipeline(self.model)
        if pipeline.lang not in ("xx", base_language(document)) and base_language(document):
            return document
        return with_spans(document, self.name, lambda text: _entities(pipeline, text))


def _entities(pipeline: Any, text: str) -> Spans:
    start = 0
    while start < len(text):
        end = len(text)
        if end - start > PIECE_CHARACTERS:
            end = text.rfind("\n", start, start + PIECE_CHARACTERS) + 1 or start + PIECE_CHARACTERS
        for entity in pipeline(text[start:end]).ents:
            yield start + entity.start_char, start + entity.end_char, entity.label_
        start = end


@lru_cache(maxsize=1)
def load_pipeline(model: str) -> Any:
    """Return a spaCy pipeline without what only other tasks need. Raises ConfigError where there is none."""
    try:
        import spacy
    except ImportError:
        raise ConfigError(
            f"--annotate entities={model}: needs spaCy, pip install 'triweave[entities]', and a model of it"
        ) from None
    try:
        pipeline = spacy.load(model, exclude=list(_NOT_NEEDED))
    except (OSError, ValueError, ImportError) as error:
        first_line = str(error).partition("\n")[0]
        raise ConfigError(
            f"--annotate entities={model}: no such model ({first_line}); install it with `python -m spacy download`"
        ) from None
    if not {"ner", "entity_ruler"} & set(pipeline.pipe_names):
        raise ConfigError(f"--annotate entities={model}: tags no entities, it has {', '.join(pipeline.pipe_names)}")
    return pipeline


def _folder_hash(folder: Path) -> str:
    digest = xxhash.xxh3_64()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()}:{file_xxh3(path)}\n".encode())
    return digest.hexdigest()
