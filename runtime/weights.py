"""From a checkpoint's files to a model's parameters, by name, each tensor exactly once."""

import json
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import chain
from pathlib import Path
from types import EllipsisType
from typing import Any, cast, overload

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

from .checkpoint_map import TOWER_PREFIX, canonical_name, checkpoint_map, pack_order
from .config import (
    ORIGINAL_C,
    ContrastiveConfig,
    InternVLConfig,
    LlavaConfig,
    ModelConfig,
    load_any_config,
)
from .errors import CheckpointError, UnsupportedError
from .inventory import Inventory
from .layers.parallel import WHOLE, Part, TensorParallel
from .model_builder import ModelBuilder
from .models.contrastive import ContrastiveModel
from .models.internvl import InternVLModel
from .models.llava import LlavaModel
from .models.vision_tower import VisionTower
from .quantization.config import QuantizationConfig
from .quantization.formats.base import Format
from .quantization.formats.detect import stored_format
from .quantization.weight import QuantizedWeight

Model = InternVLModel | ContrastiveModel | VisionTower

NANO = Path(__file__).parent / "assets" / "nano"
_CHECKPOINT_FILES = ["*.json", "*.safetensors", "tokenizer.model", "merges.txt"]


def expected_tensors(config: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors a checkpoint must hold. `config`: a folder or a decoded `config.json`.

    Of a quantised checkpoint they are those that its `quantization_config` asks for; a parsed config has none.
    """
    parsed, stored = (
        (config, None) if isinstance(config, ModelConfig) else (load_any_config(config), stored_format(config))
    )
    return {name: entry.shapes[0] for name, entry in Inventory(parsed, stored).entries.items() if not entry.optional}


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
    folder: Path,
    config: InternVLConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    progress: bool | None = None,
    quantization: QuantizationConfig | None = None,
    part: Part = ...,
    parallel: TensorParallel | None = ...,
) -> InternVLModel: ...


@overload
def load_model(
    folder: Path,
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    progress: bool | None = None,
    quantization: QuantizationConfig | None = None,
    part: Part = ...,
    parallel: TensorParallel | None = ...,
) -> Model: ...


def load_model(
    folder: Path,
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    progress: bool | None = None,
    quantization: QuantizationConfig | None = None,
    part: Part = WHOLE,
    parallel: TensorParallel | None = None,
) -> Model:
    """Build the model of a checkpoint folder, its parameters in `dtype` on `device`.

    Shards are read one after the other, memory-mapped, so that the host holds at most one of them.
    progress: show a bar; None means on a terminal only. quantization: as in `build_model`; what the folder holds
    quantised stays as it is. part: what of the model to load; of the rest only names and shapes are read. parallel: the
    other ranks of its language half. Raises `CheckpointError` naming tensors and files.
    """
    shards = find_shards(folder)
    tower = _find_tower(folder, config, shards)
    stored = stored_format(folder)
    names = _all_names(shards) | {TOWER_PREFIX + name for name in _all_names(tower)} if stored is not None else None
    absent = Inventory(config, stored, names).absent(part)
    tensors = chain(
        _read_shards(shards, progress, lambda name: canonical_name(name, config) not in absent),
        _read_shards(tower, progress, lambda name: name not in absent, TOWER_PREFIX) if tower else (),
    )
    if all(shard.suffix == ".safetensors" for shard in (*shards, *tower)):
        check_headers(shards, Inventory(config, stored, names), tower)
    return build_model(
        config,
        tensors,
        dtype=dtype,
        device=device,
        source=str(folder),
        quantization=quantization,
        stored=stored,
        names=names,
        part=part,
        parallel=parallel,
    )


@overload
def build_model(
    config: InternVLConfig,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    dtype: torch.dtype,
    device: torch.device,
    source: str = ...,
    quantization: QuantizationConfig | None = ...,
    stored: Format | None = ...,
    names: Collection[str] | None = ...,
    pack: bool = ...,
    part: Part = ...,
    parallel: TensorParallel | None = ...,
) -> InternVLModel: ...


@overload
def build_model(
    config: ModelConfig,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    dtype: torch.dtype,
    device: torch.device,
    source: str = ...,
    quantization: QuantizationConfig | None = ...,
    stored: Format | None = ...,
    names: Collection[str] | None = ...,
    pack: bool = ...,
    part: Part = ...,
    parallel: TensorParallel | None = ...,
) -> Model: ...


def build_model(
    config: ModelConfig,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    dtype: torch.dtype,
    device: torch.device,
    source: str = "checkpoint",
    quantization: QuantizationConfig | None = None,
    stored: Format | None = None,
    names: Collection[str] | None = None,
    pack: bool = True,
    part: Part = WHOLE,
    parallel: TensorParallel | None = None,
) -> Model:
    """Build the model from (checkpoint name, tensor) pairs. Each expected tensor must come exactly once.

    quantization: round weights to nearest as they come, so that a model never stands in `dtype` as a whole.
    stored: the format of the tensors that are quantised already; names: of all tensors that will come, which otherwise
    are gathered first. pack: see `quantize_model`. part, parallel: as in `load_model`.
    """
    if stored is not None and names is None:
        tensors = list(tensors)
        names = [name for name, _ in tensors]
    with torch.device("meta"):
        model = make_model(config, part, parallel).to(dtype)
        whole = model if part == WHOLE else make_model(config)
    model.requires_grad_(False).eval()
    inventory = Inventory(config, stored, names)
    builder = ModelBuilder(
        model, inventory, quantization or QuantizationConfig(), dtype=dtype, device=device, pack=pack, whole=whole
    )
    for name, tensor in tensors:
        entry = inventory.take(name, tuple(tensor.shape), source)
        if entry is not None and entry.slot.parameter is not None:
            builder.put(name, entry, tensor)
    inventory.check_complete(source)
    builder.finish()
    return model


def make_model(config: ModelConfig, part: Part = WHOLE, parallel: TensorParallel | None = None) -> Model:
    """The model of a config, or a part of it, its parameters not initialised."""
    if isinstance(config, InternVLConfig):
        model = LlavaModel(config) if isinstance(config, LlavaConfig) else InternVLModel(config)
        if part != WHOLE:
            model.reduce_to(part, parallel)
        return model
    if part != WHOLE:
        raise UnsupportedError("only chat models have two halves that can be apart")
    return ContrastiveModel(config) if isinstance(config, ContrastiveConfig) else VisionTower(config)


def checkpoint_tensors(model: InternVLModel) -> Iterator[tuple[str, Tensor]]:
    """The model's parameters under the checkpoint's names and packing: the inverse of `build_model`.

    Quantised weights must not be packed; they come in vitrail's own layout.
    """
    for name, slot in checkpoint_map(model.config).items():
        if slot.parameter is None:
            continue
        path, _, leaf = slot.parameter.rpartition(".")
        value = getattr(model.get_submodule(path), leaf)
        if slot.optional and value is model.language_model.embedding:
            continue
        rows: slice | Tensor | EllipsisType = slot.rows
        if slot.kv_groups:
            rows = slot.start + pack_order(slot.shape[0], slot.kv_groups, model.config.llm).argsort()
        if not isinstance(value, QuantizedWeight):
            yield name, value.data[rows].reshape(slot.shape).contiguous()
            continue
        for part, tensor in value.rows(cast(slice | Tensor, rows)).named_buffers():
            yield f"{name}.{part}", tensor


def _all_names(shards: list[Path]) -> set[str]:
    """Of all tensors of a checkpoint, without reading any."""
    names: set[str] = set()
    for shard in shards:
        if shard.suffix == ".safetensors":
            with open_safetensors(shard) as file:
                names.update(file.keys())
        else:
            names.update(read_pickled(shard))
    return names


def find_shards(folder: Path) -> list[Path]:
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
    if (folder / ORIGINAL_C).is_file():
        return [folder / ORIGINAL_C]
    raise CheckpointError(f"{folder}: no model.safetensors or pytorch_model.bin, nor an index of shards")


def _find_tower(folder: Path, config: ModelConfig, shards: list[Path]) -> list[Path]:
    """The files of LLaVA's vision half where it is a checkpoint of its own, in a folder of its name."""
    if not isinstance(config, LlavaConfig) or any(name.startswith(TOWER_PREFIX) for name in _all_names(shards)):
        return []
    if not (folder / config.tower).is_dir():
        raise CheckpointError(f"{folder}: its files lack the vision half; put the folder of {config.tower} into it")
    return find_shards(folder / config.tower)


def check_headers(shards: list[Path], inventory: Inventory, tower: Collection[Path] = ()) -> None:
    """Compare names and shapes of all safetensors headers with the config before any weight is read."""
    for shard in (*shards, *tower):
        prefix = TOWER_PREFIX if shard in tower else ""
        with open_safetensors(shard) as file:
            names: list[str] = file.keys()
            for name in names:
                inventory.take(prefix + name, tuple(file.get_slice(name).get_shape()), str(shard))
    inventory.check_complete(str(shards[0].parent))


def open_safetensors(shard: Path) -> Any:
    try:
        return safe_open(shard, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{shard}: not a readable safetensors file ({error})") from None


def _read_shards(
    shards: list[Path], progress: bool | None, wanted: Callable[[str], bool], prefix: str = ""
) -> Iterator[tuple[str, Tensor]]:
    """Tensors by name, `prefix` before it; those not wanted come without their values."""
    bar = tqdm(shards, desc="loading", unit="shard", disable=None if progress is None else not progress)
    for shard in bar:
        if shard.suffix == ".safetensors":
            with open_safetensors(shard) as file:
                names: list[str] = file.keys()
                for name in names:
                    if wanted(prefix + name):
                        yield prefix + name, file.get_tensor(name)
                    else:
                        yield prefix + name, torch.empty(file.get_slice(name).get_shape(), device="meta")
        else:
            yield from ((prefix + name, tensor) for name, tensor in read_pickled(shard).items())


def read_pickled(shard: Path) -> dict[str, Tensor]:
    """Tensors of a `.bin` or `.pth` shard; nothing but tensors is unpickled."""
    try:
        # Files from before PyTorch 1.6 are no zip archives and cannot be mapped.
        mapped = zipfile.is_zipfile(shard)
        values = torch.load(shard, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch raises many kinds for a broken or unsafe file
        raise CheckpointError(f"{shard}: not a readable weights file ({type(error).__name__})") from None
    if shard.suffix == ".pth" and isinstance(values, dict):  # some are wrapped as training frameworks do
        values = values.get("module", values)
    flat = isinstance(values, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in values.items())
    if not flat:
        raise CheckpointError(f"{shard}: does not hold a flat map of names to tensors")
    return values
