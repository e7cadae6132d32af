"""Entries of a `config.json`, read one by one: what is missing or mistyped is named."""

from collections.abc import Mapping
from math import inf
from typing import Any

from ..errors import ConfigError


class Section:
    """A JSON object whose missing or mistyped entries become a `ConfigError` that names them."""

    def __init__(self, values: Any, name: str) -> None:
        if not isinstance(values, Mapping):
            raise ConfigError(f"{name}: expected an object, found {type(values).__name__}")
        self.values = values
        self.name = name

    def _get(self, key: str, kinds: tuple[type, ...], default: Any) -> Any:
        value = self.values.get(key)
        if value is None:
            if default is ...:
                raise ConfigError(f"{self.name}: `{key}` is missing")
            return default
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ConfigError(f"{self.name}: `{key}` must be {kinds[0].__name__}, found {value!r}")
        return value

    def size(self, key: str, default: Any = ...) -> int:
        value = self._get(key, (int,), default)
        if value is not None and value < 1:
            raise ConfigError(f"{self.name}: `{key}` must be positive, found {value}")
        return int(value)

    def integer(self, key: str, default: Any = ...) -> int:
        return int(self._get(key, (int,), default))

    def number(self, key: str, default: Any = ...) -> float:
        value = self._get(key, (float, int), default)
        if not 0 < value < inf:  # JSON as Python reads it also has NaN and Infinity
            raise ConfigError(f"{self.name}: `{key}` must be positive and finite, found {value}")
        return float(value)

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        values = self.values.get(key)
        if not isinstance(values, list) or len(values) != count:
            raise ConfigError(f"{self.name}: `{key}` must list {count} numbers")
        entries = Section({f"{key}[{index}]": value for index, value in enumerate(values)}, self.name)
        return tuple(entries.number(entry) for entry in entries.values)

    def flag(self, key: str, default: bool) -> bool:
        return bool(self._get(key, (bool,), default))

    def text(self, key: str, default: Any = ...) -> str:
        return str(self._get(key, (str,), default))

    def choice(self, key: str, allowed: tuple[str, ...], default: Any = ...) -> Any:
        value = self.text(key, default)
        if value not in allowed:
            raise ConfigError(f"{self.name}: `{key}` is {value!r}; known: {', '.join(allowed)}")
        return value
