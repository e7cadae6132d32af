"""What the loader asks of a format of quantised checkpoints."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError, ConfigError
from ..config import LANGUAGE
from ..weight import QuantizedWeight


@dataclass(frozen=True)
class Part:
    """One of the tensors that a quantised linear layer consists of.

    shapes: those it may have, the usual one first; -1 is any length. dtypes: likewise.
    """

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    optional: bool = False


class Format(ABC):
    """The quantised linear layers of a checkpoint, as its `quantization_config` describes them.

    A layer is known by the name of its weight without ".weight": `layer` in the checkpoint, `module` in the model,
    where several layers may make a joint one.
    """

    name: str  # as `quant_method` gives it
    marker: str  # the tensor that only quantised layers have, behind the layer's name

    def expects(self, layer: str, module: str) -> bool | None:
        """Whether the config says that this layer is quantised; None where it leaves it open.

        By default it is a language model's layers that a method is for, unless they are listed as left out. LMDeploy's
        AWQ checkpoints, the official ones, leave vision half and projector as they are without listing them.
        """
        if self.leaves_out(layer):
            return False
        return True if module.startswith(LANGUAGE) else None

    def leaves_out(self, layer: str) -> bool:
        """Whether the config lists a layer among those that are not quantised."""
        return False

    @abstractmethod
    def methods(self, module: str) -> tuple[str, ...]:
        """How a layer that is quantised may run, what it was made for first."""

    @abstractmethod
    def parts(self, layer: str, module: str, shape: tuple[int, int]) -> dict[str, Part]:
        """What stands behind the layer's name -> its tensor, for a weight of this shape."""

    @abstractmethod
    def read(
        self, layer: str, method: str, shape: tuple[int, int], tensors: Mapping[str, Tensor]
    ) -> QuantizedWeight | Tensor:
        """The canonical weight of the tensors that `parts` names, to be run by one of `methods`.

        (out, in) fp32 where its groups are such that no canonical form holds them. Raises `CheckpointError` for wrong
        values, by name.
        """

    def describe(self) -> str:
        """For people, in a few words."""
        return self.name


def scales_of(name: str, scales: Tensor) -> Tensor:
    """Scales in fp32. Raises where they are not finite."""
    if not scales.isfinite().all():
        raise CheckpointError(f"{name}: holds scales that are not finite")
    return scales.float()


def lists(names: tuple[str, ...], layer: str) -> bool:
    """Whether one of some dotted names is part of a layer's."""
    return any(f".{name}." in f".{layer}." for name in names)


class Entries:
    """A `quantization_config`, read with errors that name it."""

    def __init__(self, values: Mapping[str, Any], where: str = "quantization_config") -> None:
        self.values, self.where = values, where

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        return default if value is None else value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"{self.where}: `{key}` must be a whole number, found {value!r}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise ConfigError(f"{self.where}: `{key}` must be true or false, found {value!r}")
        return value

    def text(self, key: str, default: str) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise ConfigError(f"{self.where}: `{key}` must be a string, found {value!r}")
        return value

    def names(self, *keys: str) -> tuple[str, ...]:
        """A list of strings, empty where it is missing or null; the first of the keys that is there."""
        value: Any = next((self.values[key] for key in keys if self.values.get(key)), [])
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise ConfigError(f"{self.where}: `{keys[0]}` must be a list of strings, found {value!r}")
        return tuple(value)
