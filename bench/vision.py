"""The vision half at real size: one technique after another, against eager transformers and `torch.compile`.

    python bench/vision.py [--tiles 1 2 4 ...] [--waterfall 1 7 16] [--model 6b|300m] [--out DIR]

From uint8 tiles to the last hidden states. Every row of a tile count is timed in the same rounds. `share` is the row's
FLOP rate over that of cuBLAS on 8192 x 8192 bf16 matrices in the same run. The eager baseline is timed twice: their
difference is what a ratio can be trusted to. The tile counts of `--waterfall` have a row for `torch.compile`, which
takes minutes, and one for each technique, added to the row above.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from vitrail.bench.harness import Ceilings, ceilings, compare, require_gpu, results_path, write_results
from vitrail.bench.models import INTERNVL2_5_1B, INTERNVL_CHAT_V1_5, random_model, vision_only
from vitrail.bench.peer import pixel_values, transformers_model
from vitrail.kernels import attention, linear, norm, patch_embedding, qk_norm, residual
from vitrail.runtime.config import VisionConfig
from vitrail.runtime.engine.graphs import TILE_COUNTS, CudaCapture
from vitrail.runtime.layers import linear as linear_layers
from vitrail.runtime.layers import norm as norm_layers
from vitrail.runtime.models import intern_vit

MODELS = {"6b": INTERNVL_CHAT_V1_5, "300m": INTERNVL2_5_1B}


def _unquantized(reference: Callable[..., Any]) -> Callable[..., Any]:
    """A norm's reference as layers call it, which say whether rows are to be quantised too."""
    return lambda *tensors, quantize=None: reference(*tensors)


# Names that the model calls, and the plain torch that stands for each until its technique's row.
PLAIN: dict[str, list[tuple[Any, str, Callable[..., Any]]]] = {
    "one kernel for QK-norm": [(intern_vit, "qk_norm", qk_norm.qk_norm_reference)],
    "one kernel for residual, LayerScale and norm": [
        (norm_layers, "residual_norm", _unquantized(norm.residual_norm_reference)),
        (norm_layers, "rms_norm", _unquantized(norm.rms_norm_reference)),
        (norm_layers, "layer_norm", _unquantized(norm.layer_norm_reference)),
        (intern_vit, "scaled_residual", residual.scaled_residual_reference),
    ],
    "bias and GELU in fc1's epilogue": [(linear_layers, "linear_gelu", linear.linear_gelu_reference)],
    "the fastest attention for the GPU": [(intern_vit, "tile_attention", attention.tile_attention_reference)],
    "patches from bytes in one kernel": [(intern_vit, "patch_embedding", patch_embedding.patch_embedding_reference)],
}


@contextmanager
def plain_torch(techniques: list[str]) -> Iterator[None]:
    """Within the block, the model runs plain torch in place of `techniques`."""
    with ExitStack() as stack:
        for technique in techniques:
            for module, name, reference in PLAIN[technique]:
                stack.enter_context(mock.patch.object(module, name, reference))
        yield


def encoder_flops(config: VisionConfig, depth: int, tiles: int, tokens: int | None = None) -> float:
    """Matrix products and attention of the blocks; the patch embedding is half a percent of one of them.

    tokens: of a tile with its class token; None for the config's own image size.
    """
    hidden = config.hidden_size
    tokens = config.grid_size**2 + 1 if tokens is None else tokens
    gemm = 2 * tokens * (4 * hidden**2 + 2 * hidden * config.intermediate_size)
    return float(tiles * depth * (gemm + 4 * tokens**2 * hidden))


def measure_tiles(model: Any, peer: Any, tiles: int, waterfall: bool, ceiling: Ceilings) -> list[dict[str, Any]]:
    """The rows of one tile count."""
    config = model.config
    batch = torch.randint(0, 256, (tiles, config.tile_size, config.tile_size, 3), dtype=torch.uint8, device="cuda")
    pixels = pixel_values(batch, torch.bfloat16)
    theirs = peer.model.vision_tower

    def eager() -> Tensor:
        return theirs(pixel_values=pixels).last_hidden_state

    contenders: dict[str, Callable[[], object]] = {"transformers, eager, SDPA": eager, "the same again": eager}
    techniques = list(PLAIN)

    def with_techniques(count: int) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with plain_torch(techniques[count:]):
                return model.vision_model(batch)

        return run

    if waterfall:
        torch._dynamo.reset()  # or the second shape would be compiled with dynamic sizes
        compiled: Any = torch.compile(theirs, mode="max-autotune", dynamic=False)
        contenders["transformers, torch.compile(max-autotune)"] = lambda: compiled(pixel_values=pixels)
        contenders["vitrail, plain torch"] = with_techniques(0)
        for count, technique in enumerate(techniques[:-1], start=1):
            contenders[f"+ {technique}"] = with_techniques(count)
    contenders[f"+ {techniques[-1]}" if waterfall else "vitrail, every kernel"] = with_techniques(len(techniques))
    replay = CudaCapture(batch.device)(lambda: model.vision_model(batch))
    contenders["+ CUDA graph"] = replay

    expected = with_techniques(0)().float()
    error = (replay().float() - expected).norm() / expected.norm()
    timings = compare(contenders, repeats=20 if tiles < 26 else 10)
    eager_ms = timings["transformers, eager, SDPA"].median
    flops = encoder_flops(config.vision, config.vision_depth, tiles)
    return [
        {
            "tiles": tiles,
            "technique": name,
            **timing.row(),
            "ms_per_tile": timing.median / tiles,
            "TFLOP_per_s": flops / timing.median / 1e9,
            "share": flops / (timing.median / 1e3) / ceiling.matmul_flops,
            "times_as_fast_as_eager": eager_ms / timing.median,
            "difference_to_plain": float(error) if name == "+ CUDA graph" else None,
        }
        for name, timing in timings.items()
    ]


def main() -> None:
    """Measure, print, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), default="6b")
    parser.add_argument("--tiles", type=int, nargs="+", default=list(TILE_COUNTS))
    parser.add_argument("--waterfall", type=int, nargs="*", default=[1, 7, 16])
    parser.add_argument("--out", help="folder of the JSON; bench/results/<device> by default")
    arguments = parser.parse_args()
    require_gpu()
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        ceiling = ceilings()
        model = random_model(vision_only(MODELS[arguments.model]), torch.bfloat16, "cuda")
        peer = transformers_model(model, image_token_id=0)
        for tiles in arguments.tiles:
            rows += measure_tiles(model, peer, tiles, tiles in arguments.waterfall, ceiling)
            path = write_results(
                results_path(f"vision-{arguments.model}", arguments.out),
                rows,
                title=f"InternViT-{arguments.model.upper()}, bf16: a waterfall of techniques",
                notes=str(ceiling),
            )
    for row in rows:
        print(
            f"{row['tiles']:3} tiles  {row['technique']:48} {row['ms']:9.2f} ms {row['TFLOP_per_s']:6.0f} TFLOP/s "
            f"{row['share']:5.2f} of cuBLAS {row['times_as_fast_as_eager']:5.2f} x eager"
        )
    print(f"written to {path}")


if __name__ == "__main__":
    main()
