"""The text tokenizer: sentencepiece BPE with byte fallback, and the marker tokens of media and conversations.

Tokenizers of imported models are in `hugging_face`; both are a `Tokenizer`.

Text is never normalised: decode(encode(text)) == text for every Unicode string, whatever its spaces and languages.
Markers are sentencepiece *control* symbols, which encoding never produces: a corpus that holds the characters
`<|image|>` gets ordinary tokens. Training is a pure function of (shards, vocab_size, seed, sample size).
"""

from __future__ import annotations

import heapq
import io
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import sentencepiece
import xxhash

from triweave.data_pipeline.errors import TokenizerError
from triweave.data_pipeline.media.modalities import MODALITIES
from triweave.data_pipeline.shards.manifest import Manifest, write_atomically
from triweave.data_pipeline.storage.location import require_local
from triweave.data_pipeline.text.shard_texts import read_texts

CHAT_MARKERS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
RESERVED_MEDIA = ("video", "reserved_0", "reserved_1", "reserved_2", "reserved_3")
"""Media names that get markers beside the registered modalities, so that a later one needs no new tokenizer."""
SAMPLE_BYTES = 100_000_000
"""Most UTF-8 bytes of text that training looks at; a larger corpus is sampled by hash."""
CHARACTER_COVERAGE = 0.9995
"""Share of the corpus's characters that get a piece of their own; the rest are spelled in bytes."""

_PAD_ID, _BOS_ID, _EOS_ID, _UNKNOWN_ID = range(4)
_PIECE_CHARACTERS = 1000  # at most 4000 bytes; sentencepiece drops sentences above 4192
_SPACE_SYMBOL = "\u2581"  # sentencepiece's stand-in for a space; where a text holds it, it is spelled in bytes


@dataclass(frozen=True, kw_only=True)
class MediaTokens:
    """Token ids of one modality: the marker before an item, and the placeholder of each of its tokens."""

    start_id: int
    placeholder_id: int


class Tokenizer(ABC):
    """What the stream needs of a tokenizer; picklable, so that worker processes can be handed one.

    hash: xxh3_128 (hex) of all that decides what a text becomes. vocab_size: ids are below it.
    pad_id, bos_id, eos_id: of padding, and of a document's two ends.
    media: modality name -> MediaTokens.
    markers: chat marker -> token id.
    unwritable: ids that no text encodes to (pad, bos, eos, unknown, every marker); generation must not draw them, eos
        excepted.
    """

    hash: str
    vocab_size: int
    pad_id: int
    bos_id: int
    eos_id: int
    media: dict[str, MediaTokens]
    markers: dict[str, int]
    unwritable: frozenset[int]

    @staticmethod
    def load(path: Path | str) -> Tokenizer:
        """Read a tokenizer: a file of `triweave tokenizer train`, or a folder that `triweave import` wrote.

        Raises TokenizerError where it is missing, unreadable, or neither.
        """
        if Path(path).is_dir():
            from triweave.data_pipeline.text.hugging_face import HuggingFaceTokenizer

            return HuggingFaceTokenizer.read(Path(path))
        try:
            return SentencePieceTokenizer(Path(path).read_bytes(), str(path))
        except OSError as error:
            raise TokenizerError(
                f"tokenizer {path} cannot be read ({error.strerror}): train one with "
                f"`triweave tokenizer train SHARDS --vocab-size V --out {path}`"
            ) from None

    @abstractmethod
    def encode(self, text: str) -> npt.NDArray[np.int32]:
        """Return the token ids of `text`, int32 [tokens], without bos and eos; never a marker.

        Raises TokenizerError for a text with a lone surrogate, which no encoding of Unicode can hold.
        """

    @abstractmethod
    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of several texts, as `encode` gives them; for many it is faster.

        Raises TokenizerError for a text with a lone surrogate.
        """

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids; markers, bos, eos and pad have none, broken UTF-8 becomes U+FFFD."""

    @abstractmethod
    def token_bytes(self, token: int) -> bytes:
        """Return the UTF-8 bytes of a text that one token stands for, none for markers, bos, eos and pad."""


class SentencePieceTokenizer(Tokenizer):
    """A tokenizer trained by Triweave; media has registered and reserved modalities."""

    def __init__(self, model: bytes, name: str) -> None:
        """Make a tokenizer from the bytes of a model file; `name` is what errors call it.

        Raises TokenizerError where the bytes are no tokenizer trained by Triweave.
        """
        self._model = model
        self._name = name
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.load_from_serialized_proto(model)
        except Exception:
            raise TokenizerError(
                f"{name} is no sentencepiece model: make one with `triweave tokenizer train ...`"
            ) from None
        self.hash = xxhash.xxh3_128_hexdigest(model)
        self.vocab_size: int = self._processor.get_piece_size()
        self.pad_id, self.bos_id, self.eos_id = _PAD_ID, _BOS_ID, _EOS_ID
        controls = {
            self._processor.id_to_piece(token): token
            for token in range(self.vocab_size)
            if self._processor.is_control(token)
        }
        self.media = {
            marker[2:-2]: MediaTokens(start_id=token, placeholder_id=controls[f"{marker[:-2]}_pad|>"])
            for marker, token in controls.items()
            if f"{marker[:-2]}_pad|>" in controls
        }
        self.markers = {marker: controls[marker] for marker in CHAT_MARKERS if marker in controls}
        self.unwritable = frozenset({_PAD_ID, _BOS_ID, _EOS_ID, _UNKNOWN_ID, *controls.values()})
        ends = (self._processor.pad_id(), self._processor.bos_id(), self._processor.eos_id())
        if not self.media or len(self.markers) < len(CHAT_MARKERS) or ends != (_PAD_ID, _BOS_ID, _EOS_ID):
            raise TokenizerError(
                f"{name} has no media and chat markers: Triweave needs a model made by `triweave tokenizer train`"
            )
        self._space_symbol_ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_SYMBOL.encode()]

    def __reduce__(self) -> tuple[Callable[[bytes, str], SentencePieceTokenizer], tuple[bytes, str]]:
        """Pickle as the model's bytes."""
        return SentencePieceTokenizer, (self._model, self._name)

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        """Return the token ids of `text`, int32 [tokens]."""
        try:
            if _SPACE_SYMBOL not in text:
                return np.asarray(self._processor.encode(text), np.int32)
            return np.asarray(self._encode_spelled(text), np.int32)
        except Exception:
            refuse_surrogates([text])
            raise

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of several texts; for many it is twice as fast."""
        try:
            if not any(_SPACE_SYMBOL in text for text in texts):
                return self._processor.encode(list(texts), num_threads=1)
            return [self._encode_spelled(text) for text in texts]
        except Exception:
            refuse_surrogates(texts)
            raise

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids."""
        return self._processor.decode([int(token) for token in ids])

    def token_bytes(self, token: int) -> bytes:
        """Return the UTF-8 bytes of one token.

        b"".join(map(token_bytes, encode(text))) == text.encode(): where these bytes meet are the token boundaries.
        """
        if token in self.unwritable:
            return b""
        if self._processor.is_byte(token):
            return bytes([int(self._processor.id_to_piece(token)[3:5], 16)])
        piece: str = self._processor.id_to_piece(token)
        return piece.replace(_SPACE_SYMBOL, " ").encode()

    def _encode_spelled(self, text: str) -> list[int]:
        """Encode a text that may hold sentencepiece's own space symbol, spelling that character in bytes."""
        ids: list[int] = []
        for position, stretch in enumerate(text.split(_SPACE_SYMBOL)):
            if position:
                ids += self._space_symbol_ids
            ids += self._processor.encode(stretch)
        return ids


def refuse_surrogates(texts: Sequence[str]) -> None:
    """Raise TokenizerError for a text with a lone surrogate, for which the libraries raise errors of many kinds."""
    for text in texts:
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise TokenizerError(f"text {text[:40]!r} holds a lone surrogate: repair its source") from None


@dataclass(frozen=True, kw_only=True)
class TrainingReport:
    """What a training saw: texts and their UTF-8 bytes in the shards, and the share that was used."""

    vocab_size: int
    hash: str
    texts: int
    text_bytes: int
    sampled_bytes: int


def train_tokenizer(
    manifests: Sequence[Manifest],
    vocab_size: int,
    out_path: Path,
    *,
    split: str | None = None,
    seed: int = 0,
    sample_bytes: int = SAMPLE_BYTES,
    character_coverage: float = CHARACTER_COVERAGE,
    progress: Callable[[int], None] | None = None,
) -> TrainingReport:
    """Train a tokenizer of `vocab_size` tokens, markers and bytes included, on the shards' texts; write it atomically.

    split: only samples whose label `split` is this, so that held-out text stays unseen.

    Equal arguments give equal bytes, in any process and for any order of shards. A corpus above `sample_bytes` is
    sampled: the pieces of text (at most 1000 characters each) with the smallest xxh3_64(seed, sample key, part, piece).
    `progress` is called with the number of samples read since its last call.

    Raises TokenizerError where the shards hold no text, `vocab_size` is too small or too large for them, or `out_path`
    is a URL or cannot be written.
    """
    require_local("--out", out_path, TokenizerError, "a run's `data.tokenizer` is a file")
    if out_path.is_dir():
        raise TokenizerError(f"--out {out_path} is a folder: name a file in it, such as {out_path / 'tokenizer.model'}")
    sample = _TextSample(seed=seed, limit_bytes=sample_bytes)
    shards = [(manifest, number) for manifest in manifests for number in range(len(manifest.shards))]
    for manifest, shard_number in shards:
        for texts in read_texts(manifest, shard_number, split=split):
            for part, text in enumerate(texts.texts):
                if text:
                    sample.add(texts.key, part, text)
            if progress is not None:
                progress(1)
    if not sample.texts:
        roots = ", ".join(manifest.location for manifest in manifests)
        where = f" in the split {split!r}" if split else ""
        raise TokenizerError(f"{roots} holds no text{where}: a tokenizer needs shards with text parts")
    model = _train(sample.sentences(), vocab_size, character_coverage)
    try:
        out_path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out_path, model)
    except OSError as error:
        raise TokenizerError(f"--out {out_path} cannot be written ({error.strerror}): name another place") from None
    trained = SentencePieceTokenizer(model, str(out_path))
    return TrainingReport(
        vocab_size=trained.vocab_size,
        hash=trained.hash,
        texts=sample.texts,
        text_bytes=sample.text_bytes,
        sampled_bytes=sample.sampled_bytes,
    )


class _TextSample:
    """The pieces of text with the smallest hashes whose bytes add up to at most a limit, in any order of arrival."""

    def __init__(self, *, seed: int, limit_bytes: int) -> None:
        self._seed = seed
        self._limit_bytes = limit_bytes
        self._heap: list[tuple[int, str]] = []  # (-hash, piece): the largest hash on top
        self._refused_from = 1 << 64  # pieces at or above the smallest hash ever dropped can not be in the result
        self.texts = 0
        self.text_bytes = 0
        self.sampled_bytes = 0

    def add(self, key: str, part: int, text: str) -> None:
        """Offer one text part."""
        self.texts += 1
        for number, piece in enumerate(_pieces(text)):
            size = len(piece.encode())
            self.text_bytes += size
            rank = xxhash.xxh3_64_intdigest(f"{key}\0{part}\0{number}".encode(), seed=self._seed)
            if rank >= self._refused_from:
                continue
            heapq.heappush(self._heap, (-rank, piece))
            self.sampled_bytes += size
            while self.sampled_bytes > self._limit_bytes:
                negative_rank, dropped = heapq.heappop(self._heap)
                self._refused_from = -negative_rank
                self.sampled_bytes -= len(dropped.encode())

    def sentences(self) -> Iterator[str]:
        """Return the sampled pieces in the order of their hashes."""
        return (piece for _, piece in sorted(self._heap, reverse=True))


def _pieces(text: str) -> Iterator[str]:
    """Cut a long text into pieces of at most _PIECE_CHARACTERS, after white space where there is some."""
    start = 0
    while len(text) - start > _PIECE_CHARACTERS:
        end = start + _PIECE_CHARACTERS
        cut = max(text.rfind(" ", start, end), text.rfind("\n", start, end)) + 1
        if cut <= start:
            cut = end
        yield text[start:cut]
        start = cut
    yield text[start:]


def _train(sentences: Iterator[str], vocab_size: int, character_coverage: float) -> bytes:
    """Return the model file of a sentencepiece training.

    Raises TokenizerError with the allowed sizes where `vocab_size` does not fit.
    """
    media = [*MODALITIES, *(name for name in RESERVED_MEDIA if name not in MODALITIES)]
    markers = [marker for name in media for marker in (f"<|{name}|>", f"<|{name}_pad|>")] + list(CHAT_MARKERS)
    fixed_tokens = _UNKNOWN_ID + 1 + len(markers) + 256
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(sentence.replace(_SPACE_SYMBOL, " ") for sentence in sentences),
            model_writer=model,
            model_type="bpe",
            # A size below that of the fixed tokens gets the same complaint as one that lacks room for the characters.
            vocab_size=max(vocab_size, fixed_tokens),
            control_symbols=markers,
            pad_id=_PAD_ID,
            bos_id=_BOS_ID,
            eos_id=_EOS_ID,
            unk_id=_UNKNOWN_ID,
            byte_fallback=True,
            character_coverage=character_coverage,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, OSError, ValueError) as error:
        raise TokenizerError(_explain(str(error), vocab_size)) from None
    return model.getvalue()


def _explain(message: str, vocab_size: int) -> str:
    """Turn sentencepiece's complaint about a vocabulary size into one line that names the limit."""
    if too_small := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return (
            f"vocab_size={vocab_size} is too small for this corpus: its characters, 256 bytes and the markers need at "
            f"least {too_small[1]}"
        )
    if too_large := re.search(r"set it to a value <= (\d+)", message):
        return f"vocab_size={vocab_size} is too large for this corpus: it has enough text for at most {too_large[1]}"
    return f"vocab_size={vocab_size}: sentencepiece cannot train on this corpus ({' '.join(message.split())})"
