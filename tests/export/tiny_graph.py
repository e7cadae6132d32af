"""A vision part of two matrix products as `vitrail export onnx` would write it: it takes TensorRT a second to build."""

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from vitrail.runtime.backends.manifest import (
    MANIFEST,
    Manifest,
    Parameters,
    Part,
    TensorSpec,
    file_sha256,
    read_manifest,
)

SIDE, TOKENS = 4, 4
TYPES = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16, "float32": TensorProto.FLOAT}
OPSET = 21


def write_tiny(
    folder: Path,
    dtype: str = "float16",
    quantization: str | None = None,
    *,
    hidden: int = 64,
    operator: str | None = None,
    module: dict[str, str] | None = None,
) -> Manifest:
    """tiles (n, 4, 4, 3) uint8 -> float -> W1 (48, hidden) -> Relu -> W2 (hidden, 64) -> (n, 4, 16).

    operator: put between the products, of one input and output. module: metadata of that node.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kind, random = TYPES[dtype], np.random.default_rng(0)
    initializers = [
        numpy_helper.from_array(np.array([0, 48]), "flat"),
        numpy_helper.from_array(np.array([0, TOKENS, 16]), "tokens"),
    ]
    nodes = [helper.make_node("Cast", ["tiles"], ["pixels"], name="cast", to=kind)]
    nodes.append(helper.make_node("Reshape", ["pixels", "flat"], ["x"], name="flatten"))
    x = "x"
    for index, shape in enumerate(((48, hidden), (hidden, 64)), start=1):
        weight = random.standard_normal(shape, dtype=np.float32) / 10
        product, operands = _product(index, x, weight, kind, quantization)
        initializers += operands
        nodes += product
        x = f"product{index}"
        if index == 1:
            nodes.append(helper.make_node("Relu", [x], ["relu"], name="relu"))
            x = "relu"
            if operator is not None:
                node = helper.make_node(operator, [x], ["odd"], name="node_odd", domain="")
                node.metadata_props.extend(
                    onnx.StringStringEntryProto(key=key, value=value) for key, value in (module or {}).items()
                )
                nodes.append(node)
                x = "odd"
    nodes.append(helper.make_node("Reshape", [x, "tokens"], ["visual_tokens"], name="shape"))
    graph = helper.make_graph(
        nodes,
        "vision",
        [helper.make_tensor_value_info("tiles", TensorProto.UINT8, ("tiles", SIDE, SIDE, 3))],
        [helper.make_tensor_value_info("visual_tokens", kind, ("tiles", TOKENS, 16))],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    onnx.save(model, folder / "vision.onnx", save_as_external_data=True, location="vision.data", size_threshold=0)
    return _write_manifest(folder, dtype, quantization)


def _product(
    index: int, x: str, weight: npt.NDArray[np.float32], kind: int, quantization: str | None
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    name, out = f"w{index}", f"product{index}"
    if quantization is None:
        return [helper.make_node("MatMul", [x, name], [out], name=out)], [_tensor(name, kind, weight)]
    if quantization == "int8":
        scale = np.abs(weight).max(0) / 127
        codes = np.rint(weight / scale).astype(np.int8)
        operands = [
            numpy_helper.from_array(codes, name),
            _tensor(f"{name}_scale", kind, scale),
            _tensor(f"x{index}_scale", kind, np.array(0.5)),
            numpy_helper.from_array(np.array(0, np.int8), f"x{index}_zero"),
        ]
        scales = [f"x{index}_scale", f"x{index}_zero"]
        return [
            helper.make_node("QuantizeLinear", [x, *scales], [f"q{index}"], name=f"quantize{index}"),
            helper.make_node("DequantizeLinear", [f"q{index}", *scales], [f"d{index}"], name=f"dequantize{index}"),
            helper.make_node(
                "DequantizeLinear", [name, f"{name}_scale"], [f"{name}_d"], name=f"weights{index}", axis=1
            ),
            helper.make_node("MatMul", [f"d{index}", f"{name}_d"], [out], name=out),
        ], operands
    # "int4" is symmetric; "uint4" has zero points, here all 8, and so the same weights.
    block, asymmetric = 16, quantization == "uint4"
    grouped = weight.reshape(-1, block, weight.shape[1])
    scale = np.abs(grouped).max(1) / 7
    codes = np.rint(grouped / scale[:, None]).astype(np.int8).reshape(-1)
    codes = codes + 8 if asymmetric else codes
    packed = ((codes[0::2] & 15) | (codes[1::2] & 15) << 4).astype(np.uint8)
    operands = [
        helper.make_tensor(
            name, TensorProto.UINT4 if asymmetric else TensorProto.INT4, weight.shape, packed.tobytes(), raw=True
        ),
        _tensor(f"{name}_scale", kind, scale),
    ]
    if asymmetric:
        zeros = bytes([0x88]) * (scale.size // 2)
        operands.append(helper.make_tensor(f"{name}_zero", TensorProto.UINT4, scale.shape, zeros, raw=True))
    weights = helper.make_node(
        "DequantizeLinear",
        [operand.name for operand in operands],
        [f"{name}_d"],
        name=f"weights{index}",
        axis=0,
        block_size=block,
    )
    return [weights, helper.make_node("MatMul", [x, f"{name}_d"], [out], name=out)], operands


def _tensor(name: str, kind: int, values: npt.NDArray[np.floating]) -> onnx.TensorProto:
    return helper.make_tensor(name, kind, values.shape, values.astype(np.float32).flatten().tolist())


def _write_manifest(folder: Path, dtype: str, quantization: str | None) -> Manifest:
    part = Part(
        name="vision",
        file="vision.onnx",
        data="vision.data",
        dtype=dtype,
        quantization=quantization,
        opset=OPSET,
        inputs=(TensorSpec("tiles", "uint8", ("tiles", SIDE, SIDE, 3)),),
        outputs=(TensorSpec("visual_tokens", dtype, ("tiles", TOKENS, 16)),),
        limits={"tiles": 40},
        parameters=Parameters(2, ""),
    )
    files = {name: file_sha256(folder / name) for name in (part.file, part.data)}
    manifest = Manifest(folder, "tiny", {}, {}, {}, {}, {"vision": part}, files, {"onnx": onnx.__version__})
    (folder / MANIFEST).write_text(json.dumps(manifest.to_json()), encoding="utf-8")
    return read_manifest(folder)
