"""Exported graphs in onnxruntime against vitrail's own modules, on a CPU: same weights, same run, same threads.

    python bench/export.py [--models nano 1b] [--kinds fp32 int8] [--repeats N] [--context N] [--steps N] [--out DIR]

Stages: *vision*, one tile to visual tokens; *prefill*, a prompt with its visual tokens to the first logits; *decode*,
one token of one sequence. Contenders: vitrail in fp32 and in int8 (weights rounded, activations rounded per token),
onnxruntime with the fp32 and the int8 export (the same weight codes, activations rounded by one scale a layer). `1b`
has the shape of InternVL2-1B and random weights. `export_s` is how long writing the graphs took.

Memory holds the contenders of one kind at a time, and none during an export; vitrail in fp32 runs in the same rounds
with either (`vitrail_fp32_ms`), so that what ran next to each other is compared. The JSON is written anew behind every
kind.
"""

import argparse
import gc
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from vitrail.bench.harness import compare, results_path, write_results
from vitrail.bench.models import INTERNVL2_5_1B, random_model
from vitrail.export.calibration import Prompt
from vitrail.export.description import context_token_id
from vitrail.export.generation import OnnxChat
from vitrail.export.onnx import Options, export_onnx
from vitrail.runtime.backends.manifest import read_manifest
from vitrail.runtime.config import InternVLConfig, load_config
from vitrail.runtime.engine.runner import Runner
from vitrail.runtime.layers.kv_cache import BLOCK_SIZE
from vitrail.runtime.layers.rotary import inverse_frequencies
from vitrail.runtime.quantization.model import quantize_model
from vitrail.runtime.tokenizer import load_tokenizer
from vitrail.runtime.weights import NANO, checkpoint_tensors, load_model

BASELINE = "vitrail fp32"
KINDS = ("fp32", "int8")
REPEATS = {"nano": 20, "1b": 3}


def write_random_checkpoint(folder: Path, config: InternVLConfig) -> Path:
    """A checkpoint of random weights in the official form, with nano's tokenizer: only the number of tokens matters."""
    folder.mkdir()
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        shutil.copy(NANO / name, folder)
    save_file(dict(checkpoint_tensors(random_model(config, torch.float32))), folder / "model.safetensors")
    vision, llm = vars(config.vision), vars(config.llm)
    sizes = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "rms_norm_eps", "rope_theta", "max_position_embeddings", "tie_word_embeddings"),
    )
    values = {
        "model_type": "internvl_chat",
        "template": "internlm2-chat",
        "select_layer": config.select_layer,
        "downsample_ratio": config.downsample_ratio,
        "ps_version": config.ps_version,
        "force_image_size": config.tile_size,
        "vision_config": vision,
        "llm_config": {"architectures": [config.llm.architecture], **{size: llm[size] for size in sizes}},
    }
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    return folder


@dataclass(frozen=True)
class Case:
    """A checkpoint and what is asked of it: a prompt with one tile, and so many tokens behind it."""

    name: str
    source: Path
    config: InternVLConfig
    prompt: Prompt
    context_id: int
    steps: int


def make_case(name: str, folder: Path, context: int, steps: int) -> Case:
    """name: of `--models`. folder: for the checkpoint, where it has to be made."""
    source = NANO if name == "nano" else write_random_checkpoint(folder / "checkpoint", INTERNVL2_5_1B)
    config = load_config(source)
    generator = torch.Generator().manual_seed(0)
    shape = (1, config.tile_size, config.tile_size, 3)
    tiles = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    context_id = context_token_id(config, load_tokenizer(source))
    words = torch.randint(0, 500, (max(context - config.tokens_per_tile, 1),), generator=generator).tolist()
    return Case(name, source, config, Prompt([context_id] * config.tokens_per_tile + words, tiles), context_id, steps)


class Ours:
    """A model behind its runner: what the engine calls."""

    def __init__(self, case: Case, kind: str) -> None:
        model = load_model(case.source, case.config, dtype=torch.float32, device=torch.device("cpu"), progress=False)
        if kind == "int8":
            quantize_model(model, llm="int8", vision="int8")
        self.ids, self.steps, self.context_id = list(case.prompt.token_ids), case.steps, case.context_id
        length = len(self.ids) + self.steps
        self.runner = Runner(model, max_num_seqs=1, max_model_len=length, enforce_eager=True)
        self.table = list(range(-(-length // BLOCK_SIZE)))
        self.runner.allocate(len(self.table), keep=False)
        self.inv_freq = inverse_frequencies(case.config.llm, length)

    def vision(self, tiles: Tensor) -> Tensor:
        return self.runner.encode(tiles).flatten(0, 1)

    def prefill(self, visual: Tensor) -> Tensor:
        return self.runner.prefill(self.ids, visual, self.context_id, self.inv_freq, self.table)

    def decode(self) -> None:
        token = 0
        for context in range(len(self.ids) + 1, len(self.ids) + self.steps + 1):
            token = int(self.runner.decode([token], [context], self.inv_freq[None], [self.table]).argmax())


class Theirs:
    """The exported parts in onnxruntime."""

    def __init__(self, case: Case, folder: Path) -> None:
        manifest = read_manifest(folder)
        self.graphs = OnnxChat(manifest, {name: manifest.path(name) for name in manifest.parts})
        self.ids, self.steps = np.array([case.prompt.token_ids]), case.steps
        self.past: list[Any] = []

    def vision(self, tiles: Tensor) -> Any:
        return self.graphs.encode(tiles.numpy())

    def prefill(self, visual: Tensor) -> Any:
        logits, self.past = self.graphs.step(self.ids, visual.numpy(), self.graphs.no_past(1))
        return logits

    def decode(self) -> None:
        token, past = 0, self.past
        none = np.zeros((0, self.graphs.manifest.model["hidden_size"]), np.float32)
        for _ in range(self.steps):
            logits, past = self.graphs.step(np.array([[token]]), none, past)
            token = int(logits[0].argmax())


def measure_kind(case: Case, kind: str, folder: Path, repeats: int) -> list[dict[str, Any]]:
    """The rows of a model in fp32 or in int8, exported to `folder`. Behind them nothing holds memory any more."""
    start, target = perf_counter(), folder / kind
    export_onnx(case.source, target, Options(quantization=None if kind == "fp32" else kind), lambda: [case.prompt])
    seconds = perf_counter() - start
    contenders: dict[str, Ours | Theirs] = {
        f"vitrail {label}": Ours(case, label) for label in dict.fromkeys(("fp32", kind))
    }
    contenders[f"onnxruntime {kind}"] = Theirs(case, target)
    return _timed(case, kind, contenders, repeats, seconds)


def _timed(
    case: Case, kind: str, contenders: dict[str, Ours | Theirs], repeats: int, seconds: float
) -> list[dict[str, Any]]:
    reference, tiles = contenders[BASELINE], case.prompt.tiles
    visual = reference.vision(tiles).clone()
    logits = torch.as_tensor(reference.prefill(visual)).clone()
    stages: dict[str, Callable[[Ours | Theirs], Callable[[], object]]] = {
        "vision": lambda side: lambda: side.vision(tiles),
        "prefill": lambda side: lambda: side.prefill(visual),
        "decode, a token": lambda side: side.decode,
    }
    cosines = {}
    for label, side in contenders.items():
        pairs = ((side.vision(tiles), visual), (side.prefill(visual), logits))
        both = [torch.cosine_similarity(torch.as_tensor(a).flatten(), b.flatten(), dim=0) for a, b in pairs]
        cosines[label] = {"vision": float(both[0]), "prefill": float(both[1])}
    rows = []
    for stage, of in tqdm(stages.items(), desc=f"{case.name} {kind}", disable=None):
        share = case.steps if stage.startswith("decode") else 1
        timings = compare(
            {label: of(side) for label, side in contenders.items()}, repeats=repeats, device="cpu", warmup=1
        )
        rows += [
            {
                "model": case.name,
                "stage": stage,
                "contender": label,
                "ms": timing.median / share,
                "p10_ms": timing.p10 / share,
                "p90_ms": timing.p90 / share,
                "n": timing.n,
                "vitrail_fp32_ms": timings[BASELINE].median / share,
                "times_as_fast_as_vitrail_fp32": timings[BASELINE].median / timing.median,
                "cosine_to_vitrail_fp32": cosines[label].get(stage),
                "export_s": seconds if label.startswith("onnx") else None,
            }
            for label, timing in timings.items()
            if label.endswith(kind)
        ]
    return rows


def main() -> None:
    """Measure, print, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=sorted(REPEATS), default=["nano", "1b"])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--repeats", type=int, help="timed rounds a stage; each model has its own default")
    parser.add_argument("--context", type=int, default=320, help="tokens of the prompt, one tile's among them")
    parser.add_argument("--steps", type=int, default=16, help="tokens that a decode call makes")
    parser.add_argument("--out", help="folder of the JSON; bench/results/<device> by default")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in arguments.models:
        with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
            case = make_case(name, Path(scratch), arguments.context, arguments.steps)
            for kind in arguments.kinds:
                found = measure_kind(case, kind, Path(scratch), arguments.repeats or REPEATS[name])
                gc.collect()
                rows += found
                for row in found:
                    print(
                        f"{row['model']:5} {row['stage']:16} {row['contender']:17} {row['ms']:9.2f} ms, "
                        f"{row['times_as_fast_as_vitrail_fp32']:.2f} times as fast as {BASELINE}"
                    )
                path = write_results(
                    results_path("export", arguments.out),
                    rows,
                    title="Exported graphs in onnxruntime and vitrail's own modules, on a CPU",
                    notes="Medians of one run; every contender with the same number of threads.",
                )
                print(f"written to {path}")


if __name__ == "__main__":
    main()
