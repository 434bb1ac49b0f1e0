"""What runs is what was asked for, or an error says why not; auto says why it chose."""

import importlib.util
import logging
import sys

import pytest
import torch

from triweave.kernels import backends
from triweave.kernels.admission import admission
from triweave.kernels.attention import attention
from triweave.kernels.backends import choose
from triweave.kernels.errors import KernelError, KernelUnavailableError
from triweave.kernels.rms_norm import rms_norm
from triweave.kernels.swiglu import swiglu


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.delenv(backends.OVERRIDE_VARIABLE, raising=False)
    monkeypatch.delenv(backends.INTERPRET_VARIABLE, raising=False)
    monkeypatch.setattr(backends, "_choices", {})
    backends._choose.cache_clear()
    yield
    backends._choose.cache_clear()


class Chip:
    """Stands in for the self-check on a CUDA device: refuses what is in `refused`, remembers what it was asked."""

    def __init__(self):
        self.refused, self.asked = {}, []

    def __call__(self, op, dtype, limit, *, device_type):
        assert device_type == "cuda"
        self.asked.append((op, dtype, limit))
        return self.refused.get(op)


@pytest.fixture
def chip(monkeypatch):
    stand_in = Chip()
    monkeypatch.setattr(admission, "refusal", stand_in)
    return stand_in


def test_auto_on_a_cpu_takes_the_fused_attention_and_plain_torch(monkeypatch):
    monkeypatch.setenv(backends.INTERPRET_VARIABLE, "1")
    assert choose("attention", "auto", "cpu", torch.float32, 64) == "sdpa"
    assert choose("rms_norm", "auto", "cpu", torch.float32, 64) == "reference"
    assert (
        choose("attention", "auto", "mps", torch.float32)
        == choose("swiglu", "auto", "mps", torch.float32)
        == "reference"
    )


def test_auto_on_cuda_takes_the_kernel_that_the_check_admits(chip):
    assert choose("attention", "auto", "cuda", torch.bfloat16, 70) == "triton"
    assert choose("swiglu", "auto", "cuda", torch.float16) == "triton"
    assert chip.asked == [("attention", torch.bfloat16, 70), ("swiglu", torch.float16, 0)]


def test_auto_on_cuda_goes_on_where_the_check_refuses(chip, caplog):
    chip.refused = {"attention": "its self-check on X failed: dq is off", "swiglu": "no"}
    with caplog.at_level(logging.INFO, logger=backends.logger.name):
        assert choose("attention", "auto", "cuda", torch.bfloat16, 64) == "flex"
        assert choose("attention", "auto", "cuda", torch.bfloat16, 8) == "reference"  # too narrow for FlexAttention
        assert choose("attention", "auto", "cuda", torch.float64, 64) == "reference"
        assert choose("attention", "auto", "cuda", torch.bfloat16, 300) == "reference"
        assert choose("swiglu", "auto", "cuda", torch.bfloat16) == "reference"
        assert choose("rms_norm", "auto", "cuda", torch.bfloat16, 64) == "triton"
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == (
        "attention: auto chose flex: torch's FlexAttention takes any such mask, bfloat16, width 64 "
        "(triton is out: its self-check on X failed: dq is off)"
    )
    assert "flex is out: it takes heads of 16 to 256 numbers" in lines[1]
    assert "bfloat16, a width above 256 (" in lines[3]
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 5 + [logging.INFO]
    assert list(backends.choices()) == lines


def test_a_named_kernel_serves_on_cuda_only_if_the_check_admits_it(chip):
    assert choose("swiglu", "triton", "cuda", torch.bfloat16) == "triton"
    chip.refused = {"attention": "its self-check on X failed: dq is off"}
    with pytest.raises(KernelUnavailableError, match=r"on cuda: its self-check on X failed: dq is off; use auto"):
        choose("attention", "triton", "cuda", torch.bfloat16, 64)
    with pytest.raises(KernelUnavailableError, match="heads of 16 to 256 numbers"):
        choose("attention", "flex", "cuda", torch.bfloat16, 8)


def test_auto_explains_its_choice_once(caplog):
    with caplog.at_level(logging.INFO, logger=backends.logger.name):
        for _ in range(3):
            choose("attention", "auto", "cpu", torch.float32)
            choose("swiglu", "reference", "cpu", torch.float32)
    assert [record.getMessage() for record in caplog.records] == [
        "attention: auto chose sdpa: torch's fused attention on the live segments is the fastest that serves on cpu"
    ]


@pytest.mark.parametrize(("impl", "why"), [("triton", "Triton kernels run on a CUDA device"), ("flash", "flash-attn")])
def test_what_cannot_serve_raises_and_never_falls_back(impl, why):
    q, lo = torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, dtype=torch.int32)
    with pytest.raises(KernelUnavailableError, match=f"attention: impl='{impl}' .* cannot serve on cpu: .*{why}"):
        attention(q, q, q, lo, lo, impl=impl)
    with pytest.raises(KernelUnavailableError, match=r"cannot serve on cpu: .* for attention only"):
        choose("swiglu", "flex", "cpu", torch.float32)
    assert issubclass(KernelUnavailableError, KernelError)


def test_what_another_device_lacks_raises_there():
    with pytest.raises(KernelUnavailableError, match=r"on cuda: it is torch's fused CPU kernel.*use auto or ref"):
        choose("attention", "sdpa", "cuda", torch.float32)
    with pytest.raises(KernelUnavailableError, match="for attention only"):
        choose("swiglu", "sdpa", "cpu", torch.float32)


def test_a_misspelt_implementation_is_told_the_nearest():
    with pytest.raises(KernelUnavailableError, match="did you mean 'reference'"):
        choose("attention", "referense", "cpu", torch.float32)


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
    assert choose("attention", "sdpa", "cpu", torch.float32) == expected


def test_a_wrong_override_is_named(monkeypatch):
    monkeypatch.setenv(backends.OVERRIDE_VARIABLE, "attention=triton")
    with pytest.raises(KernelUnavailableError, match="TRIWEAVE_KERNELS=attention=triton asks for 'triton'"):
        choose("attention", "auto", "cpu", torch.float32)
    monkeypatch.setenv(backends.OVERRIDE_VARIABLE, "atention=reference")
    with pytest.raises(KernelUnavailableError, match="there is no op 'atention'"):
        choose("attention", "auto", "cpu", torch.float32)


def test_every_op_is_registered_and_every_implementation_has_a_reason():
    for op, implementations in backends.IMPLEMENTATIONS.items():
        __import__(f"triweave.kernels.{op}")
        assert hasattr(torch.ops.triweave, op)
        assert set(implementations) <= {*backends.REASONS, "flash"}
        assert "reference" in implementations
        if "triton" in implementations:
            assert importlib.util.find_spec(f"triweave.kernels.{op}_triton")


def test_triton_serves_by_name_interpreted_on_a_cpu(monkeypatch):
    with pytest.raises(KernelUnavailableError, match=r"TRITON_INTERPRET=1 .* before Python starts; use auto"):
        choose("swiglu", "triton", "cpu", torch.float32)
    with pytest.raises(KernelUnavailableError, match="run on a CUDA device"):
        choose("swiglu", "triton", "mps", torch.float32)
    monkeypatch.setenv(backends.INTERPRET_VARIABLE, "1")
    assert choose("swiglu", "triton", "cpu", torch.float32) == "triton"


def test_an_op_without_a_triton_kernel_says_so(monkeypatch):
    monkeypatch.setitem(backends.IMPLEMENTATIONS, "swiglu", ("reference",))
    with pytest.raises(KernelUnavailableError, match=r"has no Triton kernel for it; use auto or reference$"):
        choose("swiglu", "triton", "cuda", torch.float32)
    assert choose("swiglu", "auto", "cuda", torch.float32) == "reference"


def test_auto_leaves_a_kernel_alone_that_is_no_faster(chip):
    assert choose("low_rank_fusion", "auto", "cuda", torch.float32) == "reference"
    assert choose("low_rank_fusion", "triton", "cuda", torch.float32) == "triton"
    assert chip.asked == [("low_rank_fusion", torch.float32, 0)]
    assert backends.choices()[0].endswith("(triton is out: it was no faster where it was measured)")


def test_triton_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # noqa: ARG005
    with pytest.raises(KernelUnavailableError, match="Triton is not installed"):
        choose("swiglu", "triton", "cuda", torch.float32)
    assert choose("attention", "auto", "cuda", torch.float32, 64) == "reference"  # FlexAttention is made with it too


@pytest.mark.parametrize("width", [64, 100])
def test_a_symbolic_width_gives_a_constant(width):
    x, weight = torch.randn(3, width), torch.randn(width)
    compiled = torch.compile(lambda x, w: rms_norm(x, w, eps=1e-6), fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight), rms_norm(x, weight, eps=1e-6))


def test_an_op_that_auto_serves_does_not_load_its_triton_kernel(monkeypatch):
    monkeypatch.delitem(sys.modules, "triweave.kernels.swiglu_triton", raising=False)
    swiglu(torch.zeros(2), torch.zeros(2))
    assert "triweave.kernels.swiglu_triton" not in sys.modules
