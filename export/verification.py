"""`vitrail export verify`: whether an exported folder holds the checkpoint, and computes what the runtime computes.

The reference are the runtime's modules in fp32, with the weights as the export stores them: rounded to its dtype, or
dequantised from codes. Where activations are rounded to int8, so are the reference's, by the scales in the graph.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..runtime.backends.manifest import Manifest, Part, read_manifest
from ..runtime.config import load_any_config
from ..runtime.errors import CheckpointError
from ..runtime.layers.kv_cache import BLOCK_SIZE, KVBatch, KVCache
from ..runtime.layers.linear import LinearLayer
from ..runtime.layers.rotary import inverse_frequencies
from ..runtime.models.contrastive import ContrastiveModel, Mode
from ..runtime.models.internvl import InternVLModel
from ..runtime.quantization.model import linear_layers, quantize_model
from ..runtime.quantization.weight import QuantizedWeight
from ..runtime.texts import EncodedText
from ..runtime.weights import Model, make_model, resolve_checkpoint
from .calibration import Prompt
from .checkpoint import Checkpoint
from .generation import OnnxChat, open_graph
from .packages import require
from .parts import chosen_parts, owns
from .rounding import INPUT_SCALE

REPORT = "verification.json"


@dataclass(frozen=True)
class Cases:
    """What is compared: prompts with the runtime's own greedy answers in fp32, and for contrastive models texts.

    images: (n, side, side, 3) uint8, of contrastive models.
    """

    prompts: Sequence[Prompt] = ()
    answers: Sequence[Sequence[int]] = ()
    images: Tensor | None = None
    texts: Sequence[EncodedText] = ()
    max_new_tokens: int = 24


@dataclass
class Comparison:
    """Of one output over all cases."""

    cosine: float = 1.0
    max_error: float = 0.0
    max_value: float = 0.0

    def add(self, got: Any, reference: Tensor) -> None:
        """Count the worst. Both of one shape; a cosine is that of all numbers of a case."""
        a, b = torch.as_tensor(got).double().flatten(), reference.detach().double().flatten()
        if a.shape != b.shape:
            raise CheckpointError(f"an output has {a.numel()} numbers, the runtime's {b.numel()}")
        cosine = float(a @ b / (a.norm() * b.norm()).clamp(min=1e-30)) if a.isfinite().all() else -1.0
        self.cosine = min(self.cosine, cosine)
        self.max_error = max(self.max_error, float((a - b).abs().max()))
        self.max_value = max(self.max_value, float(b.abs().max()))


@dataclass
class Report:
    """What was found; `failed` has a line for each gate that was not passed."""

    folder: str
    checkpoint: str
    min_cosine: float
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)
    answers: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


@torch.inference_mode()
def verify(folder: str | Path, checkpoint: str | Path | None, cases: Cases, min_cosine: float = 0.999) -> Report:
    """Check an exported folder against its checkpoint, and write the report beside the parts.

    checkpoint: where it is, if not where it was exported from. Raises `CheckpointError` for a folder that is not what
    was exported; what differs otherwise is in the report.
    """
    require("onnx", "onnxruntime")
    manifest = read_manifest(folder)
    manifest.check_files()
    source = resolve_checkpoint(checkpoint if checkpoint is not None else manifest.checkpoint)
    report = Report(str(manifest.folder), str(source), min_cosine)
    _check_consumed(manifest, source, report)
    _check_graphs(manifest)
    with TemporaryDirectory() as scratch:
        files = {name: _runnable(manifest, part, Path(scratch)) for name, part in manifest.parts.items()}
        model = _reference(manifest, source)
        if isinstance(model, InternVLModel):
            _compare_chat(manifest, model, files, cases, report)
        elif isinstance(model, ContrastiveModel):
            _compare_contrastive(model, files, cases, report)
    for name, part in report.parts.items():
        for output, found in part["outputs"].items():
            if not found["cosine"] >= min_cosine:
                report.failed.append(f"{name}: the cosine of {output} is {found['cosine']:.6f}, below {min_cosine}")
    text = json.dumps(report.__dict__, indent=1, ensure_ascii=False)
    (manifest.folder / REPORT).write_text(text + "\n", encoding="utf-8")
    return report


def _check_consumed(manifest: Manifest, source: Path, report: Report) -> None:
    """Every tensor of the checkpoint that the parts are for is in them, and is the one that the checkpoint has now."""
    config = load_any_config(source)
    checkpoint = Checkpoint(source, config)
    for name, part in manifest.parts.items():
        owned = {path for path in checkpoint.parameters() if owns(name, path)}
        if name == "decoder":
            owned.add("language_model.head.weight")
        found = checkpoint.read_all(owned)
        report.parts[name] = {"parameters": part.parameters.__dict__, "dtype": part.dtype, "outputs": {}}
        if found.count != part.parameters.count:
            report.failed.append(f"{name}: has {part.parameters.count} tensors, the checkpoint {found.count} for it")
        elif found.sha256 != part.parameters.sha256:
            report.failed.append(f"{name}: was exported from other weights than {source} holds")
    if set(manifest.parts) == set(chosen_parts(config, None, str(source))):
        unused = sorted(checkpoint.unused())
        if unused and manifest.model["kind"] == "chat":
            report.failed.append(f"{len(unused)} tensors of the checkpoint are in no part, first {unused[0]}")
        elif unused:
            report.notes.append(f"{len(unused)} tensors serve captions and matching, which are not exported")
    else:
        report.notes.append(f"only {', '.join(manifest.parts)} of the model was exported")


def _check_graphs(manifest: Manifest) -> None:
    import onnx

    for name, part in manifest.parts.items():
        try:
            onnx.checker.check_model(str(manifest.folder / part.file), full_check=True)
        except Exception as error:  # the checker's and the shape inference's own kinds
            raise CheckpointError(f"{name}: is no valid ONNX graph ({' '.join(str(error).split())[:300]})") from None


def _runnable(manifest: Manifest, part: Part, scratch: Path) -> Path:
    """The file of a part, or of its like in fp32 where it has 16 bits."""
    from .full_precision import in_float32

    path = manifest.folder / part.file
    if part.dtype == "float32":
        return path
    in_float32(path, scratch / part.file)
    return scratch / part.file


def _reference(manifest: Manifest, source: Path) -> Model:
    """The runtime's modules in fp32, with the weights that were exported."""
    config = load_any_config(source)
    checkpoint = Checkpoint(source, config)
    with torch.device("meta"):
        model = make_model(config).requires_grad_(False).eval()
    dtype = getattr(torch, next(iter(manifest.parts.values())).dtype)
    checkpoint.fill(model, "", dtype)
    model.float()
    if checkpoint.stored is None:
        methods = {name: part.quantization for name, part in manifest.parts.items()}
        group_size = next((part.group_size for part in manifest.parts.values() if part.group_size), 128)
        llm, vision = methods.get("decoder"), methods.get("vision")
        quantize_model(model, llm=llm, vision=vision, group_size=group_size, packed=False)
    _round_inputs(manifest, model)
    return model


def _round_inputs(manifest: Manifest, model: nn.Module) -> None:
    """Let linear layers round their inputs to int8 where the graphs do, by the graphs' scales."""
    import onnx_ir as ir

    layers = linear_layers(model)
    for part in manifest.parts.values():
        for name, value in ir.load(manifest.folder / part.file).graph.initializers.items():
            if name.endswith(INPUT_SCALE) and value.const_value is not None:
                scale = float(value.const_value.numpy())
                layer = layers[name.removesuffix(INPUT_SCALE).removesuffix(".weight")]
                layer.register_forward_pre_hook(partial(_rounded, scale))


def _rounded(scale: float, layer: LinearLayer, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    own = layer.weight.input_scales if isinstance(layer.weight, QuantizedWeight) else None
    x = inputs[0] if own is None else inputs[0] / own
    x = (x / scale).round().clamp(-128, 127) * scale
    return (x if own is None else x * own,)


def _compare_chat(
    manifest: Manifest, model: InternVLModel, files: Mapping[str, Path], cases: Cases, report: Report
) -> None:
    graphs = OnnxChat(manifest, files)
    found: dict[str, dict[str, Comparison]] = {name: defaultdict(Comparison) for name in files}
    context_id = manifest.prompt["image_token_id"]
    prompts: list[tuple[list[int], Tensor, Tensor]] = []
    for prompt in cases.prompts:
        visual = model.encode_tiles(prompt.tiles).flatten(0, 1)
        if "vision" in files:
            found["vision"]["visual_tokens"].add(graphs.encode(prompt.tiles.numpy()), visual)
        if "decoder" in files:
            ids = list(prompt.token_ids)
            prompts.append((ids, visual, _compare_decoder(graphs, model, ids, visual, context_id, found["decoder"])))
    if prompts:
        _compare_batch(graphs, prompts, found["decoder"]["logits of a batch"])
    for name, outputs in found.items():
        report.parts[name]["outputs"] = {output: numbers.__dict__ for output, numbers in outputs.items()}
    if len(files) == 2 and cases.answers:
        _compare_answers(manifest, graphs, cases, report)


def _compare_decoder(
    graphs: OnnxChat,
    model: InternVLModel,
    ids: list[int],
    visual: Tensor,
    context_id: int,
    found: dict[str, Comparison],
) -> Tensor:
    """A prompt at once, and its last token behind the others; the reference goes the engine's way, a paged cache."""
    decoder, llm, count = model.language_model, model.config.llm, len(ids)
    blocks = -(-count // BLOCK_SIZE)
    cache = KVCache(llm, blocks, dtype=torch.float32, device=torch.device("cpu"))
    kv = KVBatch.of(cache, [range(blocks)], [count], [count])
    x = model.splice(torch.tensor(ids), visual, context_id)
    reference = decoder.logits(decoder(x, torch.arange(count), inverse_frequencies(llm), kv)[-1:])
    tokens, no_past = visual.numpy(), graphs.no_past(1)
    logits, present = graphs.step(np.array([ids]), tokens, no_past)
    found["logits"].add(logits, reference)
    for index, got in enumerate(present):
        stored = (cache.keys, cache.values)[index % 2][index // 2]
        assert isinstance(stored, Tensor)
        kept = stored.flatten(0, 1)[:count].transpose(0, 1)  # [kv_heads, tokens, d]
        found[("present keys", "present values")[index % 2]].add(got[0], kept)
    past = graphs.step(np.array([ids[:-1]]), tokens, no_past)[1]
    found["logits of a decode step"].add(graphs.step(np.array([ids[-1:]]), tokens[:0], past)[0], reference)
    return reference


def _compare_batch(graphs: OnnxChat, prompts: list[tuple[list[int], Tensor, Tensor]], found: Comparison) -> None:
    """All prompts together, the shorter ones padded on the left, against each alone."""
    longest = max(len(ids) for ids, _, _ in prompts)
    rows = np.array([[0] * (longest - len(ids)) + ids for ids, _, _ in prompts])
    mask = np.array([[0] * (longest - len(ids)) + [1] * len(ids) for ids, _, _ in prompts])
    visual = torch.cat([tokens for _, tokens, _ in prompts]).numpy()
    logits, _ = graphs.step(rows, visual, graphs.no_past(len(prompts)), mask)
    for got, (_, _, reference) in zip(logits, prompts, strict=True):
        found.add(got, reference[0])


def _compare_answers(manifest: Manifest, graphs: OnnxChat, cases: Cases, report: Report) -> None:
    pairs = []
    for prompt, answer in zip(cases.prompts, cases.answers, strict=True):
        got = graphs.greedy(prompt.token_ids, prompt.tiles.numpy(), cases.max_new_tokens)
        pairs.append({"runtime": list(answer), "onnxruntime": got})
    equal = sum(pair["runtime"] == pair["onnxruntime"] for pair in pairs)
    report.answers = {"asked": len(pairs), "equal": equal, "tokens": pairs}
    exact = all(part.dtype == "float32" and part.quantization is None for part in manifest.parts.values())
    if exact and equal < len(pairs):
        report.failed.append(f"{len(pairs) - equal} of {len(pairs)} greedy answers differ from the runtime's")
    elif not exact:
        report.notes.append("answers are compared with the fp32 model's, and need not be equal")


def _compare_contrastive(model: ContrastiveModel, files: Mapping[str, Path], cases: Cases, report: Report) -> None:
    for name, path in files.items():
        graph, numbers = open_graph(path), Comparison()
        if name == "text":
            for text in cases.texts:
                ids, positions = torch.tensor([text.token_ids]), torch.tensor([text.positions])
                last = torch.tensor([text.last])
                inputs = {"input_ids": ids.numpy(), "position_ids": positions.numpy(), "last": last.numpy()}
                numbers.add(graph.run(None, inputs)[0], model.embed_texts(ids, positions, last))
        else:
            assert cases.images is not None
            mode: Mode = "g" if name == "contrastive_g" else "c"
            for image in cases.images.split(1):
                numbers.add(graph.run(None, {"tiles": image.numpy()})[0], model.embed_images(image, mode))
        report.parts[name]["outputs"] = {"embeddings": numbers.__dict__}
