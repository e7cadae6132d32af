"""A model that comes to memory weight by weight: parameters in their dtype, and quantised weights."""

import sys
import warnings
from types import EllipsisType
from typing import cast

import torch
from torch import Tensor, nn

from .checkpoint_map import Slot, pack_order
from .config import InternVLConfig
from .errors import CheckpointError, ConfigError
from .inventory import Entry, Inventory, is_linear
from .layers.linear import LinearLayer, replace_weight
from .layers.parallel import WHOLE, Part, Share
from .models.decoder import shares_of
from .models.internvl import InternVLModel
from .quantization.config import VISION_METHODS, QuantizationConfig, is_vision
from .quantization.methods import check_device, quantize_weight
from .quantization.model import check_layers, connect, pack, plan
from .quantization.weight import QuantizedWeight, concatenate

_HEAD = "language_model.head"


class ModelBuilder:
    """A model whose weights come to memory one by one, plain or quantised.

    whole: the model without memory, where `model` is a part of it, which `model.part` says.
    """

    def __init__(
        self,
        model: nn.Module,
        inventory: Inventory,
        quantization: QuantizationConfig,
        *,
        dtype: torch.dtype,
        device: torch.device,
        pack: bool,
        whole: nn.Module | None = None,
    ) -> None:
        self.model, self.inventory, self.quantization = model, inventory, quantization
        self.config = inventory.config
        self.dtype, self.device, self.pack = dtype, device, pack
        self.part: Part = model.part if isinstance(model, InternVLModel) else WHOLE
        self.shares: dict[str, Share] = {}
        if isinstance(model, InternVLModel) and self.part.splits_language:
            shares = shares_of(model.config.llm, self.part)
            self.shares = {f"language_model.{name}": share for name, share in shares.items()}
        planned = plan(whole or model, quantization, device)
        self.ties = isinstance(model, InternVLModel) and model.config.llm.tie_word_embeddings
        if self.ties and _HEAD in planned:
            raise ConfigError("the head cannot be quantised: its weights are those of the embedding")
        self.methods = {module: method for module, method in planned.items() if self.part.holds(module)}
        if self.shares:
            check_layers(model, self.methods, quantization, device)
        self.stored = self._stored_methods()
        rounded = self.methods.keys() - self.stored.keys()
        if rounded:
            methods = ", ".join(sorted({self.methods[module] for module in rounded}))
            warnings.warn(
                f"{len(rounded)} linear layers are rounded to nearest ({methods}) "
                "without calibration, which costs accuracy: `vitrail quantize` writes a calibrated checkpoint",
                stacklevel=_stacklevel(),
            )
        # Parameters that have a quantised piece, in pieces: first row -> piece.
        self.pieces: dict[str, dict[int, QuantizedWeight | Tensor]] = {
            f"{module}.weight": {} for module in self.methods.keys() | self.stored.keys()
        }
        self.parts: dict[str, dict[str, Tensor]] = {}

    def _stored_methods(self) -> dict[str, str]:
        """Module -> method, of those that the checkpoint holds quantised. Raises where the caller asks for another."""
        stored, chosen = self.inventory.stored, dict[str, str]()
        if stored is None:
            return chosen
        for entry in self.inventory.quantised.values():
            if not self.part.holds(entry.module):
                continue
            methods = stored.methods(entry.module)
            chosen[entry.module] = wanted = self.methods.get(entry.module, methods[0])
            if wanted not in methods:
                raise ConfigError(
                    f"quantization={wanted!r}: {entry.layer} is stored quantised by {stored.name}, as {methods[0]}"
                )
        for method in set(chosen.values()):
            check_device(method, self.device)
        if any(is_vision(module) and method not in VISION_METHODS for module, method in chosen.items()):
            warnings.warn(
                "the vision half is stored with four bits, with which it may see nonsense", stacklevel=_stacklevel()
            )
        return chosen

    def put(self, name: str, entry: Entry, tensor: Tensor) -> None:
        """Take a tensor of the checkpoint, or this part's share of it, to its place."""
        slot = entry.slot
        if slot.parameter is None or not self.part.holds(slot.parameter):
            return
        rows, target = self._rows(slot)
        # Rows are rounded by themselves: those of other ranks need not be. Columns are not, and are cut afterwards.
        piece = self._piece(name, entry, tensor[rows] if entry.part is None and rows is not ... else tensor)
        if piece is None:
            return
        if entry.part is not None and rows is not ...:
            piece = _taken(piece, rows)
        columns = self.shares[slot.parameter].columns if slot.parameter in self.shares else None
        if columns is not None:
            piece = _columns(piece, columns, f"{entry.layer}, split over {self.part.size} ranks")
        if slot.parameter not in self.pieces:
            self._parameter(slot.parameter).data[target].copy_(cast(Tensor, piece))
            return
        pieces = self.pieces[slot.parameter]
        pieces[slot.start] = piece
        if sum(part.shape[0] for part in pieces.values()) == self.model.get_parameter(slot.parameter).shape[0]:
            self._install(slot.parameter, concatenate([pieces[start] for start in sorted(pieces)]))
            pieces.clear()

    def _rows(self, slot: Slot) -> tuple["slice | Tensor | EllipsisType", "slice | EllipsisType"]:
        """Which rows of a tensor are wanted, in what order, and where in the parameter they go."""
        order = None
        if slot.kv_groups and isinstance(self.config, InternVLConfig):
            order = pack_order(slot.shape[0], slot.kv_groups, self.config.llm)
        share = self.shares.get(slot.parameter or "")
        if share is None or not share.rows:
            return (... if order is None else order), slot.rows
        kept, place = share.rows_within(slot.start, slot.shape[0])
        target = slice(place, place + len(kept))
        if order is not None:
            return order[kept], target
        first, last = int(kept[0]), int(kept[-1]) + 1
        return (slice(first, last) if last - first == len(kept) else kept), target

    def finish(self) -> None:
        """What can only be done when all tensors have come."""
        if isinstance(self.model, InternVLModel) and self.ties and self.part.language:
            head = self.model.language_model.head
            if isinstance(head.weight, nn.Parameter) and head.weight.is_meta:
                head.weight = self.model.language_model.embedding
        connect(self.model)

    def _piece(self, name: str, entry: Entry, tensor: Tensor) -> QuantizedWeight | Tensor | None:
        """The weight of a layer of the checkpoint; None while tensors of it are still to come."""
        if entry.part is None:
            method = self.methods.get(entry.module) if is_linear(name, entry.slot) else None
            if method is None:
                return tensor
            config = self.quantization
            return quantize_weight(
                tensor.to(self.device), method, group_size=config.group_size, symmetric=config.symmetric, name=name
            )
        if tensor.dtype not in entry.dtypes:
            raise CheckpointError(f"{name} is {tensor.dtype}, and should be {' or '.join(map(str, entry.dtypes))}")
        parts = self.parts.setdefault(entry.layer, {})
        parts[entry.part] = tensor.to(self.device)
        stored = self.inventory.stored
        if len(parts) < self.inventory.parts[entry.layer] or stored is None:
            return None
        rows, columns = entry.slot.shape
        return stored.read(entry.layer, self.stored[entry.module], (rows, columns), self.parts.pop(entry.layer))

    def _install(self, parameter: str, value: QuantizedWeight | Tensor) -> None:
        if not isinstance(value, QuantizedWeight):
            self._parameter(parameter).data.copy_(value)
            return
        replace_weight(cast(LinearLayer, self.model.get_submodule(parameter.removesuffix(".weight"))), value)
        if self.pack:
            pack(parameter.removesuffix(".weight"), value)

    def _parameter(self, path: str) -> nn.Parameter:
        """A parameter, in memory."""
        parameter = self.model.get_parameter(path)
        if parameter.is_meta:
            parameter = nn.Parameter(torch.empty_like(parameter, device=self.device), requires_grad=False)
            owner, _, leaf = path.rpartition(".")
            setattr(self.model.get_submodule(owner), leaf, parameter)
        return parameter


def _stacklevel() -> int:
    """How far above the function that calls this the caller of the package is, whose line a warning should name."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals["__name__"].startswith(f"{__package__}."):
        level, frame = level + 1, frame.f_back
    return level


def _taken(piece: QuantizedWeight | Tensor, rows: "slice | Tensor") -> QuantizedWeight | Tensor:
    device = piece.canonical()[0].device if isinstance(piece, QuantizedWeight) else piece.device
    rows = rows.to(device) if isinstance(rows, Tensor) else rows
    return piece.rows(rows) if isinstance(piece, QuantizedWeight) else piece[rows]


def _columns(piece: QuantizedWeight | Tensor, columns: range, name: str) -> QuantizedWeight | Tensor:
    if not isinstance(piece, QuantizedWeight):
        return piece[:, columns.start : columns.stop]
    try:
        return piece.columns(columns)
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from None
