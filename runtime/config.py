"""A checkpoint's `config.json`, whichever of the known forms it has, read into the dataclasses of `model_config.py`.

Each form has its file in `config_forms/`: `official.py`, `transformers.py`, `llava.py` and `contrastive.py`. Here is
decided which one it is. The names of `model_config.py` are offered here too: other rooms import from this file alone.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .config_forms.contrastive import parse_contrastive_config, parse_original_c
from .config_forms.llava import parse_llava, tower_name
from .config_forms.official import parse_official, parse_vision
from .config_forms.section import Section
from .config_forms.transformers import parse_transformers
from .errors import CheckpointError, ConfigError
from .model_config import (
    ContrastiveConfig,
    DecoderConfig,
    InternVLConfig,
    LlavaConfig,
    ModelConfig,
    NormType,
    RopeScaling,
    VisionConfig,
)

__all__ = [
    "ORIGINAL_C",
    "ContrastiveConfig",
    "DecoderConfig",
    "InternVLConfig",
    "LlavaConfig",
    "ModelConfig",
    "NormType",
    "RopeScaling",
    "VisionConfig",
    "load_any_config",
    "load_config",
    "parse_any_config",
    "parse_config",
    "parse_contrastive_config",
]

# InternVL-C as it was first published: weights alone, of one size.
ORIGINAL_C = "internvl_c_13b_224px.pth"


def load_config(source: str | Path | Mapping[str, Any]) -> InternVLConfig:
    """Read the config of a chat model: a checkpoint folder, or an already decoded `config.json`."""
    return parse_config(_decoded(source))


def load_any_config(source: str | Path | Mapping[str, Any]) -> ModelConfig:
    """Read the config of any model that vitrail runs: a checkpoint folder, or an already decoded `config.json`."""
    return parse_any_config(_decoded(source))


def parse_any_config(values: Mapping[str, Any]) -> ModelConfig:
    """Read a decoded `config.json` of any model that vitrail runs."""
    if isinstance(values, Mapping):
        if values.get("original_c"):
            return parse_original_c(values)
        if values.get("model_type") == "internvl" and "qllama_config" in values:
            return parse_contrastive_config(values)
        if values.get("model_type") == "intern_vit_6b":  # the 300M's too
            return parse_vision(values)
    return parse_config(values)


def parse_config(values: Mapping[str, Any]) -> InternVLConfig:
    """Read a chat model's `config.json`, already decoded. Raises `ConfigError` naming the entry.

    What other files of a checkpoint add to it stands under `preprocessor_config` and `vision_tower_config`.
    """
    section = Section(values, "config.json")
    model_type = section.values.get("model_type")
    if "mm_vision_tower" in section.values:
        tower = section.values.get("vision_tower_config")
        return parse_llava(section, None if tower is None else parse_any_config(tower))
    if "qllama_config" in section.values:
        raise ConfigError("config.json: this is a contrastive model (InternVL-C/G), not a chat model")
    if model_type == "internvl":
        return parse_transformers(section)
    if model_type != "internvl_chat":
        raise ConfigError(f"config.json: unknown model_type {model_type!r}; known: internvl_chat, internvl")
    return parse_official(section)


def _decoded(source: str | Path | Mapping[str, Any]) -> Mapping[str, Any]:
    """`config.json` with what the files beside it add."""
    if isinstance(source, Mapping):
        return source
    folder = Path(source)
    if (folder / ORIGINAL_C).is_file() and not (folder / "config.json").exists():
        return {"original_c": True}
    values = _read_json(folder / "config.json")
    if not isinstance(values, Mapping):
        raise ConfigError(f"config.json: expected an object, found {type(values).__name__}")
    if "text_config" in values:
        if (folder / "preprocessor_config.json").is_file():
            return {**values, "preprocessor_config": _read_json(folder / "preprocessor_config.json")}
        if (folder / "processor_config.json").is_file():  # where transformers writes it since version 5
            processor = _read_json(folder / "processor_config.json")
            images = processor.get("image_processor") if isinstance(processor, Mapping) else processor
            return {**values, "preprocessor_config": images}
    tower = values.get("mm_vision_tower")
    if isinstance(tower, str) and (folder / tower_name(tower) / "config.json").is_file():
        return {**values, "vision_tower_config": _read_json(folder / tower_name(tower) / "config.json")}
    return values


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or 'cannot be read'}") from None
    except (ValueError, RecursionError):
        raise ConfigError(f"{path}: not valid JSON") from None
