"""Small tensors of a step from the host to a device, together in one copy.

To copy costs the host some 10 us however little it is, and from memory that is not pinned it first waits for all that
the device was given before.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes: what kernels are compiled for


def packed_size(tensors: Sequence[Tensor]) -> int:
    """Bytes that the tensors take one behind the other."""
    return sum(_extent(tensor) for tensor in tensors)


def carve(memory: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Views of `memory`, (bytes,) uint8, that hold copies of `tensors` after `Upload`: of their shapes and types."""
    views, first = [], 0
    for tensor in tensors:
        views.append(memory[first : first + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
        first += _extent(tensor)
    return views


def _extent(tensor: Tensor) -> int:
    return -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT


class Upload:
    """Copies tensors to `device` by way of one buffer on the host, which is pinned where that is CUDA.

    The buffer is not written before its last copy is done. That copy stands between the pass that it is for and those
    before it, so that the host is ahead of a GPU by one pass at most: a request that comes meanwhile waits for no more.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._bytes = self._buffer.numpy()
        self._copied = torch.cuda.Event() if device.type == "cuda" else None

    def __call__(self, tensors: Sequence[Tensor], into: Tensor | None = None) -> Tensor:
        """Bytes on the device, to be carved; in the stream's order, without waiting for it.

        tensors: on the CPU. into: (bytes,) uint8 on the device, to be written in place of new memory.
        """
        size = packed_size(tensors)
        if self._copied is not None:
            self._copied.synchronize()
        if len(self._bytes) < size:
            self._buffer = torch.empty(2 * size, dtype=torch.uint8, pin_memory=self._copied is not None)
            self._bytes = self._buffer.numpy()
        first = 0
        for tensor in tensors:
            self._bytes[first : first + tensor.nbytes] = tensor.contiguous().numpy().reshape(-1).view("u1")
            first += _extent(tensor)
        memory = torch.empty(size, dtype=torch.uint8, device=self.device) if into is None else into[:size]
        memory.copy_(self._buffer[:size], non_blocking=True)
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(self.device))  # not that of the current device
        return memory
