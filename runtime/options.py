"""The options of `Runtime.from_pretrained`, read and checked."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from .errors import ConfigError, UnsupportedError
from .media import MediaPolicy
from .quantization.config import QuantizationConfig
from .quantization.methods import check_device

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


def read_quantization(
    quantization: str | QuantizationConfig | None, vision_quantization: str | None, device: torch.device
) -> QuantizationConfig | None:
    """What is to be quantised while it is loaded, None for nothing. A whole QuantizationConfig stands for both."""
    if isinstance(quantization, QuantizationConfig):
        if vision_quantization is not None:
            raise ConfigError("vision_quantization goes with a method's name; a QuantizationConfig has both halves")
        config = quantization
    elif quantization is None and vision_quantization is None:
        return None
    else:
        config = QuantizationConfig(llm=quantization, vision=vision_quantization)
    for method in {config.llm, config.vision, *config.overrides.values()} - {None}:
        check_device(str(method), device)
    return config


def read_cache_dtype(kv_cache_dtype: str) -> torch.dtype | None:
    """What keys and values are kept in; None is the model's own dtype."""
    if kv_cache_dtype not in ("auto", "int8"):
        raise ConfigError(f"kv_cache_dtype must be 'auto' or 'int8', got {kv_cache_dtype!r}")
    return torch.int8 if kv_cache_dtype == "int8" else None


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


def read_media(domains: Sequence[str], folder: str | Path | None) -> MediaPolicy:
    """What messages may name, of `allowed_media_domains` and `allowed_local_media_path`."""
    if not isinstance(domains, list | tuple | set | frozenset):
        raise ConfigError(f"allowed_media_domains must be a list of host names, not {domains!r}")
    return MediaPolicy(tuple(domains), None if folder is None else Path(folder))
