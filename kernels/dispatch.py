"""Which GPU a launcher faces, and which implementation wins there: nothing else probes devices or reads settings.

Choices come from a table per architecture, `tables/<arch>.json`: for every operation a list of rows, each a shape with
the implementation and the constants to use for it. Rows are measured where a GPU was at hand and otherwise computed
from the compiled kernels' resources; the table says which. `vitrail bench tune` measures them again on the user's GPU
and writes a table of its own, which replaces the shipped rows of the operations it covers.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from .cpu_extension import CpuExtension, extension
from .language import HAS_TRITON

if TYPE_CHECKING:
    from .signature import Launch

Arch = Literal["sm_80", "sm_90"]
ARCHS: tuple[Arch, ...] = ("sm_80", "sm_90")
TABLES = Path(__file__).parent / "tables"


@dataclass(frozen=True)
class Target:
    """A GPU as launchers see it. `name` is the one its driver gives, e.g. for the user's own table."""

    arch: Arch
    num_sms: int
    name: str


# The GPUs that vitrail is made for, as targets where no GPU is present.
A100 = Target("sm_80", 108, "NVIDIA A100-SXM4-80GB")
H200 = Target("sm_90", 132, "NVIDIA H200")
REPRESENTATIVE: Mapping[Arch, Target] = {"sm_80": A100, "sm_90": H200}


@dataclass
class Simulation:
    """Launchers act as on `target` although their tensors are not there.

    Without `launches` Triton's interpreter runs the kernels on CPU tensors. With it nothing runs: each launch is
    noted, and tensors may be on the `meta` device. `tuned`: choices are those of the user's own table for the target.
    """

    target: Target
    launches: "list[Launch] | None" = None
    tuned: bool = False


_simulation: Simulation | None = None


@contextmanager
def simulate(target: Target, launches: "list[Launch] | None" = None, *, tuned: bool = False) -> Iterator[None]:
    """Within the block, launchers treat CPU and meta tensors as tensors on `target`; see `Simulation`."""
    global _simulation
    before, _simulation = _simulation, Simulation(target, launches, tuned)
    try:
        yield
    finally:
        _simulation = before


def simulation() -> Simulation | None:
    """The simulation in force."""
    return _simulation


def target_of(*tensors: Tensor) -> Target | None:
    """The GPU that kernels can run on for these tensors, None where the reference must do.

    That is: no CUDA device, one older than Ampere, neither Triton nor a kernel pack, or a gradient asked for.
    """
    first = tensors[0]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return None
    if _simulation is not None:
        return _simulation.target
    return cuda_target(first.device) if first.is_cuda else None


def cpu_extension(*tensors: Tensor) -> CpuExtension | None:
    """The C++ extension, where its operations on tokens do for these: all of the first's dtype, float32 or bfloat16.

    Only in inference mode: whoever trains, exports or asks for the reference gets plain torch.
    """
    if extension is None or _simulation is not None or not torch.is_inference_mode_enabled():
        return None
    dtype = tensors[0].dtype
    if tensors[0].is_cuda or dtype not in (torch.float32, torch.bfloat16):
        return None
    for tensor in tensors:  # a decode step asks dozens of times: `all` and a generator take twice as long
        if tensor.dtype != dtype:
            return None
    return extension


def cuda_target(device: torch.device) -> Target | None:
    """The target for a CUDA device, None if kernels cannot run on it."""
    return _cuda_target(device.index if device.index is not None else torch.cuda.current_device())


@cache
def _cuda_target(index: int) -> Target | None:
    properties = torch.cuda.get_device_properties(index)
    if properties.major < 8 or not (HAS_TRITON or kernel_pack_folders()):
        return None
    # Binaries for sm_80 run on every 8.x; Hopper's own (sm_90a) run on 9.0 alone.
    arch: Arch = "sm_90" if (properties.major, properties.minor) == (9, 0) else "sm_80"
    return Target(arch, properties.multi_processor_count, properties.name)


def cache_folder() -> Path:
    """Where vitrail keeps what it measured or built on this machine."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "vitrail"


def kernel_pack_folders() -> list[Path]:
    """Folders with a kernel pack, the first to be asked first: `VITRAIL_KERNEL_PACK`, the user's, the package's own."""
    named = os.environ.get("VITRAIL_KERNEL_PACK")
    folders = [*([Path(named)] if named else []), cache_folder() / "pack", Path(__file__).parent / "pack"]
    return [folder for folder in folders if (folder / "index.json").is_file()]


def user_table(target: Target) -> Path:
    """The file of the user's own measurements for a GPU."""
    return cache_folder() / "tables" / f"{target.name.lower().replace(' ', '-')}.json"


def user_tables() -> list[Path]:
    """All of the user's own measurements, whatever GPU they are of."""
    return sorted((cache_folder() / "tables").glob("*.json"))


Choice = Mapping[str, Any]


_overrides: dict[str, Choice] = {}


@contextmanager
def override(operation: str, choice: Choice) -> Iterator[None]:
    """Within the block, `choose` answers `choice` for `operation`: what tuning, benchmarks and tests compare."""
    before = _overrides.get(operation)
    _overrides[operation] = choice
    try:
        yield
    finally:
        if before is None:
            del _overrides[operation]
        else:
            _overrides[operation] = before


def choose(operation: str, target: Target, **shape: int) -> Choice:
    """The row of the table for `operation` whose shape is nearest in ratio to `shape`.

    A row holds `implementation` and the constants that its kernel is launched with.
    """
    if operation in _overrides:
        return _overrides[operation]
    tuned = _simulation is None or _simulation.tuned
    return _choose(operation, target, tuple(sorted(shape.items())), tuned)


@cache
def _choose(operation: str, target: Target, shape: tuple[tuple[str, int], ...], tuned: bool) -> Choice:
    rows = _table(target, tuned).get(operation)
    if not rows:
        raise KeyError(f"no table row for {operation} on {target.arch}")

    def distance(row: Choice) -> float:
        return sum(abs(math.log(row["shape"][name] / value)) for name, value in shape)

    return dict(min(rows, key=distance)["choice"])


@cache
def _table(target: Target, tuned: bool) -> Mapping[str, list[Choice]]:
    operations: dict[str, list[Choice]] = dict(read_table(TABLES / f"{target.arch}.json"))
    own = user_table(target)
    if tuned and own.is_file():
        operations |= read_table(own)
    return operations


def read_table(path: Path) -> dict[str, list[Choice]]:
    """The operations of a table file; without its note on where the rows come from."""
    return json.loads(path.read_text(encoding="utf-8"))["operations"]
