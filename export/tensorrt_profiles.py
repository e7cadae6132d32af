"""Optimisation profiles: for which sizes of its named axes an engine is built."""

from dataclasses import dataclass

from ..runtime.backends.engine_file import Extent
from ..runtime.backends.manifest import Part
from ..runtime.errors import ConfigError, UnsupportedError

Profile = dict[str, Extent]

# Sizes that kernels are chosen for: a document of twelve tiles and its thumbnail, and a prompt that holds it.
BEST_TILES = 13
BEST_PROMPT = 4096
# Of the decoder, where nothing is said: what 26B leaves room for on one GPU of 80 GB.
BATCH, LENGTH = 8, 8192


@dataclass(frozen=True)
class Sizes:
    """The most that an engine takes; None: the default, which no part's limits are below."""

    max_tiles: int | None = None
    max_batch: int | None = None
    max_length: int | None = None


def profiles_of(part: Part, sizes: Sizes) -> dict[str, Profile]:
    """Profiles by name. Raises `ConfigError` for sizes beyond what the part was exported for."""
    axes = {axis for spec in part.inputs for axis in spec.shape if isinstance(axis, str)}
    limits = part.limits
    if axes == {"tiles"}:
        tiles = _most(part, "--max-tiles", sizes.max_tiles, limits["tiles"], limits["tiles"])
        return {"tiles": {"tiles": (1, min(BEST_TILES, tiles), tiles)}}
    if axes == {"batch", "tokens"}:
        batch = _most(part, "--max-batch", sizes.max_batch, limits["batch"], limits["batch"])
        length = _most(part, "--max-length", sizes.max_length, limits["tokens"], limits["tokens"])
        return {"texts": {"batch": (1, batch, batch), "tokens": (1, length, length)}}
    if axes == {"batch", "tokens", "past", "context", "visual"}:
        batch = _most(part, "--max-batch", sizes.max_batch, BATCH, limits["batch"])
        length = _most(part, "--max-length", sizes.max_length, LENGTH, limits["context"])
        return {"prefill": _prefill(batch, length), "decode": _decode(batch, length)}
    raise UnsupportedError(f"{part.name}: no profile is known for axes {', '.join(sorted(axes))}")


def shapes_of(part: Part, profile: Profile) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Least, best and largest shape of each input."""
    return {
        spec.name: tuple(
            tuple(profile[axis][which] if isinstance(axis, str) else axis for axis in spec.shape) for which in range(3)
        )
        for spec in part.inputs
    }


def _prefill(batch: int, length: int) -> Profile:
    """Prompts up to half of the context in one pass, longer ones and later turns behind what is cached.

    TensorRT wants the largest sizes of axes to fit one another: past + tokens = context.
    """
    tokens = (length + 1) // 2
    best = min(BEST_PROMPT, tokens)
    return {
        "batch": (1, 1, batch),
        "tokens": (1, best, tokens),
        "past": (0, 0, length - tokens),
        "context": (1, best, length),
        "visual": (0, best, batch * tokens),
    }


def _decode(batch: int, length: int) -> Profile:
    """A token of every sequence, none of them visual."""
    best = max(length // 2, 2)
    return {
        "batch": (1, batch, batch),
        "tokens": (1, 1, 1),
        "past": (1, best - 1, length - 1),
        "context": (2, best, length),
        "visual": (0, 0, 0),
    }


def _most(part: Part, option: str, asked: int | None, default: int, limit: int) -> int:
    if asked is None:
        return min(default, limit)
    # Of one token the decode profile would be empty.
    least = 2 if option == "--max-length" else 1
    if not least <= asked <= limit:
        raise ConfigError(f"{option} {asked}: the {part.name} part takes from {least} to {limit}")
    return asked
