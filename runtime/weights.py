"""From a checkpoint's files to a model's parameters, by name, each tensor exactly once."""

import json
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, overload

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from .checkpoint_map import Slot, checkpoint_map, pack_order
from .config import ContrastiveConfig, InternVLConfig, ModelConfig, VisionConfig, load_any_config
from .errors import CheckpointError
from .models.contrastive import ContrastiveModel
from .models.internvl import InternVLModel
from .models.vision_tower import VisionTower

Model = InternVLModel | ContrastiveModel | VisionTower

NANO = Path(__file__).parent / "assets" / "nano"
_CHECKPOINT_FILES = ["*.json", "*.safetensors", "tokenizer.model", "merges.txt"]


def expected_tensors(config: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors a checkpoint must hold. `config`: a folder or a decoded `config.json`."""
    parsed = config if isinstance(config, ModelConfig) else load_any_config(config)
    return {name: slot.shape for name, slot in checkpoint_map(parsed).items() if not slot.optional}


def resolve_checkpoint(model: str | Path, revision: str | None = None) -> Path:
    """The local folder of a model: a folder, `"nano"`, or a hub id, downloaded or found in the hub's cache."""
    name = str(model)
    if revision is not None and (name == "nano" or Path(model).is_dir()):
        raise CheckpointError(f"{name}: revision={revision!r} goes with a hub id, not with a local folder")
    if name == "nano":
        return NANO
    if not name.strip():
        raise CheckpointError("the model's name is empty: give a folder, a hub id or nano")
    try:
        path = Path(model).expanduser()
        if path.is_dir():
            return path
        exists = path.exists()
    except (OSError, RuntimeError) as error:  # a name too long, a home folder of nobody
        raise CheckpointError(f"{name}: no such folder ({error})") from None
    if exists:
        raise CheckpointError(f"{path}: is a file; give the checkpoint's folder")
    if isinstance(model, Path) or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise CheckpointError(f"{name}: no such folder (a hub id looks like owner/name)")
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=_CHECKPOINT_FILES))
        if not list(folder.glob("*.safetensors")):  # only then: many repositories hold their weights in both forms
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=[*_CHECKPOINT_FILES, "*.bin"]))
        return folder
    except GatedRepoError:
        raise CheckpointError(f"{name}: access to this model must be asked for on the hub, and a token given") from None
    except RevisionNotFoundError:
        raise CheckpointError(f"{name}: the hub has no revision {revision!r} of it") from None
    except (RepositoryNotFoundError, HFValidationError) as error:
        reason = type(error).__name__
        raise CheckpointError(f"{name}: no local folder and no such model on the hub ({reason})") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise CheckpointError(
            f"{name}: no local folder {path.absolute()}, not in the hub cache {HF_HUB_CACHE}, "
            f"and the hub cannot be reached ({type(error).__name__})"
        ) from None


@overload
def load_model(
    folder: Path, config: InternVLConfig, *, dtype: torch.dtype, device: torch.device, progress: bool | None = None
) -> InternVLModel: ...


@overload
def load_model(
    folder: Path, config: ModelConfig, *, dtype: torch.dtype, device: torch.device, progress: bool | None = None
) -> Model: ...


def load_model(
    folder: Path, config: ModelConfig, *, dtype: torch.dtype, device: torch.device, progress: bool | None = None
) -> Model:
    """Build the model of a checkpoint folder, its parameters in `dtype` on `device`.

    Shards are read one after the other, memory-mapped, so that the host holds at most one of them.
    progress: show a bar; None means on a terminal only. Raises `CheckpointError` naming tensors and files.
    """
    shards = _find_shards(folder)
    tensors = _read_shards(shards, progress)
    if shards[0].suffix == ".safetensors":
        _check_headers(shards, config)
    return build_model(config, tensors, dtype=dtype, device=device, source=str(folder))


@overload
def build_model(
    config: InternVLConfig,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    dtype: torch.dtype,
    device: torch.device,
    source: str = ...,
) -> InternVLModel: ...


@overload
def build_model(
    config: ModelConfig,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    dtype: torch.dtype,
    device: torch.device,
    source: str = ...,
) -> Model: ...


def build_model(
    config: ModelConfig,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    dtype: torch.dtype,
    device: torch.device,
    source: str = "checkpoint",
) -> Model:
    """Build the model from (checkpoint name, tensor) pairs. Each expected tensor must come exactly once."""
    with torch.device("meta"):
        model = make_model(config).to(dtype)
    model.to_empty(device=device)
    model.requires_grad_(False).eval()
    parameters = dict(model.named_parameters())
    inventory = _Inventory(config)
    for name, tensor in tensors:
        slot = inventory.take(name, tuple(tensor.shape), source)
        if slot is None or slot.parameter is None:
            continue
        if slot.kv_groups and isinstance(config, InternVLConfig):
            tensor = tensor[pack_order(slot.shape[0], slot.kv_groups, config.llm)]
        parameters[slot.parameter].data[slot.rows].copy_(tensor)
    inventory.check_complete(source)
    heads = {"language_model.lm_head.weight", "language_model.output.weight"}
    if isinstance(model, InternVLModel) and model.config.llm.tie_word_embeddings and not inventory.seen & heads:
        model.language_model.head.weight = model.language_model.embedding
    return model


def make_model(config: ModelConfig) -> Model:
    """The model of a config, its parameters not initialised."""
    if isinstance(config, ContrastiveConfig):
        return ContrastiveModel(config)
    return VisionTower(config) if isinstance(config, VisionConfig) else InternVLModel(config)


def checkpoint_tensors(model: InternVLModel) -> Iterator[tuple[str, Tensor]]:
    """The model's parameters under the checkpoint's names and packing: the inverse of `build_model`."""
    parameters = dict(model.named_parameters())
    for name, slot in checkpoint_map(model.config).items():
        if slot.parameter is None or slot.parameter not in parameters:
            continue
        rows = parameters[slot.parameter].data[slot.start : slot.start + slot.shape[0]]
        if slot.kv_groups:
            unpacked = torch.empty_like(rows)
            unpacked[pack_order(slot.shape[0], slot.kv_groups, model.config.llm)] = rows
            rows = unpacked
        yield name, rows.reshape(slot.shape).contiguous()


class _Inventory:
    """Which of a checkpoint's expected tensors have come, and which came that are not expected."""

    def __init__(self, config: ModelConfig) -> None:
        self.slots = checkpoint_map(config)
        self.seen: set[str] = set()
        self.unexpected: list[str] = []

    def take(self, name: str, shape: tuple[int, ...], source: str) -> Slot | None:
        """The slot of a tensor, None for one that has none. Raises for one that came before or has another shape."""
        slot = self.slots.get(name)
        if slot is None:
            if not name.endswith(("rotary_emb.inv_freq", "position_ids")):  # constants that old files store
                self.unexpected.append(name)
            return None
        if name in self.seen:
            raise CheckpointError(f"{source}: {name} occurs twice")
        self.seen.add(name)
        if shape != slot.shape:
            raise CheckpointError(f"{source}: {name} has shape {shape}, the config says {slot.shape}")
        return slot

    def check_complete(self, source: str) -> None:
        """Raises for everything that is missing or not expected, by name."""
        missing = [name for name, slot in self.slots.items() if name not in self.seen and not slot.optional]
        problems = []
        for kind, names in (("missing", missing), ("unexpected", self.unexpected)):
            if names:
                more = f" and {len(names) - 5} more" if len(names) > 5 else ""
                problems.append(f"{len(names)} tensors {kind}: {', '.join(names[:5])}{more}")
        if problems:
            raise CheckpointError(f"{source}: {'; '.join(problems)}")


def _find_shards(folder: Path) -> list[Path]:
    """The weight files of a folder, safetensors before `.bin`."""
    for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        index = folder / f"{stem}{suffix}.index.json"
        if index.exists():
            try:
                names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (ValueError, KeyError, AttributeError, TypeError):
                raise CheckpointError(f"{index}: not a valid index") from None
            # A shard lies beside its index: a path would let a checkpoint read other files.
            if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
                raise CheckpointError(f"{index}: not a valid index")
            shards = [folder / name for name in names]
            absent = [shard.name for shard in shards if not shard.is_file()]
            if absent:
                raise CheckpointError(f"{folder}: {len(absent)} shards missing: {', '.join(absent[:5])}")
            return shards
        if (folder / f"{stem}{suffix}").is_file():
            return [folder / f"{stem}{suffix}"]
    raise CheckpointError(f"{folder}: no model.safetensors or pytorch_model.bin, nor an index of shards")


def _check_headers(shards: list[Path], config: ModelConfig) -> None:
    """Compare names and shapes of all safetensors headers with the config before any weight is read."""
    inventory = _Inventory(config)
    for shard in shards:
        with _open_safetensors(shard) as file:
            names: list[str] = file.keys()
            for name in names:
                inventory.take(name, tuple(file.get_slice(name).get_shape()), str(shard))
    inventory.check_complete(str(shards[0].parent))


def _open_safetensors(shard: Path) -> Any:
    try:
        return safe_open(shard, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{shard}: not a readable safetensors file ({error})") from None


def _read_shards(shards: list[Path], progress: bool | None) -> Iterator[tuple[str, Tensor]]:
    bar = tqdm(shards, desc="loading", unit="shard", disable=None if progress is None else not progress)
    for shard in bar:
        if shard.suffix == ".safetensors":
            with _open_safetensors(shard) as file:
                names: list[str] = file.keys()
                for name in names:
                    yield name, file.get_tensor(name)
        else:
            yield from _read_pickled(shard).items()


def _read_pickled(shard: Path) -> dict[str, Tensor]:
    """Tensors of a `.bin` shard; nothing but tensors is unpickled."""
    try:
        # Files from before PyTorch 1.6 are no zip archives and cannot be mapped.
        mapped = zipfile.is_zipfile(shard)
        values = torch.load(shard, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch raises many kinds for a broken or unsafe file
        raise CheckpointError(f"{shard}: not a readable weights file ({type(error).__name__})") from None
    flat = isinstance(values, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in values.items())
    if not flat:
        raise CheckpointError(f"{shard}: does not hold a flat map of names to tensors")
    return values
