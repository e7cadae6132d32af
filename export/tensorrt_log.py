"""The verbose log of a build: kept whole in a file, and read for what became of the network's types.

TensorRT ends a verbose build with a line for each layer of the engine, with types and sizes of what goes in. That is
the only place to see, without a GPU, whether a product that the network has in int8 runs in int8.
"""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

# As TensorRT names types in that listing, and as the network definition does.
TYPES = {"Float": "FLOAT", "Half": "HALF", "BFloat16": "BF16", "Int8": "INT8", "Int4": "INT4", "FP8": "FP8"}
FLOATS = ("BF16", "HALF", "FLOAT")
_OPERAND = re.compile(r"Dimensions: \[([-\d,]*)\][^{}]*?Datatype: (\w+)")
# On a machine without a driver these come beside whatever else is wrong, and say nothing of the network.
_NO_DRIVER = "cudaError 35"


class BuildLog:
    """Lines of a build. Every one goes to the file; errors and layers are kept. Close it, or use it as a context."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.errors: list[str] = []
        self.weights: Counter[str] = Counter()  # elements of the constant matrices of layers, by type
        self._file = path.open("w", encoding="utf-8")

    def write(self, severity: str, message: str) -> None:
        if not self._file.closed:
            try:
                self._file.write(f"{severity}: {message}\n")
            except OSError as error:  # raised in the middle of a callback it would end the process
                self.errors.append(f"{self.path}: {error.strerror}")
        if severity in ("ERROR", "INTERNAL_ERROR") and _NO_DRIVER not in message:
            self.errors.append(message)
        for line in message.splitlines():
            if line.startswith("Name: ") and ", LayerType: " in line:
                self.weights.update(matrices(line))

    def __enter__(self) -> "BuildLog":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def matrices(line: str) -> Counter[str]:
    """Elements by type of the constant matrices that a layer multiplies by, none for layers that do not."""
    _, _, constants = line.partition("Constants: [")
    constants, _, _ = constants.partition("], Outputs: [")
    found: Counter[str] = Counter()
    for dimensions, kind in _OPERAND.findall(constants):
        sizes = [int(size) for size in dimensions.split(",") if size and int(size) > 1]
        if len(sizes) == 2:
            found[TYPES.get(kind, kind.upper())] += sizes[0] * sizes[1]
    return found


def fallbacks(network: Mapping[str, int], engine: Mapping[str, int], profiles: int) -> tuple[str, ...]:
    """Where weights of the network's quantised types are wider in the engine. Both: elements by type.

    The engine has the layers of each of its profiles.
    """
    if not engine:
        return ()
    return tuple(
        f"{kind}: {elements} weights of products in the network, {engine.get(kind, 0) // profiles} in the engine"
        for kind, elements in network.items()
        if kind not in FLOATS and engine.get(kind, 0) < profiles * elements
    )
