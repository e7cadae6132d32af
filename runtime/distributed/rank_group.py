"""How the ranks of a language half that is split over several processes meet: a process group of their own."""

import os
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import InternVLConfig
from ..errors import VitrailError
from ..layers.parallel import TensorParallel
from ..quantization.config import QuantizationConfig

_c10d: Any = torch.distributed  # more than its annotations tell
# How far ranks may be apart in one pass: on GPUs the first ones compile kernels.
_TIMEOUT = timedelta(minutes=1)
_NCCL_TIMEOUT = timedelta(minutes=5)


@dataclass(frozen=True)
class RankPlan:
    """What each rank is to load. vision: whether it is to hold the vision half too. threads: of each on a CPU."""

    folder: Path
    config: InternVLConfig
    devices: tuple[torch.device, ...]
    dtype: torch.dtype
    quantization: QuantizationConfig | None
    vision: bool
    ordered: bool
    threads: int
    store_fd: int

    @property
    def size(self) -> int:
        return len(self.devices)


class RankGroup(TensorParallel):
    """Ranks on one device each: gloo over the loopback interface on CPUs, NCCL on GPUs."""

    met = True  # whether the others are about to make the same calls

    def __init__(self, plan: RankPlan, rank: int, name: str) -> None:
        # The store's file is found by the number under which this process has it open.
        store = _c10d.PrefixStore(name, _c10d.FileStore(f"/proc/self/fd/{plan.store_fd}", plan.size))
        device = plan.devices[rank]
        if device.type == "cuda":
            self._backend = _nccl(store, rank, plan.size)
        else:
            options = _c10d.ProcessGroupGloo._Options()
            options._devices = [_c10d.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
            options._timeout = _TIMEOUT
            self._backend = _c10d.ProcessGroupGloo(store, rank, plan.size, options)
        super().__init__(self._backend, ordered=plan.ordered)
        self.all_reduce(torch.zeros(1, device=device))  # NCCL takes its memory in the first call

    def all_reduce(self, x: Tensor) -> Tensor:
        if not self.met:  # it would wait for ever
            raise VitrailError("a language half that is split over several devices is run by its runner alone")
        return super().all_reduce(x)

    def abort(self) -> None:
        """Have collectives that wait for a rank that is gone return, or raise."""
        with suppress(RuntimeError):
            self._backend.abort()


def _nccl(store: Any, rank: int, size: int) -> Any:
    # Its own ways to handle errors end the process, which is the user's; here it is the watch over the ranks that does.
    switches = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}
    before = {name: os.environ.get(name) for name in switches}
    os.environ.update(switches)
    try:
        options = _c10d.ProcessGroupNCCL.Options()
        options._timeout = _NCCL_TIMEOUT
        return _c10d.ProcessGroupNCCL(store, rank, size, options)
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def connect(plan: RankPlan, rank: int) -> tuple[RankGroup, ...]:
    """A group for the language half, and where there are tiles to share another one, for it runs at the same time."""
    return tuple(RankGroup(plan, rank, name) for name in ("language", "vision")[: 1 + plan.vision])
