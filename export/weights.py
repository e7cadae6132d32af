"""Values for a traced graph: plain weights in its dtype, quantised ones as codes with DequantizeLinear behind them."""

import onnx_ir as ir
import torch
from torch import Tensor
from tqdm import tqdm

from ..runtime.config import InternVLConfig, ModelConfig
from ..runtime.errors import UnsupportedError
from ..runtime.models.intern_vit import Embeddings
from ..runtime.quantization.methods import quantize_weight
from ..runtime.quantization.weight import QuantizedWeight
from .checkpoint import Checkpoint
from .rounding import INPUT_SCALE, Quantization
from .trace import MODULE, Traced
from .writer import WeightFile

POSITIONS = "vision_model.embeddings.position_embedding"


def add_weights(
    traced: Traced,
    checkpoint: Checkpoint,
    file: WeightFile,
    dtype: torch.dtype,
    quantization: Quantization,
    progress: bool | None = None,
) -> str | None:
    """Write the values of a graph's parameters to `file`; returns the method of its quantised layers, if it has any.

    One parameter is in memory at a time. Quantised weights are of `METHODS`. Raises `UnsupportedError` for one that is
    not a factor of products alone.
    """
    graph = traced.model.graph
    methods = set()
    bar = tqdm(traced.parameters.items(), desc=traced.part.name, unit="weight", disable=_hidden(progress))
    for name, transposed in bar:
        value = graph.initializers[name]
        module = name.removesuffix(".weight")
        weight = checkpoint.parameter(name)
        if isinstance(weight, Tensor) and module in quantization.methods:
            method = quantization.methods[module]
            weight = quantize_weight(weight, method, group_size=quantization.group_size, name=name)
        if isinstance(weight, QuantizedWeight):
            methods.add(weight.method)
            _Dequantizer(traced, value, weight, file, dtype, quantization.activations.get(module)).insert(transposed)
            continue
        if name == POSITIONS:
            weight = _interpolated(weight, checkpoint.config)
        weight = weight.to(dtype)
        value.const_value = file.add(name, weight.t() if transposed else weight)
    return "+".join(sorted(methods)) or None


def _hidden(progress: bool | None) -> bool | None:
    """tqdm's `disable`; None is a bar on a terminal only."""
    return None if progress is None else not progress


def _interpolated(positions: Tensor, config: ModelConfig) -> Tensor:
    """Stored positions, (1, 1 + grid^2, hidden), as the model has them for tiles of its size."""
    if not isinstance(config, InternVLConfig) or config.tile_size == config.vision.image_size:
        return positions
    side = config.tile_size // config.vision.patch_size
    with torch.device("meta"):
        embeddings = Embeddings(config.vision)
    embeddings.position_embedding = torch.nn.Parameter(positions, requires_grad=False)
    return embeddings.positions(side, side)[None]


class _Dequantizer:
    """Codes and scales in place of one weight, and rounded inputs before the products that read it."""

    def __init__(
        self,
        traced: Traced,
        value: ir.Value,
        weight: QuantizedWeight,
        file: WeightFile,
        dtype: torch.dtype,
        largest_input: float | None,
    ) -> None:
        self.graph, self.value, self.weight, self.file, self.dtype = traced.model.graph, value, weight, file, dtype
        assert value.name is not None
        self.name = value.name
        self.largest_input = largest_input

    def insert(self, transposed: bool) -> None:
        readers = [node for node, index in self.value.uses() if index == 1 and node.op_type in ("MatMul", "Gemm")]
        for node, _ in self.value.uses():
            if node not in readers:
                raise UnsupportedError(f"{self.name}: {node.op_type} reads a quantised weight")
        weight = self._dequantized(transposed)
        self.graph.insert_before(readers[0], weight)
        for node in readers:
            self._round_inputs(node)
        del self.graph.initializers[self.name]
        self.value.replace_all_uses_with(weight.outputs[0])

    def _dequantized(self, transposed: bool) -> ir.Node:
        """A DequantizeLinear whose output is laid out as the parameter was to be."""
        codes, scales, zeros = self.weight.canonical()
        if self.weight.method == "int4":
            group = self.weight.in_features // scales.shape[1]
            nibbles = torch.stack((codes & 15, codes >> 4), dim=2).flatten(1)  # [out, in]
            if transposed:
                nibbles, scales, zeros = nibbles.t(), scales.t(), None if zeros is None else zeros.t()
            signed = zeros is None
            kind = ir.DataType.INT4 if signed else ir.DataType.UINT4
            parts = [self._add("codes", _packed(nibbles ^ 8 if signed else nibbles), kind), self._add_scales(scales)]
            if zeros is not None:
                parts.append(self._add("zeros", _packed(zeros), kind))
            attributes = {"axis": 0 if transposed else 1, "block_size": group}
        else:
            codes = codes.t() if transposed else codes
            parts = [self._add("codes", codes), self._add_scales(scales)]
            parts.append(self._add("zeros", torch.zeros(len(scales), dtype=torch.int8)))
            attributes = {"axis": 1 if transposed else 0}
        return self._node("DequantizeLinear", parts, attributes, "dequantized", self.value.shape)

    def _round_inputs(self, node: ir.Node) -> None:
        """Inputs in the order and by the scales that the weight wants, in int8 where its method multiplies that."""
        steps: list[tuple[str, list[ir.Value], dict[str, int]]] = []
        if self.weight.order is not None:
            steps.append(("Gather", [self._add("order", self.weight.order)], {"axis": -1}))
        if self.weight.input_scales is not None:
            steps.append(("Div", [self._add("input_scales", self.weight.input_scales.to(self.dtype))], {}))
        if self.weight.method == "int8":
            if self.largest_input is None:
                raise UnsupportedError(f"{self.name}: int8 needs calibration prompts, to know how large its inputs are")
            scale = self._add(INPUT_SCALE[1:], torch.tensor(self.largest_input / 127, dtype=self.dtype))
            rounding = [scale, self._add("input_zero", torch.zeros((), dtype=torch.int8))]
            steps += [("QuantizeLinear", rounding, {}), ("DequantizeLinear", rounding, {})]
        x = node.inputs[0]
        assert x is not None
        for operation, inputs, attributes in steps:
            made = self._node(operation, [x, *inputs], attributes, f"input.{operation}", x.shape)
            self.graph.insert_before(node, made)
            x = made.outputs[0]
        node.replace_input_with(0, x)

    def _node(
        self, operation: str, inputs: list[ir.Value], attributes: dict[str, int], suffix: str, shape: ir.Shape | None
    ) -> ir.Node:
        name = f"{self.name}.{suffix}"
        node = ir.node(operation, inputs, attributes=attributes, name=name)
        node.metadata_props[MODULE] = self.name.removesuffix(".weight")
        output = node.outputs[0]
        output.name, output.shape = name, shape
        output.type = ir.TensorType(ir.DataType.INT8) if operation == "QuantizeLinear" else self.value.type
        return node

    def _add_scales(self, scales: Tensor) -> ir.Value:
        return self._add("scales", scales.to(self.dtype))

    def _add(self, suffix: str, tensor: Tensor, kind: ir.DataType | None = None) -> ir.Value:
        """An initialiser beside the weight."""
        name = f"{self.name}.{suffix}"
        stored = self.file.add(name, tensor, kind)
        value = ir.Value(name=name, const_value=stored, shape=stored.shape, type=ir.TensorType(stored.dtype))
        self.graph.register_initializer(value)
        return value


def _packed(nibbles: Tensor) -> Tensor:
    """Two 4-bit integers a byte, the first in the low half, as ONNX has them. nibbles: (rows, even columns) uint8."""
    nibbles = nibbles.contiguous()
    return nibbles[:, 0::2] | nibbles[:, 1::2] << 4
