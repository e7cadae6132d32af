"""Measure on this GPU which implementation of each operation is fastest, and write the user's own dispatch table.

    vitrail bench tune [--only OPERATION ...] [--out FILE]

Every candidate of an operation is timed at every shape of its list, all in the same rounds, on random data. The table
goes where `kernels.dispatch` looks for it (the user's cache folder) and replaces the shipped rows of the operations it
covers. Rows keep their milliseconds, so that the table shows what a choice is worth.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from vitrail.bench.harness import compare, environment, require_gpu
from vitrail.kernels import attention, dispatch, gemm, paged_attention, scaled_gemm
from vitrail.kernels.attention import tile_attention
from vitrail.kernels.dispatch import Arch, Choice
from vitrail.kernels.linear import linear_gelu
from vitrail.kernels.quantize import QuantizedRows
from vitrail.kernels.quantized_cache import Cache, QuantizedCache
from vitrail.kernels.scaled_gemm import PARTS, Epilogue, scaled_linear
from vitrail.kernels.swiglu import linear_swiglu

DEVICE = "cuda"
TILE_TOKENS = 1025
TILE_COUNTS = (1, 2, 4, 7, 8, 13, 16, 32)
Shape = Mapping[str, int]


@dataclass(frozen=True)
class Operation:
    """An operation whose implementation depends on shape.

    `shapes`: what its launcher asks the table with. `make`: the launcher's call on random operands of a shape.
    """

    configs: Mapping[Arch, Sequence[Choice]]
    shapes: Sequence[Shape]
    make: Callable[[Shape], Callable[[], object]]


def random(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, device=DEVICE) * scale


def _linear_gelu(shape: Shape) -> Callable[[], object]:
    x, bias = random(shape["m"], shape["k"]), random(shape["n"])
    weight = random(shape["n"], shape["k"], scale=shape["k"] ** -0.5)
    return lambda: linear_gelu(x, weight, bias)


def _linear_swiglu(shape: Shape) -> Callable[[], object]:
    x = random(shape["m"], shape["k"])
    weight = random(2 * shape["n"], shape["k"], scale=shape["k"] ** -0.5)
    return lambda: linear_swiglu(x, weight)


def codes(*shape: int, dtype: torch.dtype = torch.int8) -> Tensor:
    return (random(*shape) * 40).round().clamp(-127, 127).to(dtype)


def _scaled(dtype: torch.dtype, epilogue: Epilogue, shape: Shape) -> Callable[[], object]:
    m, n, k = shape["m"], PARTS[epilogue] * shape["n"], shape["k"]
    x = QuantizedRows(codes(m, k, dtype=dtype), random(m).float(), torch.bfloat16)
    weight, scales, bias = codes(n, k, dtype=dtype), random(n).float(), None if epilogue == "swiglu" else random(n)
    target = dispatch.target_of(weight)
    assert target is not None
    return lambda: scaled_linear(target, x, weight, scales, bias, epilogue=epilogue)


def _tile_attention(shape: Shape) -> Callable[[], object]:
    # `batch` counts tiles times heads; how they divide does not matter to a kernel that has a program for each.
    qkv = random(1, shape["tokens"], 3, shape["batch"], shape["head_dim"])
    q, k, v = qkv.unbind(2)
    return lambda: tile_attention(q, k, v)


def _paged(shape: Shape, sequences: int, context: int, new_tokens: int, *, int8: bool = False) -> Callable[[], object]:
    kv_heads, pages = 8, context // 64
    slots = (sequences * pages, 64, kv_heads)

    def cache() -> Cache:
        return (
            QuantizedCache(codes(*slots, shape["head_dim"]), random(*slots).float())
            if int8
            else random(*slots, shape["head_dim"])
        )

    keys, values = cache(), cache()
    tables = torch.randperm(sequences * pages, device=DEVICE).view(sequences, pages).int()
    q = random(sequences * new_tokens, kv_heads * shape["group"], shape["head_dim"])
    borders = torch.arange(sequences + 1, dtype=torch.int32, device=DEVICE) * new_tokens
    lens = torch.full((sequences,), context, dtype=torch.int32, device=DEVICE)
    return lambda: paged_attention.paged_attention(q, keys, values, tables, borders, lens, max_seqlen_q=new_tokens)


def _gemm_shapes(projections: Sequence[tuple[int, int]], rows: Sequence[int]) -> Iterator[Shape]:
    for n, k in projections:
        yield from ({"m": m, "n": n, "k": k} for m in rows)


TILES = [tiles * TILE_TOKENS for tiles in TILE_COUNTS]
# InternLM2-20B and -7B, Qwen2-0.5B.
PAGED_SHAPES = [{"head_dim": d, "group": group} for d, group in ((128, 6), (128, 4), (64, 7))]
# Projections of quantised models: InternViT-6B and -300M, InternLM2-20B and -7B, Qwen2-0.5B.
SCALED_SHAPES: Mapping[Epilogue, Sequence[tuple[int, int]]] = {
    "none": (
        *[(9600, 3200), (3200, 3200), (3200, 12800), (3072, 1024), (1024, 4096)],
        *[(8192, 6144), (6144, 16384), (4096, 4096), (1152, 896), (896, 4864)],
    ),
    "gelu": ((12800, 3200), (4096, 1024)),
    "swiglu": ((16384, 6144), (14336, 4096), (4864, 896)),
}
SCALED_ROWS = (16, 32, 64, 128, 256, 512, *(tiles * TILE_TOKENS for tiles in (1, 2, 4, 7, 16)))


def _scaled_operations() -> Iterator[tuple[str, Operation]]:
    for (dtype, epilogue), name in scaled_gemm.OPERATIONS.items():
        shapes = list(_gemm_shapes(SCALED_SHAPES[epilogue], SCALED_ROWS))
        # e4m3 is Hopper's.
        configs = scaled_gemm.CONFIGS if dtype == torch.int8 else {**scaled_gemm.CONFIGS, "sm_80": ()}
        yield name, Operation(configs, shapes, partial(_scaled, dtype, epilogue))


OPERATIONS: Mapping[str, Operation] = {
    **dict(_scaled_operations()),
    "linear_gelu": Operation(
        gemm.CONFIGS,
        [
            *_gemm_shapes([(12800, 3200), (4096, 1024)], TILES),  # fc1 of InternViT-6B and -300M
            # mlp1 of InternVL-Chat-V1.5, of 38B to 78B models, 8B, 2B and 1B
            *_gemm_shapes(
                [(6144, 12800), (5120, 12800), (8192, 12800), (4096, 4096), (2048, 4096), (896, 4096)],
                [256 * tiles for tiles in TILE_COUNTS],
            ),
            *_gemm_shapes([(512, 128), (256, 512)], [257, 1025, 4096]),  # nano
        ],
        _linear_gelu,
    ),
    "linear_swiglu": Operation(
        gemm.CONFIGS,
        list(
            _gemm_shapes(
                [
                    *[(16384, 6144), (14336, 4096), (8192, 2048)],  # InternLM2-20B, -7B, -1.8B
                    *[(4864, 896), (27648, 5120), (29568, 8192)],  # Qwen2-0.5B, Qwen2.5-32B and -72B
                    *[(8192, 3072), (20480, 7168), (512, 256)],  # Phi-3-mini, Yi-34B, nano
                ],
                [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192],
            )
        ),
        _linear_swiglu,
    ),
    "tile_attention": Operation(
        attention.CONFIGS,
        [
            {"tokens": tokens, "head_dim": head_dim, "batch": tiles * heads}
            for head_dim, heads in ((128, 25), (64, 16))
            for tokens in (257, 577, TILE_TOKENS)
            for tiles in (1, 2, 7, 16)
        ],
        _tile_attention,
    ),
    "paged_prefill": Operation(
        paged_attention.CONFIGS["paged_prefill"],
        PAGED_SHAPES,
        lambda shape: _paged(shape, sequences=1, context=3392, new_tokens=3392),
    ),
    "paged_decode": Operation(
        paged_attention.CONFIGS["paged_decode"],
        PAGED_SHAPES,
        lambda shape: _paged(shape, sequences=8, context=2048, new_tokens=1),
    ),
    "paged_prefill_int8": Operation(
        paged_attention.CONFIGS["paged_prefill_int8"],
        PAGED_SHAPES,
        lambda shape: _paged(shape, sequences=1, context=3392, new_tokens=3392, int8=True),
    ),
    "paged_decode_int8": Operation(
        paged_attention.CONFIGS["paged_decode_int8"],
        PAGED_SHAPES,
        lambda shape: _paged(shape, sequences=8, context=2048, new_tokens=1, int8=True),
    ),
}


def tune(operation: str, shape: Shape, arch: Arch) -> dict[str, Any] | None:
    """A table row: the fastest candidate at a shape, with the milliseconds of all that run here; None if none does."""
    spec = OPERATIONS[operation]
    run = spec.make(shape)
    contenders: dict[str, Callable[[], object]] = {}
    for choice in spec.configs[arch]:

        def with_choice(choice: Choice = choice) -> object:
            with dispatch.override(operation, choice):
                return run()

        try:
            with_choice()
        except Exception as error:  # e.g. shared memory that this GPU has not: the others are still to be measured
            tqdm.write(f"{operation} {dict(shape)}: {choice} does not run here: {error}")
            continue
        contenders[json.dumps(choice)] = with_choice
    if not contenders:
        return None
    timings = compare(contenders, device=DEVICE, cold_cache=True, hide_launch=True)
    fastest = min(timings, key=lambda name: timings[name].median)
    milliseconds = sorted((timing.median, name) for name, timing in timings.items())
    return {
        "shape": dict(shape),
        "choice": json.loads(fastest),
        "ms": timings[fastest].median,
        "others": [{"ms": ms, **json.loads(name)} for ms, name in milliseconds[1:]],
    }


def main() -> None:
    """Measure, print, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=sorted(OPERATIONS), default=list(OPERATIONS))
    parser.add_argument("--out", type=Path, help="the table's file; by default where vitrail looks for it")
    arguments = parser.parse_args()
    require_gpu()
    target = dispatch.cuda_target(torch.device(DEVICE))
    if target is None:
        parser.error(f"kernels need compute capability 8.0 or newer and Triton; this is {torch.cuda.get_device_name()}")
    path: Path = arguments.out or dispatch.user_table(target)
    operations: dict[str, list[Choice]] = dispatch.read_table(path) if path.is_file() else {}
    for name in arguments.only:
        with torch.inference_mode():
            shapes = tqdm(OPERATIONS[name].shapes, desc=name, disable=None)
            operations[name] = [row for shape in shapes if (row := tune(name, shape, target.arch)) is not None]
        for measured in operations[name]:
            print(f"{name:16} {measured['shape']}  {measured['ms']:8.3f} ms  {measured['choice']}")
        path.parent.mkdir(parents=True, exist_ok=True)
        table = {"origin": "measured", "environment": environment(), "operations": operations}
        path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
