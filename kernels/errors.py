"""The errors of `kernels` that are meant for its user: one line that names the thing, the value and the next step.

KernelError
├── KernelUnavailableError   the implementation asked for cannot serve here; nothing falls back silently
│   └── KernelCompileError   the compiler refuses a kernel for a chip
└── KernelInputError         a shape, dtype or option that an op does not take
"""


class KernelError(Exception):
    """Base of every user-facing error of this folder; the console script prints it and exits with 2."""


class KernelUnavailableError(KernelError):
    """An implementation was asked for by name and cannot serve; the message says why and what can."""


class KernelCompileError(KernelUnavailableError):
    """A Triton kernel does not compile for a chip; the message ends with what the compiler said."""


class KernelInputError(KernelError, ValueError):
    """An argument has a shape, dtype or value outside the op's documented range."""
