"""Our own layout: a quantised `x.weight` becomes the canonical form of its method, all other tensors stay as they are.

`config.json` holds a `QuantizationConfig` under "quantization_config"; in place of `x.weight` (out, in) stand

    x.weight.codes         int8, int8-weight, bnb-int8: int8 (out, in); fp8: float8_e4m3fn (out, in);
                           int4: uint8 (out, in / 2), the even input in the low half; nf4: likewise, in the high half
    x.weight.scales        float32 (out,); int4: (out, in / group_size); nf4: (out, in / 64)
    x.weight.zeros         int4 that is not symmetric: uint8 (out, in / group_size)
    x.weight.input_scales  of layers that "static_inputs" lists, whose inputs are divided by them: float32 (in,)
    x.weight.order         where columns are not in the order of the inputs: int64 (in,)

and the weight is scales * codes, for int4 scales * (q - zeros) with zeros 8 by default, for nf4 scales * NF4[q]; its
columns divided by input_scales.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError
from ..bitsandbytes import BLOCK
from ..config import QuantizationConfig
from ..methods import WEIGHTS, check_inputs
from ..weight import QuantizedWeight
from .base import Entries, Format, Part, scales_of

_CODES = {
    "int8": torch.int8,
    "int8-weight": torch.int8,
    "bnb-int8": torch.int8,
    "int4": torch.uint8,
    "nf4": torch.uint8,
    "fp8": torch.float8_e4m3fn,
}


class VitrailFormat(Format):
    """`QuantizationConfig` says which layers are quantised and how."""

    name = "vitrail"
    marker = ".weight.codes"

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.config = QuantizationConfig.from_json(values)
        self.static_inputs = frozenset(Entries(values).names("static_inputs"))

    def expects(self, layer: str, module: str) -> bool:
        return self.config.method_of(module) is not None

    def methods(self, module: str) -> tuple[str, ...]:
        method = self.config.method_of(module)
        if method is None:
            raise CheckpointError(f"{module} is quantised, which quantization_config does not say")
        return (method,)

    def parts(self, layer: str, module: str, shape: tuple[int, int]) -> dict[str, Part]:
        (method,), (rows, columns) = self.methods(module), shape
        check_inputs(method, columns, self.config.group_size, module)
        groups = {"int4": columns // self.config.group_size, "nf4": columns // BLOCK}.get(method)
        scales = (rows,) if groups is None else (rows, groups)
        codes = (rows, columns // WEIGHTS[method].codes_per_byte)
        parts = {
            ".weight.codes": Part((codes,), (_CODES[method],)),
            ".weight.scales": Part((scales,), (torch.float32,)),
            ".weight.order": Part(((columns,),), (torch.int64,), optional=True),
        }
        if module in self.static_inputs:  # without them the weight would be another, and nobody the wiser
            parts[".weight.input_scales"] = Part(((columns,),), (torch.float32,))
        if method == "int4":
            parts[".weight.zeros"] = Part((scales,), (torch.uint8,), optional=self.config.symmetric)
        return parts

    def read(self, layer: str, method: str, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        values = {part.removeprefix(".weight."): tensor for part, tensor in tensors.items()}
        for part in values.keys() & {"scales", "input_scales"}:
            scales_of(f"{layer}.weight.{part}", values[part])
        if "input_scales" in values and not (values["input_scales"] > 0).all():
            raise CheckpointError(f"{layer}.weight.input_scales: holds scales that are not positive")
        return WEIGHTS[method](**values)

    def describe(self) -> str:
        halves = (("language half", self.config.llm), ("vision half", self.config.vision))
        return ", ".join(f"{half} {method}" for half, method in halves if method) or "by overrides"
