"""Latency of each stage, vitrail against transformers: same process, weights, dtype, prompt and threads.

    python bench/latency.py [--device cpu] [--models nano 1b v1.5] [--dtypes float32 bfloat16] [--repeats N] [--out DIR]

Stages: *preprocessing*, a decoded image to tiles (bytes here, normalised floats there: vitrail normalises with the
patch embedding, so that its vision row carries that work); *vision*, tiles to visual tokens; *prefill*, the prompt with
its visual tokens to the first logits; *decode*, one token of one sequence; *end to end*, a decoded image and a prompt
to the last token, through `Runtime.generate` and `generate`. `1b` has the shape of InternVL2-1B (InternViT-300M and
Qwen2-0.5B) and `v1.5` that of InternVL-Chat-V1.5, a document of twelve tiles and its thumbnail before it; their weights
are random, since time does not depend on their values.
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

from vitrail.bench.harness import compare, require_gpu, results_path, write_results
from vitrail.bench.models import INTERNVL2_5_1B, INTERNVL_CHAT_V1_5, random_model
from vitrail.bench.peer import pixel_values, transformers_model
from vitrail.runtime.api import Runtime
from vitrail.runtime.engine.processor import Conversation, Picture
from vitrail.runtime.engine.runner import Runner
from vitrail.runtime.layers.kv_cache import BLOCK_SIZE
from vitrail.runtime.layers.rotary import inverse_frequencies
from vitrail.runtime.prompt import place_images
from vitrail.runtime.tokenizer import load_tokenizer
from vitrail.runtime.weights import resolve_checkpoint

QUESTION = "What is the total?"


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
    "v1.5": Case("v1.5", (1792, 1344), new_tokens=32, repeats=20),
}
RANDOM = {"1b": ("InternVL2-1B shape", INTERNVL2_5_1B), "v1.5": ("InternVL-Chat-V1.5 shape", INTERNVL_CHAT_V1_5)}


def load(name: str, dtype_name: str, device: str, **options: Any) -> Runtime:
    """The Runtime of a case. Random models speak nano's tokens: only their number matters."""
    if name == "nano":
        return Runtime.from_pretrained("nano", dtype=dtype_name, device=device, **options)
    title, config = RANDOM[name]
    model = random_model(config, getattr(torch, dtype_name), device)
    # On a GPU memory is left for the other side's activations and cache.
    tokenizer = load_tokenizer(resolve_checkpoint("nano"))
    return Runtime(model, tokenizer, name=title, gpu_memory_utilization=0.7, **options)


def measure_case(case: Case, dtype_name: str, device: str, repeats: int | None) -> list[dict[str, Any]]:
    """One row a stage."""
    # The same picture is asked about again and again, and each time as if it were new.
    runtime = load(case.name, dtype_name, device, enable_prefix_caching=False, vision_cache_gb=0.0)
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
    ids = torch.tensor([prepared.token_ids], device=device)
    tiles = torch.cat([torch.from_numpy(tiles) for tiles in prepared.tiles]).to(device)
    pixels = pixel_values(tiles, dtype)
    visual = model.encode_tiles(tiles).flatten(0, 1)
    length, steps = ids.shape[1], case.new_tokens
    runner = Runner(model, max_num_seqs=1, max_model_len=length + steps, enforce_eager=False)
    runner.warm_up_vision()
    table = list(range(-(-(length + steps) // BLOCK_SIZE)))
    runner.allocate(len(table), keep=False)
    inv_freq = inverse_frequencies(config.llm, length + steps).to(device)

    def our_prefill() -> torch.Tensor:
        return runner.prefill(prepared.token_ids, visual, image_token, inv_freq, table)

    def their_prefill() -> tuple[torch.Tensor, DynamicCache]:
        x = peer.get_input_embeddings()(ids)
        x = x.masked_scatter((ids == image_token)[..., None], visual)
        past = DynamicCache(config=peer.config.text_config)
        out = peer.model.language_model(inputs_embeds=x, past_key_values=past, use_cache=True)
        return peer.lm_head(out.last_hidden_state[:, -1]).float(), past

    def our_decode() -> None:
        token = 0
        for context in range(length + 1, length + steps + 1):
            token = int(runner.decode([token], [context], inv_freq[None], [table]).argmax())

    def their_decode() -> None:
        token = 0
        for _ in range(steps):
            step = torch.tensor([[token]], device=device)
            out = peer.model.language_model(input_ids=step, past_key_values=past, use_cache=True)
            token = int(peer.lm_head(out.last_hidden_state[:, -1]).float().argmax())
        past.crop(-steps)

    def our_answer() -> object:
        return runtime.generate(QUESTION, image, max_new_tokens=steps, ignore_eos=True)

    def their_answer() -> object:
        values = processor(image, return_tensors="pt")["pixel_values"].to(device, dtype)
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
            "vision": (lambda: runner.encode(tiles), lambda: peer.get_image_features(pixel_values=pixels), 1),
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
                device=device,
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
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
    parser.add_argument("--models", nargs="+", choices=sorted(CASES), default=["nano", "1b"])
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, help="timed rounds a stage; each case has its own default")
    parser.add_argument("--out", help="folder of the JSON; bench/results/<device> by default")
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # these are figures of a CPU, whatever else is there
    else:
        require_gpu()
    rows = []
    for name in arguments.models:
        for dtype_name in arguments.dtypes:
            for row in measure_case(CASES[name], dtype_name, arguments.device, arguments.repeats):
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
                notes="Medians; transformers with SDPA attention.",
            )
    print(f"written to {path}")


if __name__ == "__main__":
    main()
