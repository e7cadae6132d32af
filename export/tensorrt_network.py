"""From an ONNX graph to a strongly typed network: what is refused is named, and what it multiplies in is known."""

import ast
from collections import Counter
from pathlib import Path
from typing import Any

from ..runtime.backends.tensorrt_api import TensorRT
from ..runtime.errors import UnsupportedError
from .tensorrt_log import FLOATS, BuildLog

# precision -> the type that weights of products have in a network
PRODUCTS = {"bf16": "BF16", "fp16": "HALF", "fp32": "FLOAT", "int8": "INT8", "int4": "INT4", "fp8": "FP8"}
_PASSED = ("SHUFFLE", "CAST", "IDENTITY", "SLICE", "CONCATENATION")  # what may stand between weights and their product
_MODULE = "vitrail.module"


def parse(tensorrt: TensorRT, builder: Any, logger: Any, log: BuildLog, onnx: Path) -> Any:
    """The network of an ONNX file. Raises `UnsupportedError` naming a node that TensorRT refuses, and its module."""
    api = tensorrt.api
    # TensorRT 11 has no other kind, and takes the flag all the same.
    network = builder.create_network(1 << int(api.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = api.OnnxParser(network, logger)
    if parser.parse_from_file(str(onnx)):
        return network
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    named = next((error for error in errors if error.node_name() or error.node_operator()), None)
    if named is None:
        if _has_zero_points(onnx):
            raise UnsupportedError(
                f"{onnx.name}: its 4-bit weights have zero points, which {tensorrt.product} does not take; "
                "it takes symmetric ones, as `vitrail quantize` writes them without --asymmetric"
            )
        reason = _first_line(errors[0].desc() if errors else "; ".join(log.errors) or "no reason given")
        raise UnsupportedError(f"{onnx}: {tensorrt.product} {tensorrt.version} cannot read it: {reason}")
    module = module_of(onnx, named.node_name())
    where = f", which {module} computes with" if module else ""
    node = f"{named.node_operator()} (node {named.node_name()}){where}"
    if named.code() == api.ErrorCode.UNSUPPORTED_NODE:
        raise UnsupportedError(f"{onnx.name}: {tensorrt.product} {tensorrt.version} has no {node}")
    reason = _reason(named.desc())
    raise UnsupportedError(f"{onnx.name}: {tensorrt.product} {tensorrt.version} refuses {node}: {reason}")


def _has_zero_points(onnx_file: Path) -> bool:
    """Whether 4-bit weights are unsigned, which only asymmetric ones are."""
    import onnx

    weights = onnx.load(onnx_file, load_external_data=False).graph.initializer
    return any(weight.data_type == onnx.TensorProto.UINT4 for weight in weights)


def module_of(onnx_file: Path, node_name: str) -> str | None:
    """The module whose forward made a node of the graph, from the node's metadata."""
    import onnx

    graph = onnx.load(onnx_file, load_external_data=False).graph
    for node in graph.node:
        if node.name == node_name:
            notes = {entry.key: entry.value for entry in node.metadata_props}
            if _MODULE in notes:
                return notes[_MODULE]
            # What PyTorch's exporter itself writes: modules from the outermost on, and the operation last.
            scopes = ast.literal_eval(notes.get("pkg.torch.onnx.name_scopes", "[]"))
            return next((str(scope).removeprefix("model.") for scope in reversed(scopes[:-1]) if scope), None)
    return None


def product_weights(network: Any) -> Counter[str]:
    """Elements of the constant matrices that products of the network have, by the type they are stored in.

    Quantised weights reach a product through DequantizeLinear and what only moves them; the type is that before it.
    """
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    made_by = {layer.get_output(index).name: layer for layer in layers for index in range(layer.num_outputs)}
    found: Counter[str] = Counter()
    for layer in layers:
        if layer.type.name != "MATRIX_MULTIPLY":
            continue
        for index in range(2):
            constant = _constant(layer.get_input(index), made_by)
            if constant is not None:
                sizes = [size for size in constant.shape if size > 1]
                if len(sizes) == 2:
                    found[constant.dtype.name] += sizes[0] * sizes[1]
    return found


def _constant(tensor: Any, made_by: dict[str, Any]) -> Any:
    """The stored tensor behind an operand, None where it is computed."""
    while (layer := made_by.get(tensor.name)) is not None:
        if layer.type.name == "CONSTANT":
            return tensor
        if layer.type.name not in (*_PASSED, "DEQUANTIZE") or layer.num_inputs == 0:
            return None
        tensor = layer.get_input(0)
    return None


def check_precision(onnx: Path, products: Counter[str], precision: str | None) -> str:
    """The precision of a network, that which was asked for. Raises `UnsupportedError` where it has another.

    It is the type of the weights of its products, of the quantised ones where there are some.
    """
    kinds = {kind: name for name, kind in PRODUCTS.items()}
    quantised = [kind for kind in products if kind not in FLOATS]
    plain = [kind for kind in products if kind in FLOATS]
    found = kinds.get(max(quantised or plain, key=lambda kind: products[kind], default=""), "none")
    if precision is not None and precision != found:
        raise UnsupportedError(
            f"{onnx}: multiplies in {found}, not {precision}; a strongly typed network is as precise as its ONNX file, "
            f"so export one that is: vitrail export onnx ... {_OPTION[precision]}"
        )
    return found


_OPTION = {
    "bf16": "--dtype bfloat16",
    "fp16": "--dtype float16",
    "fp32": "--dtype float32",
    "int8": "--quantization int8",
    "int4": "--quantization int4",
    "fp8": "with fp8 Q/DQ, which vitrail does not write",
}


def _reason(text: str) -> str:
    """The line of the parser's that says why: the first repeats the name of the node."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines[1:] if "cudaError" not in line), lines[0] if lines else "no reason given")


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), text)
