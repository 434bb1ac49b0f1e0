"""Every Triton kernel that ships, as the launchers in the `*_triton.py` files start it: types, widths, pinned configs.

One entry of `KERNELS` per op. Types and constants are those of a launch whose sizes and strides are multiples of 16,
as a model's are; Triton compiles a variant of its own for others. Weights are fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from triweave.kernels import (
    attention_triton,
    linear_cross_entropy_triton,
    low_rank_fusion_triton,
    mmca_triton,
    qk_norm_rope_triton,
    rms_norm_triton,
    swiglu_triton,
)
from triweave.kernels.attention_triton import WIDEST_LOAD
from triweave.kernels.compiler.compile_triton import Variant
from triweave.kernels.errors import KernelInputError
from triweave.kernels.rows_triton import LAUNCH
from triweave.kernels.tuning import pinned

NUMBER_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
HEAD_WIDTHS = (32, 64, 72, 80, 96, 128, 256)
KEY_HEADS = 8
"""Key heads of the model whose qk_norm_rope is compiled; it has at least as many query heads as a tile takes."""
MODALITIES = 4
"""Weights of the modality-indexed rms_norm whose backward is compiled."""

TENSORS: dict[str, Sequence[str]] = {
    **dict.fromkeys(
        ("attention", "cross_attention"),
        ("grad_ptr", "q_ptr", "k_ptr", "v_ptr", "out_ptr", "dq_ptr", "dk_ptr", "dv_ptr"),
    ),
    "mmca": ("grad_ptr", "q_ptr", "k_ptr", "v_ptr", "text_ptr", "out_ptr", "dq_ptr", "dk_ptr", "dv_ptr"),
    "linear_cross_entropy": ("x_ptr", "w_ptr", "b_ptr", "logit_grad_ptr"),
    "low_rank_fusion": (
        *(f"{name}{number}_ptr" for name in ("x", "w", "dp") for number in range(3)),
        *("out_ptr", "grad_ptr"),
    ),
    "rms_norm": ("grad", "x", "residual", "out", "total", "residual_grad", "x_grad"),
    "swiglu": ("grad", "gate", "up", "out", "gate_grad", "up_grad"),
    "qk_norm_rope": ("q", "k", "q_grad", "k_grad", "q_out", "k_out"),
}
"""Op -> arguments that are tensors of the op's dtype."""

_ATTENTION_TYPES = {
    **dict.fromkeys(("lo_ptr", "hi_ptr", "table_ptr"), "*i32"),
    **dict.fromkeys(("lse_ptr", "delta_ptr", "gate_ptr"), "*fp32"),
    "scale": "fp32",
}
TYPES: dict[str, Mapping[str, str]] = {
    "attention": _ATTENTION_TYPES,
    "cross_attention": _ATTENTION_TYPES,
    "mmca": {
        **dict.fromkeys(("layout_ptr", "table_ptr"), "*i32"),
        **dict.fromkeys(("lse_ptr", "delta_ptr"), "*fp32"),
        "scale": "fp32",
    },
    "linear_cross_entropy": {
        **dict.fromkeys(("index_ptr", "target_ptr"), "*i64"),
        **dict.fromkeys(("partial_ptr", "target_logit_ptr", "lse_ptr", "factor_ptr", "row_weight_ptr"), "*fp32"),
        **dict.fromkeys(("total_ptr", "out_ptr"), "*fp32"),
        "softcap": "fp32",
    },
    "low_rank_fusion": {"y_ptr": "*fp32", "dy_ptr": "*fp32"},
    "rms_norm": {"weight": "*fp32", "modality": "*i32", "partial": "*fp32", "eps": "fp32"},
    "swiglu": {},
    "qk_norm_rope": {
        **dict.fromkeys(("frequencies", "q_weight", "k_weight", "q_partial", "k_partial"), "*fp32"),
        "positions": "*i32",
        "axes": "*i64",
        "eps": "fp32",
    },
}
"""Op -> arguments of another type; what is in neither table is i32."""

_UNALIGNED = frozenset({"heads_per_group", "modalities", "rows_each", "blocks", "tokens_each", "q_heads", "k_heads"})
"""Integers that need not be multiples of 16."""
_COMPILER_OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")
_ALIGNMENT = 16


def _attention(op: str) -> Iterator[Variant]:
    module = mmca_triton if op == "mmca" else attention_triton
    functions = {"forward": module.forward_kernel, "dq": module.dq_kernel, "dkv": module.dkv_kernel}
    for name, function in functions.items():
        left_out = {("attention", name): ("gate_ptr",), ("cross_attention", "dq"): ("out_ptr",)}.get((op, name), ())
        for dtype, size in NUMBER_BYTES.items():
            for width in HEAD_WIDTHS:
                launch = {**attention_triton.launch_options(name, width, size), "HEAD_UNIT": WIDEST_LOAD}
                # strides from head to head are the head's width; all others are multiples of all heads'
                odd = [arg for arg in function.arg_names if arg.startswith("stride_") and arg[-1] in "hg"]
                unaligned = odd if width % _ALIGNMENT else ()
                yield _variant(op, function, dtype, launch, head_dim=width, unaligned=unaligned, left_out=left_out)


def _linear_cross_entropy() -> Iterator[Variant]:
    op, module = "linear_cross_entropy", linear_cross_entropy_triton
    sizes = ("hidden_rows", "N", "V", "M", "K", "row_tiles", "column_tiles", "first_column")
    for kernel, configs in module.CONFIGS.items():
        function = getattr(module, kernel)
        for dtype, size in NUMBER_BYTES.items():
            launch = {**configs[size], **LAUNCH}
            if kernel == "product_kernel":
                sums, products = {**launch, "TRANSPOSED": False}, {**launch, "TRANSPOSED": True}
                yield _variant(op, function, dtype, sums, unaligned=sizes, form="+total")
                yield _variant(op, function, dtype, products, unaligned=sizes, left_out=("total_ptr",))
                continue
            launch["WHOLE"] = True
            yield _variant(op, function, dtype, launch, unaligned=sizes, left_out=("softcap",))
            yield _variant(op, function, dtype, launch, unaligned=sizes, form="+softcap")


def _low_rank_fusion() -> Iterator[Variant]:
    op, sizes = "low_rank_fusion", ("N", "R")
    for kernel, configs in low_rank_fusion_triton.CONFIGS.items():
        function = getattr(low_rank_fusion_triton, kernel)
        for dtype, size in NUMBER_BYTES.items():
            launch = {**configs[size], **LAUNCH}
            yield _variant(op, function, dtype, launch, unaligned=sizes, left_out=("x2_ptr", "w2_ptr", "dp2_ptr"))
            if "x2_ptr" in function.arg_names:
                yield _variant(op, function, dtype, launch, unaligned=sizes, form="+third")


def _rms_norm() -> Iterator[Variant]:
    plain = ("residual", "modality", "total", "residual_grad")
    for kernel, configs in rms_norm_triton.CONFIGS.items():
        function = getattr(rms_norm_triton, kernel)
        for dtype in NUMBER_BYTES:
            for width, config in configs.items():
                launch = {**config, **LAUNCH, "KINDS": 1}
                yield _variant("rms_norm", function, dtype, launch, head_dim=width, left_out=plain)
                launch["KINDS"] = MODALITIES
                yield _variant("rms_norm", function, dtype, launch, head_dim=width, form="+residual+modality")


def _swiglu() -> Iterator[Variant]:
    for kernel, config in swiglu_triton.CONFIGS.items():
        for dtype in NUMBER_BYTES:
            yield _variant("swiglu", getattr(swiglu_triton, kernel), dtype, {**config, **LAUNCH})


def _qk_norm_rope() -> Iterator[Variant]:
    for kernel, configs in qk_norm_rope_triton.CONFIGS.items():
        function = getattr(qk_norm_rope_triton, kernel)
        for dtype in NUMBER_BYTES:
            for width, config in configs.items():
                heads = {"Q_HEADS": config["HEADS"], "K_HEADS": min(KEY_HEADS, config["HEADS"])}
                launch = {**heads, **config, **LAUNCH, "INTERLEAVED": False}
                yield _variant("qk_norm_rope", function, dtype, launch, head_dim=width)


KERNELS: dict[str, Callable[[], Iterator[Variant]]] = {
    "attention": partial(_attention, "attention"),
    "cross_attention": partial(_attention, "cross_attention"),
    "mmca": partial(_attention, "mmca"),
    "linear_cross_entropy": _linear_cross_entropy,
    "low_rank_fusion": _low_rank_fusion,
    "qk_norm_rope": _qk_norm_rope,
    "rms_norm": _rms_norm,
    "swiglu": _swiglu,
}
"""Op -> what yields its shipped variants."""


def variants(ops: Sequence[str] = (), *, arch: str | None = None) -> list[Variant]:
    """Return every variant of `ops`, of all when empty, that ships for `arch`: its pinned configs, else `CONFIGS`.

    Raises KernelInputError for an op without a kernel.
    """
    for op in ops:
        if op not in KERNELS:
            raise KernelInputError(f"kernels compile: {op!r} has no Triton kernel; those that do: {', '.join(KERNELS)}")
    with pinned.reading(arch):
        return [variant for op in ops or KERNELS for variant in KERNELS[op]()]


def _variant(
    op: str,
    function: Any,
    dtype: str,
    launch: Mapping[str, Any],
    *,
    head_dim: int | None = None,
    unaligned: Sequence[str] = (),
    left_out: Sequence[str] = (),
    form: str = "",
) -> Variant:
    """Return the variant of a launch with `launch` as its keyword arguments.

    unaligned: further integers that are not multiples of 16. left_out: optional tensors that are None. form: appended
    to the kernel's name.
    """
    constants = {name: value for name, value in launch.items() if name in function.arg_names}
    constants |= {name: None for name in left_out if name in function.arg_names}
    usual = {**dict.fromkeys(TENSORS[op], f"*{dtype}"), **TYPES[op]}
    signature = {name: usual.get(name, "i32") for name in function.arg_names if name not in constants}
    options = {name: value for name, value in launch.items() if name in _COMPILER_OPTIONS}
    fixed = ("WIDTH", "K0", "K1", "HEAD_UNIT", "KINDS", "INTERLEAVED", "enable_fp_fusion")
    shown = {name: value for name, value in {**constants, **options}.items() if value is not None and name not in fixed}
    return Variant(
        op=op,
        kernel=function.__name__.removesuffix("_kernel") + form,
        dtype=dtype,
        head_dim=head_dim,
        function=function,
        signature=signature,
        constants=constants,
        aligned=[name for name, kind in signature.items() if kind == "i32" and name not in {*_UNALIGNED, *unaligned}],
        options=options,
        config=" ".join(f"{name}={value}" for name, value in shown.items()),
    )
