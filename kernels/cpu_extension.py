"""The optional C++ extension `vitrail._cpu` (csrc/cpu): loaded once, with types, and the reason where it is missing."""

from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt


class Weight(Protocol):
    """Packed weights of a linear layer; the layout is that of `kernels.cpu_weight.CpuWeight`."""

    def multiply(
        self,
        x: npt.NDArray[Any],
        bias: npt.NDArray[np.float32] | None,
        y: npt.NDArray[Any],
        *,
        threads: int,
        isa: str = "",
    ) -> None:
        """y = x W^T + bias. x: (rows, inputs), y: (rows, outputs), both float32 or both bfloat16 seen as uint16."""


class CpuExtension(Protocol):
    """What the extension offers. `isa` is one of `instruction_sets()`, or empty for the fastest.

    All arrays are contiguous, none is copied; the interpreter lock is released; a `ValueError` tells what does not fit.
    """

    def instruction_sets(self) -> list[str]:
        """What runs on this processor, slowest first; `portable` always does."""

    def fill_tiles(
        self,
        tiles: npt.NDArray[np.uint8],
        grids: Sequence[tuple[int, int, bool]],
        width: int,
        height: int,
        blocks: Iterable[npt.NDArray[np.uint8] | tuple[object, object]],
        *,
        threads: int,
        isa: str = "",
    ) -> None:
        """Resize an RGB image into grids of tiles with Pillow's antialiased bicubic, bit for bit.

        tiles: (n, size, size, 3); the whole image fills each of the grids (columns, rows, whether the height is resized
        before the width), one behind the other. blocks: the image from top to bottom, as arrays (rows, width, 3) or as
        what `Image.__arrow_c_array__` gives; each but the last holds a multiple of 16 rows.
        """

    def Weight(  # noqa: N802
        self,
        packed: npt.NDArray[np.uint8],
        scales: npt.NDArray[np.float32],
        zeros: npt.NDArray[np.uint8] | None,
        *,
        bits: int,
        outputs: int,
        inputs: int,
        group: int,
    ) -> Weight:
        """Keeps the arrays, which must not change."""


def _load() -> tuple[CpuExtension | None, str]:
    try:
        return cast(CpuExtension, import_module(".._cpu", __package__)), ""
    except ModuleNotFoundError:
        return None, "it was not built, for want of a C++ compiler or of pybind11 when vitrail was installed"
    except ImportError as error:
        return None, f"it does not load: {error}"


extension, missing_because = _load()
