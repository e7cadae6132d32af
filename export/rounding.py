"""What is to be quantised of a part, and how."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Quantization:
    """How weights become codes.

    methods: module path -> method, of the layers that a plain checkpoint's weights are rounded for. group_size: of
    int4. activations: module path -> largest magnitude of its inputs, for those whose inputs are rounded too.
    """

    methods: Mapping[str, str]
    group_size: int
    activations: Mapping[str, float]


# Methods whose codes ONNX has a type for that runtimes multiply by.
METHODS = ("int8", "int8-weight", "int4")
INPUT_SCALE = ".input_scale"  # behind a weight's name: the graph's scale of the layer's int8 inputs
