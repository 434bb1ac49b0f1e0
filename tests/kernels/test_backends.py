"""What runs is what was asked for, or an error says why not; auto says why it chose."""

import logging

import pytest
import torch

from triweave.kernels import backends
from triweave.kernels.attention import attention
from triweave.kernels.backends import choose
from triweave.kernels.errors import KernelError, KernelUnavailableError


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.delenv(backends.OVERRIDE_VARIABLE, raising=False)
    backends._choose.cache_clear()


def test_auto_takes_the_fused_attention_on_a_cpu_only():
    assert choose("attention", "auto", "cpu") == "sdpa"
    assert choose("attention", "auto", "cuda") == "reference"
    assert choose("rms_norm", "auto", "cpu") == "reference"


def test_auto_explains_its_choice_once(caplog):
    with caplog.at_level(logging.INFO, logger=backends.logger.name):
        for _ in range(3):
            choose("attention", "auto", "cpu")
            choose("swiglu", "reference", "cpu")
    assert [record.getMessage() for record in caplog.records] == [
        "attention: auto chose sdpa: torch's fused attention on the live segments is the fastest that serves on cpu"
    ]


@pytest.mark.parametrize("impl", ["triton", "flex", "flash"])
def test_known_but_absent_implementations_raise_and_never_fall_back(impl):
    q, lo = torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, dtype=torch.int32)
    with pytest.raises(KernelUnavailableError, match=f"attention: impl='{impl}'.*{impl.capitalize()[:4]}|flash-attn"):
        attention(q, q, q, lo, lo, impl=impl)
    assert issubclass(KernelUnavailableError, KernelError)


def test_what_another_device_lacks_raises_there():
    with pytest.raises(KernelUnavailableError, match=r"on cuda: it is torch's fused CPU kernel.*use auto or reference"):
        choose("attention", "sdpa", "cuda")
    with pytest.raises(KernelUnavailableError, match="for attention only"):
        choose("swiglu", "sdpa", "cpu")


def test_a_misspelt_implementation_is_told_the_nearest():
    with pytest.raises(KernelUnavailableError, match="did you mean 'reference'"):
        choose("attention", "referense", "cpu")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("reference", "reference"),
        ("attention=reference", "reference"),
        ("swiglu=auto, attention=reference", "reference"),
        ("swiglu=reference", "sdpa"),
        ("attention=auto", "sdpa"),
        ("", "sdpa"),
    ],
)
def test_the_override_wins_over_the_argument(monkeypatch, override, expected):
    monkeypatch.setenv(backends.OVERRIDE_VARIABLE, override)
    assert choose("attention", "sdpa", "cpu") == expected


def test_a_wrong_override_is_named(monkeypatch):
    monkeypatch.setenv(backends.OVERRIDE_VARIABLE, "attention=triton")
    with pytest.raises(KernelUnavailableError, match="TRIWEAVE_KERNELS=attention=triton asks for 'triton'"):
        choose("attention", "auto", "cpu")
    monkeypatch.setenv(backends.OVERRIDE_VARIABLE, "atention=reference")
    with pytest.raises(KernelUnavailableError, match="there is no op 'atention'"):
        choose("attention", "auto", "cpu")


def test_every_op_is_registered_and_every_implementation_has_a_reason():
    for op, implementations in backends.IMPLEMENTATIONS.items():
        __import__(f"triweave.kernels.{op}")
        assert hasattr(torch.ops.triweave, op)
        assert set(implementations) <= set(backends.REASONS)
        assert "reference" in implementations
