"""Scrubbing: what each kind finds and leaves, check digits, placeholders everywhere, and time on hostile text."""

from __future__ import annotations

import itertools
import json
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from triweave.data_pipeline.errors import ConfigError
from triweave.data_pipeline.scrub import personal
from triweave.data_pipeline.scrub.kinds import GROUPS, KINDS, placeholder
from triweave.data_pipeline.scrub.personal import iban_checks, luhn
from triweave.data_pipeline.scrub.secrets import entropy_bits
from triweave.data_pipeline.scrub.step import scrub_step
from triweave.data_pipeline.shards.index import read_index
from triweave.data_pipeline.shards.ledger import read_ledger
from triweave.data_pipeline.shards.manifest import Manifest
from triweave.data_pipeline.shards.media_encoder import MediaEncoder, MediaOptions
from triweave.data_pipeline.shards.schema import Document, TextPart
from triweave.launch.cli import main

RANDOM = "aB3dE6gH9jK2mN5pQ8sT1vW4xY7zA0cD3fG6"
PEM = "-----BEGIN RSA PRIVATE KEY-----\nMIIEpAIBAAKCAQEA7bq\nx9==\n-----END RSA PRIVATE KEY-----"
CUT_PEM = "-----BEGIN PRIVATE KEY-----\nMIIEvQIBADANBgkqhkiG9w0BAQEFAASCBKcw\nMIIEowIBAAKCAQEA0Z3VS5JJcds3xfn"


def scrubbed(text: str, *asked: str) -> str:
    step = scrub_step(asked or ("pii,secrets",))
    assert step is not None
    (part,) = step.apply(Document(id="d", parts=(TextPart(text=text),))).parts
    assert isinstance(part, TextPart)
    return part.text


@pytest.mark.parametrize(
    ("kind", "text", "secret"),
    [
        ("email", "Write to {}, please.", "anna.b+list@mail.site.co.uk"),
        ("email", "请联系{}中文", "bob@example.com"),
        ("email", "<a href='mailto:{}'>", "x@xn--bcher-kva.example"),
        ("phone", "Call {} now", "+49 30 901820"),
        ("phone", "fax: {}.", "+1 (212) 555-2368"),
        ("ipv4", "It came from {}.", "93.184.215.14"),
        ("ipv4", "{}:443", "193.0.6.139"),
        ("ipv4", "x\n{} - GET /", "193.0.6.139"),
        ("ipv6", "AAAA {}", "2606:2800:21f:cb07:6820:80da:af6b:8b2c"),
        ("ipv6", "[{}]:80", "2001:4860:4860::8888"),
        ("credit_card", "Visa {} 12/30", "4111 1111 1111 1111"),
        ("credit_card", "{}, thanks", "5500-0055-5555-5559"),
        ("credit_card", "Amex {}", "378282246310005"),
        ("iban", "to {} BIC", "DE89 3704 0044 0532 0130 00"),
        ("iban", "({})", "GB82WEST12345698765432"),
        ("iban", "{}", "FR1420041010050500013M02606"),
        ("private_key", "a {} b", PEM),
        ("private_key", "a {}\nThe end", CUT_PEM),
        ("access_token", "export KEY={}", "AKIAIOSFODNN7EXAMPLE"),
        ("access_token", "'{}'", f"ghp_{RANDOM}"),
        ("access_token", "{}", f"sk-proj-{RANDOM}_{RANDOM}"),
        ("access_token", "Bearer {}", f"eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.{RANDOM}"),
        ("access_token", "{}", f"hf_{RANDOM[:34]}"),
        ("password", "password: {}", "xK9-fuq2!bb"),
        ("password", '{{"api_key": "{}"}}', "a8Xk29dkKw02"),
        ("password", "postgres://app:{}@db/x", "s3cr3t"),
    ],
)
def test_what_is_found(kind: str, text: str, secret: str) -> None:
    whole = text.format(secret)
    assert scrubbed(whole, kind) == text.format(placeholder(kind))
    everything = scrubbed(whole)
    assert secret not in everything
    assert scrubbed(everything) == everything


@pytest.mark.parametrize(
    "text",
    [
        "icon@2x.png and foo@bar and @name and git@gitlab.gnome.org:GNOME/gimp.git",
        "2,471 pictures in 1995-2024, 12:30:45, ISBN 978-3-16-148410-0",
        "192.168.1.1, 127.0.0.1, 10.0.0.1, version 5.10.104.3 and 1.2.3.4.5",
        "3.2.1.4. The Dialog, see 2.4.12.1 and 8.8.8.8",
        "6.34.2.1. Properties\n\n6.34.2.2. Colors",
        "std::vector, a::b, 2001:db8::1, fe80::1",
        "4111 1111 1111 1112 and 1234567890123456",
        "DE00370400440532013000 and DE8937040044053201300 and DE89 3704",
        "-----BEGIN PRIVATE KEY----- is how such a file begins.",
        "sk-xxxxxxxxxxxxxxxxxxxxxxxxxxxx, sk-learn-contrib-estimators, AKIAXXXXXXXXXXXXXXXX",
        "password: something, token: your_token_here, the secret: tomorrow's weather",
        "http://site.org:8080/a@b",
    ],
)
def test_what_is_left(text: str) -> None:
    assert scrubbed(text) == text


def test_national_numbers_need_a_region() -> None:
    text = "Call (212) 555-2368."
    assert scrubbed(text) == text
    assert scrubbed(text, "phone=us") == "Call <PHONE>."
    assert scrubbed("Ruf 030 901820 an.", "phone=DE") == "Ruf <PHONE> an."


def test_check_digits() -> None:
    assert [luhn(f"7992739871{last}") for last in range(10)] == [last == 3 for last in range(10)]
    assert [iban_checks(f"GB{checks}WEST12345698765432") for checks in (82, 83)] == [True, False]
    assert [entropy_bits("ab" * 8), entropy_bits("abcdefgh")] == [1.0, 3.0]


@pytest.mark.parametrize("country", personal._IBAN_LENGTH)
def test_every_country_has_its_ibans(country: str) -> None:
    draw = random.Random(country)
    for gap in ("", " "):
        account = "".join(draw.choices("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=personal._IBAN_LENGTH[country] - 4))
        remainder = int("".join(str(int(character, 36)) for character in f"{account}{country}00")) % 97
        number = f"{country}{98 - remainder:02d}{account}"
        written = gap.join(number[start : start + 4] for start in range(0, len(number), 4))
        assert scrubbed(f"Pay to {written}, please.", "iban") == "Pay to <IBAN>, please."


@pytest.mark.parametrize(
    ("prefix", "groups"),
    [("4", (4, 4, 4, 4)), ("51", (4, 4, 4, 4)), ("2221", (4, 4, 4, 4)), ("34", (4, 6, 5)), ("36", (4, 6, 4)),
     ("6011", (4, 4, 4, 4)), ("3528", (4, 4, 4, 4)), ("62", (4, 4, 4, 4, 3)), ("4", (13,)), ("4", (4, 4, 4, 4, 3))],
)  # fmt: skip
def test_every_network_has_its_cards(prefix: str, groups: tuple[int, ...]) -> None:
    draw = random.Random(prefix)
    for gap in ("", " ", "-"):
        begun = prefix + "".join(draw.choices("0123456789", k=sum(groups) - len(prefix) - 1))
        number = next(begun + last for last in "0123456789" if luhn(begun + last))
        ends = [sum(groups[:count]) for count in range(len(groups) + 1)]
        written = gap.join(number[start:end] for start, end in itertools.pairwise(ends))
        assert scrubbed(f"Card {written}, please.", "credit_card") == "Card <CREDIT_CARD>, please."


def test_placeholders_stand_everywhere_and_only_numbers_are_told(picture: Callable[..., bytes]) -> None:
    step = scrub_step(["email"])
    assert step is not None
    image = replace(MediaEncoder(MediaOptions()).encode("image", picture(1)), alt="by e@site.org")
    document = Document(
        id="d",
        parts=(TextPart(text="a@site.org b@site.org", role="user"), image),
        source={"url": "https://x/?mail=c@site.org"},
        labels={"answers": [{"by": "d@site.org", "n": 1}]},
        left_out="without 1 media",
    )
    found = step.apply(document)
    assert found.parts == (TextPart(text="<EMAIL> <EMAIL>", role="user"), replace(image, alt="by <EMAIL>"))
    assert found.source == {"url": "https://x/?mail=<EMAIL>"}
    assert found.labels == {"answers": [{"by": "<EMAIL>", "n": 1}], "scrubbed": {"email": 5}}
    assert found.left_out == "without 1 media; scrubbed 5 email"


def test_kinds_and_groups_agree() -> None:
    assert sorted(kind for group in GROUPS.values() for kind in group) == sorted(KINDS)


@pytest.mark.parametrize("asked", ["emails", "email=DE", "phone=XX", "pii=DE"])
def test_wrong_use_is_one_line(asked: str) -> None:
    with pytest.raises(ConfigError, match=f"--scrub {asked}: ") as error:
        scrub_step([asked])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "unit",
    [
        *("a", "a@", "x@a.", "eyJ", "1", "1 ", "4444 ", "+1-", "1.", ":", "password=", "secret", "a://", "AB12"),
        *("DE89 ", "sk-", "-----", "-----BEGIN PRIVATE KEY-----\n", "-----BEGIN PRIVATE KEY-----\nAAAAAAAAAAAAAAAA\n"),
    ],
)
def test_hostile_text_costs_no_more_than_its_length(unit: str) -> None:
    """A pattern that starts over at every character would take minutes."""
    step = scrub_step(["pii,secrets,phone=US"])
    assert step is not None
    start = time.process_time()
    step.apply(Document(id="d", parts=(TextPart(text=unit * (100_000 // len(unit))),)))
    assert time.process_time() - start < 5


def test_a_build_counts_and_never_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [("a", "Ask anna@site.org or +49 30 901820."), ("b", f"export T=ghp_{RANDOM}"), ("c", "A bird.")]
    lines = [json.dumps({"id": name, "parts": [{"modality": "text", "text": text}]}) for name, text in rows]
    lines.append(json.dumps({"id": "d", "parts": [{"modality": "anna@site.org", "bytes": ""}]}))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    command = ["build", "--source", "manifest", "--input", str(tmp_path / "rows.jsonl"), "--keep-order"]
    for out, asked in (("plain", []), ("clean", ["--scrub", "pii,secrets"])):
        capsys.readouterr()
        assert main([*command, "--out", str(tmp_path / out), *asked]) == 0
    manifest = Manifest.load(tmp_path / "clean")
    labels = [json.loads(text) for text in read_index(manifest, 0)["labels"].to_pylist()]
    assert labels == [{"scrubbed": {"email": 1, "phone": 1}}, {"scrubbed": {"access_token": 1}}, {}]
    reasons = read_ledger(manifest.ledger_path)["reason"].to_pylist()
    assert reasons[:3] == ["scrubbed 1 email, 1 phone", "scrubbed 1 access_token", ""]
    assert reasons[3].startswith("MediaError: unknown modality '<EMAIL>'")
    everything = b"".join(path.read_bytes() for path in manifest.root.iterdir()) + capsys.readouterr().out.encode()
    assert b"anna" not in everything
    assert b"aB3dE6" not in everything
    step: dict[str, Any] = manifest.build["steps"]["scrub"]
    assert step["kinds"] == list(KINDS)
    assert "steps" not in Manifest.load(tmp_path / "plain").build
