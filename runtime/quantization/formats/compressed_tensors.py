"""compressed-tensors, as llm-compressor writes it: W8A8, W8A16, W4A16 and fp8."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError, ConfigError, UnsupportedError
from ..methods import WEIGHTS
from ..weight import QuantizedWeight
from .base import Entries, Format, Part, scales_of
from .groups import HALVES, WORD, group_size_of, grouped, nibbles

_STORES = ("int-quantized", "float-quantized", "naive-quantized", "pack-quantized")
_BYTES = 4  # of a word


class CompressedTensorsFormat(Format):
    """One scheme for all linear layers but those that `ignore` lists.

    weight (out, in) int8 or e4m3 with weight_scale (out, 1); or weight_packed, signed values raised by half their
    range, in words along the inputs, weight_scale (out, groups), and weight_zero_point, packed along the outputs.
    Inputs are rounded per token whatever was stored for them: scales found beforehand are coarser.
    """

    name = "compressed-tensors"

    def __init__(self, values: Mapping[str, Any]) -> None:
        groups = values.get("config_groups")
        if not isinstance(groups, Mapping) or len(groups) != 1:
            raise UnsupportedError("quantization_config: one group of `config_groups` is supported")
        (group,) = groups.values()
        if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
            raise ConfigError("quantization_config: `config_groups` says nothing of weights")
        for key in ("sparsity_config", "transform_config", "kv_cache_scheme"):
            section = values.get(key)
            if section and not (isinstance(section, Mapping) and section.get("format") == "dense"):
                raise UnsupportedError(f"quantization_config: `{key}` is not supported")
        store = group.get("format") or Entries(values).text("format", "int-quantized")
        self.weights = Entries(group["weights"], "quantization_config.config_groups.weights")
        kind, self.bits = self.weights.text("type", "int"), self.weights.integer("num_bits", 8)
        strategy = self.weights.text("strategy", "tensor")
        self.symmetric = self.weights.flag("symmetric", True)
        self.packed = store == "pack-quantized"
        self.method = self._method(store, kind, strategy, group.get("input_activations"))
        self.per_output = strategy != "group"
        self.marker = ".weight_packed" if self.packed else ".weight_scale"
        self.ignored = Entries(values).names("ignore")
        self.targets = Entries(group).names("targets") or ("Linear",)

    def _method(self, store: str, kind: str, strategy: str, inputs: Any) -> str:
        rounds = isinstance(inputs, Mapping) and inputs.get("num_bits") == 8 and inputs.get("type", "int") == kind
        row_wise = strategy in ("channel", "tensor") and self.symmetric
        if store in _STORES and (inputs is None or rounds):
            if self.packed and (kind, self.bits) == ("int", 4) and not rounds and strategy in ("group", "channel"):
                return "int4"
            if (kind, self.bits) == ("int", 8) and row_wise:
                return "int8" if rounds else "int8-weight"
            if (kind, self.bits) == ("float", 8) and row_wise and rounds and not self.packed:
                return "fp8"
        activations = f"{inputs.get('type', 'int')} {inputs.get('num_bits')}" if isinstance(inputs, Mapping) else "none"
        raise UnsupportedError(
            f"quantization_config: weights {kind} {self.bits}, {strategy}, "
            f"{'symmetric' if self.symmetric else 'asymmetric'}, activations {activations}, {store} are not supported"
        )

    def expects(self, layer: str, module: str) -> bool | None:
        if self.leaves_out(layer):
            return False
        if self.targets == ("Linear",):
            return super().expects(layer, module)
        return any(_matches(target, layer) for target in self.targets)

    def leaves_out(self, layer: str) -> bool:
        return any(_matches(pattern, layer) for pattern in self.ignored)

    def methods(self, module: str) -> tuple[str, ...]:
        return (self.method,)

    def parts(self, layer: str, module: str, shape: tuple[int, int]) -> dict[str, Part]:
        rows, columns = shape
        per_output = ((rows, 1), (rows,), (1,), ())
        parts = {
            # Of inputs; what is not used is known at least.
            ".input_scale": Part(((1,), ()), HALVES, optional=True),
            ".input_zero_point": Part(((1,), ()), (torch.int8,), optional=True),
        }
        if not self.packed:
            codes = torch.float8_e4m3fn if self.method == "fp8" else torch.int8
            zeros = (codes, torch.int8, torch.int32)
            return parts | {
                ".weight": Part((shape,), (codes,)),
                ".weight_scale": Part(per_output, HALVES),
                ".weight_zero_point": Part(per_output, zeros, optional=True),
            }
        words = -(-columns * self.bits // 32)
        parts[".weight_packed"] = Part(((rows, words),), (torch.int32,))
        parts[".weight_shape"] = Part(((2,),), (torch.int64, torch.int32))
        parts[".weight_g_idx"] = Part(((columns,),), (torch.int32, torch.int64), optional=True)
        if self.method != "int4":
            return parts | {".weight_scale": Part(per_output, HALVES)}
        groups = 1 if self.per_output else columns // group_size_of(self.weights, layer, columns)
        parts[".weight_scale"] = Part(((rows, groups),), HALVES)
        zeros_shape = (-(-rows // WORD), groups)
        parts[".weight_zero_point"] = Part((zeros_shape,), (torch.int32,), optional=self.symmetric)
        return parts

    def read(
        self, layer: str, method: str, shape: tuple[int, int], tensors: Mapping[str, Tensor]
    ) -> QuantizedWeight | Tensor:
        rows, columns = shape
        scales = scales_of(f"{layer}.weight_scale", tensors[".weight_scale"])
        stated = tensors.get(".weight_shape")
        if stated is not None and tuple(stated.tolist()) != shape:
            raise CheckpointError(f"{layer}.weight_shape: says {stated.tolist()}, the config {list(shape)}")
        zeros = tensors.get(".weight_zero_point")
        if method == "int4":
            q = nibbles(tensors[".weight_packed"])[:, :columns]
            zeros = None if zeros is None else nibbles(zeros.t())[:, :rows].t()
            groups = tensors.get(".weight_g_idx")
            if groups is not None and bool((groups == -1).all()):  # never filled in: there is no order
                groups = None
            return grouped(layer, q, scales, zeros, groups)
        if zeros is not None and zeros.float().any():
            raise CheckpointError(f"{layer}.weight_zero_point: is not zero, and quantization_config says symmetric")
        if self.packed:
            # Little-endian words: their bytes in the order of the inputs.
            codes = (tensors[".weight_packed"].contiguous().view(torch.uint8)[:, :columns] ^ 128).view(torch.int8)
        else:
            codes = tensors[".weight"]
        return WEIGHTS[method](codes, scales.flatten().expand(rows))

    def describe(self) -> str:
        return f"compressed-tensors {self.method}"


def _matches(pattern: str, layer: str) -> bool:
    """An entry of `ignore` or `targets`: a layer's name, or "re:" and a regular expression for its beginning."""
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), layer) is not None
    return pattern == layer
