"""Latency of each stage, vitrail against transformers: same process, weights, dtype, prompt and threads.

    python bench/latency.py [--models nano 1b] [--dtypes float32 bfloat16] [--repeats N] [--out DIR]

Stages: *preprocessing*, a decoded image to tiles (bytes here, normalised floats there: vitrail normalises with the
patch embedding, so that its vision row carries that work); *vision*, tiles to visual tokens; *prefill*, the prompt with
its visual tokens to the first logits; *decode*, one token of one sequence; *end to end*, a decoded image and a prompt
to the last token, through `Runtime.generate` and `generate`. `1b` has the shape of InternVL2-1B (InternViT-300M and
Qwen2-0.5B) and random weights: time does not depend on their values.
"""

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm
from transformers import DynamicCache
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from vitrail.bench.harness import compare, results_path, write_results
from vitrail.bench.peer import pixel_values, transformers_model
from vitrail.runtime.api import Runtime
from vitrail.runtime.config import parse_config
from vitrail.runtime.engine.processor import Conversation, Picture
from vitrail.runtime.layers.kv_cache import KVCache, KVSlice
from vitrail.runtime.layers.rotary import inverse_frequencies
from vitrail.runtime.models.internvl import InternVLModel
from vitrail.runtime.prompt import place_images
from vitrail.runtime.tokenizer import load_tokenizer
from vitrail.runtime.weights import resolve_checkpoint

QUESTION = "What is the total?"
INTERNVL2_1B = {
    "model_type": "internvl_chat",
    "template": "Hermes-2",
    "select_layer": -1,
    "ps_version": "v2",
    "force_image_size": 448,
    "dynamic_image_size": True,
    "use_thumbnail": True,
    "max_dynamic_patch": 12,
    "vision_config": {
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "image_size": 448,
        "patch_size": 14,
        "qkv_bias": True,
        "qk_normalization": False,
        "norm_type": "layer_norm",
    },
    "llm_config": {
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": 151655,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": 32768,
    },
}


@dataclass(frozen=True)
class Case:
    """A model and the sizes that keep its measurement within minutes."""

    name: str
    image_size: tuple[int, int]
    new_tokens: int
    repeats: int


CASES = {
    # A two-tile picture with its thumbnail, and for the large model a single tile: 0.7 TFLOP on a CPU.
    "nano": Case("nano", (224, 448), new_tokens=32, repeats=30),
    "1b": Case("1b", (448, 448), new_tokens=16, repeats=3),
}


def random_model(config: dict[str, Any], dtype: torch.dtype) -> InternVLModel:
    """A model of that shape with random weights, scaled so that activations stay finite."""
    model = InternVLModel(parse_config(config)).to(dtype).requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
        else:
            parameter.fill_(0.5)
    return model


def load(name: str, dtype_name: str) -> Runtime:
    """The Runtime of a case. The random model speaks nano's tokens: only their number matters."""
    if name == "nano":
        return Runtime.from_pretrained("nano", dtype=dtype_name, device="cpu")
    model = random_model(INTERNVL2_1B, getattr(torch, dtype_name))
    return Runtime(model, load_tokenizer(resolve_checkpoint("nano")), name="InternVL2-1B shape")


def measure_case(case: Case, dtype_name: str, repeats: int | None) -> list[dict[str, Any]]:
    """One row a stage."""
    runtime = load(case.name, dtype_name)
    model, config = runtime.model, runtime.model.config
    dtype = getattr(torch, dtype_name)
    image_token = runtime.engine.context_token_id
    peer = transformers_model(model, image_token)
    image = _picture(case.image_size)
    processor = GotOcr2ImageProcessorPil(
        size={"height": config.tile_size, "width": config.tile_size},
        crop_to_patches=True,
        min_patches=config.min_dynamic_patch,
        max_patches=config.max_dynamic_patch,
    )
    question = place_images(QUESTION, num_images=1, has_history=False)
    prepared = runtime.processor.prepare(Conversation([(question, None)], [Picture(image)]))
    ids = torch.tensor([prepared.token_ids])
    tiles = torch.cat([torch.from_numpy(tiles) for tiles in prepared.tiles])
    pixels = pixel_values(tiles, dtype)
    visual = model.encode_tiles(tiles)
    length, steps = ids.shape[1], case.new_tokens
    decoder = model.language_model
    inv_freq = inverse_frequencies(config.llm, length + steps)
    positions = torch.arange(length)[None]
    cache = KVCache(config.llm, 1, length + steps, dtype=dtype, device=torch.device("cpu"))

    def our_prefill() -> torch.Tensor:
        x = model.splice(ids[0], visual.flatten(0, 1), image_token)[None]
        return decoder.logits(decoder(x, positions, inv_freq, KVSlice(cache, 0, positions, length))[:, -1])

    def their_prefill() -> tuple[torch.Tensor, DynamicCache]:
        x = peer.get_input_embeddings()(ids)
        x = x.masked_scatter((ids == image_token)[..., None], visual.flatten(0, 1))
        past = DynamicCache(config=peer.config.text_config)
        out = peer.model.language_model(inputs_embeds=x, past_key_values=past, use_cache=True)
        return peer.lm_head(out.last_hidden_state[:, -1]).float(), past

    def our_decode() -> None:
        token = torch.zeros(1, 1, dtype=torch.int64)
        for context in range(length + 1, length + steps + 1):
            position = torch.tensor([[context - 1]])
            hidden = decoder(decoder.embed(token), position, inv_freq, KVSlice(cache, 0, position, context))
            token = decoder.logits(hidden[:, -1]).argmax(-1, keepdim=True)

    def their_decode() -> None:
        token = torch.zeros(1, 1, dtype=torch.int64)
        for _ in range(steps):
            out = peer.model.language_model(input_ids=token, past_key_values=past, use_cache=True)
            token = peer.lm_head(out.last_hidden_state[:, -1]).float().argmax(-1, keepdim=True)
        past.crop(-steps)

    def our_answer() -> object:
        return runtime.generate(QUESTION, image, max_new_tokens=steps, ignore_eos=True)

    def their_answer() -> object:
        values = processor(image, return_tensors="pt")["pixel_values"].to(dtype)
        return peer.generate(input_ids=ids, pixel_values=values, max_new_tokens=steps, do_sample=False)

    with torch.inference_mode():
        ours, (theirs, past) = our_prefill(), their_prefill()
        agreement = (ours - theirs).abs().max().item() / theirs.abs().max().item()
        stages: dict[str, tuple[Callable[[], object], Callable[[], object], int]] = {
            "preprocessing": (
                lambda: runtime.processor.tile(image),
                lambda: processor(image, return_tensors="pt"),
                1,
            ),
            "vision": (lambda: model.encode_tiles(tiles), lambda: peer.get_image_features(pixel_values=pixels), 1),
            "prefill": (our_prefill, their_prefill, 1),
            "decode, a token": (our_decode, their_decode, steps),
            f"end to end, {steps} tokens": (our_answer, their_answer, 1),
        }
        rows = []
        for stage, (ours_fn, theirs_fn, share) in tqdm(stages.items(), desc=f"{case.name} {dtype_name}", disable=None):
            timings = compare(
                {"vitrail": ours_fn, "transformers": theirs_fn},
                warmup=1,
                repeats=repeats or case.repeats,
                device="cpu",
            )
            milliseconds = {name: timing.median / share for name, timing in timings.items()}
            rows.append(
                {
                    "model": runtime.name,
                    "dtype": dtype_name,
                    "stage": stage,
                    "tiles": len(tiles),
                    "prompt_tokens": length,
                    "vitrail_ms": milliseconds["vitrail"],
                    "transformers_ms": milliseconds["transformers"],
                    "times_as_fast": milliseconds["transformers"] / milliseconds["vitrail"],
                    "vitrail_p10_ms": timings["vitrail"].p10 / share,
                    "vitrail_p90_ms": timings["vitrail"].p90 / share,
                    "transformers_p10_ms": timings["transformers"].p10 / share,
                    "transformers_p90_ms": timings["transformers"].p90 / share,
                    "n": timings["vitrail"].n,
                    "logits_difference": agreement,
                }
            )
    return rows


def _picture(size: tuple[int, int]) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def main() -> None:
    """Measure, print, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=sorted(CASES), default=list(CASES))
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, help="timed rounds a stage; each case has its own default")
    parser.add_argument("--out", help="folder of the JSON; bench/results/cpu by default")
    arguments = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # these are figures of a CPU, whatever else is there
    rows = []
    for name in arguments.models:
        for dtype_name in arguments.dtypes:
            for row in measure_case(CASES[name], dtype_name, arguments.repeats):
                rows.append(row)
                print(
                    f"{row['model']:20} {row['dtype']:9} {row['stage']:24} vitrail {row['vitrail_ms']:9.2f} ms, "
                    f"transformers {row['transformers_ms']:9.2f} ms, {row['times_as_fast']:.2f} times as fast",
                    flush=True,
                )
    path = write_results(
        results_path("latency", arguments.out),
        rows,
        title="Latency of one request, vitrail against transformers",
        notes="Medians; both sides at their fastest settings on a CPU (transformers with SDPA attention).",
    )
    print(f"written to {path}")


if __name__ == "__main__":
    main()
