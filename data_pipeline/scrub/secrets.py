"""Find what opens a door: private keys, access tokens of known services, passwords that are written out.

A token must have the shape its service gives it and be as random as it should be: Shannon entropy of its characters,
-sum p log2 p, in bits. `sk-xxxxxxxxxxxxxxxxxxxxxxxx` in a manual stays. The shapes are those the services publish for
secret scanning.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator

Spans = Iterator[tuple[int, int]]

TOKEN_BITS = 3.0
PASSWORD_BITS = 2.75

_PRIVATE_KEY = re.compile(
    r"-----BEGIN (?P<label>(?:[A-Z0-9]{1,20} ){0,4}PRIVATE KEY(?: BLOCK)?)-----"
    r"(?:(?:(?!-----)[\s\S]){0,32768}-----END (?P=label)-----|(?:(?:\s|\\[nr]){1,4}[A-Za-z0-9+/=]{16,128}){1,512})"
)
"""To its end, or as far as lines of base64 go where the end is cut off."""
_TOKENS = re.compile(
    r"(?<![A-Za-z0-9_-])(?:"
    r"(?:AKIA|ASIA|ABIA|ACCA)[A-Z2-7]{16}"  # Amazon Web Services
    r"|gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_[A-Za-z0-9_]{22,255}"  # GitHub
    r"|glpat-[A-Za-z0-9_.-]{20,300}"  # GitLab
    r"|xox[abeoprs]-[A-Za-z0-9-]{10,250}|xapp-\d-[A-Za-z0-9-]{10,250}"  # Slack
    r"|[rs]k_(?:live|test)_[A-Za-z0-9]{20,250}|whsec_[A-Za-z0-9]{32,64}"  # Stripe
    r"|AIza[A-Za-z0-9_-]{35}|ya29\.[A-Za-z0-9_-]{20,500}|GOCSPX-[A-Za-z0-9_-]{28}"  # Google
    r"|sk-(?:ant|proj|svcacct|admin)-[A-Za-z0-9_-]{20,250}|sk-[A-Za-z0-9]{20,100}"  # Anthropic, OpenAI
    r"|hf_[A-Za-z0-9]{34}|npm_[A-Za-z0-9]{36}|pypi-AgE[A-Za-z0-9_-]{50,1000}"  # Hugging Face, npm, PyPI
    r"|SG\.[A-Za-z0-9_-]{22}\.[A-Za-z0-9_-]{43}|dop_v1_[a-f0-9]{64}|shp(?:at|ca|pa|ss)_[a-fA-F0-9]{32}"
    r"|\d{8,10}:AA[A-Za-z0-9_-]{33}"  # SendGrid, DigitalOcean, Shopify, Telegram
    r"|eyJ[A-Za-z0-9_-]{8,4096}\.eyJ[A-Za-z0-9_-]{8,8192}\.[A-Za-z0-9_-]{16,2048}"  # JSON Web Token, RFC 7519
    r")(?![A-Za-z0-9_-])"
)
_ASSIGNED = re.compile(
    r"(?:passwor[dt]|passwd|passphrase|pwd|secret|token|(?:api|access|auth|secret|account|encryption|private)[_-]?key)"
    r"[\"'\u201d]?\s{0,3}(?::=|=>|=|:)\s{0,3}[\"'`\u201c]?(?P<value>[^\s\"'`,;<>(){}\[\]\u201c\u201d]{8,256})",
    re.IGNORECASE,
)
_URL_LOGIN = re.compile(
    r"(?<![A-Za-z0-9+.-])[A-Za-z][A-Za-z0-9+.-]{1,20}://[^\s/:@]{0,64}:(?P<value>[^\s/@<>]{1,128})@"
)


def entropy_bits(text: str) -> float:
    """Return the Shannon entropy of a text's characters in bits for each character, 0 for an empty one."""
    counts = Counter(text).values()
    return -sum(count / len(text) * math.log2(count / len(text)) for count in counts)


def private_keys(text: str) -> Spans:
    """Yield private keys in PEM and PGP armour, whole or cut off."""
    if "PRIVATE KEY" in text:
        for match in _PRIVATE_KEY.finditer(text):
            yield match.span()


def access_tokens(text: str) -> Spans:
    """Yield tokens whose shape tells their service, at least TOKEN_BITS random."""
    for match in _TOKENS.finditer(text):
        if entropy_bits(match[0]) >= TOKEN_BITS and not _is_words(match[0]):
            yield match.span()


def _is_words(token: str) -> bool:
    """Return whether a token is words with dashes, as `sk-learn-contrib-estimators` is."""
    return token.startswith(("sk-", "xox", "glpat-")) and not any(character.isdigit() for character in token)


def passwords(text: str) -> Spans:
    """Yield what is assigned to a name such as `password`, `token` or `api_key`, and the password in a URL.

    An assigned value must hold a letter and a digit and be PASSWORD_BITS random, or it is a word of the language.
    """
    found = [match.span("value") for match in _ASSIGNED.finditer(text) if _is_password(match["value"])]
    found += [match.span("value") for match in _URL_LOGIN.finditer(text)]
    end = 0
    for start, stop in sorted(found):
        if start >= end:
            yield start, stop
            end = stop


def _is_password(value: str) -> bool:
    mixed = any(character.isdigit() for character in value) and any(character.isalpha() for character in value)
    return mixed and entropy_bits(value) >= PASSWORD_BITS
