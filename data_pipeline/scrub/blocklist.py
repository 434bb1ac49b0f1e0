"""A blocklist: words and phrases, domains, and media by their hash.

# a comment                 one entry a line, UTF-8
word: some phrase           in any letter case; whole words where the script parts words, else anywhere
domain: example.org         and its subdomains, in any URL of the document
media: <sha256 in hex>      of a medium's file, as it came or as it would go into the shard
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import xxhash

from triweave.data_pipeline.errors import ConfigError

MAX_LIST_BYTES = 256 << 20
_ENTRY = re.compile(r"(word|domain|media)\s*:\s*(.*)")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_WORD = re.compile(r"\w+")
_UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
"""Thai, Lao, Burmese, Khmer, Kana, Han: written without spaces between words."""
_URL = re.compile(r"\b(?:https?|ftp)://[^\s\"'<>]{1,2048}|\bwww\.[^\s\"'<>/]{1,256}", re.IGNORECASE)

Phrase = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Blocklist:
    """One list; every entry leads to its line.

    xxh3: hash of the file's bytes.
    phrases: first word -> phrases that begin with it, in scripts that part words.
    unspaced: folded phrase, for the other scripts.
    """

    name: str
    xxh3: str = ""
    phrases: Mapping[str, Mapping[Phrase, int]] = field(default_factory=dict)
    unspaced: Mapping[str, int] = field(default_factory=dict)
    domains: Mapping[str, int] = field(default_factory=dict)
    media: Mapping[str, int] = field(default_factory=dict)

    def line_of_words(self, text: str) -> int | None:
        """Return a line that lists something in a folded text, None where no line does."""
        for unspaced, line in self.unspaced.items():
            if unspaced in text:
                return line
        words = _WORD.findall(text) if self.phrases else []
        for place, word in enumerate(words):
            for phrase, line in self.phrases.get(word, {}).items():
                if tuple(words[place : place + len(phrase)]) == phrase:
                    return line
        return None

    def line_of_host(self, host: str) -> int | None:
        """Return the line that lists a host or a domain it lies in, None where no line does."""
        labels = host.split(".")
        domains = (".".join(labels[start:]) for start in range(len(labels)))
        return next((self.domains[domain] for domain in domains if domain in self.domains), None)


def fold(text: str) -> str:
    """Return a text as it is compared: compatibility forms made equal (NFKC), without letter case."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


def hosts_in(text: str) -> Iterator[str]:
    """Yield the host of every URL in a text, in ASCII (IDNA) and lower case."""
    if "://" not in text and "www." not in text.lower():
        return
    for match in _URL.finditer(text):
        try:
            host = urlsplit(match[0] if "://" in match[0] else f"//{match[0]}").hostname
        except ValueError:  # a bracket of an IPv6 address that is not closed
            continue
        if host:
            yield _ascii_host(host)


def _ascii_host(host: str) -> str:
    host = host.casefold().strip(".")
    try:
        return host if host.isascii() else host.encode("idna").decode()
    except UnicodeError:
        return host


def read_blocklist(path: Path) -> Blocklist:
    """Return the list in a file. Raises ConfigError, which names the line where one is wrong."""
    try:
        if path.stat().st_size > MAX_LIST_BYTES:
            raise ConfigError(f"--blocklist {path}: has more than {MAX_LIST_BYTES >> 20} MiB; split it")
        data = path.read_bytes()
        lines = data.decode("utf-8-sig").splitlines()
    except OSError as error:
        raise ConfigError(f"--blocklist {path}: cannot be read ({error.strerror}); name a file of entries") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--blocklist {path}: is not UTF-8; convert it") from None
    phrases: dict[str, dict[Phrase, int]] = {}
    tables: dict[str, dict[str, int]] = {"unspaced": {}, "domain": {}, "media": {}}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        kind, entry = _entry(line.strip())
        if not entry:
            raise ConfigError(
                f"--blocklist {path}: line {number} is none of `word: PHRASE`, `domain: NAME` and `media: SHA256`"
            )
        if kind == "word" and not _UNSPACED.search(entry):
            phrase = tuple(_WORD.findall(entry))
            phrases.setdefault(phrase[0], {}).setdefault(phrase, number)
        else:
            tables["unspaced" if kind == "word" else kind].setdefault(entry, number)
    return Blocklist(
        name=path.name,
        xxh3=xxhash.xxh3_64_hexdigest(data),
        phrases=phrases,
        unspaced=tables["unspaced"],
        domains=tables["domain"],
        media=tables["media"],
    )


def _entry(line: str) -> tuple[str, str]:
    """Return kind and folded entry of a line, an empty entry where it is none."""
    match = _ENTRY.fullmatch(line)
    if match is None:
        return "", ""
    kind, value = match[1], fold(match[2])
    if kind == "word":
        return kind, value if _WORD.search(value) else ""
    if kind == "domain":
        return kind, _ascii_host(value) if re.fullmatch(r"[^\s/:@]+", value) else ""
    return kind, value if _SHA256.fullmatch(value) else ""
