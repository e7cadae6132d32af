"""One part of a model in memory at a time: its parameters from the checkpoint's files, all others without memory.

For work that goes through a model block by block, whatever the model's size.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint_map import checkpoint_map, pack_order
from .config import InternVLConfig
from .inventory import Inventory
from .models.internvl import InternVLModel
from .weights import check_headers, find_shards, make_model, open_safetensors, read_pickled


class PartLoader:
    """The model of a checkpoint folder on the meta device, and its files.

    A part is a path of the model ("vision_model.encoder.layers.3", "language_model.embedding"). Raises
    `CheckpointError` where names or shapes of safetensors headers are not those of the config.
    """

    def __init__(self, folder: Path, config: InternVLConfig, *, dtype: torch.dtype, device: torch.device) -> None:
        self.config = config
        self.dtype = dtype
        self.device = device
        self.slots = checkpoint_map(config)
        with torch.device("meta"):
            model = make_model(config).to(dtype).requires_grad_(False).eval()
        assert isinstance(model, InternVLModel)
        self.model = model
        self._shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        self.shards = find_shards(folder)
        if self.shards[0].suffix == ".safetensors":
            check_headers(self.shards, Inventory(config, None))
        self._files: dict[str, Any] = {}  # name -> the open file that holds it: mapped, not read
        for shard in self.shards:
            file = open_safetensors(shard) if shard.suffix == ".safetensors" else _Pickled(shard)
            self._files |= dict.fromkeys(file.keys(), file)
        self._tied = config.llm.tie_word_embeddings and not self._names("language_model.head")

    def load(self, *parts: str) -> None:
        """Give the parameters of parts their values, on the device."""
        for part in parts:
            if part == "language_model.head" and self._tied:
                self._set("language_model.head.weight", self._filled("language_model.embedding"))
                continue
            for parameter in self._parameters(part):
                self._set(parameter, self._filled(parameter))

    def release(self, *parts: str) -> None:
        """Free the memory of parts; their modules may have been changed since."""
        for part in parts:
            for parameter in self._parameters(part):
                self._set(parameter, torch.empty(self._shapes[parameter], dtype=self.dtype, device="meta"))

    def names(self, *parts: str) -> list[str]:
        """The checkpoint's tensors that belong to parts."""
        return [name for part in parts for name in self._names(part)]

    def unused(self) -> list[str]:
        """The checkpoint's tensors that have no place in the model that runs."""
        return [name for name, slot in self.slots.items() if slot.parameter is None and name in self._files]

    def tensor(self, name: str) -> Tensor:
        """One of the checkpoint's tensors, as it is in the file."""
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor

    def _names(self, part: str) -> list[str]:
        return [
            name for name, slot in self.slots.items() if _within(slot.parameter or "", part) and name in self._files
        ]

    def _parameters(self, part: str) -> list[str]:
        return [name for name in self._shapes if _within(name, part)]

    def _filled(self, parameter: str) -> Tensor:
        values = torch.empty(self._shapes[parameter], dtype=self.dtype, device=self.device)
        for name in self._names(parameter):
            slot, tensor = self.slots[name], self.tensor(name)
            if slot.kv_groups:
                tensor = tensor[pack_order(slot.shape[0], slot.kv_groups, self.config.llm)]
            values[slot.rows].copy_(tensor)
        return values

    def _set(self, parameter: str, values: Tensor) -> None:
        path, _, leaf = parameter.rpartition(".")
        owner = self.model.get_submodule(path)
        if isinstance(getattr(owner, leaf, None), nn.Module):  # a quantised weight: a name changes kind only when free
            delattr(owner, leaf)
        setattr(owner, leaf, nn.Parameter(values, requires_grad=False))


class _Pickled:
    """A `.bin` file with the face of a safetensors file."""

    def __init__(self, shard: Path) -> None:
        self._tensors = read_pickled(shard)

    def keys(self) -> list[str]:
        return list(self._tensors)

    def get_tensor(self, name: str) -> Tensor:
        return self._tensors[name]


def _within(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")
