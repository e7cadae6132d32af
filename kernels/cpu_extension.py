"""The optional C++ extension `vitrail._cpu` (csrc/cpu): loaded once, with types, and the reason where it is missing."""

from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:  # tiles are made without torch
    from torch import Tensor

# Addresses of keys and values, and their block size and strides of blocks, tokens and heads, in elements.
CacheArguments = tuple[int, int, int, int, int, int]


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
    The operations on tokens (csrc/cpu/token_ops.h) take addresses, 0 for None, of float32 or bfloat16; what they name
    is the caller's to check.
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

    def rms_norm(
        self,
        bfloat16: bool,
        rows: int,
        hidden: int,
        x_stride: int,
        x: int,
        branch: int,
        scale: int,
        weight: int,
        total: int,
        out: int,
        eps: float,
        threads: int,
        isa: str,
    ) -> None: ...

    def rope_and_cache(
        self,
        bfloat16: bool,
        tokens: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        qkv: int,
        cos: int,
        sin: int,
        q_weight: int,
        k_weight: int,
        eps: float,
        slots: int,
        q: int,
        cache: CacheArguments,
        threads: int,
        isa: str,
    ) -> None: ...

    def paged_decode(
        self,
        bfloat16: bool,
        sequences: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        q: int,
        tables: int,
        table_width: int,
        contexts: int,
        out: int,
        cache: CacheArguments,
        threads: int,
        isa: str,
    ) -> None: ...


def _load() -> tuple[CpuExtension | None, str]:
    try:
        return cast(CpuExtension, import_module(".._cpu", __package__)), ""
    except ModuleNotFoundError:
        return None, "it was not built, for want of a C++ compiler or of pybind11 when vitrail was installed"
    except ImportError as error:
        return None, f"it does not load: {error}"


extension, missing_because = _load()


def cache_arguments(k_cache: "Tensor", v_cache: "Tensor") -> CacheArguments:
    """What the extension takes of caches (num_blocks, block_size, kv_heads, d) of the same strides."""
    block_stride, token_stride, head_stride, _ = k_cache.stride()
    return k_cache.data_ptr(), v_cache.data_ptr(), k_cache.shape[1], block_stride, token_stride, head_stride


def address(tensor: "Tensor | None") -> int:
    """Where a tensor lies, 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()
