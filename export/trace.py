"""From a part to its ONNX graph, without a byte of its weights.

Parameters are fake tensors, shapes without memory. What PyTorch's exporter makes of them are initialisers without
values, under the names of the parameters; `weights.py` gives them values one by one.
"""

import ast
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnxscript.optimizer import fold_constants_ir
from onnxscript.rewriter import rewrite
from onnxscript.rewriter.rules import common as rules
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from ..runtime.errors import UnsupportedError
from .parts import PREFIX, Export
from .translations import TABLE

# Blockwise DequantizeLinear and 4-bit integers begin here, and every runtime of the last two years reads it.
OPSET = 21
MODULE = "vitrail.module"  # key of a node's note
# What the exporter leaves to be simplified. Of onnxscript's default rules, one walks through the whole graph at every
# node of it: minutes for a deep model.
_RULES = (
    *rules.mul_by_1_rule.commute(),
    rules.collapse_slice_rule,
    rules.collapse_slice2_rule,
    rules.materialize_reshape_shape_rule,
    rules.cast_cast_rule,
    rules.no_op_cast_rule,
    rules.no_op_expand_rule,
    rules.reshape_reshape_rule,
    rules.squeeze_reshape_1d_rule,
    rules.no_op_transpose_rule,
    rules.transpose_transpose_rule,
    rules.unsqueeze_unsqueeze_rule,
)


@dataclass(frozen=True)
class Traced:
    """A part, its graph, and the parameters that the graph awaits: name -> whether it is to be stored transposed."""

    part: Export
    model: ir.Model
    parameters: dict[str, bool]


def trace(build: Callable[[FakeTensorMode], Export]) -> Traced:
    """Trace the part that `build` makes of tensors without memory.

    Raises `UnsupportedError` naming an operation that ONNX has no form of and the module that made it.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    # Not in a caller's inference mode: there launchers hand CPU tensors to C++, by their addresses.
    with torch.inference_mode(False), torch.no_grad(), _quiet():
        part = build(fake)
        with fake:
            args = _examples(part)
            shapes = pytree.tree_unflatten(_dynamic_shapes(part), pytree.tree_structure(args))
            program = torch.export.export(part.module, args, dynamic_shapes=shapes, strict=False)
        try:
            translated = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                custom_translation_table=TABLE,
                optimize=False,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise _unsupported(error, program, part) from None
        assert translated is not None
        model = translated.model
        names = _empty(model)
        _simplify(model)
    _name_interface(model, part)
    _drop_notes(model)
    _cast_bytes_first(model)
    # What the graph does not read has been removed from it.
    kept = [name for name in model.graph.initializers if name in names]
    return Traced(part, model, {name: _store_transposed(model, name) for name in kept})


def _examples(part: Export) -> tuple[Any, ...]:
    """Fake inputs, every named axis of a size of its own so that none is taken for another."""
    sizes: dict[str, int] = {}
    for spec in part.inputs:
        for axis in spec.shape:
            if isinstance(axis, str) and axis not in part.derived:
                sizes.setdefault(axis, 3 + 2 * len(sizes))
    sizes |= {"context": sizes.get("past", 0) + sizes.get("tokens", 0)}
    shapes = [[axis if isinstance(axis, int) else sizes[axis] for axis in spec.shape] for spec in part.inputs]
    tensors = [torch.zeros(s, dtype=getattr(torch, spec.dtype)) for s, spec in zip(shapes, part.inputs, strict=True)]
    if not part.nested:
        return tuple(tensors)
    return (*tensors[: -part.nested], tensors[-part.nested :])


def _dynamic_shapes(part: Export) -> list[dict[int, Any]]:
    dims: dict[str, Any] = {}

    def dim(axis: str) -> Any:
        if axis in part.derived:
            return torch.export.Dim.AUTO
        return dims.setdefault(axis, torch.export.Dim(axis, min=0))

    return [{i: dim(axis) for i, axis in enumerate(spec.shape) if isinstance(axis, str)} for spec in part.inputs]


def _empty(model: ir.Model) -> set[str]:
    """Take the values from initialisers that have none in memory, and the prefix from their names; returns these."""
    names = set()
    for name, value in list(model.graph.initializers.items()):
        if isinstance(getattr(value.const_value, "raw", None), FakeTensor):
            del model.graph.initializers[name]
            value.const_value = None
            value.name = name.removeprefix(PREFIX)
            model.graph.initializers[value.name] = value
            names.add(value.name)
    return names


def _simplify(model: ir.Model) -> None:
    """Fold constants and shapes, drop what does nothing, keep one of what is there twice."""
    common.InlinePass()(model)
    for _ in range(2):
        fold_constants_ir(model, onnx_shape_inference=True)
        rewrite(model, _RULES)
    for step in (
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.NameFixPass(),
    ):
        step(model)


def _name_interface(model: ir.Model, part: Export) -> None:
    """Names and axes of the inputs and outputs; the symbols that stand for axes within the graph become them."""
    axes: dict[str, str] = {}
    for value, spec in zip(model.graph.inputs, part.inputs, strict=True):
        assert value.shape is not None
        for symbol, axis in zip(value.shape, spec.shape, strict=True):
            if isinstance(axis, str) and re.fullmatch(r"\w+", str(symbol)):
                axes[str(symbol)] = axis
    for node in model.graph:
        for output in node.outputs:
            if output.shape is not None:
                output.shape = ir.Shape([_renamed(size, axes) for size in output.shape])
    for values, specs in ((model.graph.inputs, part.inputs), (model.graph.outputs, part.outputs)):
        for value, spec in zip(values, specs, strict=True):
            value.name = spec.name
            value.shape = ir.Shape(list(spec.shape))


def _renamed(size: Any, axes: dict[str, str]) -> int | str:
    if isinstance(size, int):
        return size
    text = re.sub(r"\bs\d+\b", lambda found: axes.get(found[0], found[0]), str(size))
    return "context" if text in ("past + tokens", "tokens + past") else text


def _cast_bytes_first(model: ir.Model) -> None:
    """Bytes become numbers as the first thing, not after they were moved: TensorRT moves no bytes."""
    for value in model.graph.inputs:
        if value.dtype != ir.DataType.UINT8:
            continue
        readers = value.uses()
        cast = ir.node("Cast", [value], attributes={"to": int(ir.DataType.FLOAT)}, name=f"{value.name}.cast")
        moved = cast.outputs[0]
        moved.name, moved.shape, moved.dtype = f"{value.name}.cast", value.shape, ir.DataType.FLOAT
        for node, index in readers:
            node.replace_input_with(index, moved)
        model.graph.insert_before(next(iter(model.graph)), cast)
        pending = [node for node, _ in readers]
        while pending:
            node = pending.pop()
            output = node.outputs[0]
            if node.op_type in ("Reshape", "Transpose"):
                output.dtype = ir.DataType.FLOAT
                pending += [reader for reader, _ in output.uses()]
            elif node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.FLOAT:
                assert node.inputs[0] is not None
                output.replace_all_uses_with(node.inputs[0])
                model.graph.remove(node, safe=True)


def _store_transposed(model: ir.Model, name: str) -> bool:
    """Whether a matrix is only read transposed. Then it is to be stored so, as products take it."""
    value = model.graph.initializers[name]
    nodes = [node for node, _ in value.uses()]
    if value.shape is None or len(value.shape) != 2 or any(node.op_type != "Transpose" for node in nodes):
        return False
    value.shape = ir.Shape(list(value.shape)[::-1])
    for node in nodes:
        node.outputs[0].replace_all_uses_with(value)
        model.graph.remove(node, safe=True)
    return True


def _drop_notes(model: ir.Model) -> None:
    """What the exporter wrote down about the origin of nodes and values, paths of this machine among it.

    The module whose forward made a node is kept, for messages about that node.
    """
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.doc_string = model.graph.doc_string = None
    for node in model.graph:
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        node.metadata_props.clear()
        node.doc_string = None
        # The last is the operation; torch's own begin with an underscore.
        modules = [scope for scope in scopes[:-1] if scope and not scope.startswith("_")]
        if modules:
            node.metadata_props[MODULE] = str(modules[-1]).removeprefix(PREFIX)
    values = [
        *model.graph.inputs,
        *model.graph.initializers.values(),
        *(o for node in model.graph for o in node.outputs),
    ]
    for value in values:
        value.metadata_props.clear()


def _unsupported(error: Exception, program: Any, part: Export) -> UnsupportedError:
    """The operation that could not be translated, and the module whose forward called it."""
    text = " ".join(str(cause) for cause in _causes(error))
    found = re.search(r"op='([\w.]+)'", text) or re.search(r"target=torch\.ops\.([\w.]+?)(?:\.\w+)?\]", text)
    if found is None:
        return UnsupportedError(f"{part.name}: cannot be exported ({text.splitlines()[-1] if text else error})")
    operation, where = found[1].replace("::", "."), "an unknown module"
    for node in program.run_decompositions().graph.nodes:
        if str(node.target).startswith(operation):
            stack = list((node.meta.get("nn_module_stack") or {"": (part.name, "")}).values())
            where = str(stack[-1][0]).removeprefix(PREFIX) or part.name
            break
    return UnsupportedError(f"{part.name}: {operation}, which {where} computes with, has no form in ONNX")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter and its optimiser say about torchvision, and about initialisers without values."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir", "onnxscript")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
