"""Quantised models against the same weights as they were: CPU side by side with other runtimes, and one GPU.

    python bench/quantised.py [--device cpu|cuda] [--context 512] [--repeats N] [--no-onnxruntime] [--out DIR]

CPU: a random model of Qwen2-0.5B's shape, the language half of InternVL2-1B: prefill of `--context` tokens, and one
token of one sequence behind as many. vitrail in fp32, bf16, int8 and int4 (quantised rows compute the rest in fp32, and
quantise the head too, as llama.cpp does); transformers in fp32 and bf16 on the same tensors; llama.cpp in Q8_0 and Q4_0
where `llama-cpp-python` and `gguf` are installed: the file is made of the same weights; onnxruntime in int8, where it
is installed, of transformers' export (`onnx_peer.py`), which takes minutes to make. All with the same number of
threads. Marks, against transformers in fp32: decode int8 2.5 times, int4 4 times.

GPU: InternViT-6B of seven tiles in int8 and fp8, the inputs of fc2 with scales known beforehand as `vitrail quantize`
writes them, and decode of InternLM2-20B in int4, each against our bf16 with CUDA graphs; `share` is of the time that
reading all weights and keys and values once would take at the copy bandwidth measured in the same run. Marks: ViT 1.45
times at a cosine of 0.995, decode 2.4 times and 0.62 of the roof.

Exit status 1 where a mark is missed.
"""

import argparse
import gc
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from vitrail.bench.harness import Timing, ceilings, compare, require_gpu, results_path, write_results
from vitrail.bench.llama_peer import PACKAGES as LLAMA_PACKAGES
from vitrail.bench.llama_peer import LlamaPeer
from vitrail.bench.models import (
    INTERNVL2_5_1B,
    INTERNVL_CHAT_V1_5,
    language_only,
    random_model,
    randomize,
    vision_only,
)
from vitrail.bench.onnx_peer import PACKAGES, OnnxPeer
from vitrail.bench.peer import transformers_model
from vitrail.kernels.quantize import LARGEST
from vitrail.runtime.config import DecoderConfig, InternVLConfig
from vitrail.runtime.engine.runner import Runner
from vitrail.runtime.layers.kv_cache import BLOCK_SIZE, KVBatch, KVCache
from vitrail.runtime.layers.linear import LinearLayer, replace_weight
from vitrail.runtime.layers.rotary import inverse_frequencies
from vitrail.runtime.models.decoder import Decoder
from vitrail.runtime.models.internvl import InternVLModel
from vitrail.runtime.quantization.config import QuantizationConfig
from vitrail.runtime.quantization.methods import WEIGHTS, quantize_weight
from vitrail.runtime.quantization.model import connect, linear_layers, plan, quantize_model
from vitrail.runtime.smoothing import ROWS_DTYPE

HEAD = r"^language_model\.head$"
# (row, method of the layers, method of the head)
CPU_METHODS = (("vitrail int8", "int8", "int8"), ("vitrail int4", "int4", "int8"))
LLAMA_KINDS = ("Q8_0", "Q4_0")
CPU_MARKS = {"vitrail int8": 2.5, "vitrail int4": 4.0}
BASELINE = "transformers fp32"
TILES = 7
VIT_MARK, COSINE_MARK, DECODE_MARK, ROOF_MARK = 1.45, 0.995, 2.4, 0.62


class Sequence1:
    """One sequence of a decoder with its cache: the prompt, and one token behind it again and again."""

    def __init__(self, decoder: Decoder, context: int) -> None:
        self.decoder, self.context = decoder, context
        weight = decoder.embedding
        blocks = -(-(context + 1) // BLOCK_SIZE)
        self.cache = KVCache(decoder.config, blocks, dtype=weight.dtype, device=weight.device)
        self.table = [list(range(blocks))]
        self.inv_freq = inverse_frequencies(decoder.config, context + 1).to(weight.device)

    def prefill(self, tokens: Tensor) -> Tensor:
        """The logits (1, vocab) behind the prompt. tokens: (context,) int64."""
        return self._run(tokens, torch.arange(self.context), self.context)

    def decode(self, token: Tensor) -> Tensor:
        """The logits (1, vocab) behind one more token. token: (1,) int64."""
        return self._run(token, torch.tensor([self.context]), self.context + 1)

    def _run(self, tokens: Tensor, positions: Tensor, length: int) -> Tensor:
        kv = KVBatch.of(self.cache, self.table, [length], [len(tokens)])
        hidden = self.decoder(self.decoder.embed(tokens), positions, self.inv_freq, kv)
        return self.decoder.logits(hidden[-1:])


# --- CPU ---


def cpu_contenders(
    config: InternVLConfig, context: int, folder: Path, *, with_onnx: bool
) -> tuple[dict[str, Callable[[], Any]], dict[str, Callable[[], Any]]]:
    """Prefill and decode of every runtime, all of the same weights; their first logits are near one another."""
    prefill: dict[str, Callable[[], Any]] = {}
    decode: dict[str, Callable[[], Any]] = {}
    tokens = torch.randint(0, config.llm.vocab_size, (context,), generator=torch.Generator().manual_seed(0))

    def add(name: str, first: Callable[[], Any], then: Callable[[], Any]) -> None:
        prefill[name], decode[name] = first, then

    def ours(name: str, model: InternVLModel) -> None:
        sequence = Sequence1(model.language_model, context)
        add(name, lambda: sequence.prefill(tokens), lambda: sequence.decode(tokens[:1]))

    for label, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        model = random_model(config, torch.float32).to(dtype)
        ours(f"vitrail {label}", model)
        peer = _Peer(transformers_model(model, image_token_id=0), tokens)
        add(f"transformers {label}", peer.prefill, peer.decode)
        if label == "fp32" and with_onnx:
            onnx = OnnxPeer(peer.model, tokens, folder)
            add("onnxruntime int8", onnx.prefill, onnx.decode)
        if label == "fp32" and all(map(find_spec, LLAMA_PACKAGES)):
            for kind in LLAMA_KINDS:
                llama = LlamaPeer(model.language_model, kind, tokens, folder)
                add(f"llama.cpp {kind}", llama.prefill, llama.decode)
    for name, layers, head in CPU_METHODS:
        model = random_model(config, torch.float32)
        quantize_model(model, llm=layers, overrides={HEAD: head})
        ours(name, model)
    gc.collect()
    return prefill, decode


class _Peer:
    """transformers with its dynamic cache, cut back behind each token."""

    def __init__(self, model: Any, tokens: Tensor) -> None:
        self.model, self.tokens = model, tokens
        self.cache: Any = None

    def prefill(self) -> Tensor:
        self.cache = import_module("transformers").DynamicCache(config=self.model.config.text_config)
        return self._run(self.tokens)

    def decode(self) -> Tensor:
        if self.cache is None:
            self.prefill()
        logits = self._run(self.tokens[:1])
        self.cache.crop(-1)
        return logits

    def _run(self, tokens: Tensor) -> Tensor:
        out = self.model.model.language_model(input_ids=tokens[None], past_key_values=self.cache, use_cache=True)
        return cast(Tensor, self.model.lm_head(out.last_hidden_state[:, -1]))


def cpu_rows(prefill: Mapping[str, Timing], decode: Mapping[str, Timing], context: int) -> list[dict[str, Any]]:
    """A row for every stage and runtime."""
    rows = []
    for stage, tokens, timings in ((f"prefill of {context}", context, prefill), ("decode", 1, decode)):
        base = timings[BASELINE].median
        rows += [
            {
                "stage": stage,
                "runtime": name,
                **timing.row(),
                "tokens_per_s": tokens / timing.median * 1e3,
                "times_transformers_fp32": base / timing.median,
            }
            for name, timing in timings.items()
        ]
    return rows


def cpu_missed(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The marks of decoding that are not reached, in words."""
    reached = {row["runtime"]: row["times_transformers_fp32"] for row in rows if row["stage"] == "decode"}
    return [
        f"{name}: decode is {reached[name]:.2f} times {BASELINE}, the mark is {mark}"
        for name, mark in CPU_MARKS.items()
        if reached[name] < mark
    ]


def check_alike(contenders: Mapping[str, Callable[[], Any]]) -> None:
    """Raise unless the logits of all runtimes are of one model: cosines above 0.9 with the baseline's."""
    logits = {name: run().float().flatten() for name, run in contenders.items()}
    for name, values in logits.items():
        cosine = float(torch.cosine_similarity(values, logits[BASELINE], dim=0))
        if cosine < 0.9:
            raise RuntimeError(f"{name} runs another model than {BASELINE}: cosine of logits {cosine:.3f}")


def missing_peers(*, with_onnx: bool) -> str:
    """What did not take part, as a sentence."""
    peers = {"llama.cpp": LLAMA_PACKAGES, "onnxruntime": {p: p for p in PACKAGES}}
    absent = [
        f"{peer} ({' and '.join(packages.values())})"
        for peer, packages in peers.items()
        if not all(map(find_spec, packages)) or (peer == "onnxruntime" and not with_onnx)
    ]
    return f"Not measured: {', '.join(absent)}." if absent else ""


def measure_cpu(context: int, repeats: int, out: str | None, *, with_onnx: bool) -> list[str]:
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        prefill, decode = cpu_contenders(language_only(INTERNVL2_5_1B), context, Path(folder), with_onnx=with_onnx)
        check_alike(prefill)
        check_alike(decode)
        first = compare(prefill, warmup=1, repeats=max(1, repeats // 4), device="cpu")
        then = compare(decode, warmup=2, repeats=repeats, device="cpu")
    rows = cpu_rows(first, then, context)
    absent = missing_peers(with_onnx=with_onnx)
    path = write_results(
        results_path("quantised", out),
        rows,
        title="Qwen2-0.5B shape on a CPU, random weights",
        notes=f"Heads: bf16 and fp32 as the rest, int8 in vitrail's quantised rows. {absent}",
    )
    for row in rows:
        print(
            f"{row['stage']:14} {row['runtime']:18} {row['ms']:9.1f} ms {row['tokens_per_s']:8.1f} tok/s "
            f"{row['times_transformers_fp32']:6.2f} times {BASELINE}"
        )
    print(f"written to {path}")
    return cpu_missed(rows)


# --- GPU ---


def random_quantised(
    config: InternVLConfig, device: torch.device | str, *, llm: str | None = None, vision: str | None = None
) -> InternVLModel:
    """A bf16 model of that shape whose quantised weights are random codes: nothing is rounded, so that it is made in
    the memory that it runs in, or on the meta device in none.
    """
    with torch.device("meta"):
        model = InternVLModel(config).to(torch.bfloat16)
    settings = QuantizationConfig(llm, vision)
    layers = linear_layers(model)
    weights = {}
    for name, method in plan(model, settings, torch.device("cpu")).items():
        rows, columns = layers[name].weight.shape
        weights[name] = _random_weight(method, rows, columns, settings.group_size, device)
        replace_weight(layers[name], nn.Parameter(torch.empty(0, device="meta")))  # takes no memory below
    model.to_empty(device=device)
    if torch.device(device).type != "meta":
        randomize(model)
    for name, weight in weights.items():
        replace_weight(cast(LinearLayer, model.get_submodule(name)), weight)
        weight.pack()
    connect(model)
    return model.requires_grad_(False).eval()


def _random_weight(method: str, rows: int, columns: int, group_size: int, device: torch.device | str) -> Any:
    kind = WEIGHTS[method]
    codes = torch.randint(0, 256, (rows, columns // kind.codes_per_byte), dtype=torch.uint8, device=device)
    if method == "int4":
        scales = torch.full((rows, columns // group_size), columns**-0.5 / 4.6, device=device)  # of q - 8 of 0..15
        return kind(codes, scales)
    scales = torch.full((rows,), columns**-0.5 / 64, device=device)
    if method == "fp8":
        return kind((codes & 0xB7).view(torch.float8_e4m3fn), scales)  # below 2, and no NaN
    return kind(codes.view(torch.int8).clamp(min=-127), scales)


def quantize_vision(model: InternVLModel, method: str, tiles: Tensor) -> None:
    """Round the ViT, the inputs of every fc2 with one scale for all: the largest magnitude that `tiles` bring there.

    tiles: (n, side, side, 3) uint8, where the model is.
    """
    readers = {name: layer for name, layer in linear_layers(model.vision_model).items() if name.endswith("mlp.fc2")}
    largest: dict[str, Tensor] = {}

    def note(name: str, x: Tensor) -> None:
        largest[name] = x.abs().max().float()

    handles = [
        layer.register_forward_pre_hook(lambda _, inputs, name=name: note(name, inputs[0]))
        for name, layer in readers.items()
    ]
    model.encode_tiles(tiles)
    for handle in handles:
        handle.remove()
    for name, layer in readers.items():
        scales = (largest[name] / LARGEST[ROWS_DTYPE[method]]).expand(layer.weight.shape[1]).contiguous()
        weight = quantize_weight(cast(Tensor, layer.weight), method, input_scales=scales, name=name)
        replace_weight(layer, weight)
        weight.pack()
    quantize_model(model, vision=method)


def vision_case(model: InternVLModel, tiles: Tensor) -> Callable[[], Tensor]:
    """The ViT and the projector over tiles. tiles: (n, side, side, 3) uint8, where the model is."""
    return lambda: model.encode_tiles(tiles)


def decode_case(model: InternVLModel, context: int) -> Callable[[], Tensor]:
    """One token behind `context` others, eagerly."""
    sequence = Sequence1(model.language_model, context)
    device = model.language_model.embedding.device
    token, position = torch.zeros(1, dtype=torch.long, device=device), torch.tensor([context], device=device)
    kv = KVBatch.of(sequence.cache, sequence.table, [context + 1], [1])
    decoder = model.language_model
    return lambda: decoder.logits(decoder(decoder.embed(token), position, sequence.inv_freq, kv))


def decode_bytes(model: InternVLModel, context: int, llm: DecoderConfig, bits: float) -> float:
    """What one token has to read: weights of the layers at `bits` each, head and the rest in bf16, keys and values."""
    layers = sum(
        rows * columns
        for name, layer in linear_layers(model).items()
        if name.startswith("language_model.layers.")
        for rows, columns in [layer.weight.shape]
    )
    return layers * bits / 8 + 2 * llm.vocab_size * llm.hidden_size + (context + 1) * llm.kv_bytes_per_token


def measure_gpu(context: int, repeats: int, out: str | None) -> list[str]:
    rows: list[dict[str, Any]] = []
    missed: list[str] = []
    with torch.inference_mode():
        ceiling = ceilings()
        rows += _measure_vision(repeats, missed)
        gc.collect()
        torch.cuda.empty_cache()
        rows += _measure_decode(context, repeats, ceiling.copy_bytes, missed)
    path = write_results(
        results_path("quantised", out),
        rows,
        title="Quantised halves of InternVL-Chat-V1.5 against bf16",
        notes=f"CUDA graphs on both sides, random weights. {ceiling}",
    )
    for row in rows:
        print("  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{value}" for key, value in row.items()))
    print(f"written to {path}")
    return missed


def _measure_vision(repeats: int, missed: list[str]) -> list[dict[str, Any]]:
    config = vision_only(INTERNVL_CHAT_V1_5)
    tiles = torch.randint(0, 256, (TILES, config.tile_size, config.tile_size, 3), dtype=torch.uint8)
    runners: dict[str, Runner] = {}
    for name in ("bf16", "int8", "fp8"):
        model = random_model(config, torch.bfloat16, "cuda")
        if name != "bf16":
            quantize_vision(model, name, tiles[:1].cuda())
        runners[name] = Runner(model, max_num_seqs=1, max_model_len=BLOCK_SIZE, enforce_eager=False)
        runners[name].warm_up_vision()
    outputs = {name: runner.encode(tiles).float().flatten(0, 1) for name, runner in runners.items()}
    timings = compare({name: partial(runner.encode, tiles) for name, runner in runners.items()}, repeats=repeats)
    rows = []
    for name, timing in timings.items():
        cosine = float(torch.cosine_similarity(outputs[name], outputs["bf16"], dim=-1).mean())
        times = timings["bf16"].median / timing.median
        rows.append(
            {"half": f"ViT, {TILES} tiles", "method": name, **timing.row(), "times_bf16": times, "cosine": cosine}
        )
        if name != "bf16" and (times < VIT_MARK or cosine < COSINE_MARK):
            missed.append(f"ViT {name}: {times:.2f} times bf16 at cosine {cosine:.4f}")
    return rows


def _measure_decode(context: int, repeats: int, copy_bytes: float, missed: list[str]) -> list[dict[str, Any]]:
    config = language_only(INTERNVL_CHAT_V1_5)
    inv_freq = inverse_frequencies(config.llm, context).cuda()[None]
    blocks = -(-context // BLOCK_SIZE)
    timings: dict[str, Timing] = {}
    rows = []
    for name, bits in (("bf16", 16.0), ("int4", 4 + 32 / 128)):
        quantised = name != "bf16"
        model = (
            random_quantised(config, "cuda", llm="int4") if quantised else random_model(config, torch.bfloat16, "cuda")
        )
        runner = Runner(model, max_num_seqs=1, max_model_len=blocks * BLOCK_SIZE, enforce_eager=False)
        runner.allocate(blocks, keep=False)
        timings |= compare(
            {name: partial(runner.decode, [0], [context], inv_freq, [list(range(blocks))])},
            repeats=repeats,
        )
        roof_ms = decode_bytes(model, context, config.llm, bits) / copy_bytes * 1e3
        times, share = timings["bf16"].median / timings[name].median, roof_ms / timings[name].median
        rows.append(
            {
                "half": f"decode, {context} tokens",
                "method": name,
                **timings[name].row(),
                "times_bf16": times,
                "tokens_per_s": 1e3 / timings[name].median,
                "roof_ms": roof_ms,
                "share": share,
            }
        )
        if quantised and (times < DECODE_MARK or share < ROOF_MARK):
            missed.append(f"decode {name}: {times:.2f} times bf16, {share:.2f} of the roof")
        del model, runner
        gc.collect()
        torch.cuda.empty_cache()
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write the rows; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--context", type=int, help="tokens; 512 on a CPU, 2048 on a GPU")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--no-onnxruntime", action="store_true", help="leave onnxruntime out")
    parser.add_argument("--out", help="folder of the JSON; bench/results/<device> by default")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda":
        require_gpu()
        missed = measure_gpu(arguments.context or 2048, arguments.repeats, arguments.out)
    else:
        with_onnx = not arguments.no_onnxruntime and all(map(find_spec, PACKAGES))
        missed = measure_cpu(arguments.context or 512, arguments.repeats, arguments.out, with_onnx=with_onnx)
    for text in missed:
        print(f"quantised: {text}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
