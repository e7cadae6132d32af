"""A graph's weights in one file beside it, each written as soon as it is known."""

import hashlib
from pathlib import Path
from typing import Any, cast

import onnx_ir as ir
import torch
from torch import Tensor

# Runtimes map the file: large tensors begin with a page, all others with a cache line.
PAGE, LINE, LARGE = 4096, 64, 1 << 20

_TYPES = {
    torch.uint8: ir.DataType.UINT8,
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.int8: ir.DataType.INT8,
    torch.int64: ir.DataType.INT64,
}


class WeightFile:
    """The file of a graph's weights, written from its beginning to its end. SHA-256 is known when it is closed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("wb")
        self._digest = hashlib.sha256()
        self._end = 0

    def add(self, name: str, tensor: Tensor, kind: ir.DataType | None = None) -> ir.ExternalTensor:
        """Append a tensor. kind: its type if bytes stand for something else, two 4-bit integers each."""
        tensor = tensor.contiguous()
        data = memoryview(cast(Any, tensor.reshape(-1).view(torch.uint8).numpy()))
        self._pad(PAGE if data.nbytes >= LARGE else LINE)
        shape = list(tensor.shape)
        if kind in (ir.DataType.INT4, ir.DataType.UINT4):
            shape[-1] *= 2
        stored = ir.ExternalTensor(
            self.path.name,
            self._end,
            data.nbytes,
            _TYPES[tensor.dtype] if kind is None else kind,
            shape=ir.Shape(shape),
            name=name,
            base_dir=self.path.parent,
        )
        self._write(data)
        return stored

    def close(self) -> str:
        """The file is whole; its SHA-256."""
        self._file.close()
        return self._digest.hexdigest()

    def _pad(self, boundary: int) -> None:
        self._write(bytes(-self._end % boundary))

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._end += len(data)
