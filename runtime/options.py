"""The options of `Runtime.from_pretrained`, read and checked."""

from collections.abc import Mapping
from typing import Any

import torch

from .errors import ConfigError, UnsupportedError

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def read_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The torch dtype of a name, or the dtype itself if it is one that models run in."""
    if isinstance(dtype, torch.dtype):
        dtype = str(dtype).removeprefix("torch.")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not known; known: {', '.join(_DTYPES)}")
    return _DTYPES[dtype]


def read_device(device: str | torch.device | None) -> torch.device:
    """The device of a name that is present; None is the best one."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError):
        raise ConfigError(f"device {device!r} is not known; use 'cpu', 'cuda' or 'cuda:1'") from None
    if chosen.type == "cuda" and not (torch.cuda.is_available() and (chosen.index or 0) < torch.cuda.device_count()):
        raise UnsupportedError(f"device {device}: {torch.cuda.device_count()} CUDA devices are visible")
    if chosen.type not in ("cpu", "cuda"):
        raise UnsupportedError(f"device {device}: only 'cpu' and 'cuda' are supported")
    return chosen


def at_least_one(name: str, value: int) -> int:
    """`value`, a positive integer."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} must be a positive integer, not {value!r}")
    return value


def read_positive(name: str, value: float) -> float:
    """`value`, a number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ConfigError(f"{name} must be a positive number, not {value!r}")
    return value


def read_share(name: str, value: float) -> float:
    """`value`, a number above 0 and up to 1."""
    if read_positive(name, value) > 1:
        raise ConfigError(f"{name} must be at most 1, not {value!r}")
    return value


def read_image_limit(limits: Mapping[str, int] | None) -> int:
    """The most images a prompt may have, of `limit_mm_per_prompt`."""
    if limits is None:
        return 64
    if not isinstance(limits, Mapping) or not set(limits) <= {"image"}:
        raise ConfigError(f"limit_mm_per_prompt must be like {{'image': 64}}, not {limits!r}")
    return at_least_one("limit_mm_per_prompt['image']", limits.get("image", 64))


def refuse_unavailable(**options: tuple[Any, Any]) -> None:
    """Raise for the first option that is not at its default."""
    for name, (value, default) in options.items():
        if value != default:
            raise UnsupportedError(f"{name}={value!r} is not available yet; only {default!r} is")
