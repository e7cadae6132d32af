"""Kernel packs: folders of binaries compiled ahead of time. With one, a process compiles nothing and needs no Triton.

A folder holds a cubin for every launch and architecture, and `index.json`, which names them and says what each takes.
A pack belongs to the sources it was compiled from: one of other sources is left alone, with a warning.
"""

import ctypes
import hashlib
import json
import math
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..runtime.errors import UnsupportedError
from . import dispatch
from .build import Compiled
from .dispatch import Arch
from .signature import Argument, Launch

INDEX = "index.json"
SMALLEST_SHARED = 99 * 1024  # bytes a CTA, of the 8.6 and 8.9 whose binaries are an A100's
REMEDY = "build it anew with `vitrail build-kernels`, or delete it"


@dataclass(frozen=True)
class Entry:
    """One binary of a pack, as the index describes it. `num_warps` counts those that Triton added, too."""

    file: str
    sha256: str
    function: str
    num_warps: int
    shared: int
    scratch_size: int
    hidden_parameters: int


@dataclass(frozen=True)
class Pack:
    """A folder's index: for each architecture the binaries by the key of their launch."""

    folder: Path
    triton_version: str
    binaries: Mapping[Arch, Mapping[str, Entry]]


@cache
def sources_digest() -> str:
    """Stands for all sources of this room: what a kernel compiles to may depend on any of them."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def read_pack(folder: Path) -> Pack | None:
    """The pack in `folder`; None where there is none or it is of other sources. `UnsupportedError` if it is damaged."""
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if index["sources"] != sources_digest():
            return None
        binaries = {
            arch: {key: Entry(**entry) for key, entry in index["binaries"][arch].items()}
            for arch in dispatch.ARCHS
            if arch in index["binaries"]
        }
        return Pack(folder, index["triton"], binaries)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UnsupportedError(f"the kernel pack {path} is damaged ({_reason(error)}): {REMEDY}") from error


def write_pack(folder: Path, compiled: Iterable[Compiled], triton_version: str) -> Pack:
    """Put binaries into the pack in `folder`, beside those it has of the same sources and the same Triton."""
    try:
        before = read_pack(folder)
    except UnsupportedError:
        before = None
    if before is None or before.triton_version != triton_version:
        before = Pack(folder, triton_version, {})
    binaries = {arch: dict(before.binaries.get(arch, {})) for arch in dispatch.ARCHS}
    for binary in compiled:
        assert binary.resources is not None
        file = folder / binary.arch / f"{binary.launch.file_stem}.cubin"
        file.parent.mkdir(parents=True, exist_ok=True)
        _replace(file, binary.cubin)
        binaries[binary.arch][binary.launch.key] = Entry(
            file=file.relative_to(folder).as_posix(),
            sha256=hashlib.sha256(binary.cubin).hexdigest(),
            function=binary.function,
            num_warps=binary.resources.warps,
            shared=binary.resources.shared,
            scratch_size=binary.scratch_size,
            hidden_parameters=binary.hidden_parameters,
        )
    index = {
        "triton": triton_version,
        "sources": sources_digest(),
        "binaries": {
            arch: {key: asdict(entry) for key, entry in held.items()} for arch, held in binaries.items() if held
        },
    }
    _replace(folder / INDEX, json.dumps(index, indent=1).encode())
    named = {folder / entry.file for held in binaries.values() for entry in held.values()}
    for file in folder.glob("*/*.cubin"):
        if file not in named:
            file.unlink()
    return Pack(folder, triton_version, binaries)


def _replace(file: Path, content: bytes) -> None:
    """Write a file in one step, so that no other process reads half of it."""
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    partial.write_bytes(content)
    partial.replace(file)


_lock = threading.Lock()
_loaded: "dict[tuple[int, Launch], Binary | None]" = {}


def find(device: torch.device, launch: Launch) -> "Binary | None":
    """The binary for a launch on a CUDA device, loaded on first use; None where no pack has it."""
    index = device.index if device.index is not None else torch.cuda.current_device()
    try:
        return _loaded[index, launch]
    except KeyError:
        pass
    with _lock:
        if (index, launch) not in _loaded:
            _loaded[index, launch] = _load(index, launch)
        return _loaded[index, launch]


def _load(index: int, launch: Launch) -> "Binary | None":
    target = dispatch.cuda_target(torch.device("cuda", index))
    assert target is not None
    for pack in packs():
        entry = pack.binaries.get(target.arch, {}).get(launch.key)
        if entry is not None and _fits(entry, target.arch, index):
            return Binary(pack.folder / entry.file, entry, launch, index)
    return None


def _fits(entry: Entry, arch: Arch, index: int) -> bool:
    """Whether a GPU runs a binary: one made for its major version, with no more shared memory than it has."""
    major, minor = torch.cuda.get_device_capability(index)
    return arch == f"sm_{major}0" and (minor == 0 or entry.shared <= SMALLEST_SHARED)


@cache
def packs() -> tuple[Pack, ...]:
    """The packs that launches are looked up in, in order. Warns of those that cannot be used."""
    folders = dispatch.kernel_pack_folders()
    if folders:
        try:
            import cuda.core  # noqa: F401
        except ImportError:
            _warn(f"the kernel pack {folders[0]} is not used: it needs cuda-python (pip install 'vitrail[cuda]')")
            return ()
    found = [(folder, read_pack(folder)) for folder in folders]
    for folder, pack in found:
        if pack is None:
            _warn(f"the kernel pack {folder} is not used: it was built from other sources; {REMEDY}")
    return tuple(pack for _, pack in found if pack is not None)


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=2)


class Binary:
    """A kernel of a pack, loaded for one device."""

    def __init__(self, file: Path, entry: Entry, launch: Launch, device_index: int) -> None:
        self.device = torch.device("cuda", device_index)
        self.threads = 32 * entry.num_warps
        self.shared = entry.shared
        self.scratch_size = entry.scratch_size
        self.hidden_parameters = entry.hidden_parameters
        # Arguments that are None at compile time are no parameters of the binary.
        self.converters = [
            (position, _converter(described.partition(":")[0]))
            for position, described in enumerate(launch.signature)
            if described != "None"
        ]
        self.options = {"programmatic_stream_serialization": True} if launch.launch_pdl else {}
        try:
            cubin = file.read_bytes()
            if hashlib.sha256(cubin).hexdigest() != entry.sha256:
                raise ValueError("its SHA-256 is not the one in the index")
            with torch.cuda.device(self.device):
                self.kernel = load_kernel(cubin, entry.function, entry.shared, device_index)
        except Exception as error:  # cuda.core has errors of its own for what the driver refuses
            raise UnsupportedError(f"the kernel pack's {file} cannot be loaded ({_reason(error)}): {REMEDY}") from error

    def launch(self, grid: tuple[int, ...], args: tuple[Argument, ...]) -> None:
        """Run the kernel on torch's current stream of its device."""
        values = [convert(args[position]) for position, convert in self.converters]
        hidden = [0] * self.hidden_parameters
        if self.scratch_size:
            # Freed when this returns, in the stream's order: whoever gets the memory next comes after the kernel.
            scratch = torch.empty(math.prod(grid) * self.scratch_size, dtype=torch.uint8, device=self.device)
            hidden[0] = scratch.data_ptr()
        start_kernel(self.kernel, self.device, (*values, *hidden), grid, self.threads, self.shared, **self.options)


def _converter(kind: str) -> Callable[[Any], Any]:
    """How cuda.core is told an argument of that width; it takes a bare int for an address."""
    if kind.startswith("*"):
        return Tensor.data_ptr
    return {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}[kind]


# Without asking, a kernel gets this much shared memory; more must be allowed to it, device by device.
FREE_SHARED = 48 * 1024


def load_kernel(cubin: bytes, function: str, shared: int, device_index: int) -> Any:
    """A function of a cubin, loaded for the current device, which will be asked for `shared` bytes a CTA."""
    import cuda.core
    from cuda.bindings import driver

    _have_context(device_index)
    kernel = cuda.core.ObjectCode.from_cubin(cubin).get_kernel(function)
    if shared > FREE_SHARED:
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        (status,) = driver.cuKernelSetAttribute(attribute, shared, kernel.handle, device_index)
        if status != driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"{shared} bytes of shared memory refused: {status.name}")
    return kernel


def start_kernel(
    kernel: Any,
    device: torch.device,
    values: tuple[Any, ...],
    grid: tuple[int, ...],
    threads: int,
    shared: int,
    **options: Any,
) -> None:
    """Run a kernel from `load_kernel` on torch's current stream. values: addresses as int, numbers as ctypes."""
    import cuda.core

    config = cuda.core.LaunchConfig(grid=grid, block=threads, shmem_size=shared, **options)
    with torch.cuda.device(device):
        _have_context(device.index)
        cuda.core.launch(torch.cuda.current_stream(device), config, kernel, *values)


_threads = threading.local()


def _have_context(index: int) -> None:
    """Give this thread the device's context, which torch only does when it needs it itself."""
    import cuda.core

    known = _threads.__dict__.setdefault("known", set())
    if index not in known:
        cuda.core.Device(index).set_current()
        known.add(index)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
