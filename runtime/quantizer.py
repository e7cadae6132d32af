"""`vitrail quantize`: a checkpoint to a quantised one, block by block.

The calibration prompts go through the model twice side by side, once through the blocks as they are and once through
the quantised ones, and only one block has memory for its weights at a time. What a block's linear layers see in the
first stream decides its scales; what comes out of the second at the end says how far the whole model has moved, without
the model ever having been in memory. Then, where memory allows, both checkpoints answer the prompts as a user would
have them answered.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from tqdm import tqdm

from ..kernels.residual import scaled_residual
from ..kernels.rope import rotary_table
from .block_quantizer import quantise_block, rounded_weight
from .calibration import CalibrationSet, prepare_examples, read_examples, watch
from .checkpoint_folder import CheckpointFolder
from .checkpoint_map import Slot, pack_order
from .comparison import Comparison, compare, distance
from .config import InternVLConfig, load_any_config
from .engine.processor import Processor
from .errors import CheckpointError, InvalidRequestError, UnsupportedError
from .image import ImageLimits
from .layers.rotary import inverse_frequencies
from .models.decoder import Layer
from .models.intern_vit import Block
from .options import read_device, read_dtype
from .part_loader import PartLoader
from .quantization.config import QuantizationConfig
from .quantization.model import connect, linear_layers, plan
from .quantization.weight import QuantizedWeight
from .quantization_report import render
from .tokenizer import Tokenizer, load_tokenizer
from .weights import resolve_checkpoint

METHODS = ("int8", "int8-weight", "int4", "fp8")
TILES_AT_ONCE = 4
MEASURES = ("visual_cosine", "logit_kl", "same_next_token")
COPIED = (".json", ".model", ".txt", ".jinja")  # suffixes of files that go along as they are
NOT_COPIED = ("config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json")


@dataclass
class Streams:
    """Activations of all prompts in host memory: as the model makes them, and as the quantised one does.

    One tensor a prompt. In the vision half (tiles, tokens, hidden), behind the projector (visual tokens, llm hidden),
    in the language half (tokens, llm hidden). `quantised` is `reference` itself as long as nothing is quantised.
    """

    reference: list[Tensor]
    quantised: list[Tensor]

    def apply(self, step: Callable[[int, Tensor], Tensor]) -> None:
        """One step of both streams, of modules that are not quantised."""
        _replace(self.reference, step)
        if self.quantised is not self.reference:
            _replace(self.quantised, step)

    def state(self) -> dict[str, Tensor]:
        """As `CheckpointFolder` keeps it."""
        streams = {"reference": self.reference}
        if self.quantised is not self.reference:
            streams["quantised"] = self.quantised
        return {f"{name}.{index}": x for name, stream in streams.items() for index, x in enumerate(stream)}

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor], count: int) -> "Streams":
        reference = [state[f"reference.{index}"] for index in range(count)]
        if "quantised.0" not in state:
            return cls(reference, reference)
        return cls(reference, [state[f"quantised.{index}"] for index in range(count)])


@dataclass(frozen=True)
class Options:
    """What `quantize_checkpoint` is told beside the methods.

    calibration: a folder of images or a `.jsonl`, None for the set that ships; of it `num_samples` examples.
    dtype: of all that is not quantised. answers: compare the answers of both checkpoints at the end.
    """

    calibration: str | Path | None = None
    num_samples: int = 32
    max_tiles: int = 6
    dtype: str = "bfloat16"
    device: str | None = None
    answers: bool = True
    progress: bool | None = None


def quantize_checkpoint(
    source: str | Path, target: str | Path, config: QuantizationConfig, options: Options | None = None
) -> dict[str, Any]:
    """Quantise the checkpoint `source` (folder, hub id or nano) into the new folder `target`; returns the report.

    A run that was killed goes on where it stood. Raises a `VitrailError` for what cannot be done: before anything is
    written, unless it is a layer whose inputs are useless, or a full disk.
    """
    return _Run(source, Path(target).expanduser(), config, options or Options()).run()


class _Run:
    def __init__(self, source: str | Path, target: Path, config: QuantizationConfig, options: Options) -> None:
        self.config, self.options, self.target = config, options, target
        _check_methods(config)
        if target.exists():
            raise InvalidRequestError(f"{target}: exists already")
        self.name = str(source)
        self.folder = resolve_checkpoint(source)
        self.raw_config = _raw_config(self.folder)
        parsed = load_any_config(self.folder)
        if not isinstance(parsed, InternVLConfig):
            raise UnsupportedError(f"{source}: only chat models are quantised")
        dtype, device = read_dtype(options.dtype), read_device(options.device)
        self.tokenizer = load_tokenizer(self.folder)
        self.parts = PartLoader(self.folder, parsed, dtype=dtype, device=device)
        self.model = self.parts.model
        self.methods = plan(self.model, config, device)
        self.set = _calibration_set(parsed, self.tokenizer, options)
        self.context_id = cast(int, self.tokenizer.token_to_id(parsed.context_token))  # prompts have it
        self.stages = self._stages()
        self.output = CheckpointFolder(target, len(self.stages), self._settings())

    @torch.inference_mode()
    def run(self) -> dict[str, Any]:
        done = len(self.output.done)
        stages = list(self.stages.items())
        streams = self._tiles() if done == 0 else None
        if 0 < done < len(stages):
            streams = Streams.of_state(self.output.state(), len(self.set.prompts))
        show = None if self.options.progress is None else not self.options.progress
        with tqdm(total=len(stages), initial=done, desc="quantising", unit="block", disable=show) as bar:
            for name, stage in stages[done:]:
                assert streams is not None
                bar.set_postfix_str(name.removeprefix("vision_model.encoder.").removeprefix("language_model."))
                tensors, entry = stage(streams)
                last = name == stages[-1][0]
                self.output.finish_piece(tensors, {} if last else streams.state(), {"part": name, **entry})
                bar.update()
        return self._finish()

    # --- the parts, in the order the data meets them ---

    def _stages(self) -> dict[str, Callable[[Streams], tuple[dict[str, Tensor], dict[str, Any]]]]:
        stages: dict[str, Callable[[Streams], tuple[dict[str, Tensor], dict[str, Any]]]] = {
            "vision_model.embeddings": self._embeddings
        }
        for index in range(len(self.model.vision_model.encoder.layers)):
            part = f"vision_model.encoder.layers.{index}"
            stages[part] = lambda streams, part=part: self._block(part, streams)  # type: ignore[misc]
        stages |= {"projector": self._projector, "language_model.embedding": self._splice}
        for index in range(len(self.model.language_model.layers)):
            part = f"language_model.layers.{index}"
            stages[part] = lambda streams, part=part: self._block(part, streams)  # type: ignore[misc]
        stages["language_model.head"] = self._head
        return stages

    def _tiles(self) -> Streams:
        tiles = [torch.cat([torch.from_numpy(part) for part in prompt.tiles]) for prompt in self.set.prompts]
        return Streams(tiles, tiles)

    def _embeddings(self, streams: Streams) -> tuple[dict[str, Tensor], dict[str, Any]]:
        with self._loaded("vision_model.embeddings") as tensors:
            embed = self.model.vision_model.embeddings
            streams.apply(lambda _, tiles: self._over_tiles(embed, tiles))
            return tensors, {}

    def _projector(self, streams: Streams) -> tuple[dict[str, Tensor], dict[str, Any]]:
        with self._loaded("projector") as tensors:
            project = self.model.projector
            streams.apply(lambda _, x: self._over_tiles(lambda part: project(part[:, 1:]), x).flatten(0, 1))
            cosines = [
                torch.cosine_similarity(a.float(), b.float(), dim=-1)
                for a, b in zip(streams.reference, streams.quantised, strict=True)
            ]
            cosine = torch.cat(cosines)
            return tensors, {"visual_cosine": {"mean": float(cosine.mean()), "min": float(cosine.min())}}

    def _splice(self, streams: Streams) -> tuple[dict[str, Tensor], dict[str, Any]]:
        with self._loaded("language_model.embedding") as tensors:

            def splice(index: int, visual: Tensor) -> Tensor:
                ids = torch.tensor(self.set.prompts[index].token_ids, device=self.parts.device)
                return self.model.splice(ids, visual.to(self.parts.device), self.context_id).cpu()

            streams.apply(splice)
            return tensors, {}

    def _head(self, streams: Streams) -> tuple[dict[str, Tensor], dict[str, Any]]:
        parts = ("language_model.norm", "language_model.head")
        with self._loaded(*parts) as tensors:
            decoder = self.model.language_model
            kl: list[Tensor] = []
            equal: list[Tensor] = []
            for prompt, a, b in zip(self.set.prompts, streams.reference, streams.quantised, strict=True):
                ids = torch.tensor(prompt.token_ids)
                # What is asked and answered, behind the last image.
                first = int((ids == self.context_id).nonzero().max()) + 1
                logits = [decoder.logits(decoder.norm(x[first:].to(self.parts.device))).log_softmax(-1) for x in (a, b)]
                kl.append(distance(*logits).cpu())
                equal.append((logits[0].argmax(-1) == logits[1].argmax(-1)).cpu())
            tensors |= self._unused()
            same = float(torch.cat(equal).float().mean())
            return tensors, {"logit_kl": float(torch.cat(kl).mean()), "same_next_token": same}

    def _block(self, part: str, streams: Streams) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Run, quantise and write one block of either half."""
        self.parts.load(part)
        block = cast(Block | Layer, self.model.get_submodule(part))
        methods = {
            name.removeprefix(f"{part}."): method
            for name, method in self.methods.items()
            if name.startswith(f"{part}.")
        }
        if methods and streams.quantised is streams.reference:
            streams.quantised = list(streams.reference)  # from here on they are two
        with watch(block, sum(x.shape[:-1].numel() for x in streams.reference)) as statistics:
            _replace(streams.reference, lambda _, x: self._through(block, x))
        for name in methods:
            statistics[name].check(f"{self.name}: {part}.{name}")
        rows = quantise_block(block, methods, statistics, self.config, self.parts.dtype, part) if methods else []
        entry: dict[str, Any] = {"layers": rows}
        tensors = dict(self._named_tensors(part))
        for layer in linear_layers(block).values():
            if isinstance(layer.weight, QuantizedWeight):
                layer.weight.pack()
        connect(block)
        if streams.quantised is not streams.reference:
            _replace(streams.quantised, lambda _, x: self._through(block, x))
            entry["output_error"] = _relative(streams.reference, streams.quantised)
        self.parts.release(part)
        return tensors, entry

    # --- help ---

    def _through(self, block: Block | Layer, x: Tensor) -> Tensor:
        """One prompt through one block; from and to host memory."""
        if isinstance(block, Layer):
            decoder = self.model.language_model
            tokens = x.shape[0]
            positions = torch.arange(tokens, device=self.parts.device)[None]
            inv_freq = inverse_frequencies(self.parts.config.llm, tokens).to(self.parts.device)
            cos, sin = rotary_table(positions, inv_freq, decoder.rope_amplitude, x.dtype)
            out, branch = block(x[None].to(self.parts.device), None, cos, sin, None)
            return (out + branch)[0].cpu()

        def through(tiles: Tensor) -> Tensor:
            out, branch = block(tiles, block.norm1(tiles))
            return scaled_residual(out, branch, block.ls2)

        return self._over_tiles(through, x)

    def _over_tiles(self, step: Callable[[Tensor], Tensor], tiles: Tensor) -> Tensor:
        return torch.cat([step(part.to(self.parts.device)).cpu() for part in tiles.split(TILES_AT_ONCE)])

    @contextmanager
    def _loaded(self, *parts: str) -> Iterator[dict[str, Tensor]]:
        """Parts that stay as they are, and their tensors as they are to be written."""
        self.parts.load(*parts)
        yield {name: self._stored(self.parts.tensor(name)) for name in self.parts.names(*parts)}
        self.parts.release(*parts)

    def _stored(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.parts.dtype)

    def _named_tensors(self, part: str) -> Iterator[tuple[str, Tensor]]:
        """The tensors of a block by the names and in the packing of the checkpoint."""
        for name in self.parts.names(part):
            slot = self.parts.slots[name]
            path, _, leaf = (slot.parameter or "").rpartition(".")
            value = getattr(self.model.get_submodule(path), leaf)
            index = self._rows(slot)
            if isinstance(value, QuantizedWeight):
                for key, buffer in value.rows(index).named_buffers():
                    yield f"{name}.{key}", buffer.cpu().clone()
            else:
                yield name, value.data[index].reshape(slot.shape).cpu()

    def _unused(self) -> dict[str, Tensor]:
        """Blocks that never run, as the layout asks for them: weights of a quantised half are rounded to nearest."""
        tensors: dict[str, Tensor] = {}
        for name in self.parts.unused():
            tensor = self.parts.tensor(name)
            method = self.config.method_of(name.removesuffix(".weight")) if tensor.dim() == 2 else None
            if method is None:
                tensors[name] = self._stored(tensor)
            else:
                rounded = rounded_weight(tensor, method, self.config, name)
                tensors |= {f"{name}.{key}": buffer for key, buffer in rounded.named_buffers()}
        return tensors

    def _rows(self, slot: Slot) -> slice | Tensor:
        """Which rows of a parameter a checkpoint's tensor holds, in its order."""
        if not slot.kv_groups:
            return slice(slot.start, slot.start + slot.shape[0])
        return pack_order(slot.shape[0], slot.kv_groups, self.parts.config.llm).argsort()

    def _settings(self) -> dict[str, Any]:
        """What decides the result: a run that was begun with others is not gone on with."""
        digest = hashlib.sha256()
        for prompt in self.set.prompts:
            digest.update(json.dumps(prompt.token_ids).encode())
            for tiles in prompt.tiles:
                digest.update(tiles.tobytes())
        return {
            "source": str(self.folder.resolve()),
            "files": {shard.name: shard.stat().st_size for shard in self.parts.shards},
            "quantization": self.config.to_json(),
            "dtype": str(self.parts.dtype).removeprefix("torch."),
            "calibration": digest.hexdigest(),
        }

    # --- the end ---

    def _finish(self) -> dict[str, Any]:
        count = f"{len(self.set.prompts)} prompts with images"
        static = [
            f"{entry['part']}.{layer['layer']}"
            for entry in self.output.done
            for layer in entry.get("layers", ())
            if layer["static"]
        ]
        note = {**self.config.to_json(), "static_inputs": static, "calibration": count}
        self.output.write_index({**self.raw_config, "quantization_config": note})
        for file in sorted(self.folder.iterdir()):
            if file.is_file() and file.suffix in COPIED and file.name not in NOT_COPIED:
                self.output.copy(file)
        report = self._report()
        self.output.write("report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
        self.output.write("report.md", render(report))
        self.output.take_its_place()
        return report

    def _report(self) -> dict[str, Any]:
        entries = self.output.done
        found = {key: entry[key] for entry in entries for key in MEASURES if key in entry}
        comparison, why = self._compare()
        return {
            "source": self.name,
            "quantization": self.config.to_json(),
            "dtype": str(self.parts.dtype).removeprefix("torch."),
            "calibration": {
                "source": None if self.options.calibration is None else str(self.options.calibration),
                "prompts": len(self.set.prompts),
                "tiles": sum(sum(prompt.num_tiles) for prompt in self.set.prompts),
                "tokens": sum(len(prompt.token_ids) for prompt in self.set.prompts),
                "skipped": self.set.skipped,
            },
            "bytes": {
                "source": sum(shard.stat().st_size for shard in self.parts.shards),
                "quantised": sum(entry["bytes"] for entry in entries),
            },
            **found,
            "answers": None if comparison is None else comparison.to_dict(),
            "answers_note": why,
            "blocks": [
                {key: entry[key] for key in ("part", "output_error", "layers") if key in entry}
                for entry in entries
                if entry.get("layers")
            ],
        }

    def _compare(self) -> tuple[Comparison | None, str]:
        """The answers of both checkpoints, or why they were not asked for."""
        if not self.options.answers:
            return None, "not asked for"
        needed = sum(parameter.numel() for parameter in self.model.parameters()) * self.parts.dtype.itemsize
        free = free_memory(self.parts.device)
        if needed > 0.8 * free:
            return None, f"the source needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free: vitrail verify"
        common = {"dtype": self.options.dtype, "device": self.options.device, "progress": False}
        both = ({"model": self.folder, **common}, {"model": self.output.partial, **common})
        found = compare(*both, self.set.examples, max_tiles=self.options.max_tiles, progress=self.options.progress)
        return found, ""


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            facts = dict(line.split(":", 1) for line in file)
        return int(facts["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # no Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _replace(stream: list[Tensor], step: Callable[[int, Tensor], Tensor]) -> None:
    """Every activation by what comes of it, one after the other: two whole streams would be twice the memory."""
    for index, x in enumerate(stream):
        stream[index] = step(index, x)


def _relative(reference: list[Tensor], other: list[Tensor]) -> float:
    """RMS of the difference over the RMS of what should be."""
    error = norm = 0.0
    for x, y in zip(reference, other, strict=True):
        error += float((y.float() - x.float()).square().sum())
        norm += float(x.float().square().sum())
    return (error / norm) ** 0.5 if norm else 0.0


def _check_methods(config: QuantizationConfig) -> None:
    if config.llm is None and config.vision is None:
        raise InvalidRequestError("nothing to quantise: give a method for the language half, the vision half or both")
    for half, method in (("llm", config.llm), ("vision", config.vision)):
        if method is not None and method not in METHODS:
            raise InvalidRequestError(f"{half}: {method!r} is not calibrated; known: {', '.join(METHODS)}")


def _raw_config(folder: Path) -> dict[str, Any]:
    """`config.json` as it is. Raises `InvalidRequestError` where its weights are quantised already."""
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: cannot be read ({error})") from None
    if isinstance(values, dict):
        for where in (values, values.get("llm_config"), values.get("vision_config")):
            found = where.get("quantization_config") if isinstance(where, dict) else None
            if found:
                method = found.get("quant_method", "?") if isinstance(found, dict) else found
                raise InvalidRequestError(f"{folder}: is quantised already ({method}); start from the original weights")
    return dict(values) if isinstance(values, dict) else {}


def _calibration_set(config: InternVLConfig, tokenizer: Tokenizer, options: Options) -> CalibrationSet:
    if options.num_samples < 1 or options.max_tiles < 1:
        raise InvalidRequestError("calibration needs at least one sample, and a tile an image")
    examples = read_examples(options.calibration, options.num_samples)
    processor = Processor(
        config, tokenizer, limits=ImageLimits(), max_images=64, max_model_len=config.llm.max_model_len
    )
    return prepare_examples(processor, examples, options.max_tiles)
