"""Where kernels are tested: under Triton's interpreter on CPU tensors, and with `pytest -m gpu` on a CUDA device."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
import torch

from vitrail.kernels import dispatch

triton = pytest.importorskip("triton")


@pytest.fixture(autouse=True, scope="session")
def exact_interpreter() -> None:
    """Makes the interpreter treat bf16 and e4m3 as a GPU does.

    By itself it computes with bf16 as with raw bit patterns, and cuts fp32 off where it should round.
    """
    if torch.cuda.is_available():
        return
    import triton.language as tl
    import triton.runtime.interpreter as interpreter

    builder, convert = interpreter.InterpreterBuilder, interpreter._convert_float
    create_dot, create_fsub, cast = builder.create_dot, builder.create_fsub, builder.cast_impl

    def convert_bf16(data, source, target, rounding_mode):
        if (source, target) == (tl.bfloat16, tl.float32):
            return data.astype(np.uint32) << 16
        if (source, target) == (tl.float32, tl.bfloat16):
            bits = data.view(np.uint32)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # to nearest, ties to even
            return np.where(np.isnan(data), 0x7FC0, rounded).astype(np.uint16)
        if (source, target) == (tl.float32, tl.float8e4nv):
            return torch.from_numpy(np.asarray(data)).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        return convert(data, source, target, rounding_mode)

    def widen(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        data = convert_bf16(handle.data, tl.bfloat16, tl.float32, None).view(np.float32)
        return interpreter.TensorHandle(data, tl.float32)

    def narrow(handle):
        return interpreter.TensorHandle(convert_bf16(handle.data, tl.float32, tl.bfloat16, None), tl.bfloat16)

    def subtract(self, a, b):
        difference = create_fsub(self, widen(a), widen(b))
        return narrow(difference) if a.dtype.scalar == tl.bfloat16 else difference

    def from_integer(self, source, target):
        if target.scalar != tl.bfloat16:
            return cast(self, source, target)
        return narrow(interpreter.TensorHandle(source.data.astype(np.float32), tl.float32))

    interpreter._convert_float = convert_bf16
    builder.create_dot = lambda self, a, b, *rest: create_dot(self, widen(a), widen(b), *rest)
    builder.create_fsub, builder.create_si_to_fp, builder.create_ui_to_fp = subtract, from_integer, from_integer


@pytest.fixture(autouse=True, scope="module")
def poisoned_outputs() -> Iterator[None]:
    """What a kernel leaves unwritten is NaN."""
    empty = torch.empty

    def poisoned(*shape: Any, **options: Any) -> torch.Tensor:
        memory = empty(*shape, **options)
        return memory.fill_(torch.nan) if memory.is_floating_point() else memory

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", poisoned)
        yield


@pytest.fixture(
    params=[
        pytest.param("sm_80"),
        pytest.param("sm_90"),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ]
)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The device on which launchers run their kernels: the CPU, simulating an architecture, or a GPU.

    For kernels that are the same on both architectures use `any_device`.
    """
    yield from _device(request.param)


@pytest.fixture(params=[pytest.param("sm_80", id="interpreter"), pytest.param("cuda", marks=pytest.mark.gpu)])
def any_device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """`device` for kernels that do not differ between architectures."""
    yield from _device(request.param)


@pytest.fixture(scope="session")
def interpreted() -> Callable[[], AbstractContextManager[None]]:
    """For property tests, which may use no fixture of a single test: a block in which CPU tensors meet the kernels."""
    if torch.cuda.is_available():
        pytest.skip("Triton compiles for the GPU here; its interpreter is tested where there is none")
    return lambda: dispatch.simulate(dispatch.A100)


def _device(where: str) -> Iterator[torch.device]:
    if where == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        yield torch.device("cuda")
        return
    if torch.cuda.is_available():
        pytest.skip("Triton compiles for the GPU here; its interpreter is tested where there is none")
    with dispatch.simulate(dispatch.REPRESENTATIVE[where]):
        yield torch.device("cpu")
