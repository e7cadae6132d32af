"""Which parts of a model are quantised, and how."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from ..errors import ConfigError, UnsupportedError

METHODS = ("int8", "int8-weight", "int4", "fp8", "nf4", "bnb-int8")
# With four bits a vision half is known to answer nonsense: its activations have outliers that images depend on.
VISION_METHODS = tuple(method for method in METHODS if method not in ("int4", "nf4"))
# Beginnings of the paths of what `llm` and `vision` are for.
LANGUAGE = ("language_model.layers.", "qllama.layers.")
VISION = ("vision_model.encoder.layers.",)
VERSION = 1  # of the layout of our checkpoints
# Of a checkpoint beside its config: the layers whose inputs have scales known beforehand, and a word for people.
NOTES = ("static_inputs", "calibration")


@dataclass(frozen=True)
class QuantizationConfig:
    """A method for each half, None for as it is, and exceptions.

    llm: one of METHODS for the projections of the language model's layers; vision: one of VISION_METHODS for those of
    the ViT's blocks. group_size, symmetric: of int4. overrides: regular expressions, searched for in paths of modules
    like "language_model.layers.0.attention.qkv"; the first that matches decides, and its method may be None. Only an
    override quantises the head or the projector.
    """

    llm: str | None = None
    vision: str | None = None
    group_size: int = 128
    symmetric: bool = True
    overrides: Mapping[str, str | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.group_size, bool) or not isinstance(self.group_size, int) or self.group_size < 8:
            raise ConfigError(f"group_size must be a multiple of 8, not {self.group_size!r}")
        if self.group_size % 8:  # what the kernels unpack at a time
            raise ConfigError(f"group_size must be a multiple of 8, not {self.group_size}")
        if not isinstance(self.symmetric, bool):
            raise ConfigError(f"symmetric must be true or false, not {self.symmetric!r}")
        if not isinstance(self.overrides, Mapping):
            raise ConfigError(f"overrides must map regular expressions to methods, not {self.overrides!r}")
        _check_method("quantization", self.llm)
        check_vision("vision_quantization", self.vision)
        for pattern, method in self.overrides.items():
            _check_method(f"overrides[{pattern!r}]", method)
            try:
                re.compile(pattern)
            except (re.error, TypeError) as error:
                raise ConfigError(f"overrides: {pattern!r} is not a regular expression ({error})") from None

    def method_of(self, module: str) -> str | None:
        """The method of a linear module, by its path in the model."""
        for pattern, method in self.overrides.items():
            if re.search(pattern, module):
                if is_vision(module):
                    check_vision(module, method)
                return method
        if module.startswith(VISION):
            return self.vision
        return self.llm if module.startswith(LANGUAGE) else None

    def check_overrides(self, modules: Iterable[str]) -> None:
        """Raises for an override that names none of the linear `modules`."""
        modules = list(modules)
        for pattern in self.overrides:
            if not any(re.search(pattern, module) for module in modules):
                raise ConfigError(f"overrides: {pattern!r} matches no linear layer of the model")

    def to_json(self) -> dict[str, Any]:
        """What `config.json` says under "quantization_config"."""
        return {"quant_method": "vitrail", "version": VERSION, **asdict(self), "overrides": dict(self.overrides)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "QuantizationConfig":
        """The inverse of `to_json`. What else a checkpoint says, NOTES, is not read."""
        version = values.get("version")
        if version != VERSION:
            raise ConfigError(f"quantization_config: version {version!r} is not known; known: {VERSION}")
        known = {entry.name for entry in fields(cls)}
        given = {key: value for key, value in values.items() if key not in ("quant_method", "version", *NOTES)}
        if not set(given) <= known:
            raise ConfigError(f"quantization_config: unknown entries {sorted(set(given) - known)}")
        return cls(**given)


def is_vision(module: str) -> bool:
    return module.startswith("vision_model.")


def check_vision(where: str, method: str | None) -> None:
    """Raises for a method that the vision half cannot take."""
    _check_method(where, method)
    if method is not None and method not in VISION_METHODS:
        raise UnsupportedError(
            f"{where}: the vision half cannot be {method}: with four bits it sees nonsense; "
            f"use one of {', '.join(VISION_METHODS)}"
        )


def _check_method(where: str, method: str | None) -> None:
    if method is not None and method not in METHODS:
        raise ConfigError(f"{where}: method {method!r} is not known; known: {', '.join(METHODS)}")
