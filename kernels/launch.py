"""One way to launch a Triton kernel: from a kernel pack, through Triton's compiler or interpreter, or only recorded."""

from typing import Any

import torch
from torch import Tensor

from . import dispatch
from .language import Kernel, triton
from .pack import find, packs
from .signature import Argument, Launch, compiler_options


def launch(
    kernel: Kernel,
    grid: tuple[int, ...],
    *args: Argument,
    num_warps: int = 4,
    num_stages: int = 2,
    launch_pdl: bool = False,
    **constants: Any,
) -> None:
    """Run `kernel` on `grid` programs: run-time arguments in order, constants by name.

    num_stages: depth of the software pipeline. launch_pdl: let the kernel start before its predecessor has ended.
    """
    if 0 in grid:
        return
    options: dict[str, Any] = {"num_warps": num_warps, "num_stages": num_stages, "launch_pdl": launch_pdl}
    simulated = dispatch.simulation()
    if simulated is not None:
        if simulated.launches is None:
            kernel.triton[grid](*args, **constants)
        else:
            simulated.launches.append(Launch.of(kernel, args, constants, **options))
        return
    device = next(value.device for value in args if isinstance(value, Tensor))
    if packs() or kernel.triton is None:  # to describe a launch takes the host longer than all the rest here
        wanted = Launch.of(kernel, args, constants, **options)
        binary = find(device, wanted)
        if binary is not None:
            binary.launch(grid, args)
            return
        if kernel.triton is None:
            raise RuntimeError(f"the kernel pack has no {wanted.key}, and Triton is not installed")
    with torch.cuda.device(device):
        triton.set_allocator(_scratch)  # in a context variable: every thread begins without
        kernel.triton[grid](*args, **constants, **compiler_options(**options))


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """What tensor descriptors made on the device need of memory, a little for each program."""
    return torch.empty(size, dtype=torch.int8, device="cuda")
