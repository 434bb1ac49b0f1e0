"""Triton's interpreter for the tests of the Triton kernels, with bf16 put right. Loaded by the conftest beside it.

@triton.jit makes an interpreted function if TRITON_INTERPRET=1 is set when it decorates. That is too late for Triton's
own library (`tl.max`, `tl.sum`, ...) once anything in the process has imported Triton, and torch.compile does. So
`interpreted_triton` swaps these functions, imports the `*_triton` modules anew, and puts everything back when it ends:
compiled and interpreted kernels can be tested in one process, one after the other. It needs that `kernels` looks a
`*_triton` module up when an op runs (`importlib.import_module`, or an import inside the function) and keeps no
reference to it.

What is wrong in Triton 3.9's interpreter and corrected here: `tl.dot` multiplies the bit patterns of bf16 operands, and
fp32 is cut off to bf16 where the hardware rounds to nearest even. Other arithmetic on bf16 values is on the bit
patterns too; that raises here, for a kernel is to widen them first.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np

PACKAGE = "triweave.kernels"


@contextlib.contextmanager
def interpreted_triton() -> Iterator[Callable[[str], Any]]:
    """Within it the `*_triton` modules are interpreted, and impl="triton" serves on the CPU; yields `load(name)`.

    `load("attention_triton")` returns the interpreted module.
    """
    from triweave.kernels import backends

    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language as tl

    with contextlib.ExitStack() as undo:
        undo.callback(_set_environment, "TRITON_INTERPRET", before)
        _remember(undo, *_language_namespaces(tl))
        _interpret_library(tl)
        _correct_bfloat16(undo)
        _patch_once(undo)
        _own_modules(undo)
        backends._choose.cache_clear()
        undo.callback(backends._choose.cache_clear)
        yield lambda name: importlib.import_module(f"{PACKAGE}.{name}")


def _set_environment(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


def _language_namespaces(tl: Any) -> list[Any]:
    """Return the modules and classes that the interpreter writes to, and not always puts back."""
    modules = [module for name, module in sys.modules.items() if name.startswith("triton.language") and module]
    return [*modules, tl.tensor, tl.dtype, tl.core.tensor_descriptor_base, tl.condition]


def _remember(undo: contextlib.ExitStack, *namespaces: Any) -> None:
    """Put every attribute of the namespaces back at the end; modules imported meanwhile stay where they are."""

    def restore(namespace: Any, saved: dict[str, Any]) -> None:
        for name in set(vars(namespace)) - set(saved):
            if not isinstance(vars(namespace)[name], ModuleType):
                delattr(namespace, name)
        for name, value in saved.items():
            if vars(namespace).get(name) is not value:
                setattr(namespace, name, value)

    for namespace in namespaces:
        undo.callback(restore, namespace, dict(vars(namespace)))


def _interpret_library(tl: Any) -> None:
    """Replace each compiled function of Triton's library by an interpreted one of the same source."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    InterpretedFunction.rewritten_fn.clear()  # what is in it uses names that an earlier `_remember` took out again
    twins: dict[Any, Any] = {}
    for namespace in _language_namespaces(tl):
        for name, value in list(vars(namespace).items()):
            if isinstance(value, JITFunction):
                twin = twins.setdefault(value.fn, InterpretedFunction(value.fn))
                member = isinstance(namespace, type)
                setattr(namespace, name, (lambda *a, twin=twin, **k: twin(*a, **k)) if member else twin)


def _patch_once(undo: contextlib.ExitStack) -> None:
    """Let a call of one kernel function by another prepare Triton's language for its file once, not each time: 2 ms.

    A launch prepares `tl` and takes that back at its end; Triton's library, which names it otherwise, stays prepared.
    """
    from triton.runtime import interpreter as triton_interpreter

    prepare = triton_interpreter._patch_lang
    prepared: set[int] = set()

    def prepare_once(function: Any) -> Any:
        launched = isinstance(sys._getframe(1).f_locals.get("self"), triton_interpreter.GridExecutor)
        if not launched and id(function.__globals__) in prepared:
            return None
        if not launched:
            prepared.add(id(function.__globals__))
        return prepare(function)

    undo.callback(setattr, triton_interpreter, "_patch_lang", prepare)
    triton_interpreter._patch_lang = prepare_once


def _own_modules(undo: contextlib.ExitStack) -> None:
    """Forget the `*_triton` modules now, so that they are imported anew, and bring the old ones back at the end."""

    def place(name: str) -> tuple[Any, str]:
        """Return the package that a module is an attribute of, and the attribute's name."""
        folder, _, own = name.rpartition(".")
        return importlib.import_module(folder), own

    def forget() -> dict[str, Any]:
        names = [name for name in sys.modules if name.startswith(f"{PACKAGE}.") and name.endswith("_triton")]
        for folder, own in map(place, names):
            vars(folder).pop(own, None)
        return {name: sys.modules.pop(name) for name in names}

    def bring_back(saved: dict[str, Any]) -> None:
        forget()
        sys.modules.update(saved)
        for name, module in saved.items():
            folder, own = place(name)
            setattr(folder, own, module)

    undo.callback(bring_back, forget())


# bf16


def widen(bits: np.ndarray) -> np.ndarray:
    """Return fp32 of the uint16 patterns of bf16 numbers."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """Return the uint16 patterns of fp32 numbers rounded to bf16, to nearest and halves to even; NaN stays NaN."""
    values = np.asarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def _correct_bfloat16(undo: contextlib.ExitStack) -> None:
    import triton.language as tl
    from triton.runtime import interpreter as triton_interpreter

    builder, handle = triton_interpreter.InterpreterBuilder, triton_interpreter.TensorHandle
    cast, dot, binary = builder.cast_impl, builder.create_dot, builder.binary_op
    bfloat16 = tl.bfloat16

    def wide(x: Any) -> Any:
        return handle(widen(x.data), tl.float32) if x.dtype.scalar == bfloat16 else x

    def corrected_cast(self: Any, source: Any, target: Any) -> Any:
        source = wide(source)
        if target.scalar != bfloat16 or source.dtype.scalar == tl.int1:
            return cast(self, source, target)
        return handle(narrow(source.data), bfloat16)

    def corrected_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, wide(a), wide(b), *rest)

    def guarded_binary(self: Any, left: Any, right: Any, operation: Any) -> Any:
        if left.dtype.scalar == bfloat16:
            raise TypeError(f"{operation.__name__} on bf16: the interpreter computes on bit patterns; cast to fp32")
        return binary(self, left, right, operation)

    for name, corrected in {
        "cast_impl": corrected_cast,
        "create_fp_to_fp": lambda self, source, target, _: corrected_cast(self, source, target),
        "create_dot": corrected_dot,
        "binary_op": guarded_binary,
    }.items():
        undo.callback(setattr, builder, name, getattr(builder, name))
        setattr(builder, name, corrected)
