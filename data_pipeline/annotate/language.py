"""Which language a document is written in: langid's naive Bayes over byte n-grams (Lui and Baldwin 2012), by py3langid.

    labels.detected_language    ISO 639 code, `und` where the model gives none half of its belief
    labels.language             the same, where the corpus does not say it and it is not `und`

The filters `languages` and `min_stop_words` see the label, for this step runs before them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.metadata import version
from typing import Any

from triweave.data_pipeline.shards.schema import Document, TextPart

LEAST_PROBABILITY = 0.5
MAX_CHARACTERS = 4096
"""Of a document's text, from its beginning; more does not change the answer."""
UNDETERMINED = "und"


@dataclass(frozen=True, kw_only=True)
class LanguageStep:
    """Label a document with its language."""

    name: str = "language"
    before_filters: bool = True

    @property
    def options(self) -> dict[str, Any]:
        """Return the version of the library, which brings the model."""
        return {"py3langid": version("py3langid")}

    def apply(self, document: Document) -> Document:
        """Return the document with its labels; one without text comes back as it is."""
        text = _beginning(document)
        if not text:
            return document
        code = detect(text)
        labels = document.labels | {"detected_language": code}
        if code != UNDETERMINED:
            labels.setdefault("language", code)
        return replace(document, labels=labels)


def detect(text: str) -> str:
    """Return the ISO 639 code of a text's language, `und` if it has no letters or the model is not sure."""
    if not any(character.isalpha() for character in text):
        return UNDETERMINED
    code, probability = _model().classify(text)
    return str(code) if probability >= LEAST_PROBABILITY else UNDETERMINED


def _beginning(document: Document) -> str:
    texts = (part.text for part in document.parts if isinstance(part, TextPart))
    found = ""
    for text in texts:
        found = f"{found}\n{text[:MAX_CHARACTERS]}"[:MAX_CHARACTERS] if found else text[:MAX_CHARACTERS]
        if len(found) == MAX_CHARACTERS:
            break
    return found.strip()


@lru_cache(maxsize=1)
def _model() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
