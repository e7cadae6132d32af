"""What a launch asks of Triton's compiler, and the name by which a kernel pack knows its binary.

A launch is identified by the kernel, the types of its arguments with what the compiler may assume of them (pointers
and integers that divide by 16), its constants and its options.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .language import Kernel

Argument = Tensor | int | float | None

TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}
ALIGNMENT = 16  # bytes of a pointer, or the divisor of an integer, that wide loads need


@dataclass(frozen=True)
class Launch:
    """What one launch asks of the compiler.

    `signature`: one entry a run-time argument: `*bf16`, `i32`, `fp32`, `None`; `:16` follows where it divides by 16.
    """

    kernel: Kernel = field(compare=False)
    name: str
    signature: tuple[str, ...]
    constants: tuple[tuple[str, Any], ...]
    num_warps: int
    num_stages: int
    launch_pdl: bool = False

    @classmethod
    def of(cls, kernel: Kernel, args: tuple[Argument, ...], constants: Mapping[str, Any], **options: Any) -> "Launch":
        """The launch of `kernel` with these arguments."""
        if len(args) != len(kernel.arguments) or constants.keys() != set(kernel.constants):
            raise TypeError(
                f"{kernel.name} takes {', '.join(kernel.arguments)} and the constants {', '.join(kernel.constants)}; "
                f"got {len(args)} arguments and {', '.join(sorted(constants))}"
            )
        signature = tuple(
            _describe(value, name not in kernel.unspecialized)
            for name, value in zip(kernel.arguments, args, strict=True)
        )
        return cls(kernel, kernel.name, signature, tuple(sorted(constants.items())), **options)

    @cached_property
    def key(self) -> str:
        """Names the launch in a pack's index, readable."""
        constants = ",".join(f"{name}={value}" for name, value in self.constants)
        pdl = " pdl" if self.launch_pdl else ""
        return (
            f"{self.name}({','.join(self.signature)})[{constants}] warps={self.num_warps} stages={self.num_stages}{pdl}"
        )

    @cached_property
    def file_stem(self) -> str:
        """Names the launch's binary."""
        return f"{self.name.strip('_')}-{hashlib.sha256(self.key.encode()).hexdigest()[:12]}"


def _describe(value: Argument, specialize: bool) -> str:
    if value is None:
        return "None"
    if isinstance(value, Tensor):
        # Tensors without memory are taken at their word: allocations are aligned, views are off by their offset.
        address = value.storage_offset() * value.itemsize if value.is_meta else value.data_ptr()
        return f"*{TYPES[value.dtype]}" + (":16" if address % ALIGNMENT == 0 else "")
    if isinstance(value, float):
        return "fp32"
    kind = "i32" if -(2**31) <= value < 2**31 else "i64"
    return kind + (":16" if specialize and value % ALIGNMENT == 0 else "")


def compiler_options(*, num_warps: int, num_stages: int, launch_pdl: bool) -> dict[str, Any]:
    """The options that Triton compiles a launch with, ahead of time and just in time."""
    # Fused multiply-add is Triton's default of today and not of tomorrow; numerics must not depend on it.
    options: dict[str, Any] = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    if launch_pdl:
        options["launch_pdl"] = True
    return options
