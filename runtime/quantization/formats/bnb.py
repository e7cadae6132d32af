"""bitsandbytes: LLM.int8() and nf4, as transformers saves them."""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError, ConfigError, UnsupportedError
from ..bitsandbytes import BLOCK, NF4, Nf4Weight, nf4_value
from ..methods import WEIGHTS
from ..weight import QuantizedWeight
from .base import Entries, Format, Part, lists, scales_of
from .groups import HALVES

_NESTED_BLOCK = 256  # scales of blocks that share a scale of their own
_STATE = ".weight.quant_state.bitsandbytes__nf4"


class BnbInt8Format(Format):
    """weight (out, in) int8 and SCB (out,) fp32, the largest magnitude of a row, which is 127.

    Weights are what LLM.int8() stores; they run as weight-only int8, whose inputs are not rounded on a GPU, unless
    another method is asked for: LLM.int8() itself needs bitsandbytes ("bnb-int8").
    """

    name = "bitsandbytes"
    marker = ".SCB"

    def __init__(self, entries: Entries) -> None:
        self.left_out = entries.names("llm_int8_skip_modules", "modules_to_not_convert")

    def leaves_out(self, layer: str) -> bool:
        return lists(self.left_out, layer)

    def methods(self, module: str) -> tuple[str, ...]:
        return ("int8-weight", "int8", "bnb-int8")

    def parts(self, layer: str, module: str, shape: tuple[int, int]) -> dict[str, Part]:
        return {
            ".weight": Part((shape,), (torch.int8,)),
            ".SCB": Part(((shape[0],),), HALVES),
            ".weight_format": Part(((), (1,)), (torch.uint8,), optional=True),
        }

    def read(self, layer: str, method: str, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        layout = tensors.get(".weight_format")
        if layout is not None and layout.any():
            raise UnsupportedError(f"{layer}.weight_format: only rows (0) are supported, found {int(layout)}")
        return WEIGHTS[method](tensors[".weight"], scales_of(f"{layer}.SCB", tensors[".SCB"]) / 127)

    def describe(self) -> str:
        return "bitsandbytes int8"


class BnbNf4Format(Format):
    """weight (out * in / 2, 1) uint8, the first of two inputs in the high half; a scale for 64 values on end.

    Scales may be quantised themselves ("nested"): 8 bits, and a scale for 256 of them.
    """

    name = "bitsandbytes"
    marker = _STATE

    def __init__(self, entries: Entries) -> None:
        self.left_out = entries.names("llm_int8_skip_modules", "modules_to_not_convert")
        kind = entries.text("bnb_4bit_quant_type", "fp4")
        if kind != "nf4":
            raise UnsupportedError(f"quantization_config: `bnb_4bit_quant_type` {kind!r} is not supported; nf4 is")
        self.nested = entries.flag("bnb_4bit_use_double_quant", False)
        if entries.text("bnb_4bit_quant_storage", "uint8") != "uint8":
            raise UnsupportedError("quantization_config: `bnb_4bit_quant_storage` other than uint8 is not supported")

    def leaves_out(self, layer: str) -> bool:
        return lists(self.left_out, layer)

    def methods(self, module: str) -> tuple[str, ...]:
        return ("nf4",)

    def parts(self, layer: str, module: str, shape: tuple[int, int]) -> dict[str, Part]:
        size = shape[0] * shape[1]
        blocks = -(-size // BLOCK)
        parts = {
            ".weight": Part(((-(-size // 2), 1), (1, -(-size // 2))), (torch.uint8,)),
            ".weight.absmax": Part(((blocks,),), (torch.uint8,) if self.nested else (torch.float32,)),
            ".weight.quant_map": Part(((len(NF4),),), (torch.float32,)),
            _STATE: Part(((-1,),), (torch.uint8,)),
        }
        if self.nested:
            parts[".weight.nested_absmax"] = Part(((-(-blocks // _NESTED_BLOCK),),), (torch.float32,))
            parts[".weight.nested_quant_map"] = Part(((256,),), (torch.float32,))
        return parts

    def read(
        self, layer: str, method: str, shape: tuple[int, int], tensors: Mapping[str, Tensor]
    ) -> QuantizedWeight | Tensor:
        state = _state(layer, tensors[_STATE])
        if state.get("blocksize") != BLOCK or tuple(state.get("shape", ())) != shape:
            raise CheckpointError(
                f"{layer}{_STATE}: blocks of {state.get('blocksize')}, shape {state.get('shape')}; "
                f"expected {BLOCK} and {list(shape)}"
            )
        levels = torch.tensor(NF4, device=tensors[".weight.quant_map"].device)
        if not torch.allclose(tensors[".weight.quant_map"], levels, rtol=0, atol=1e-6):
            raise CheckpointError(f"{layer}.weight.quant_map: does not hold the levels of nf4")
        scales = tensors[".weight.absmax"]
        if self.nested:
            outer = tensors[".weight.nested_absmax"].repeat_interleave(_NESTED_BLOCK)[: len(scales)]
            scales = tensors[".weight.nested_quant_map"][scales.int()] * outer + state.get("nested_offset", 0.0)
        scales = scales_of(f"{layer}.weight.absmax", scales)
        rows, columns = shape
        codes = tensors[".weight"].flatten()
        if columns % BLOCK:  # blocks reach from one row into the next
            padded = torch.nn.functional.pad(codes, (0, len(scales) * BLOCK // 2 - len(codes)))
            return nf4_value(padded[None], scales[None])[0, : rows * columns].view(shape)
        return Nf4Weight(codes.view(rows, -1), scales.view(rows, -1))

    def describe(self) -> str:
        return "bitsandbytes nf4"


def read_bnb(values: Mapping[str, Any]) -> Format:
    """The format that a bitsandbytes section says."""
    entries = Entries(values)
    four, eight = entries.flag("load_in_4bit", False), entries.flag("load_in_8bit", False)
    if four == eight:
        raise ConfigError("quantization_config: one of `load_in_4bit` and `load_in_8bit` must be true")
    return BnbNf4Format(entries) if four else BnbInt8Format(entries)


def _state(layer: str, packed: Tensor) -> dict[str, Any]:
    try:
        state = json.loads(bytes(packed.tolist()).decode())
    except ValueError:
        state = None
    if not isinstance(state, dict):
        raise CheckpointError(f"{layer}{_STATE}: not the description of a quantised tensor")
    return state
