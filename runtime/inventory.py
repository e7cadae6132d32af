"""What a checkpoint must hold: every tensor by name and shape, plain or of a quantised layer, and which have come."""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

import torch

from .checkpoint_map import Slot, canonical_name, checkpoint_map
from .config import ModelConfig
from .errors import CheckpointError
from .layers.parallel import Part
from .quantization.formats.base import Format


@dataclass(frozen=True)
class Entry:
    """A tensor that a checkpoint holds: its place, and the shapes it may have.

    part: which tensor of a quantised layer it is, by what stands behind the layer's name; None for a plain one.
    """

    slot: Slot
    shapes: tuple[tuple[int, ...], ...]
    optional: bool
    layer: str
    part: str | None = None
    dtypes: tuple[torch.dtype, ...] = ()

    @property
    def module(self) -> str:
        """The path of the linear layer that it belongs to, if it is a weight of one."""
        return (self.slot.parameter or self.layer).removesuffix(".weight")


class Inventory:
    """Which of a checkpoint's expected tensors have come, and which came that are not expected.

    stored: the format of those that are quantised. names: of all tensors of the checkpoint, which say what layers are
    quantised; without them the format's config does. Raises `CheckpointError` where the two contradict each other.
    """

    def __init__(self, config: ModelConfig, stored: Format | None, names: Collection[str] | None = None) -> None:
        self.config = config
        self.stored = stored
        self.seen: set[str] = set()
        self.unexpected: list[str] = []
        self.entries: dict[str, Entry] = {}
        known = None if names is None else {canonical_name(name, config) for name in names}
        slots = checkpoint_map(config)
        for name, slot in slots.items():
            layer = name.removesuffix(".weight")
            plain = Entry(slot, (slot.shape,), slot.optional, layer)
            if stored is None or not is_linear(name, slot) or not _is_quantised(stored, plain, known):
                self.entries[name] = plain
                continue
            rows, columns = slot.shape
            for suffix, part in stored.parts(layer, plain.module, (rows, columns)).items():
                if layer + suffix not in slots or suffix == ".weight":  # a bias that the model has is a tensor apart
                    optional = slot.optional or part.optional
                    entry = Entry(slot, part.shapes, optional, layer, suffix, part.dtypes)
                    self.entries[layer + suffix] = entry
        if stored is not None and not self.quantised:
            raise CheckpointError(f"config.json says {stored.name}, but no tensor of the checkpoint is quantised")
        # How many tensors of each quantised layer are to come: one that lacks any is never complete.
        awaited = (entry for name, entry in self.entries.items() if not entry.optional or (known and name in known))
        self.parts = Counter(entry.layer for entry in awaited if entry.part is not None)

    @property
    def quantised(self) -> dict[str, Entry]:
        """Layer -> one of its entries, of the layers that are quantised."""
        return {entry.layer: entry for entry in self.entries.values() if entry.part is not None}

    def absent(self, part: Part) -> set[str]:
        """Tensors that a part of the model has no place for."""
        return {
            name
            for name, entry in self.entries.items()
            if entry.slot.parameter is None or not part.holds(entry.slot.parameter)
        }

    def take(self, name: str, shape: tuple[int, ...], source: str) -> Entry | None:
        """What a tensor is, None for one that has no place. Raises if it came before or has another shape."""
        name = canonical_name(name, self.config)
        entry = self.entries.get(name)
        if entry is None:
            if not name.endswith(("rotary_emb.inv_freq", "position_ids")):  # constants that old files store
                self.unexpected.append(name)
            return None
        if name in self.seen:
            raise CheckpointError(f"{source}: {name} occurs twice")
        self.seen.add(name)
        if not any(_fits(shape, allowed) for allowed in entry.shapes):
            raise CheckpointError(f"{source}: {name} has shape {shape}, the config says {entry.shapes[0]}")
        return entry

    def check_complete(self, source: str) -> None:
        """Raises for everything that is missing or not expected, by name."""
        missing = [name for name, entry in self.entries.items() if name not in self.seen and not entry.optional]
        problems = []
        for kind, names in (("missing", missing), ("unexpected", self.unexpected)):
            if names:
                more = f" and {len(names) - 5} more" if len(names) > 5 else ""
                problems.append(f"{len(names)} tensors {kind}: {', '.join(names[:5])}{more}")
        if problems:
            hint = ""
            if self.stored is None and any(name.endswith(_QUANTISED) for name in self.unexpected):
                hint = " (quantised weights, of which config.json says nothing: it has no quantization_config)"
            raise CheckpointError(f"{source}: {'; '.join(problems)}{hint}")


def _fits(shape: tuple[int, ...], allowed: tuple[int, ...]) -> bool:
    return len(shape) == len(allowed) and all(a in (-1, s) for s, a in zip(shape, allowed, strict=True))


# Of tensors that only quantised layers have.
_QUANTISED = (".qweight", ".SCB", ".absmax", ".weight_packed", ".weight_scale", ".weight.codes")


def is_linear(name: str, slot: Slot) -> bool:
    """Whether a tensor is the weight of a linear layer: of all of them or of some of its rows."""
    return len(slot.shape) == 2 and name.endswith(".weight") and (slot.parameter or name).endswith(".weight")


def _is_quantised(stored: Format, entry: Entry, names: Collection[str] | None) -> bool:
    says = stored.expects(entry.layer, entry.module)
    if names is None:
        return bool(says)
    found = entry.layer + stored.marker in names
    if says is not None and says is not found and (found or not entry.optional):
        fact = f"is quantised ({stored.marker[1:]})" if found else f"has no {stored.marker[1:]}"
        raise CheckpointError(
            f"{entry.layer} {fact}, but quantization_config ({stored.name}) says that it is "
            f"{'quantised' if says else 'not'}"
        )
    return found
