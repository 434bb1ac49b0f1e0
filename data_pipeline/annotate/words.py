"""Words and parts of speech of Chinese text, by jieba: a prefix dictionary, and a hidden Markov model for the unknown.

    labels.annotations.words = {"0": [[0, 2, "n"], ...]}      tags of the ICTCLAS set: n noun, v verb, m number, x other

Only documents whose label `language` is Chinese, or which have none and hold Han characters without Kana or Hangul.
White space is no word.
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from typing import Any

from triweave.data_pipeline.annotate.standoff import Spans, base_language, with_spans
from triweave.data_pipeline.shards.schema import Document, TextPart

CHINESE = ("zh", "cmn", "yue", "wuu", "lzh")
_HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]")
_KANA_OR_HANGUL = re.compile(r"[\u3040-\u30ff\uac00-\ud7af]")


@dataclass(frozen=True, kw_only=True)
class WordsStep:
    """Cut Chinese text into words and tag them."""

    name: str = "words"
    before_filters: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Return the version of the library, which brings dictionary and model."""
        return {"jieba": version("jieba")}

    def apply(self, document: Document) -> Document:
        """Return the document with its words; one that is not Chinese comes back as it is."""
        return with_spans(document, self.name, words_in) if _is_chinese(document) else document


def words_in(text: str) -> Spans:
    """Yield (start, end, tag) of the words of a text."""
    end = 0
    for pair in _tagger().cut(text):
        start, end = end, end + len(pair.word)
        assert text[start:end] == pair.word, "jieba gives back every character"
        if not pair.word.isspace():
            yield start, end, pair.flag


def _is_chinese(document: Document) -> bool:
    language = base_language(document)
    if language:
        return language in CHINESE
    text = "".join(part.text for part in document.parts if isinstance(part, TextPart))
    return bool(_HAN.search(text)) and not _KANA_OR_HANGUL.search(text)


@lru_cache(maxsize=1)
def _tagger() -> Any:
    """Return a tagger with a dictionary of its own, about a second of work.

    jieba keeps its dictionary as a marshal file in the temporary folder that all users share, and loads what it finds
    there; an empty folder keeps it from reading what somebody else has put in its place.
    """
    import jieba
    import jieba.posseg

    jieba.setLogLevel("WARNING")
    tokenizer = jieba.Tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.tmp_dir = folder
        tokenizer.initialize()
    return jieba.posseg.POSTokenizer(tokenizer)
