"""Every GPU kernel at real size against plain torch and the library, with its share of what this GPU can do.

    python bench/kernels.py [--only NAME ...] [--out DIR]

`share` is of the copy bandwidth (GB/s rows) or of cuBLAS on 8192 x 8192 matrices (TFLOP/s rows), measured in the same
run; products of 8 bits, too, are measured by cuBLAS in bf16, and may reach 2. Bytes are the fewest that the operation
must move, each input read once and each output written once; FLOPs those it must do. Memory-bound operations start with
a cold L2 cache, as inside a model. `plain` is the reference that also runs on a CPU; `library` the fastest library call
for the same operation, for weights of 4 and 8 bits that of the matrix in bf16.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vitrail.bench.harness import Ceilings, ceilings, compare, require_gpu, results_path, write_results
from vitrail.kernels import attention, dispatch
from vitrail.kernels.attention import tile_attention
from vitrail.kernels.linear import linear, linear_gelu, linear_gelu_reference
from vitrail.kernels.norm import residual_norm, residual_norm_reference, rms_norm, rms_norm_reference
from vitrail.kernels.paged_attention import paged_attention, paged_attention_reference
from vitrail.kernels.patch_embedding import patch_embedding, patch_embedding_reference
from vitrail.kernels.pixel_shuffle import pixel_shuffle_norm, pixel_shuffle_norm_reference
from vitrail.kernels.qk_norm import qk_norm, qk_norm_reference
from vitrail.kernels.quantize import QuantizedRows, quantize_rows, quantize_rows_reference
from vitrail.kernels.quantized_cache import QuantizedCache
from vitrail.kernels.quantized_linear import pack_fp8, pack_int4, pack_int8
from vitrail.kernels.rope import rope_and_cache, rope_and_cache_reference
from vitrail.kernels.swiglu import linear_swiglu, linear_swiglu_reference

DEVICE = "cuda"
EPS = 1e-6
HIDDEN, HEADS, HEAD_DIM, MLP, TOKENS = 3200, 25, 128, 12800, 1025  # InternViT-6B at 448 px
LLM_HIDDEN, LLM_MLP, LLM_HEADS, KV_HEADS = 6144, 16384, 48, 8  # InternLM2-20B


@dataclass(frozen=True)
class Case:
    """One operation at one size. `bytes` of a memory-bound operation, or `flops` of a compute-bound one."""

    name: str
    shape: str
    run: Callable[[], object]
    plain: Callable[[], object] | None = None
    library: Callable[[], object] | None = None
    bytes: float = 0.0
    flops: float = 0.0


def random(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, device=DEVICE) * scale


def vision_cases(tiles: int) -> Iterator[Case]:
    """The operations of an InternViT-6B block and of what surrounds the blocks."""
    rows = tiles * TOKENS
    unit = 2.0 * rows * HIDDEN
    shape = f"{tiles} tiles"
    x, branch, weight, scale = random(rows, HIDDEN), random(rows, HIDDEN), random(HIDDEN), random(HIDDEN)
    yield Case(
        *("rms_norm", shape, lambda: rms_norm(x, weight, EPS)),
        plain=lambda: rms_norm_reference(x, weight, EPS),
        library=lambda: F.rms_norm(x, (HIDDEN,), weight, EPS),
        bytes=2 * unit,
    )
    yield Case(
        *("residual_norm", shape, lambda: residual_norm(x, branch, scale, weight, None, EPS)),
        plain=lambda: residual_norm_reference(x, branch, scale, weight, None, EPS),
        bytes=4 * unit,
    )
    qkv = random(rows, 3 * HIDDEN)
    yield Case(
        *("qk_norm", shape, lambda: qk_norm(qkv, weight, weight, EPS)),
        plain=lambda: qk_norm_reference(qkv, weight, weight, EPS),
        bytes=4 * unit,
    )
    q, k, v = qkv.view(tiles, TOKENS, 3, HEADS, HEAD_DIM).unbind(2)

    def sdpa(backend: SDPBackend) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))

        return run

    for candidate in ("triton", "flash", "cudnn"):
        choice = next((row for row in candidates("tile_attention") if row["implementation"] == candidate), None)
        if choice is not None:
            yield Case(
                *(
                    "tile_attention",
                    f"{shape}, {candidate}",
                    forced("tile_attention", choice, lambda: tile_attention(q, k, v)),
                ),
                plain=sdpa(SDPBackend.MATH) if tiles == 1 else None,
                library=sdpa(SDPBackend.FLASH_ATTENTION),
                flops=4.0 * rows * TOKENS * HIDDEN,
            )
    fc1, bias = random(MLP, HIDDEN, scale=HIDDEN**-0.5), random(MLP)
    yield Case(
        *("linear_gelu", shape, lambda: linear_gelu(x, fc1, bias)),
        plain=lambda: linear_gelu_reference(x, fc1, bias),
        library=lambda: torch.ops.aten._addmm_activation(bias, x, fc1.t(), use_gelu=True),  # its GELU is the tanh one
        flops=2.0 * rows * HIDDEN * MLP,
    )
    for name, out in (("linear, qkv", 3 * HIDDEN), ("linear, proj", HIDDEN)):
        matrix = random(out, HIDDEN, scale=HIDDEN**-0.5)
        yield Case(name, shape, partial(linear, x, matrix), flops=2.0 * rows * HIDDEN * out)
    inner, fc2 = random(rows, MLP), random(HIDDEN, MLP, scale=MLP**-0.5)
    yield Case("linear, fc2", shape, lambda: linear(inner, fc2), flops=2.0 * rows * HIDDEN * MLP)
    pixels = torch.randint(0, 256, (tiles, 448, 448, 3), dtype=torch.uint8, device=DEVICE)
    patch = (random(HIDDEN, 588), random(HIDDEN), random(HIDDEN), random(TOKENS, HIDDEN), 14)
    yield Case(
        *("patch_embedding", shape, lambda: patch_embedding(pixels, *patch)),
        plain=lambda: patch_embedding_reference(pixels, *patch),
        bytes=float(pixels.nbytes) + unit + 2 * TOKENS * HIDDEN,
    )
    features, wide = x.view(tiles, TOKENS, HIDDEN), (random(4 * HIDDEN), random(4 * HIDDEN))
    yield Case(
        *("pixel_shuffle_norm", shape, lambda: pixel_shuffle_norm(features[:, 1:], *wide, 1e-5, 2, "v2")),
        plain=lambda: pixel_shuffle_norm_reference(features[:, 1:], *wide, 1e-5, 2, "v2"),
        bytes=4.0 * tiles * (TOKENS - 1) * HIDDEN,
    )


def codes(*shape: int, dtype: torch.dtype = torch.int8) -> Tensor:
    return (random(*shape) * 40).round().clamp(-127, 127).to(dtype)


def quantized_vision_cases(tiles: int) -> Iterator[Case]:
    """The quantised operations of an InternViT-6B block."""
    rows = tiles * TOKENS
    unit = 2.0 * rows * HIDDEN
    shape = f"{tiles} tiles"
    x, branch, weight, scale = random(rows, HIDDEN), random(rows, HIDDEN), random(HIDDEN), random(HIDDEN)
    target = dispatch.target_of(x)
    assert target is not None
    yield Case(
        *("quantize_rows", shape, lambda: quantize_rows(x)),
        plain=lambda: quantize_rows_reference(x),
        bytes=1.5 * unit,
    )
    yield Case(
        *("residual_norm to int8", shape),
        lambda: residual_norm(x, branch, scale, weight, None, EPS, quantize=torch.int8),
        plain=lambda: quantize_rows_reference(residual_norm_reference(x, branch, scale, weight, None, EPS)[1]),
        bytes=3.5 * unit,
    )
    kinds = (torch.int8, torch.float8_e4m3fn) if target.arch == "sm_90" else (torch.int8,)
    for dtype in kinds:
        for layer, out, inner in (
            *(("qkv", 3 * HIDDEN, HIDDEN), ("proj", HIDDEN, HIDDEN)),
            *(("fc1", MLP, HIDDEN), ("fc2", HIDDEN, MLP)),
        ):
            yield _scaled_case(dtype, layer, shape, rows, out, inner)


def _scaled_case(dtype: torch.dtype, layer: str, shape: str, rows: int, out: int, inner: int) -> Case:
    """A product of codes against the library's of the same type, which for int8 leaves int32, unscaled."""
    name = "int8" if dtype == torch.int8 else "fp8"
    x = QuantizedRows(codes(rows, inner, dtype=dtype), torch.rand(rows, device=DEVICE) / 127, torch.bfloat16)
    matrix, scales, bias = codes(out, inner, dtype=dtype), torch.rand(out, device=DEVICE) / 127, random(out)
    packed = (pack_int8 if dtype == torch.int8 else pack_fp8)(matrix, scales)
    next_scales = torch.rand(out, device=DEVICE) + 0.5 if dtype == torch.int8 else None

    def library() -> Tensor:
        if dtype == torch.int8:
            return torch._int_mm(x.codes, matrix.t())
        assert x.scales is not None
        row_scales, column_scales = x.scales[:, None], scales[None, :]
        return torch._scaled_mm(
            *(x.codes, matrix.t(), row_scales, column_scales), bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    return Case(
        f"linear {name}, {layer}",
        shape,
        (lambda: packed.linear_gelu(x, bias, next_scales)) if layer == "fc1" else (lambda: packed.linear(x, bias)),
        library=library,
        flops=2.0 * rows * out * inner,
    )


def quantized_decode_cases(batch: int, context: int) -> Iterator[Case]:
    """A decode step of an InternLM2-20B layer with weights or cache of 4 and 8 bits."""
    shape = f"batch {batch}, context {context}"
    pages = context // 64
    slots = (batch * pages, 64, KV_HEADS)
    keys, values = (QuantizedCache(codes(*slots, HEAD_DIM), torch.rand(slots, device=DEVICE)) for _ in range(2))
    tables = torch.randperm(batch * pages, device=DEVICE).view(batch, pages).int()
    lens = torch.full((batch,), context, dtype=torch.int32, device=DEVICE)
    borders = torch.arange(batch + 1, dtype=torch.int32, device=DEVICE)
    q = random(batch, LLM_HEADS, HEAD_DIM)
    yield Case(
        *("paged_attention int8, decode", shape),
        lambda: paged_attention(q, keys, values, tables, borders, lens, max_seqlen_q=1),
        bytes=float(keys.nbytes + values.nbytes + 2 * q.nbytes),
    )
    x, matrix = random(batch, LLM_HIDDEN), random(2 * LLM_MLP, LLM_HIDDEN, scale=LLM_HIDDEN**-0.5)
    yield from _few_rows_cases("gate_up", shape, x, matrix)


def _few_rows_cases(layer: str, shape: str, x: Tensor, matrix: Tensor) -> Iterator[Case]:
    out, inner = matrix.shape
    nibbles = torch.randint(0, 16, (out, inner), dtype=torch.uint8, device=DEVICE)
    scales = torch.rand(out, inner // 128, device=DEVICE) / 8
    for name, packed, size in (
        ("int4", pack_int4(nibbles, scales), matrix.numel() / 2 + 4 * scales.numel()),
        ("int8-weight", pack_int8(codes(out, inner), scales[:, 0], weight_only=True), matrix.numel() + 4 * out),
    ):
        yield Case(
            f"linear {name}, {layer}",
            shape,
            partial(packed.linear, x),
            library=lambda: F.linear(x, matrix),
            bytes=size + 2.0 * x.shape[0] * (out + inner),
        )


def quantized_prefill_cases(tokens: int) -> Iterator[Case]:
    """Projections of an InternLM2-20B layer in a prompt, with weights of 4 bits and in int8."""
    shape = f"{tokens} tokens"
    x, matrix = random(tokens, LLM_HIDDEN), random(2 * LLM_MLP, LLM_HIDDEN, scale=LLM_HIDDEN**-0.5)
    int4 = pack_int4(
        torch.randint(0, 16, matrix.shape, dtype=torch.uint8, device=DEVICE),
        torch.rand(matrix.shape[0], LLM_HIDDEN // 128, device=DEVICE) / 8,
    )
    int8 = pack_int8(codes(*matrix.shape), torch.rand(matrix.shape[0], device=DEVICE) / 127)
    for name, packed in (("int4", int4), ("int8", int8)):
        yield Case(
            *(f"linear_swiglu {name}", shape, partial(packed.linear_swiglu, x)),
            library=lambda: linear_swiglu(x, matrix),
            flops=4.0 * tokens * LLM_HIDDEN * LLM_MLP,
        )


def decode_cases(batch: int, context: int) -> Iterator[Case]:
    """One decode step of an InternLM2-20B layer."""
    shape = f"batch {batch}, context {context}"
    pages = context // 64
    keys, values = random(batch * pages, 64, KV_HEADS, HEAD_DIM), random(batch * pages, 64, KV_HEADS, HEAD_DIM)
    tables = torch.randperm(batch * pages, device=DEVICE).view(batch, pages).int()
    lens = torch.full((batch,), context, dtype=torch.int32, device=DEVICE)
    borders = torch.arange(batch + 1, dtype=torch.int32, device=DEVICE)
    q = random(batch, LLM_HEADS, HEAD_DIM)
    paged = (q, keys, values, tables, borders, lens)
    yield Case(
        *("paged_attention, decode", shape, lambda: paged_attention(*paged, max_seqlen_q=1)),
        plain=lambda: paged_attention_reference(*paged, max_seqlen_q=1),
        bytes=float(keys.nbytes + values.nbytes + 2 * q.nbytes),
    )
    x, gate_up = random(batch, LLM_HIDDEN), random(2 * LLM_MLP, LLM_HIDDEN, scale=LLM_HIDDEN**-0.5)
    yield Case(
        *("linear_swiglu", shape, lambda: linear_swiglu(x, gate_up)),
        plain=lambda: linear_swiglu_reference(x, gate_up),
        bytes=float(gate_up.nbytes + x.nbytes) + 2 * batch * LLM_MLP,
    )
    qkv = random(batch, (LLM_HEADS + 2 * KV_HEADS) * HEAD_DIM)
    cos, sin = random(batch, HEAD_DIM), random(batch, HEAD_DIM)
    slots = torch.randperm(batch * context, device=DEVICE)[:batch]
    yield Case(
        *("rope_and_cache", shape, lambda: rope_and_cache(qkv, cos, sin, keys, values, slots, LLM_HEADS)),
        plain=lambda: rope_and_cache_reference(qkv, cos, sin, keys, values, slots, LLM_HEADS),
        bytes=2.0 * qkv.nbytes,
    )


def prefill_cases(tokens: int) -> Iterator[Case]:
    """The prompt of one request through an InternLM2-20B layer."""
    shape = f"{tokens} tokens"
    pages = -(-tokens // 64)
    keys, values = random(pages, 64, KV_HEADS, HEAD_DIM), random(pages, 64, KV_HEADS, HEAD_DIM)
    q = random(tokens, LLM_HEADS, HEAD_DIM)
    numbers = [torch.tensor(row, dtype=torch.int32, device=DEVICE) for row in ([0, tokens], [tokens])]
    paged = (q, keys, values, torch.arange(pages, device=DEVICE).int()[None], *numbers)
    k, v = (cache.flatten(0, 1)[None, :tokens].transpose(1, 2) for cache in (keys, values))

    def flash() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q[None].transpose(1, 2), k, v, is_causal=True, enable_gqa=True)

    yield Case(
        *("paged_attention, prefill", shape, lambda: paged_attention(*paged, max_seqlen_q=tokens)),
        library=flash,
        flops=2.0 * tokens**2 * LLM_HEADS * HEAD_DIM,
    )
    x, gate_up = random(tokens, LLM_HIDDEN), random(2 * LLM_MLP, LLM_HIDDEN, scale=LLM_HIDDEN**-0.5)
    yield Case(
        *("linear_swiglu", shape, lambda: linear_swiglu(x, gate_up)),
        plain=lambda: linear_swiglu_reference(x, gate_up),
        flops=4.0 * tokens * LLM_HIDDEN * LLM_MLP,
    )


def candidates(operation: str) -> tuple[dispatch.Choice, ...]:
    """What the tables may choose from for an operation on this GPU."""
    target = dispatch.target_of(torch.empty(0, device=DEVICE))
    assert target is not None
    return {"tile_attention": attention.CONFIGS}[operation][target.arch]


def forced(operation: str, choice: dispatch.Choice, run: Callable[[], object]) -> Callable[[], object]:
    """`run` with one row of the table replaced."""

    def with_choice() -> object:
        with dispatch.override(operation, choice):
            return run()

    return with_choice


def measure_case(case: Case, ceiling: Ceilings) -> dict[str, Any]:
    """A row; the first contender's columns carry no prefix."""
    contenders = {"": case.run, "plain": case.plain, "library": case.library}
    timings = compare(
        {name: run for name, run in contenders.items() if run is not None},
        cold_cache=bool(case.bytes),
        hide_launch=True,
    )
    own = timings[""]
    seconds = own.median / 1e3
    plain, library = timings.get("plain"), timings.get("library")
    return {
        "operation": case.name,
        "shape": case.shape,
        **own.row(),
        "GB_per_s": case.bytes / seconds / 1e9 if case.bytes else None,
        "TFLOP_per_s": case.flops / seconds / 1e12 if case.flops else None,
        "share": case.bytes / seconds / ceiling.copy_bytes
        if case.bytes
        else case.flops / seconds / ceiling.matmul_flops,
        "plain_ms": plain.median if plain else None,
        "library_ms": library.median if library else None,
        "times_as_fast_as_plain": plain.median / own.median if plain else None,
        "times_as_fast_as_library": library.median / own.median if library else None,
    }


def main() -> None:
    """Measure, print, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="operations whose name begins so")
    parser.add_argument("--out", help="folder of the JSON; bench/results/<device> by default")
    arguments = parser.parse_args()
    require_gpu()
    with torch.inference_mode():
        ceiling = ceilings()
        wanted = tuple(arguments.only) or ("",)
        cases = chain(  # made one by one: all together would fill the memory
            *(cases(tiles) for tiles in (1, 7, 16) for cases in (vision_cases, quantized_vision_cases)),
            *(cases(batch, 2048) for batch in (1, 8, 32) for cases in (decode_cases, quantized_decode_cases)),
            *(cases(tokens) for tokens in (512, 1856, 3392) for cases in (prefill_cases, quantized_prefill_cases)),
        )
        rows = [measure_case(case, ceiling) for case in cases if case.name.startswith(wanted)]
    for row in rows:
        rate = f"{row['GB_per_s']:6.0f} GB/s   " if row["GB_per_s"] else f"{row['TFLOP_per_s']:6.0f} TFLOP/s"
        against = "".join(
            f"  {row[f'times_as_fast_as_{name}']:5.2f} x {name}"
            for name in ("plain", "library")
            if row[f"times_as_fast_as_{name}"]
        )
        print(f"{row['operation']:26} {row['shape']:24} {row['ms']:8.3f} ms {rate} {row['share']:5.2f}{against}")
    path = write_results(
        results_path("kernels", arguments.out),
        rows,
        title="Kernels at real size, bf16",
        notes=str(ceiling),
    )
    print(f"written to {path}")


if __name__ == "__main__":
    main()
