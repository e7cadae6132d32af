"""A 16-bit graph computed in fp32: what it says can be checked where no processor has its types."""

from pathlib import Path

import numpy as np
import onnx_ir as ir

_HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def in_float32(source: Path, target: Path) -> None:
    """Write the graph of `source` to `target` with fp32 in place of fp16 and bf16, weights as they were rounded."""
    model = ir.load(source)
    graph = model.graph
    for value in graph.initializers.values():
        if value.const_value is not None and value.dtype in _HALVES:
            value.const_value = ir.tensor(value.const_value.numpy().astype(np.float32), name=value.name)
    for value in (*graph.inputs, *graph.initializers.values(), *(o for node in graph for o in node.outputs)):
        if value.dtype in _HALVES:
            value.dtype = ir.DataType.FLOAT
    for node in graph:
        for name, attribute in list(node.attributes.items()):
            if attribute.type == ir.AttributeType.INT and name == "to" and attribute.as_int() in _HALVES:
                node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.FLOAT))
            elif attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype in _HALVES:
                numbers = attribute.as_tensor().numpy().astype(np.float32)
                node.attributes[name] = ir.AttrTensor(name, ir.tensor(numbers))
    ir.save(model, target, external_data=f"{target.name}.data")
