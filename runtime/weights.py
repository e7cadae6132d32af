"""From a checkpoint's files to a model's parameters, by name, each tensor exactly once.

`checkpoint_map` is the one statement of how official InternVL-Chat checkpoints name and pack their tensors. Loading,
`expected_tensors` and the export of a trained model all read it.
"""

import json
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

from .config import DecoderConfig, InternVLConfig, VisionConfig, load_config
from .errors import CheckpointError
from .models.internvl import InternVLModel

NANO = Path(__file__).parent / "assets" / "nano"
_CHECKPOINT_FILES = ["*.json", "*.safetensors", "tokenizer.model", "merges.txt"]


@dataclass(frozen=True)
class Slot:
    """Where one checkpoint tensor goes: rows `start..` of a parameter, or nowhere.

    `parameter` None means that the tensor belongs to the checkpoint but not to the part of the model that runs.
    `kv_groups` > 0: the rows are InternLM2's `wqkv`, interleaved by that many KV heads, and become [q | k | v].
    `optional`: a checkpoint may lack it.
    """

    shape: tuple[int, ...]
    parameter: str | None
    start: int = 0
    kv_groups: int = 0
    optional: bool = False


def expected_tensors(config: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors a checkpoint must hold. `config`: a folder or a decoded `config.json`."""
    parsed = config if isinstance(config, InternVLConfig) else load_config(config)
    return {name: slot.shape for name, slot in checkpoint_map(parsed).items() if not slot.optional}


def checkpoint_map(config: InternVLConfig) -> dict[str, Slot]:
    """Every tensor of an official InternVL-Chat checkpoint and its place in `InternVLModel`."""
    slots: dict[str, Slot] = {}
    for name, slot in _vision_map(config.vision, config.vision_depth).items():
        slots[f"vision_model.{name}"] = slot
    shuffled, hidden = config.shuffle_factor**2 * config.vision.hidden_size, config.llm.hidden_size
    for key, shape, parameter in (
        ("0.weight", (shuffled,), "norm.weight"),
        ("0.bias", (shuffled,), "norm.bias"),
        ("1.weight", (hidden, shuffled), "linear_1.weight"),
        ("1.bias", (hidden,), "linear_1.bias"),
        ("3.weight", (hidden, hidden), "linear_2.weight"),
        ("3.bias", (hidden,), "linear_2.bias"),
    ):
        slots[f"mlp1.{key}"] = Slot(shape, f"projector.{parameter}")
    for name, slot in _decoder_map(config.llm).items():
        slots[f"language_model.{name}"] = slot
    return slots


def _vision_map(config: VisionConfig, depth: int) -> dict[str, Slot]:
    """Tensors of the ViT; blocks beyond `depth` are known but have no place in the model."""
    hidden, wide = config.hidden_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.class_embedding": (1, 1, hidden),
        "embeddings.patch_embedding.weight": (hidden, 3, config.patch_size, config.patch_size),
        "embeddings.patch_embedding.bias": (hidden,),
        "embeddings.position_embedding": (1, 1 + config.grid_size**2, hidden),
    }
    block: dict[str, tuple[int, ...]] = {"norm1.weight": (hidden,), "norm2.weight": (hidden,)}
    if config.norm_type == "layer_norm":
        block |= {"norm1.bias": (hidden,), "norm2.bias": (hidden,)}
    block["attn.qkv.weight"] = (3 * hidden, hidden)
    if config.qkv_bias:
        block["attn.qkv.bias"] = (3 * hidden,)
    if config.qk_normalization:
        block |= {"attn.q_norm.weight": (hidden,), "attn.k_norm.weight": (hidden,)}
    block |= {
        "attn.proj.weight": (hidden, hidden),
        "attn.proj.bias": (hidden,),
        "mlp.fc1.weight": (wide, hidden),
        "mlp.fc1.bias": (wide,),
        "mlp.fc2.weight": (hidden, wide),
        "mlp.fc2.bias": (hidden,),
        "ls1": (hidden,),
        "ls2": (hidden,),
    }
    slots = {name: Slot(shape, f"vision_model.{name}") for name, shape in shapes.items()}
    for layer in range(config.num_hidden_layers):
        for key, shape in block.items():
            name = f"encoder.layers.{layer}.{key}"
            slots[name] = Slot(shape, f"vision_model.{name}" if layer < depth else None)
    return slots


def _decoder_map(config: DecoderConfig) -> dict[str, Slot]:
    """Tensors of the language model, without their `language_model.` prefix."""
    hidden, wide = config.hidden_size, config.intermediate_size
    q_rows = config.num_attention_heads * config.head_dim
    kv_rows = config.num_key_value_heads * config.head_dim
    qkv_rows = q_rows + 2 * kv_rows

    def projection(
        key: str, rows: int, columns: int, target: str, bias: bool, start: int = 0, kv_groups: int = 0
    ) -> dict[str, Slot]:
        slots = {f"{key}.weight": Slot((rows, columns), f"{target}.weight", start, kv_groups)}
        if bias:
            slots[f"{key}.bias"] = Slot((rows,), f"{target}.bias", start, kv_groups)
        return slots

    def separate_qkv(prefix: str) -> dict[str, Slot]:
        slots: dict[str, Slot] = {}
        start = 0
        for key, rows in (("q_proj", q_rows), ("k_proj", kv_rows), ("v_proj", kv_rows)):
            slots |= projection(f"{prefix}.{key}", rows, hidden, "attention.qkv", config.qkv_bias, start=start)
            start += rows
        return slots

    layer: dict[str, Slot] = {}
    if config.architecture == "InternLM2ForCausalLM":
        top = ("model.tok_embeddings.weight", "model.norm.weight", "output.weight")
        norms = ("attention_norm", "ffn_norm")
        groups = config.num_key_value_heads
        layer |= projection("attention.wqkv", qkv_rows, hidden, "attention.qkv", config.qkv_bias, kv_groups=groups)
        layer |= projection("attention.wo", hidden, q_rows, "attention.o", config.output_bias)
        gate, up, down = "feed_forward.w1", "feed_forward.w3", "feed_forward.w2"
    else:
        top = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
        norms = ("input_layernorm", "post_attention_layernorm")
        if config.architecture == "Phi3ForCausalLM":
            layer |= projection("self_attn.qkv_proj", qkv_rows, hidden, "attention.qkv", config.qkv_bias)
        else:
            layer |= separate_qkv("self_attn")
        if config.qk_norm:
            for key in ("q_norm", "k_norm"):
                layer[f"self_attn.{key}.weight"] = Slot((config.head_dim,), f"attention.{key}.weight")
        layer |= projection("self_attn.o_proj", hidden, q_rows, "attention.o", config.output_bias)
        gate, up, down = "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"
    if config.architecture == "Phi3ForCausalLM":
        layer |= projection("mlp.gate_up_proj", 2 * wide, hidden, "mlp.gate_up", False)
    else:
        layer |= projection(gate, wide, hidden, "mlp.gate_up", False)
        layer |= projection(up, wide, hidden, "mlp.gate_up", False, start=wide)
    layer |= projection(down, hidden, wide, "mlp.down", False)
    layer[f"{norms[0]}.weight"] = Slot((hidden,), "attention_norm.weight")
    layer[f"{norms[1]}.weight"] = Slot((hidden,), "mlp_norm.weight")

    vocabulary = (config.vocab_size, hidden)
    slots = {
        top[0]: Slot(vocabulary, "language_model.embedding"),
        top[1]: Slot((hidden,), "language_model.norm.weight"),
        top[2]: Slot(vocabulary, "language_model.head.weight", optional=config.tie_word_embeddings),
    }
    for index in range(config.num_hidden_layers):
        for key, slot in layer.items():
            place = f"language_model.layers.{index}.{slot.parameter}"
            slots[f"model.layers.{index}.{key}"] = Slot(slot.shape, place, slot.start, slot.kv_groups)
    return slots


def pack_order(rows: int, kv_groups: int, config: DecoderConfig) -> Tensor:
    """(rows,) int64: which row of InternLM2's `wqkv` each row of [q | k | v] is.

    The file holds one group per KV head: its query heads, then its key head, then its value head.
    """
    group = config.queries_per_kv_head
    packed = torch.arange(rows).view(kv_groups, group + 2, config.head_dim)
    q, k, v = packed[:, :group], packed[:, group], packed[:, group + 1]
    return torch.cat((q.flatten(), k.flatten(), v.flatten()))


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


def load_model(
    folder: Path, config: InternVLConfig, *, dtype: torch.dtype, device: torch.device, progress: bool | None = None
) -> InternVLModel:
    """Build the model of a checkpoint folder, its parameters in `dtype` on `device`.

    Shards are read one after the other, memory-mapped, so that the host holds at most one of them.
    progress: show a bar; None means on a terminal only. Raises `CheckpointError` naming tensors and files.
    """
    shards = _find_shards(folder)
    tensors = _read_shards(shards, progress)
    if shards[0].suffix == ".safetensors":
        _check_headers(shards, config)
    return build_model(config, tensors, dtype=dtype, device=device, source=str(folder))


def build_model(
    config: InternVLConfig,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    dtype: torch.dtype,
    device: torch.device,
    source: str = "checkpoint",
) -> InternVLModel:
    """Build the model from (checkpoint name, tensor) pairs. Each expected tensor must come exactly once."""
    with torch.device("meta"):
        model = InternVLModel(config).to(dtype)
    model.to_empty(device=device)
    model.requires_grad_(False).eval()
    parameters = dict(model.named_parameters())
    inventory = _Inventory(config)
    for name, tensor in tensors:
        slot = inventory.take(name, tuple(tensor.shape), source)
        if slot is None or slot.parameter is None:
            continue
        rows = slice(slot.start, slot.start + slot.shape[0])
        if slot.kv_groups:
            tensor = tensor[pack_order(slot.shape[0], slot.kv_groups, config.llm)]
        parameters[slot.parameter].data[rows].copy_(tensor)
    inventory.check_complete(source)
    if config.llm.tie_word_embeddings and not inventory.seen & {
        "language_model.lm_head.weight",
        "language_model.output.weight",
    }:
        model.language_model.head.weight = model.language_model.embedding
    return model


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

    def __init__(self, config: InternVLConfig) -> None:
        self.slots = checkpoint_map(config)
        self.seen: set[str] = set()
        self.unexpected: list[str] = []

    def take(self, name: str, shape: tuple[int, ...], source: str) -> Slot | None:
        """The slot of a tensor, None for one that has none. Raises for one that came before or has another shape."""
        slot = self.slots.get(name)
        if slot is None:
            if not name.endswith("rotary_emb.inv_freq"):  # old LLaMA files store this constant
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


def _check_headers(shards: list[Path], config: InternVLConfig) -> None:
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
