"""AWQ, GEMM packing: what AutoAWQ and LMDeploy write, and the official InternVL2-*-AWQ checkpoints are."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError, UnsupportedError
from ..weight import QuantizedWeight
from .base import Entries, Format, Part, lists, scales_of
from .groups import HALVES, WORD, check_bits, group_size_of, grouped, nibbles

# Output j of a word's eight stands in this nibble: from the lowest, a word holds outputs 0 2 4 6 1 3 5 7.
_POSITIONS = (0, 4, 1, 5, 2, 6, 3, 7)


class AwqFormat(Format):
    """qweight (in, out / 8) and qzeros (groups, out / 8), words of 8 outputs; scales (groups, out)."""

    name = "awq"
    marker = ".qweight"

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.entries = Entries(values)
        check_bits(self.entries, "bits" if "bits" in values else "w_bit")
        version = self.entries.text("version", "gemm")
        if version.lower() != "gemm":
            raise UnsupportedError(f"quantization_config: AWQ version {version!r} is not supported; gemm is")
        if not self.entries.flag("zero_point", True):
            raise UnsupportedError("quantization_config: AWQ without zero points is not supported")
        self.left_out = self.entries.names("modules_to_not_convert")

    def leaves_out(self, layer: str) -> bool:
        return lists(self.left_out, layer)

    def methods(self, module: str) -> tuple[str, ...]:
        return ("int4",)

    def parts(self, layer: str, module: str, shape: tuple[int, int]) -> dict[str, Part]:
        rows, columns = shape
        if rows % WORD:
            raise ConfigError(f"{layer}: its {rows} outputs do not fill words of {WORD}, as AWQ packs them")
        groups = columns // group_size_of(self.entries, layer, columns)
        return {
            ".qweight": Part(((columns, rows // WORD),), (torch.int32,)),
            ".qzeros": Part(((groups, rows // WORD),), (torch.int32,)),
            ".scales": Part(((groups, rows),), HALVES),
        }

    def read(
        self, layer: str, method: str, shape: tuple[int, int], tensors: Mapping[str, Tensor]
    ) -> QuantizedWeight | Tensor:
        q, zeros = (nibbles(tensors[part], _POSITIONS).t() for part in (".qweight", ".qzeros"))
        return grouped(layer, q, scales_of(f"{layer}.scales", tensors[".scales"]).t(), zeros, None)

    def describe(self) -> str:
        return "awq int4"
