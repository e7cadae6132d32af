"""Triton where it is installed, and what a kernel file needs where it is not: all files of this room import either way.

`@kernel` marks what is launched, `@jit` what kernels call. Kernels must not depend on the caller's Triton version for
their numerics, so that `launch` fixes every compiler option itself.
"""

import inspect
from collections.abc import Callable
from typing import Any

triton: Any = None
tl: Any = None
try:
    import triton as _triton
    import triton.language as _tl
except ImportError:  # the base install runs on a CPU, where no kernel is ever launched

    class _NoTriton:
        """Stands for `triton.language` in annotations and constants; kernel bodies are never run without Triton."""

        def __getattr__(self, name: str) -> None:
            return None

        def constexpr(self, value: Any) -> Any:
            return value

    tl = _NoTriton()
else:
    triton, tl = _triton, _tl

HAS_TRITON = triton is not None


def cdiv(a: int, b: int) -> int:
    """How many pieces of `b` cover `a`."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is not below `n`: blocks of Triton come in no other sizes."""
    return 1 << (n - 1).bit_length()


def row_warps(block: int) -> int:
    """Warps of a program that holds a row of `block` elements: each thread loads 16 bytes of bf16 at most twice."""
    return min(max(block // 512, 1), 16)


def jit(fn: Callable[..., Any]) -> Any:
    """Triton's decorator for functions that kernels call."""
    return triton.jit(fn) if HAS_TRITON else fn


class Kernel:
    """A Triton kernel with what its launch depends on.

    `name`: its function's name. `arguments`: names of the run-time arguments, in order; `constants`: of the
    `tl.constexpr` ones. `unspecialized`: integer arguments that vary from call to call, for which no variant is
    compiled when they divide by 16: counts, never strides, which must be known to divide for loads to be wide.
    """

    def __init__(self, fn: Callable[..., Any], unspecialized: tuple[str, ...] = ()) -> None:
        self.fn = fn
        self.name = fn.__name__
        self.__doc__ = fn.__doc__
        self.unspecialized = frozenset(unspecialized)
        parameters = inspect.signature(fn).parameters
        # Without Triton `tl.constexpr` is None, so the names tell: constants are written in capitals.
        self.constants = tuple(name for name in parameters if name.isupper())
        self.arguments = tuple(name for name in parameters if not name.isupper())
        if missing := self.unspecialized - set(self.arguments):
            raise TypeError(f"{self.name} has no argument {', '.join(sorted(missing))}")
        self.triton: Any = None
        if HAS_TRITON:
            self.triton = triton.jit(fn, do_not_specialize=sorted(self.unspecialized))


def kernel(*, unspecialized: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Kernel]:
    """Decorate a Triton kernel. `unspecialized`: see `Kernel`."""
    return lambda fn: Kernel(fn, unspecialized)
