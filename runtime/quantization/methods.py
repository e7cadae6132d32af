"""Round a weight to nearest by any method, and what each method needs of weight and device."""

import torch
from torch import Tensor

from ...kernels.int4_decode import LEAST_GROUP, STEP, supports
from ..errors import CheckpointError, ConfigError, UnsupportedError
from . import bitsandbytes
from .bitsandbytes import BnbInt8Weight, Nf4Weight, round_nf4
from .fp8 import Fp8Weight, round_fp8
from .int4 import Int4Weight, round_int4
from .int8 import Int8OnlyWeight, Int8Weight, round_int8
from .weight import QuantizedWeight

WEIGHTS: dict[str, type[QuantizedWeight]] = {
    weight.method: weight for weight in (Int8Weight, Int8OnlyWeight, Int4Weight, Fp8Weight, Nf4Weight, BnbInt8Weight)
}


def quantize_weight(
    weight: Tensor,
    method: str,
    *,
    group_size: int = 128,
    symmetric: bool = True,
    input_scales: Tensor | None = None,
    name: str = "weight",
) -> QuantizedWeight:
    """The values of `method` nearest to a weight (out, in) of any float type, in canonical form on its device.

    group_size, symmetric: of int4. input_scales: (in,), by which inputs will be divided and columns are multiplied
    first. name: for errors: `CheckpointError` for a weight that is not finite or all zeros, `ConfigError` for a group
    size that does not divide its inputs. A single row of zeros is exact.
    """
    check_inputs(method, weight.shape[1], group_size, name)
    values = weight.detach().float()
    if input_scales is not None:
        input_scales = input_scales.to(values.device, torch.float32)
        values = values * input_scales
    largest = values.abs().amax() if values.numel() else torch.zeros(())
    if not torch.isfinite(largest):
        raise CheckpointError(f"{name}: holds values that are not finite, and cannot be quantised")
    if largest == 0:
        raise CheckpointError(f"{name}: holds nothing but zeros, and cannot be quantised")
    zeros = None
    if method == "int4":
        codes, scales, zeros = round_int4(values, group_size, symmetric)
    else:
        codes, scales = {"fp8": round_fp8, "nf4": round_nf4}.get(method, round_int8)(values)
    return WEIGHTS[method](codes, scales, zeros, input_scales=input_scales)


def check_inputs(method: str, in_features: int, group_size: int, name: str, device: torch.device | None = None) -> None:
    """Raises where a method's groups do not divide the inputs of a weight, or are such that the device cannot run."""
    size = {"int4": group_size, "nf4": bitsandbytes.BLOCK}.get(method, 1)
    if in_features % size:
        fitting = [str(group) for group in (128, 64, 32, 16, 8) if in_features % group == 0]
        hint = f"; group_size={fitting[0]} would" if method == "int4" and fitting else ""
        raise ConfigError(f"{name}: groups of {size} do not divide its {in_features} inputs{hint}")
    on_gpu = device is not None and device.type == "cuda"
    if on_gpu and method in ("int4", "int8-weight") and not supports(in_features, size if size > 1 else in_features):
        raise UnsupportedError(
            f"{name}: {method} on a GPU needs inputs in multiples of {STEP} and groups of {LEAST_GROUP}; "
            f"it has {in_features} inputs" + (f" in groups of {size}" if method == "int4" else "")
        )


def check_device(method: str, device: torch.device) -> None:
    """Raises `UnsupportedError` where the device, or the installation, cannot run a method."""
    if method in ("nf4", "bnb-int8"):
        bitsandbytes.library()
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        least = (9, 0) if method == "fp8" else (8, 0)
        if capability < least:
            raise UnsupportedError(
                f"{method} needs a GPU of compute capability {least[0]}.{least[1]}; "
                f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}"
            )
