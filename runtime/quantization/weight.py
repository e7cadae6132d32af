"""The quantised weight of a linear layer: what stands under the name `weight` in place of the parameter."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.packed_weight import PackedWeight
from ...kernels.quantize import QuantizedRows
from ...kernels.swiglu import swiglu


class QuantizedWeight(nn.Module, ABC):
    """The weight (out, in) = value(codes, scales, zeros) / input_scales, its columns in `order`.

    Its buffers are the canonical form, which checkpoints hold and whose rows are those of the weight, so that the
    weights of several projections make that of a joint one. `pack` turns them into the layout of the device.
    Until then it multiplies by the dequantised weight.

    codes, scales, zeros: as the method says. order: (in,) int64 or None: column j of the codes belongs to input
    order[j]. input_scales: (in,) fp32 or None for 1: by them the inputs are divided, column for column of the codes.
    """

    method: ClassVar[str]
    codes_per_byte: ClassVar[int] = 1
    capturable: ClassVar[bool] = True  # whether its products may be part of a CUDA graph
    codes: Tensor | None
    scales: Tensor | None
    zeros: Tensor | None
    input_scales: Tensor | None
    order: Tensor | None

    def __init__(
        self,
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor | None = None,
        *,
        input_scales: Tensor | None = None,
        order: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("codes", codes.contiguous())
        self.register_buffer("scales", scales.contiguous())
        self.register_buffer("zeros", None if zeros is None else zeros.contiguous())
        self.register_buffer("input_scales", input_scales)
        self.register_buffer("order", order)
        self.out_features, self.in_features = codes.shape[0], codes.shape[1] * self.codes_per_byte
        self._packed: PackedWeight | None = None

    # --- what a method says ---

    @abstractmethod
    def _value(self, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        """(out, in) fp32."""

    @abstractmethod
    def _pack(self, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> PackedWeight:
        """The layout of the kernel of the device."""

    # --- what a layer calls ---

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def is_packed(self) -> bool:
        return self._packed is not None

    @property
    def rows_dtype(self) -> torch.dtype | None:
        """The codes that inputs may come in, once packed, as QuantizedRows; None if they have to be numbers."""
        return None if self._packed is None or self.order is not None else self._packed.rows_dtype

    def pack(self) -> None:
        """Go over to the device's layout; codes, scales and zeros are dropped."""
        if self._packed is None:
            self._packed = self._pack(*self.canonical())
            self.codes = self.scales = self.zeros = None

    def linear(self, x: Tensor | QuantizedRows, bias: Tensor | None) -> Tensor:
        """x: (..., in), or rows of `rows_dtype`, without scales if there are `input_scales`. Returns (..., out)."""
        if self._packed is not None:
            return self._packed.linear(self._divided(x), bias)
        if isinstance(x, QuantizedRows):
            raise ValueError("linear: a weight takes rows only when it is packed")
        return F.linear(x, self.dequantize().to(x.dtype), bias)

    def linear_gelu(
        self, x: Tensor | QuantizedRows, bias: Tensor, next_scales: Tensor | None = None
    ) -> Tensor | QuantizedRows:
        """GELU(x W^T + b), erf form; rows without scales for the weight whose `input_scales` are given."""
        if self._packed is not None:
            return self._packed.linear_gelu(self._divided(x), bias, next_scales)
        return F.gelu(self.linear(x, bias))

    def linear_swiglu(self, x: Tensor | QuantizedRows) -> Tensor:
        """SiLU(x Wg^T) * (x Wu^T) of a weight with the rows of Wg first."""
        if self._packed is not None:
            return self._packed.linear_swiglu(self._divided(x))
        return swiglu(self.linear(x, None))

    def dequantize(self) -> Tensor:
        """(out, in) fp32: the weight as it multiplies inputs."""
        value = self._value(*self.canonical()) if self._packed is None else self._packed.dequantize()
        if self.input_scales is not None:
            value = value / self.input_scales
        if self.order is None:
            return value
        out = torch.empty_like(value)
        out[:, self.order] = value
        return out

    def _divided(self, x: Tensor | QuantizedRows) -> Tensor | QuantizedRows:
        if isinstance(x, QuantizedRows):
            return x
        if self.order is not None:
            x = x[..., self.order]
        return x if self.input_scales is None else (x / self.input_scales).to(x.dtype)

    # --- its canonical form ---

    def canonical(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """codes, scales, zeros."""
        if self.codes is None or self.scales is None:
            raise RuntimeError("a packed weight has no canonical form any more")
        return self.codes, self.scales, self.zeros

    def rows(self, index: slice | Tensor) -> Self:
        """The weight of some of the outputs."""
        codes, scales, zeros = self.canonical()
        kept = (codes[index], scales[index], None if zeros is None else zeros[index])
        return type(self)(*kept, input_scales=self.input_scales, order=self.order)

    def columns(self, inputs: range) -> Self:
        """The weight of a stretch of the inputs. Raises `ValueError` where that would tear a group of them apart.

        Scales stay those of the whole, so that the shares of several ranks add up to it. With an `order`, groups are
        of inputs from anywhere, and each must lie within the stretch or outside.
        """
        codes, scales, zeros = self.canonical()
        size = self.in_features // scales.shape[1] if scales.dim() == 2 else 1
        places = torch.arange(self.in_features, device=codes.device) if self.order is None else self.order
        within = ((places >= inputs.start) & (places < inputs.stop)).unflatten(0, (-1, size))
        kept = within.all(1)
        if not torch.equal(kept, within.any(1)):
            ordered = "" if self.order is None else ", ordered as they matter (act-order),"
            raise ValueError(
                f"groups of {size} of its {self.in_features} inputs{ordered} "
                f"cannot be cut into stretches of {len(inputs)}"
            )

        def cut_inputs(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.unflatten(0, within.shape)[kept].flatten()

        order = cut_inputs(self.order)
        return type(self)(
            codes.unflatten(1, (len(kept), -1))[:, kept].flatten(1),
            scales[:, kept] if scales.dim() == 2 else scales,
            None if zeros is None else zeros[:, kept],
            input_scales=cut_inputs(self.input_scales),
            order=None if order is None else order - inputs.start,
        )

    def joins(self, other: "QuantizedWeight | Tensor") -> bool:
        """Whether one weight can hold the rows of both."""
        return (
            type(other) is type(self)
            and other.canonical()[1].shape[1:] == self.canonical()[1].shape[1:]
            and _same(other.order, self.order)
            and _same(other.input_scales, self.input_scales)
        )

    def extra_repr(self) -> str:
        return f"{self.method}, out_features={self.out_features}, in_features={self.in_features}"


def concatenate(pieces: Sequence[QuantizedWeight | Tensor]) -> QuantizedWeight | Tensor:
    """One weight of the rows of all pieces, (out, in) each.

    Pieces stay quantised where one weight can hold them: of one method and group size, with one order and scales of
    their inputs (GPTQ with act-order may give each projection an order of its own). Else all of them are dequantised.
    """
    first = pieces[0]
    if len(pieces) == 1:
        return first
    weights = [piece for piece in pieces if isinstance(piece, QuantizedWeight)]
    if not isinstance(first, QuantizedWeight) or not all(map(first.joins, pieces)):
        return torch.cat([p.dequantize() if isinstance(p, QuantizedWeight) else p.float() for p in pieces])
    codes, scales, zeros = zip(*(weight.canonical() for weight in weights), strict=True)
    joined = None
    if any(zero is not None for zero in zeros):  # where some are symmetric and some not
        joined = torch.cat(
            [torch.full_like(s, 8, dtype=torch.uint8) if z is None else z for s, z in zip(scales, zeros, strict=True)]
        )
    return type(first)(torch.cat(codes), torch.cat(scales), joined, input_scales=first.input_scales, order=first.order)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))
