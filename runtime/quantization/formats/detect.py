"""Which format a checkpoint has."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...errors import CheckpointError, ConfigError
from .awq import AwqFormat
from .base import Format
from .bnb import read_bnb
from .compressed_tensors import CompressedTensorsFormat
from .gptq import GptqFormat
from .vitrail import VitrailFormat

# quant_method -> what reads its section.
FORMATS: dict[str, Callable[[Mapping[str, Any]], Format]] = {
    "vitrail": VitrailFormat,
    "awq": AwqFormat,
    "gptq": GptqFormat,
    "bitsandbytes": read_bnb,
    "compressed-tensors": CompressedTensorsFormat,
}


def stored_format(source: str | Path | Mapping[str, Any]) -> Format | None:
    """The format of a checkpoint folder, or of a decoded `config.json`; None where nothing is quantised.

    The section may stand at the top or in `llm_config`: LMDeploy writes it to both. Raises `ConfigError` for a method
    that is not known and for two sections that differ.
    """
    values = source if isinstance(source, Mapping) else _decoded(Path(source))
    nested = values.get("llm_config")
    sections = [section for owner in (values, nested) if isinstance(owner, Mapping) and (section := _section(owner))]
    if not sections:
        return None
    method, *others = map(_method, sections)
    if any(other != method for other in others):
        raise ConfigError("config.json: quantization_config at the top and in llm_config name different methods")
    if method not in FORMATS:
        raise ConfigError(f"quantization_config: quant_method {method!r} is not known; known: {', '.join(FORMATS)}")
    return FORMATS[method](sections[0])


def _section(owner: Mapping[str, Any]) -> Mapping[str, Any] | None:
    section = owner.get("quantization_config") or owner.get("compression_config")
    if section is not None and not isinstance(section, Mapping):
        raise ConfigError(f"config.json: quantization_config must be an object, found {type(section).__name__}")
    return section


def _method(section: Mapping[str, Any]) -> Any:
    """The name of the method; bitsandbytes has not always written it."""
    old = "bitsandbytes" if "load_in_8bit" in section or "load_in_4bit" in section else None
    return section.get("quant_method", old)


def _decoded(folder: Path) -> Mapping[str, Any]:
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}  # weights that were published without one are not quantised
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or 'cannot be read'}") from None
    except (ValueError, RecursionError):
        raise ConfigError(f"{path}: not valid JSON") from None
    return values if isinstance(values, Mapping) else {}
