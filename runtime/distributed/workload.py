"""What is asked of a deployment: kinds of requests and how often they come, from options or from a file."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from ..config import InternVLConfig
from ..errors import CapacityError, ConfigError


@dataclass(frozen=True)
class Kind:
    """Requests of one kind: tiles of its images, tokens of its text (template included), tokens of its answer.

    weight: how often it comes, against the others of its workload.
    """

    tiles: int
    prompt: int
    output: int
    weight: float = 1.0


@dataclass(frozen=True)
class Workload:
    """Kinds of requests, the tokens that a tile becomes, how many requests come in a second (None: not known)."""

    kinds: tuple[Kind, ...]
    tokens_per_tile: int
    rate: float | None = None

    def mean(self, values: Sequence[float]) -> float:
        """Of one value a kind."""
        weights = [kind.weight for kind in self.kinds]
        return sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)

    def prompt_tokens(self, kind: Kind) -> int:
        """Tokens of a prompt, visual ones included."""
        return kind.tiles * self.tokens_per_tile + kind.prompt

    @property
    def tiles(self) -> float:
        """Of a request, on average; so are the numbers that follow."""
        return self.mean([kind.tiles for kind in self.kinds])

    @property
    def prompt(self) -> float:
        return self.mean([self.prompt_tokens(kind) for kind in self.kinds])

    @property
    def output(self) -> float:
        return self.mean([kind.output for kind in self.kinds])

    @property
    def causal_pairs(self) -> float:
        """Pairs of positions that look at one another in a prompt: what attention costs."""
        return self.mean([self.prompt_tokens(kind) ** 2 / 2 for kind in self.kinds])

    @property
    def context(self) -> float:
        """Tokens of keys and values that a row of a decode step reads: long answers are met more often."""
        read = self.mean([kind.output * (self.prompt_tokens(kind) + kind.output / 2) for kind in self.kinds])
        return read / self.output

    @property
    def held(self) -> float:
        """Tokens that a row holds at the end of its answer, weighed in the same way."""
        return self.mean([kind.output * (self.prompt_tokens(kind) + kind.output) for kind in self.kinds]) / self.output

    @property
    def longest(self) -> int:
        """Tokens of the longest request, with its answer."""
        return max(self.prompt_tokens(kind) + kind.output for kind in self.kinds)


def workload_of(config: InternVLConfig, kinds: Sequence[Kind], rate: float | None = None) -> Workload:
    """A workload of a model. Raises `CapacityError` where a request is longer than its context."""
    workload = Workload(tuple(kinds), config.tokens_per_tile, rate)
    if workload.longest > config.llm.max_model_len:
        raise CapacityError(
            f"a request of {workload.longest} tokens, answer included, exceeds the model's context of "
            f"{config.llm.max_model_len}"
        )
    return workload


FIELDS = ("tiles", "prompt", "output", "weight", "rate")


def read_workload(path: Path) -> tuple[list[Kind], float | None]:
    """The kinds of a `.jsonl` file and, if its lines give their `rate`, what those add up to.

    A line: {"tiles": 7, "prompt": 64, "output": 256} and optionally "weight", 1 by default, or "rate" in requests a
    second, which all lines have or none. Empty lines are skipped. Raises `ConfigError` with line and field.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {getattr(error, 'strerror', None) or 'not a text in UTF-8'}") from None
    rows = [_read_line(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1) if line.strip()]
    if not rows:
        raise ConfigError(f"{path}: no line describes a request")
    rated = [row for row in rows if "rate" in row]
    if rated and len(rated) < len(rows):
        raise ConfigError(f"{path}: `rate` stands in {len(rated)} of {len(rows)} lines; give it in all or in none")
    kinds = [
        Kind(row["tiles"], row["prompt"], row["output"], float(row.get("rate", row.get("weight", 1)))) for row in rows
    ]
    return kinds, sum(kind.weight for kind in kinds) if rated else None


def _read_line(line: str, where: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        column = f", column {error.colno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else ""
        raise ConfigError(f"{where}{column or ': cannot be read'}") from None
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: expected an object, found {type(row).__name__}")
    for field in row:
        if field not in FIELDS:
            raise ConfigError(f"{where}: unknown field `{field}`; known: {', '.join(FIELDS)}")
    if "weight" in row and "rate" in row:
        raise ConfigError(f"{where}: `weight` and `rate` both say how often it comes; give one")
    for field in FIELDS[:3]:
        value, least = row.get(field), 1 if field == "output" else 0
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            found = "is missing" if field not in row else f"is {value!r}"
            raise ConfigError(f"{where}: `{field}` {found}; expected a whole number from {least} on")
    if row["tiles"] + row["prompt"] == 0:
        raise ConfigError(f"{where}: `prompt` is 0, and there are no tiles: the request would be empty")
    for field in FIELDS[3:]:
        value = row.get(field, 1)
        if isinstance(value, bool) or not isinstance(value, int | float) or not (isfinite(value) and value > 0):
            raise ConfigError(f"{where}: `{field}` is {value!r}; expected a number above 0")
    return row
