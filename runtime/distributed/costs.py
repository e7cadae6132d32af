"""What each stage takes, in milliseconds: by a roofline with stated shares of it, or as it was measured.

Passes are described by what decides their cost: new tokens, pairs of positions that attention looks at, rows of a
decode step and the tokens of keys and values that they read.
"""

import json
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from pathlib import Path
from typing import Any, Protocol

from ...kernels.int4_decode import MAX_ROWS
from ..errors import ConfigError, UnsupportedError
from ..quantization.config import QuantizationConfig
from .gpus import Gpu
from .sizes import BITS, ModelSizes


class Costs(Protocol):
    """Milliseconds of the stages of one copy of the model."""

    def vision_ms(self, tiles: float) -> float:
        """Tiles in one pass, from pixels to visual tokens."""
        ...

    def prefill_ms(self, tokens: float, pairs: float, prompts: float = 1) -> float:
        """A pass of tokens of so many prompts, whose attention looks at so many pairs of positions."""
        ...

    def decode_ms(self, rows: float, tokens: float) -> float:
        """A decode step of so many rows, whose keys and values are of `tokens` tokens in all."""
        ...

    def beside_ms(self, rows: float, tokens: float, prompt: float) -> float:
        """What such rows add to a pass that `prompt` tokens have anyway."""
        ...

    def wake_ms(self, tiles: float) -> float:
        """What a step with so many tiles takes more where it follows a wait."""
        ...


def causal_pairs(tokens: float, end: float) -> float:
    """Pairs of positions for the last `tokens` of `end` ones."""
    return tokens * (end - tokens / 2)


@dataclass(frozen=True)
class Roofline:
    """The datasheet's rates times the shares that `gpu` states: nothing of it was measured as a whole.

    few_rows: up to so many, weights that alone are quantised are read as codes; for more they are written out first.
    """

    sizes: ModelSizes
    gpu: Gpu
    quantization: QuantizationConfig
    few_rows: float = MAX_ROWS

    def __post_init__(self) -> None:
        for numbers in (self._vision_numbers, self._language_numbers):
            if numbers not in self.gpu.tflops:
                raise UnsupportedError(f"{self.gpu.name} has no kernels for {numbers}")

    @property
    def _vision_numbers(self) -> str:
        return _numbers(self.quantization.vision)

    @property
    def _language_numbers(self) -> str:
        return _numbers(self.quantization.llm)

    @property
    def _writes_out(self) -> bool:
        return self.quantization.llm in ("int4", "int8-weight")

    @cached_property
    def _tile_ms(self) -> float:
        sizes, shares = self.sizes, self.gpu.shares
        vision, depth, positions = sizes.config.vision, sizes.config.vision_depth, sizes.tile_positions
        rate = self.gpu.tflops[self._vision_numbers] * shares.vision[self._vision_numbers]
        products = 2e-9 * positions * sizes.vision / rate
        attention = 4e-9 * positions**2 * vision.hidden_size * depth
        attention /= self.gpu.tflops["bf16"] * shares.vision_attention
        # Norms and what belongs to them read or write the residual stream twelve times a block when fused.
        elementwise = 12 * depth * 2e-9 * positions * vision.hidden_size / (self.gpu.bandwidth * shares.elementwise)
        projector = 2e-9 * sizes.config.tokens_per_tile * sizes.projector
        projector /= self.gpu.tflops["bf16"] * shares.vision["bf16"]
        return products + attention + elementwise + projector

    def vision_ms(self, tiles: float) -> float:
        return tiles * self._tile_ms

    def _products_ms(self, tokens: float) -> float:
        rate = self.gpu.tflops[self._language_numbers] * self.gpu.shares.prefill[self._language_numbers]
        return 2e-9 * tokens * self.sizes.language / rate

    @cached_property
    def _weights_ms(self) -> float:
        """Reading the weights once."""
        bits = int(BITS[self.quantization.llm])
        read = self.sizes.language * BITS[self.quantization.llm] / 8 + 2 * self.sizes.head
        return read * 1e-9 / (self.gpu.bandwidth * self.gpu.shares.weights[bits])

    @cached_property
    def _written_out_ms(self) -> float:
        """Reading codes, writing numbers of 16 bits and reading those, once."""
        moved = self.sizes.language * (BITS[self.quantization.llm] / 8 + 2 * 2) + 2 * self.sizes.head
        return moved * 1e-9 / (self.gpu.bandwidth * self.gpu.shares.elementwise)

    def _linear_ms(self, tokens: float) -> float:
        """All linear layers for so many tokens: what is slower, the products or reading their weights."""
        if self._writes_out and tokens > self.few_rows:
            # The numbers are in memory before the product begins; only its own reading lies under it.
            read = 2e-9 * (self.sizes.language + self.sizes.head) / (self.gpu.bandwidth * self.gpu.shares.elementwise)
            return self._written_out_ms - read + max(self._products_ms(tokens), read)
        return max(self._products_ms(tokens), self._weights_ms)

    def _kv_ms(self, tokens: float) -> float:
        kv_bytes = tokens * self.sizes.config.llm.kv_bytes_per_token
        return kv_bytes * 1e-9 / (self.gpu.bandwidth * self.gpu.shares.kv)

    def prefill_ms(self, tokens: float, pairs: float, prompts: float = 1) -> float:
        llm = self.sizes.config.llm
        attention = 4e-9 * pairs * llm.num_attention_heads * llm.head_dim * llm.num_hidden_layers
        return self._linear_ms(tokens) + attention / (self.gpu.tflops["bf16"] * self.gpu.shares.prefill_attention)

    def decode_ms(self, rows: float, tokens: float) -> float:
        return self._linear_ms(rows) + self._kv_ms(tokens)

    def beside_ms(self, rows: float, tokens: float, prompt: float) -> float:
        return self._products_ms(rows) + self._kv_ms(tokens)

    def wake_ms(self, tiles: float) -> float:
        return 0.0


def _numbers(method: str | None) -> str:
    """The type of numbers that a method multiplies."""
    return method if method in ("int8", "fp8") else "bf16"


@dataclass(frozen=True)
class Curve:
    """Milliseconds at some counts, straight between them and beyond the last two; a part of the first below it."""

    counts: tuple[float, ...]
    ms: tuple[float, ...]

    def __call__(self, count: float) -> float:
        if count <= self.counts[0]:
            return self.ms[0]  # half a batch of one takes as long as one
        if len(self.counts) == 1:
            return self.ms[0] * count / self.counts[0]
        right = min(bisect_left(self.counts, count), len(self.counts) - 1)
        (x0, x1), (y0, y1) = self.counts[right - 1 : right + 1], self.ms[right - 1 : right + 1]
        return y0 + (y1 - y0) * (count - x0) / (x1 - x0)


@dataclass(frozen=True)
class Measured:
    """What `bench/scaling.py calibrate` wrote for one model on one device: steps of the engine, timed from outside.

    decode, beside (by prompt tokens in the pass): at `context` tokens a row; what more tokens add is `kv_ms` for each.
    prefill: of one prompt without its attention, which is `pair_ms` for each pair; every further prompt in the pass
    adds `prompt_ms`. wake: what caches that a wait has emptied cost, by tiles, since they are the vision half's too;
    beyond the last count that was measured there is nothing left to lose.
    """

    vision: Curve
    prefill: Curve
    decode: Curve
    beside: Mapping[float, Curve]
    context: float
    kv_ms: float
    pair_ms: float
    prompt_ms: float
    wake: Curve

    def vision_ms(self, tiles: float) -> float:
        return self.vision(tiles)

    def prefill_ms(self, tokens: float, pairs: float, prompts: float = 1) -> float:
        return self.prefill(tokens) + pairs * self.pair_ms + max(0.0, prompts - 1) * self.prompt_ms

    def decode_ms(self, rows: float, tokens: float) -> float:
        return self.decode(rows) + (tokens - rows * self.context) * self.kv_ms

    def beside_ms(self, rows: float, tokens: float, prompt: float) -> float:
        if not rows:
            return 0.0
        by_prompt = Curve(tuple(self.beside), tuple(curve(rows) for curve in self.beside.values()))
        return by_prompt(prompt) + (tokens - rows * self.context) * self.kv_ms

    def wake_ms(self, tiles: float) -> float:
        return self.wake(min(tiles, self.wake.counts[-1]))


STAGES = {"vision": "tiles", "prefill": "tokens", "decode": "rows", "wake": "tiles"}


def _curve(rows: Sequence[Mapping[str, Any]], count: str) -> Curve:
    points = sorted((float(row[count]), float(row["ms"])) for row in rows)
    return Curve(tuple(x for x, _ in points), tuple(y for _, y in points))


def _without_attention(row: Mapping[str, Any], *, pair: float, prompt: float, **_: float) -> float:
    """What a pass of fresh prompts of one length takes, if it was one prompt and its attention cost nothing."""
    tokens, prompts = float(row["tokens"]), float(row.get("prompts", 1))
    pairs = causal_pairs(tokens / prompts, tokens / prompts) * prompts
    return max(0.0, float(row["ms"]) - pairs * pair - (prompts - 1) * prompt)


def measured_of(rows: Sequence[Mapping[str, Any]]) -> Measured:
    """The rows of a table of costs. Raises `ConfigError` for a stage that it lacks."""
    stages: dict[str, list[Mapping[str, Any]]] = {stage: [] for stage in (*STAGES, "beside")}
    single: dict[str, float] = {}
    for row in rows:
        if row["stage"] in stages:
            stages[row["stage"]].append(row)
        else:
            single[row["stage"]] = float(row["ms"])
    for stage in (*stages, "kv", "pair", "prompt"):
        if not stages.get(stage) and stage not in single:
            raise ConfigError(f"no row of the stage {stage}")
    beside = stages.pop("beside")
    prompts = sorted({float(row["tokens"]) for row in beside})
    stages["prefill"] = [{**row, "ms": _without_attention(row, **single)} for row in stages["prefill"]]
    return Measured(
        **{stage: _curve(found, STAGES[stage]) for stage, found in stages.items()},
        beside={prompt: _curve([row for row in beside if row["tokens"] == prompt], "rows") for prompt in prompts},
        context=float(stages["decode"][0]["context"]),
        kv_ms=single["kv"],
        pair_ms=single["pair"],
        prompt_ms=single["prompt"],
    )


def read_measured(path: Path, model: str, quantization: QuantizationConfig) -> Measured | None:
    """The rows of a results file for a model and its methods; None if there are none. Raises `ConfigError`."""
    try:
        rows: Sequence[Mapping[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"]
        wanted = (model.rstrip("/").rpartition("/")[2], quantization.llm, quantization.vision)
        found = [row for row in rows if (row["model"], row["quantization"], row["vision_quantization"]) == wanted]
        return measured_of(found) if found else None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error} for {model}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: not a table of costs ({type(error).__name__}: {error})") from None


@dataclass(frozen=True)
class TensorParallel:
    """A language half over `size` GPUs of one machine, beside which each of them encodes whole tiles."""

    costs: Costs
    sizes: ModelSizes
    gpu: Gpu
    size: int

    def _reduce_ms(self, tokens: float) -> float:
        """Two all-reduces a layer, of a row a token."""
        llm = self.sizes.config.llm
        moved = 2 * (self.size - 1) / self.size * 2 * tokens * llm.hidden_size
        each = max(self.gpu.reduce_us * 1e-3, moved / self.gpu.reduce_gb_s * 1e-6)
        return 2 * llm.num_hidden_layers * each

    def vision_ms(self, tiles: float) -> float:
        return self.costs.vision_ms(ceil(tiles / self.size))

    def prefill_ms(self, tokens: float, pairs: float, prompts: float = 1) -> float:
        return self.costs.prefill_ms(tokens, pairs, prompts) / self.size + self._reduce_ms(tokens)

    def decode_ms(self, rows: float, tokens: float) -> float:
        return self.costs.decode_ms(rows, tokens) / self.size + self._reduce_ms(rows)

    def beside_ms(self, rows: float, tokens: float, prompt: float) -> float:
        return self.costs.beside_ms(rows, tokens, prompt) / self.size

    def wake_ms(self, tiles: float) -> float:
        return self.costs.wake_ms(ceil(tiles / self.size))
