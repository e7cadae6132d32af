"""The parameters of a checkpoint one by one, straight from its files: none stays in memory, and none is forgotten."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..runtime.backends.manifest import Parameters
from ..runtime.checkpoint_map import TOWER_PREFIX, canonical_name, pack_order
from ..runtime.config import InternVLConfig, LlavaConfig, ModelConfig
from ..runtime.errors import CheckpointError
from ..runtime.inventory import Entry, Inventory
from ..runtime.layers.linear import LinearLayer, replace_weight
from ..runtime.quantization.formats.detect import stored_format
from ..runtime.quantization.weight import QuantizedWeight, concatenate
from ..runtime.weights import find_shards, open_safetensors, read_pickled


class Checkpoint:
    """The tensors of a checkpoint folder by the parameters of the model that they make.

    Raises `CheckpointError`, before any weight is read, where names or shapes are not those of the config.
    """

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        self.folder = folder
        self.config = config
        self.stored = stored_format(folder)
        shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, tuple[Path, str]] = {}  # name -> its file, and what it is called there
        self._pickled: tuple[Path, dict[str, Tensor]] | None = None
        for shard, prefix in _all_shards(folder, config):
            for name, shape in self._shapes(shard):
                shapes[prefix + name] = shape
                self._files[canonical_name(prefix + name, config)] = (shard, name)
        inventory = Inventory(config, self.stored, shapes if self.stored is not None else None)
        for name, shape in shapes.items():
            inventory.take(name, shape, str(folder))
        inventory.check_complete(str(folder))
        self._entries: dict[str, list[tuple[str, Entry]]] = {}
        for name, entry in inventory.entries.items():
            if name in self._files and entry.slot.parameter is not None:
                self._entries.setdefault(entry.slot.parameter, []).append((name, entry))
        self._digests: dict[str, str] = {}

    def parameter(self, path: str) -> Tensor | QuantizedWeight:
        """The value of a parameter of the model, as it is stored."""
        entries = self._entries.get(self._source(path))
        if not entries:
            raise CheckpointError(f"{self.folder}: holds nothing for {path}")
        pieces: dict[int, Tensor | QuantizedWeight] = {}
        layers: dict[str, dict[str, Tensor]] = {}
        for name, entry in entries:
            if entry.part is None:
                pieces[entry.slot.start] = self._ordered(self._read(name), entry)
            else:
                layers.setdefault(entry.layer, {})[entry.part] = self._read(name)
        for _, entry in entries:
            if entry.layer in layers:
                assert self.stored is not None
                rows, columns = entry.slot.shape
                method = self.stored.methods(entry.module)[0]
                value = self.stored.read(entry.layer, method, (rows, columns), layers.pop(entry.layer))
                pieces[entry.slot.start] = self._ordered(value, entry)
        ordered = [pieces[start] for start in sorted(pieces)]
        plain = [piece for piece in ordered if isinstance(piece, Tensor)]
        if len(plain) == len(ordered):
            return plain[0] if len(plain) == 1 else torch.cat(plain)
        return concatenate(ordered)

    def dense(self, path: str) -> Tensor:
        """The parameter as numbers, dequantised where it is stored in codes."""
        value = self.parameter(path)
        return value.dequantize() if isinstance(value, QuantizedWeight) else value

    def fill(self, module: nn.Module, path: str, dtype: torch.dtype) -> None:
        """Give the parameters of a module at `path` of the model, which have no memory, their values.

        What the checkpoint holds quantised becomes the module's weight in canonical form.
        """
        for name, parameter in list(module.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            value = self.parameter(f"{path}.{name}" if path else name)
            layer = module.get_submodule(owner)
            if isinstance(value, QuantizedWeight):
                replace_weight(cast(LinearLayer, layer), value)
                continue
            stored = nn.Parameter(value.to(dtype).reshape(parameter.shape), requires_grad=False)
            if isinstance(layer, nn.ParameterDict):
                layer[leaf] = stored
            else:
                setattr(layer, leaf, stored)

    def parameters(self) -> list[str]:
        """The parameters of the model that the checkpoint makes."""
        return list(self._entries)

    def methods(self) -> dict[str, str]:
        """Module path -> method, of the linear layers that the checkpoint holds quantised."""
        if self.stored is None:
            return {}
        quantised = {entry.module for entries in self._entries.values() for _, entry in entries if entry.part}
        return {module: self.stored.methods(module)[0] for module in quantised}

    def names(self, parameters: set[str]) -> set[str]:
        """The checkpoint's tensors that make some parameters of the model."""
        return {name for path in parameters for name, _ in self._entries.get(self._source(path), [])}

    def read_all(self, parameters: set[str]) -> Parameters:
        """`consumed` of some parameters after reading what makes them."""
        for name in self.names(parameters):
            if name not in self._digests:
                self._read(name)
        return self.consumed(parameters)

    def unused(self) -> set[str]:
        """The checkpoint's tensors that are part of the model that runs and have not been read."""
        return {name for entries in self._entries.values() for name, _ in entries} - self._digests.keys()

    def consumed(self, parameters: set[str]) -> Parameters:
        """Count and hash of the tensors that make some parameters, all of which have been read."""
        names = sorted(self.names(parameters))
        missing = [name for name in names if name not in self._digests]
        if missing:
            raise CheckpointError(f"{self.folder}: {len(missing)} tensors were not exported, first {missing[0]}")
        lines = "".join(f"{name} {self._digests[name]}\n" for name in names)
        return Parameters(len(names), hashlib.sha256(lines.encode()).hexdigest())

    def _source(self, path: str) -> str:
        """Whose tensors make a parameter: its own, or the embedding's for a head that is tied to it."""
        if path == "language_model.head.weight" and path not in self._entries:
            return "language_model.embedding"
        return path

    def _ordered(self, value: Tensor | QuantizedWeight, entry: Entry) -> Tensor | QuantizedWeight:
        if not entry.slot.kv_groups:
            return value
        order = pack_order(entry.slot.shape[0], entry.slot.kv_groups, cast(InternVLConfig, self.config).llm)
        return value.rows(order) if isinstance(value, QuantizedWeight) else value[order]

    def _shapes(self, shard: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
        if shard.suffix != ".safetensors":
            yield from ((name, tuple(tensor.shape)) for name, tensor in self._unpickled(shard).items())
            return
        with open_safetensors(shard) as file:
            for name in file.keys():
                yield name, tuple(file.get_slice(name).get_shape())

    def _read(self, name: str) -> Tensor:
        shard, stored_name = self._files[name]
        if shard.suffix == ".safetensors":
            # Opened for each tensor: pages of a file that stays mapped count as this process's memory.
            with open_safetensors(shard) as file:
                tensor: Tensor = file.get_tensor(stored_name)
        else:
            tensor = self._unpickled(shard)[stored_name]
        if name not in self._digests:
            self._digests[name] = _digest(tensor)
        return tensor

    def _unpickled(self, shard: Path) -> dict[str, Tensor]:
        if self._pickled is None or self._pickled[0] != shard:
            self._pickled = (shard, read_pickled(shard))
        return self._pickled[1]


def _all_shards(folder: Path, config: ModelConfig) -> Iterator[tuple[Path, str]]:
    """Files with what stands before their names: LLaVA's vision half may be a checkpoint of its own."""
    shards = find_shards(folder)
    yield from ((shard, "") for shard in shards)
    if isinstance(config, LlavaConfig) and (folder / config.tower).is_dir():
        yield from ((shard, TOWER_PREFIX) for shard in find_shards(folder / config.tower))


def _digest(tensor: Tensor) -> str:
    """SHA-256 over dtype, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    digest.update(cast(Any, tensor.contiguous().reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()
