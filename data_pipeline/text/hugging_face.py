"""Tokenizers of imported models: a `tokenizer.json` of the Hugging Face library and the ids Triweave gives a meaning.

    FOLDER/tokenizer.json    as the open model has it
    FOLDER/triweave.json     {"vocab_size", "pad", "bos", "eos", "media": {name: {"start", "placeholder"}}}

`triweave import` writes both. Text never becomes a special token: a corpus that holds the characters `<|image_pad|>`
gets ordinary tokens. Whether decode(encode(text)) == text is up to the model's own normaliser.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from triweave.data_pipeline.errors import TokenizerError
from triweave.data_pipeline.text.tokenizer import MediaTokens, Tokenizer, refuse_surrogates

VOCABULARY = "tokenizer.json"
MEANINGS = "triweave.json"
_SPACE_SYMBOL = "\u2581"


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library, with bos, eos and media markers from triweave.json."""

    def __init__(self, vocabulary: bytes, meanings: bytes, name: str) -> None:
        """Make one from the bytes of the two files; `name` is what errors call it. Raises TokenizerError."""
        self._files = vocabulary, meanings
        self._name = name
        self._tokenizer = read_vocabulary(vocabulary, name)
        self._tokenizer.encode_special_tokens = True  # characters of a special token are ordinary text
        try:
            ids = json.loads(meanings)
            self.vocab_size = int(ids["vocab_size"])
            self.pad_id, self.bos_id, self.eos_id = (int(ids[key]) for key in ("pad", "bos", "eos"))
            self.media = {
                modality: MediaTokens(start_id=int(pair["start"]), placeholder_id=int(pair["placeholder"]))
                for modality, pair in ids["media"].items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise TokenizerError(
                f"{name}: {MEANINGS} is damaged ({type(error).__name__}: {error}); run `triweave import` again"
            ) from None
        self.hash = xxhash.xxh3_128_hexdigest(vocabulary + b"\0" + meanings)
        self.markers: dict[str, int] = {}
        special = {
            token: entry.content for token, entry in self._tokenizer.get_added_tokens_decoder().items() if entry.special
        }
        own = {self.pad_id, self.bos_id, self.eos_id}
        for pair in self.media.values():
            own |= {pair.start_id, pair.placeholder_id}
        beyond = range(self._tokenizer.get_vocab_size(with_added_tokens=True), self.vocab_size)
        self.unwritable = frozenset({*own, *special, *beyond})
        largest = max(own)
        if largest >= self.vocab_size:
            raise TokenizerError(f"{name}: {MEANINGS} names id {largest}, but vocab_size is {self.vocab_size}")
        for token in own - set(beyond):
            content = self._tokenizer.id_to_token(token)
            if token in self.encode(content).tolist():
                raise TokenizerError(
                    f"{name}: the text {content!r} becomes token {token}, which is a marker; mark it as special in "
                    f"{VOCABULARY}, or give {MEANINGS} another id"
                )
        decoder = json.loads(vocabulary).get("decoder")
        self._byte_of = _byte_of_character() if '"ByteLevel"' in json.dumps(decoder) else None

    @classmethod
    def read(cls, folder: Path) -> HuggingFaceTokenizer:
        """Read a folder that `triweave import` wrote; raises TokenizerError where it is none."""
        try:
            return cls((folder / VOCABULARY).read_bytes(), (folder / MEANINGS).read_bytes(), str(folder))
        except OSError as error:
            raise TokenizerError(
                f"tokenizer {folder}: {Path(error.filename).name} cannot be read ({error.strerror}); "
                "name a folder of `triweave import`, or a file of `triweave tokenizer train`"
            ) from None

    def __reduce__(self) -> tuple[Callable[[bytes, bytes, str], HuggingFaceTokenizer], tuple[bytes, bytes, str]]:
        """Pickle as the files' bytes."""
        return HuggingFaceTokenizer, (*self._files, self._name)

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        """Return the token ids of `text`, int32 [tokens]."""
        return np.asarray(self.encode_many([text])[0], np.int32)

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of several texts."""
        try:
            return [self._tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
        except Exception:
            refuse_surrogates(texts)
            raise

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids."""
        kept = [int(token) for token in ids if int(token) not in self.unwritable]
        text: str = self._tokenizer.decode(kept, skip_special_tokens=False)
        return text

    def token_bytes(self, token: int) -> bytes:
        """Return the UTF-8 bytes of one token; for a vocabulary that is not byte-level a guess where it joins words."""
        if token in self.unwritable:
            return b""
        piece: str = self._tokenizer.id_to_token(token)
        if self._byte_of is not None and all(character in self._byte_of for character in piece):
            return bytes(self._byte_of[character] for character in piece)
        if len(piece) == 6 and piece.startswith("<0x"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(_SPACE_SYMBOL, " ").encode()


def read_vocabulary(vocabulary: bytes, name: str) -> Any:
    """Return the library's tokenizer of a tokenizer.json; raises TokenizerError where it is none or not installed."""
    try:
        import tokenizers
    except ImportError:
        raise TokenizerError(
            f"tokenizer {name} is one of an imported model, which the package tokenizers reads: "
            "pip install 'triweave[interop]'"
        ) from None
    try:
        return tokenizers.Tokenizer.from_buffer(vocabulary)
    except Exception as error:
        raise TokenizerError(f"{name}: {VOCABULARY} is damaged ({' '.join(str(error).split())})") from None


def _byte_of_character() -> dict[str, int]:
    """Return the character -> byte table of byte-level vocabularies (Radford et al. 2019, GPT-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in printable)
    return table | {chr(256 + number): byte for number, byte in enumerate(others)}
