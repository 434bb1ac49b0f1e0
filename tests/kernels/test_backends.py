"""What runs is what was asked for, or an error says why not; auto says why it chose."""

import importlib.util
import logging
import sys

import pytest
import torch

from triweave.kernels import backends
from triweave.kernels.attention import attention
from triweave.kernels.backends import choose
from triweave.kernels.errors import KernelError, KernelUnavailableError
from triweave.kernels.swiglu import swiglu


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.delenv(backends.OVERRIDE_VARIABLE, raising=False)
    monkeypatch.delenv(backends.INTERPRET_VARIABLE, raising=False)
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
        assert set(implementations) <= {*backends.REASONS, "triton"}
        assert "reference" in implementations
        if "triton" in implementations:
            assert importlib.util.find_spec(f"triweave.kernels.{op}_triton")


def test_triton_serves_by_name_on_cuda_and_interpreted_on_a_cpu(monkeypatch):
    assert choose("swiglu", "triton", "cuda") == "triton"
    with pytest.raises(KernelUnavailableError, match=r"TRITON_INTERPRET=1 .* before Python starts; use auto"):
        choose("swiglu", "triton", "cpu")
    with pytest.raises(KernelUnavailableError, match="run on a CUDA device"):
        choose("swiglu", "triton", "mps")
    monkeypatch.setenv(backends.INTERPRET_VARIABLE, "1")
    assert choose("swiglu", "triton", "cpu") == "triton"
    with pytest.raises(KernelUnavailableError, match=r"has no Triton kernel for it; use auto or reference$"):
        choose("linear_cross_entropy", "triton", "cuda")


def test_auto_never_takes_triton_and_says_why(monkeypatch, caplog):
    monkeypatch.setenv(backends.INTERPRET_VARIABLE, "1")
    with caplog.at_level(logging.INFO, logger=backends.logger.name):
        assert choose("swiglu", "auto", "cuda") == choose("swiglu", "auto", "cpu") == "reference"
        assert choose("linear_cross_entropy", "auto", "cuda") == "reference"
    assert ["only when asked for by name" in record.getMessage() for record in caplog.records] == [True, True, False]


def test_triton_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # noqa: ARG005
    with pytest.raises(KernelUnavailableError, match="Triton is not installed"):
        choose("swiglu", "triton", "cuda")


def test_an_op_that_auto_serves_does_not_load_its_triton_kernel(monkeypatch):
    monkeypatch.delitem(sys.modules, "triweave.kernels.swiglu_triton", raising=False)
    swiglu(torch.zeros(2), torch.zeros(2))
    assert "triweave.kernels.swiglu_triton" not in sys.modules
