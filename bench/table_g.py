"""The InternVL paper's efficiency table (Table G) on this GPU: InternVL-C and -G, image and text encoders.

    python bench/table_g.py [--sizes 224 336 448] [--batch 128] [--out DIR]

As in the paper: 48-layer InternViT-6B, bf16, batches of 128 images, texts of 80 tokens; milliseconds per image or text
and image-text pairs per second. Weights are random and of real size. The paper's figures, one A100, stand beside; what
an H200 gains by its own rates must not be read as ours: `share` is of cuBLAS on 8192 x 8192 matrices in the same run,
and on that A100 the paper's image encoder reached 0.75 of it. Images start as uint8 pixels in GPU memory.
"""

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import torch

from vitrail.bench.harness import ceilings, compare, require_gpu, results_path, write_results
from vitrail.bench.models import INTERNVL_14B, randomize
from vitrail.bench.vision import encoder_flops
from vitrail.runtime.models.contrastive import ContrastiveModel

TEXT_TOKENS = 80
# Milliseconds per image or text on one A100, by image size: InternViT-6B, QLLaMA on the image's tokens, text encoder.
PAPER_IMAGE: Mapping[int, float] = {224: 15.5, 336: 35.2, 448: 66.9}
PAPER_QUERIES: Mapping[int, float] = {224: 8.2, 336: 10.3, 448: 12.8}
PAPER_TEXT = 4.9
PATCH = 14


def measure_size(model: ContrastiveModel, size: int, batch: int, at_once: int) -> dict[str, float]:
    """Milliseconds per image of the ViT and of QLLaMA's queries, and per text."""
    pixels = torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8, device="cuda")
    tokens = torch.randint(3, model.config.llm.vocab_size, (batch, TEXT_TOKENS), device="cuda")
    positions = torch.arange(TEXT_TOKENS, device="cuda").expand(batch, -1)
    last = torch.full((batch,), TEXT_TOKENS - 1, device="cuda")
    vision = model.vision_model(pixels[:at_once])

    def images() -> None:
        for part in pixels.split(at_once):
            model.clip_projector(model.vision_model(part))

    def queries() -> None:
        for _ in range(0, batch, at_once):
            model.clip_projector2(model.encode_queries(vision))

    contenders: dict[str, Callable[[], object]] = {
        "image": images,
        "queries": queries,
        "text": lambda: model.embed_texts(tokens, positions, last),
    }
    return {name: timing.median / batch for name, timing in compare(contenders).items()}


def rows_of(size: int, ms: Mapping[str, float], matmul_flops: float) -> list[dict[str, Any]]:
    """The rows of InternVL-C and -G at one image size."""
    # The same tokens in a larger grid: the table's sizes are multiples of a patch.
    grid_tokens = (size // PATCH) ** 2 + 1
    flops = encoder_flops(INTERNVL_14B.vision, INTERNVL_14B.vision.num_hidden_layers, 1, tokens=grid_tokens)
    rows = []
    for mode in ("C", "G"):
        with_queries = mode == "G"
        total = ms["image"] + ms["text"] + (ms["queries"] if with_queries else 0)
        paper = PAPER_IMAGE[size] + PAPER_TEXT + (PAPER_QUERIES[size] if with_queries else 0)
        rows.append(
            {
                "model": f"InternVL-{mode}",
                "size": size,
                "image_encoder_ms": ms["image"],
                "QLLaMA_ms": ms["queries"] if with_queries else None,
                "text_encoder_ms": ms["text"],
                "total_ms": total,
                "FPS": 1e3 / total,
                "paper_A100_image_encoder_ms": PAPER_IMAGE[size],
                "paper_A100_total_ms": paper,
                "paper_A100_FPS": 1e3 / paper,
                "share": flops / (ms["image"] / 1e3) / matmul_flops,
            }
        )
    return rows


def main() -> None:
    """Measure, print, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", choices=sorted(PAPER_IMAGE), default=sorted(PAPER_IMAGE))
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--at-once", type=int, default=32, help="images in one pass of the ViT")
    parser.add_argument("--out", help="folder of the JSON; bench/results/<device> by default")
    arguments = parser.parse_args()
    require_gpu()
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        ceiling = ceilings()
        with torch.device("meta"):
            empty = ContrastiveModel(INTERNVL_14B).to(torch.bfloat16)
        model = randomize(empty.to_empty(device="cuda"))
        for size in arguments.sizes:
            ms = measure_size(model, size, arguments.batch, arguments.at_once)
            rows += rows_of(size, ms, ceiling.matmul_flops)
            path = write_results(
                results_path("table_g", arguments.out),
                rows,
                title=f"Table G of the InternVL paper, bf16, batch {arguments.batch}",
                notes=f"{ceiling} The paper's figures are of one A100.",
            )
    for row in rows:
        milliseconds = f"image {row['image_encoder_ms']:6.2f} ms, total {row['total_ms']:6.2f} ms"
        rate = f"{row['FPS']:6.1f} pairs/s ({row['paper_A100_FPS']:.1f} in the paper)"
        print(f"{row['model']} {row['size']} px  {milliseconds}, {rate}, {row['share']:.2f} of cuBLAS")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
