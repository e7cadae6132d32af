"""Kernels of csrc/cuda on the CPU: compiled by the host's compiler with the emulator of tests/csrc, which checks them.

An `Emulator` stands for `cubins`: launchers that meet it take CPU tensors for a GPU's. A misuse that the emulator finds
(a race on shared memory, an address outside a tensor) is a `RuntimeError`.
"""

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from vitrail.kernels.cubins import CudaKernel

ROOT = Path(__file__).resolve().parents[2]
EMULATOR = ROOT / "tests" / "csrc"
# Fibers are glibc's.
COMPILER = shutil.which(os.environ.get("CXX", "c++")) if sys.platform == "linux" else None
# A line that makes kernels of a template.
ENTRY = re.compile(r"(INT8_GEMM|BOTH_FLOATS|DEQUANTIZE)\(")
FLAGS = ("-std=c++17", "-g0", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")


def shared_folder(factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of a test run have in common."""
    base = factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def compile_kernels(
    folder: Path, name: str, replaced: Mapping[str, str] | None = None, only: str | None = None
) -> Path:
    """The library of csrc/cuda/<name>.cu in `folder`, compiled once for the same sources by all who share it.

    replaced: texts of the source, each of which stands there once, by what to put there. only: keep those entries
    alone in whose line this stands.
    """
    texts = {file: (ROOT / "csrc/cuda" / file).read_text(encoding="utf-8") for file in (f"{name}.cu", "intrinsics.h")}
    source = texts[f"{name}.cu"]
    for old, new in (replaced or {}).items():
        assert source.count(old) == 1, f"{name}.cu has {old!r} {source.count(old)} times"
        source = source.replace(old, new)
    if only is not None:
        source = "".join(line for line in source.splitlines(True) if not ENTRY.match(line) or only in line)
    texts[f"{name}.cu"] = source
    emulator = _compile(folder, "emulator.o", {}, EMULATOR / "emulator.cpp", "-O2", "-c")
    # What runs once is not worth optimising.
    return _compile(folder, f"{name}.so", texts, f"{name}.cu", "-O0" if replaced else "-O1", "-shared", emulator)


def _compile(folder: Path, output: str, texts: Mapping[str, str], source: str | Path, *more: str | Path) -> Path:
    """`source` compiled with the emulator's header and the files `texts`; the name has a digest of all of them."""
    sources = [*texts.items(), *((file.name, file.read_text(encoding="utf-8")) for file in EMULATOR.glob("*"))]
    digest = hashlib.sha256(repr((output, sorted(sources))).encode()).hexdigest()[:16]
    result = folder / f"{digest}-{output}"
    if not result.exists():
        assert COMPILER is not None
        private = folder / f"{digest}-{os.getpid()}"
        private.mkdir(exist_ok=True)
        for file, text in texts.items():
            (private / file).write_text(text, encoding="utf-8")
        partial = private / output
        inputs = ["-x", "c++", private / source, "-x", "none", *more]
        subprocess.run([COMPILER, *FLAGS, f"-I{private}", f"-I{EMULATOR}", *inputs, "-o", partial], check=True)
        partial.replace(result)
    return result


class Emulator(SimpleNamespace):
    """What launchers use of `cubins`, with a library from `compile_kernels`; notes launches and bank conflicts."""

    def __init__(self, library: Path, sms: int = 4) -> None:
        super().__init__(CudaKernel=CudaKernel, launched=[], bank_conflicts=0)
        self.library = ctypes.CDLL(str(library))
        self.library.emulate.restype = ctypes.c_int64
        self.sms = sms

    def available(self, device: torch.device, shared: int = 0) -> bool:
        return shared <= 166_912  # an A100's

    def num_sms(self, device: torch.device) -> int:
        return self.sms

    def launch(self, kernel: CudaKernel, grid: int, *args: Tensor | int | ctypes.c_int64 | None) -> None:
        values, buffers = [], []
        for value in args:
            if isinstance(value, Tensor):
                span = sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True)) + 1
                buffers.append((value.data_ptr(), span * value.element_size()))
                values.append(ctypes.c_void_p(value.data_ptr()))
            elif isinstance(value, int):
                values.append(ctypes.c_int32(value))
            else:
                values.append(ctypes.c_void_p(None) if value is None else value)
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        message = ctypes.create_string_buffer(500)
        conflicts = self.library.emulate(
            ctypes.cast(getattr(self.library, f"{kernel.function}_run"), ctypes.c_void_p),
            pointers,
            *(grid, kernel.threads, kernel.shared),
            (ctypes.c_void_p * len(buffers))(*(start for start, _ in buffers)),
            (ctypes.c_int64 * len(buffers))(*(size for _, size in buffers)),
            *(len(buffers), message, len(message)),
        )
        self.launched.append((kernel, grid))
        if conflicts < 0:
            raise RuntimeError(f"{kernel.function}: {message.value.decode()}")
        self.bank_conflicts += conflicts
