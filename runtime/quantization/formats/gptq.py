"""GPTQ, as AutoGPTQ and GPTQModel write it, with and without act-order."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError, UnsupportedError
from ..weight import QuantizedWeight
from .base import Entries, Format, Part, lists, scales_of
from .groups import HALVES, WORD, check_bias, check_bits, group_size_of, grouped, nibbles, zeros_bias


class GptqFormat(Format):
    """qweight (in / 8, out), words of 8 inputs; qzeros (groups, out / 8), of 8 outputs; scales (groups, out).

    g_idx: (in,), the group of each input; with act-order groups are of inputs that matter alike, not of neighbours.
    """

    name = "gptq"
    marker = ".qweight"

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.entries = Entries(values)
        check_bits(self.entries)
        version = self.entries.text("checkpoint_format", "gptq")
        if version not in ("gptq", "gptq_v2"):
            raise UnsupportedError(
                f"quantization_config: `checkpoint_format` {version!r} is not supported; gptq and gptq_v2 are"
            )
        self.offset = 1 if version == "gptq" else 0  # the first version stores zero points less 1
        self.act_order = self.entries.flag("desc_act", False)
        self.left_out = self.entries.names("modules_to_not_convert")
        # GPTQModel: regular expressions, "-:" for those left out, "+:" or nothing for other settings.
        dynamic = values.get("dynamic") or {}
        if not isinstance(dynamic, Mapping) or any(not pattern.startswith("-:") for pattern in dynamic):
            raise UnsupportedError("quantization_config: `dynamic` settings of single layers are not supported")
        self.patterns = tuple(pattern.removeprefix("-:") for pattern in dynamic)
        within = values.get("modules_in_block_to_quantize")
        try:
            self.within = None if not within else tuple(name for block in within for name in block)
        except TypeError:
            raise ConfigError("quantization_config: `modules_in_block_to_quantize` must list lists of names") from None

    def leaves_out(self, layer: str) -> bool:
        if self.within is not None and not any(layer.endswith(f".{name}") for name in self.within):
            return True
        return lists(self.left_out, layer) or any(re.match(pattern, layer) for pattern in self.patterns)

    def methods(self, module: str) -> tuple[str, ...]:
        return ("int4",)

    def parts(self, layer: str, module: str, shape: tuple[int, int]) -> dict[str, Part]:
        rows, columns = shape
        if rows % WORD or columns % WORD:
            raise ConfigError(f"{layer}: a weight of {shape} does not fill words of {WORD}, as GPTQ packs them")
        groups = columns // group_size_of(self.entries, layer, columns)
        return {
            ".qweight": Part(((columns // WORD, rows),), (torch.int32,)),
            ".qzeros": Part(((groups, rows // WORD),), (torch.int32,)),
            ".scales": Part(((groups, rows),), HALVES),
            ".g_idx": Part(((columns,),), (torch.int32, torch.int64), optional=not self.act_order),
            ".bias": zeros_bias(shape),
        }

    def read(
        self, layer: str, method: str, shape: tuple[int, int], tensors: Mapping[str, Tensor]
    ) -> QuantizedWeight | Tensor:
        check_bias(layer, tensors.get(".bias"))
        q = nibbles(tensors[".qweight"].t())
        zeros = nibbles(tensors[".qzeros"]).t() + self.offset
        scales = scales_of(f"{layer}.scales", tensors[".scales"]).t()
        return grouped(layer, q, scales, zeros, tensors.get(".g_idx"))

    def describe(self) -> str:
        return "gptq int4"
