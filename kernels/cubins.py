"""The kernels of csrc/cuda: binaries that the installation compiled where it found nvcc, launched as a pack's are.

`cubin/<arch>/<file>.cubin` hold them, `cubin/index.json` says of which sources they are. Where they are missing, or do
not fit the GPU, `available` is false, and the callers have something else.
"""

import ctypes
import hashlib
import json
import threading
import warnings
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..runtime.errors import UnsupportedError
from .dispatch import Arch
from .pack import load_kernel, start_kernel

FOLDER = Path(__file__).parent / "cubin"
SOURCES = Path(__file__).parent.parent / "csrc" / "cuda"  # in a checkout


class CudaKernel(NamedTuple):
    """An entry of `<file>.cubin`, with the threads and the bytes of shared memory of its CTAs."""

    file: str
    function: str
    threads: int
    shared: int


def available(device: torch.device, shared: int = 0) -> bool:
    """Whether kernels of csrc/cuda can run there, with that many bytes of shared memory a CTA."""
    if device.type != "cuda":
        return False
    index = device.index if device.index is not None else torch.cuda.current_device()
    return _arch(index) is not None and shared <= _most_shared(index)


def num_sms(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch(kernel: CudaKernel, grid: int, *args: Tensor | int | ctypes.c_int64 | None) -> None:
    """Run `grid` CTAs on torch's current stream of the tensors' device; ints are of 32 bits, None is a null pointer."""
    device = next(value.device for value in args if isinstance(value, Tensor))
    index = device.index if device.index is not None else torch.cuda.current_device()
    values = tuple(_converted(value) for value in args)
    start_kernel(_load(kernel, index), torch.device("cuda", index), values, (grid,), kernel.threads, kernel.shared)


def _converted(value: Tensor | int | ctypes.c_int64 | None) -> Any:
    if value is None:
        return 0
    if isinstance(value, Tensor):
        return value.data_ptr()
    return ctypes.c_int32(value) if isinstance(value, int) else value


@cache
def sources_digest(folder: Path = SOURCES) -> str:
    """Stands for the kernels' sources."""
    digest = hashlib.sha256()
    for file in sorted((*folder.glob("*.cu"), *folder.glob("*.h"))):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


@cache
def _built() -> frozenset[Arch]:
    """The architectures that there are binaries for, none if they are of other sources than this checkout's."""
    try:
        index = json.loads((FOLDER / "index.json").read_text(encoding="utf-8"))
        archs: frozenset[Arch] = frozenset(index["archs"])
        sources = index["sources"]
    except FileNotFoundError:
        return frozenset()
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UnsupportedError(f"{FOLDER / 'index.json'} is damaged ({error}): install vitrail again") from error
    if SOURCES.is_dir() and sources != sources_digest():
        warnings.warn(
            f"the CUDA kernels in {FOLDER} are not used: csrc/cuda has changed since; run csrc/cuda/build.py",
            stacklevel=2,
        )
        return frozenset()
    if find_spec("cuda") is None or find_spec("cuda.core") is None:
        return frozenset()
    return archs


@cache
def _arch(index: int) -> Arch | None:
    major, minor = torch.cuda.get_device_capability(index)
    # Binaries for sm_80 run on every 8.x; Hopper's own (sm_90a) run on 9.0 alone.
    arch: Arch | None = "sm_80" if major == 8 else "sm_90" if (major, minor) == (9, 0) else None
    return arch if arch in _built() else None


@cache
def _most_shared(index: int) -> int:
    properties: Any = torch.cuda.get_device_properties(index)  # torch's types do not know this one
    return properties.shared_memory_per_block_optin


_lock = threading.Lock()
_loaded: dict[tuple[CudaKernel, int], Any] = {}


def _load(kernel: CudaKernel, index: int) -> Any:
    with _lock:
        if (kernel, index) not in _loaded:
            arch = _arch(index)
            if arch is None:
                raise UnsupportedError(f"there is no binary of {kernel.function} for GPU {index}")
            file = FOLDER / arch / f"{kernel.file}.cubin"
            try:
                with torch.cuda.device(index):
                    _loaded[kernel, index] = load_kernel(file.read_bytes(), kernel.function, kernel.shared, index)
            except Exception as error:  # cuda.core has errors of its own for what the driver refuses
                raise UnsupportedError(f"{file} cannot be loaded ({error}): install vitrail again") from error
        return _loaded[kernel, index]
