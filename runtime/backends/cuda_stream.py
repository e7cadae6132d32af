"""A CUDA stream with memory of its own, and work on it recorded once and repeated: what an engine of others needs.

By cuda-python; torch sees the memory through DLPack, without a copy.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack


class CudaStream:
    """A stream of one GPU, beside torch's. Close it when nothing that it computed is still read."""

    def __init__(self, device: torch.device) -> None:
        from cuda.core import Device

        self._device = Device(device.index)
        self._device.set_current()
        self._stream = self._device.create_stream()
        self._torch = torch.cuda.ExternalStream(int(self._stream.handle), device)
        self._buffers: list[Any] = []
        self._graphs: list[Any] = []

    @property
    def handle(self) -> int:
        """The `cudaStream_t`, as libraries take it."""
        return int(self._stream.handle)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory of this stream, as a tensor: the same bytes. It lives until `close`."""
        buffer = self._device.allocate(prod(shape) * dtype.itemsize, stream=self._stream)
        self._buffers.append(buffer)
        self._stream.sync()  # allocated in the order of the stream, and read on others
        return from_dlpack(buffer).view(torch.uint8).view(dtype).view(shape)

    @contextmanager
    def in_order(self) -> Iterator[None]:
        """What runs here inside the block comes after all that torch's current stream has, and before what it gets."""
        current = torch.cuda.current_stream(self._torch.device)
        self._torch.wait_stream(current)
        with torch.cuda.stream(self._torch):
            yield
        current.wait_stream(self._torch)

    def record(self, work: Callable[[int], None]) -> Callable[[], None]:
        """Capture what `work` enqueues on the stream it is given; returns what enqueues it again, here."""
        builder = self._stream.create_graph_builder()
        builder.begin_building()
        work(int(builder.stream.handle))
        graph = builder.end_building().complete()
        self._graphs.append(graph)
        return lambda: graph.launch(self._stream)

    def sync(self) -> None:
        """Wait until all that was enqueued is done."""
        self._stream.sync()

    def close(self) -> None:
        """Give graphs and memory back, after all that uses them is done."""
        self._stream.sync()
        for resource in (*self._graphs, *self._buffers):
            resource.close()
        self._graphs, self._buffers = [], []
        self._stream.close()
