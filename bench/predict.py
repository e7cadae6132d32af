"""The shipped dispatch tables: which implementation should win where no GPU was at hand to measure.

    python bench/predict.py [--write]

A model of time, not a measurement: waves of output tiles at published rates of matrix products, the instructions that
each epilogue was counted to issue in the compiled kernels, how many programs a multiprocessor holds of them, and bytes
over copy bandwidth. Margins of a few percent are within its error. `vitrail bench tune` replaces it on a user's GPU.
Prints every prediction; with `--write`, rewrites the rows of the operations it covers in `kernels/tables/`.
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vitrail.bench.tune import OPERATIONS, Shape
from vitrail.kernels import dispatch, gemm, scaled_gemm
from vitrail.kernels.dispatch import ARCHS, REPRESENTATIVE, TABLES, Arch, Choice
from vitrail.kernels.language import cdiv

LAUNCH_GAP = 2e-6  # seconds between two kernels of a CUDA graph
STREAMING = 0.92  # of copy bandwidth, for what a GEMM reads and writes


@dataclass(frozen=True)
class Gpu:
    """Rates of a GPU. FLOP and bytes a second, Hz; `library` and `triton`: the share of `flops` that a GEMM reaches."""

    flops: float
    clock: float
    copy_bytes: float
    l2_bytes: float
    library: float
    triton: float


# Published: cuBLAS 82 % of an A100's and 78 % of an H100's peak, Triton 71 % on Ampere and 97 % of cuBLAS on Hopper.
GPUS: Mapping[Arch, Gpu] = {
    "sm_80": Gpu(312e12, 1.41e9, 1.78e12, 4.5e12, library=0.82, triton=0.71),
    "sm_90": Gpu(989e12, 1.70e9, 4.30e12, 8.0e12, library=0.78, triton=0.757),
}
# The main loop of a smaller output tile against the largest one: more operand traffic for each product. Judged.
TILE_RATE: Mapping[Arch, Mapping[tuple[int, int], float]] = {
    "sm_80": {(128, 256): 1, (128, 128): 1, (64, 128): 0.88, (64, 64): 0.72, (32, 64): 0.45, (16, 64): 0.3},
    "sm_90": {
        **{(128, 256): 1, (128, 128): 0.97, (64, 256): 0.9, (64, 128): 0.65},
        **{(64, 64): 0.45, (32, 64): 0.35, (16, 64): 0.3},
    },
}
LIBRARY_TILES = {(256, 128): 1, (128, 256): 1, (128, 128): 0.95, (256, 64): 0.85, (128, 64): 0.8, (64, 64): 0.6}
# Of the peak of 8-bit products, twice that of 16 bits: published for fp8 on an H100 and for Triton's int8 on an A100,
# estimated for int8 on Hopper.
SCALED_SHARES: Mapping[tuple[Arch, torch.dtype], float] = {
    ("sm_80", torch.int8): 0.4,
    ("sm_90", torch.int8): 0.62,
    ("sm_90", torch.float8_e4m3fn): 0.68,
}
# An int8 instruction of Hopper's is 128 columns wide at most, as Triton uses them: a wider tile reads no less.
SCALED_TILE_RATE: Mapping[torch.dtype, float] = {torch.int8: 1.0, torch.float8_e4m3fn: 0.97}  # 128 x 128
SCALED_SLOTS: Mapping[scaled_gemm.Epilogue, float] = {"none": 7, "gelu": 22, "swiglu": 12}
SCALED_PROGRAMS_PER_SM = {(128, 128): 1, (64, 128): 2, (64, 64): 3, (32, 64): 2, (16, 64): 2}
# Issue slots that the epilogue takes for an element of the accumulator, counted in the compiled kernels.
EPILOGUE_SLOTS: Mapping[gemm.Epilogue, float] = {"gelu": 15.2, "swiglu": 9.5}
# CTAs that a multiprocessor holds of each kernel, by the resources of the compiled ones.
PROGRAMS_PER_SM = {(128, 256): 1, (64, 256): 2, (128, 128): 2, (64, 128): 2, (64, 64): 3, (32, 64): 3, (16, 64): 3}


def fused_seconds(arch: Arch, epilogue: gemm.Epilogue, choice: Choice, m: int, n: int, k: int) -> float:
    """One kernel: the main loops of the tiles that each multiprocessor gets, and what of their epilogues shows."""
    gpu, num_sms = GPUS[arch], REPRESENTATIVE[arch].num_sms
    block_m, block_n, block_k = choice["BLOCK_M"], choice["BLOCK_N"], choice["BLOCK_K"]
    tiles = cdiv(m, block_m) * cdiv(n, block_n // gemm.PARTS[epilogue])
    rate = gpu.flops / num_sms * gpu.triton * TILE_RATE[arch][block_m, block_n]
    loop = 2 * block_m * block_n * cdiv(k, block_k) * block_k / rate
    end = block_m * block_n * EPILOGUE_SLOTS[epilogue] / 128 / gpu.clock + 0.4e-6
    if choice["implementation"] == "pipelined":
        end += 0.8e-6  # the loads of a next tile do not run under it
    each = cdiv(tiles, num_sms)
    together = choice.get("programs_per_sm", PROGRAMS_PER_SM[block_m, block_n])
    if each > 1 and together > 1:
        end *= 0.35  # one program ends while the other multiplies
    operands = 2 * k * tiles * (block_m + block_n) / gpu.l2_bytes
    return max(each * (loop + end), operands, _memory_seconds(gpu, epilogue, m, n, k)) + LAUNCH_GAP


def library_seconds(arch: Arch, epilogue: gemm.Epilogue, m: int, n: int, k: int) -> float:
    """The library's GEMM at its best tile and split of k, and a pointwise kernel."""
    gpu, num_sms = GPUS[arch], REPRESENTATIVE[arch].num_sms
    columns = n * gemm.PARTS[epilogue]
    best = float("inf")
    for (block_m, block_n), tile_rate in LIBRARY_TILES.items():
        for splits in (1, 2, 3, 4, 6, 8):
            if splits > 1 and k // splits < 512:
                continue
            rate = gpu.flops / num_sms * gpu.library * tile_rate
            waves = cdiv(cdiv(m, block_m) * cdiv(columns, block_n) * splits, num_sms)
            seconds = waves * (2 * block_m * block_n * k / splits / rate + 0.6e-6)
            if splits > 1:  # partial sums in fp32
                seconds += 8 * m * columns / gpu.copy_bytes + LAUNCH_GAP
            best = min(best, seconds)
    pointwise = (4 if epilogue == "gelu" else 6) * m * n / gpu.copy_bytes / STREAMING
    if 2 * m * columns < 20e6:
        pointwise /= 2  # the projection is still in L2
    return max(best, _memory_seconds(gpu, epilogue, m, n, k)) + pointwise + 2 * LAUNCH_GAP


def scaled_seconds(
    arch: Arch, dtype: torch.dtype, epilogue: scaled_gemm.Epilogue, choice: Choice, m: int, n: int, k: int
) -> float:
    """As `fused_seconds`, of 8-bit codes."""
    gpu, num_sms, parts = GPUS[arch], REPRESENTATIVE[arch].num_sms, scaled_gemm.PARTS[epilogue]
    block_m, block_n, block_k = choice["BLOCK_M"], choice["BLOCK_N"], choice["BLOCK_K"]
    tiles = cdiv(m, block_m) * cdiv(n, block_n // parts)
    tile_rate = TILE_RATE[arch][block_m, block_n]
    if arch == "sm_90" and (block_m, block_n) == (128, 128):
        tile_rate = SCALED_TILE_RATE[dtype]
    rate = 2 * gpu.flops / num_sms * SCALED_SHARES[arch, dtype] * tile_rate
    loop = 2 * block_m * block_n * cdiv(k, block_k) * block_k / rate
    end = block_m * block_n * SCALED_SLOTS[epilogue] / 128 / gpu.clock + 0.4e-6
    if choice["implementation"] == "pipelined":
        end += 0.8e-6  # the loads of a next tile do not run under it
    each = cdiv(tiles, num_sms)
    together = choice.get("programs_per_sm", 0) or SCALED_PROGRAMS_PER_SM[block_m, block_n]
    if each > 1 and together > 1:
        end *= 0.35  # one program ends while the other multiplies
    operands = k * tiles * (block_m + block_n) / gpu.l2_bytes
    memory = (m * k + parts * n * k + 2 * m * n) / gpu.copy_bytes / STREAMING
    return max(each * (loop + end), operands, memory) + LAUNCH_GAP


def predict_scaled(
    arch: Arch, dtype: torch.dtype, epilogue: scaled_gemm.Epilogue, shape: Shape
) -> list[tuple[float, Choice]]:
    """Milliseconds of every candidate at a shape, the fastest first."""
    m, n, k = shape["m"], shape["n"], shape["k"]
    fitting = [row for row in scaled_gemm.CONFIGS[arch] if row["BLOCK_M"] == 16 or row["BLOCK_M"] < 2 * m]
    found = [(scaled_seconds(arch, dtype, epilogue, row, m, n, k) * 1e3, row) for row in fitting]
    # Where reading the weight is all, as all agree, the least tile that holds the rows: the others read for nothing.
    return sorted(found, key=lambda pair: (round(pair[0], 4), pair[1]["BLOCK_M"] if m <= 64 else 0))


def _memory_seconds(gpu: Gpu, epilogue: gemm.Epilogue, m: int, n: int, k: int) -> float:
    return 2 * (m * k + gemm.PARTS[epilogue] * n * k + m * n) / gpu.copy_bytes / STREAMING


def predict(arch: Arch, epilogue: gemm.Epilogue, shape: Shape) -> list[tuple[float, Choice]]:
    """Milliseconds of every candidate at a shape, the fastest first; the library first of equals."""
    m, n, k = shape["m"], shape["n"], shape["k"]
    found = []
    for choice in gemm.CONFIGS[arch]:
        if choice["implementation"] == "torch":
            found.append((library_seconds(arch, epilogue, m, n, k) * 1e3, choice))
        elif choice["BLOCK_M"] == 16 or choice["BLOCK_M"] < 2 * m:  # no tile more than half empty
            found.append((fused_seconds(arch, epilogue, choice, m, n, k) * 1e3, choice))
    return sorted(found, key=lambda pair: pair[0])


def rows(arch: Arch, epilogue: gemm.Epilogue) -> Iterator[dict[str, Any]]:
    """Table rows of one operation."""
    for shape in OPERATIONS[f"linear_{epilogue}"].shapes:
        (ms, choice), (second, _), *_ = predict(arch, epilogue, shape)
        yield {"shape": dict(shape), "choice": dict(choice), "predicted_ms": round(ms, 4), "next_ms": round(second, 4)}


def scaled_rows(arch: Arch, dtype: torch.dtype, epilogue: scaled_gemm.Epilogue) -> Iterator[dict[str, Any]]:
    """Table rows of one operation on codes."""
    for shape in OPERATIONS[scaled_gemm.OPERATIONS[dtype, epilogue]].shapes:
        ranked = predict_scaled(arch, dtype, epilogue, shape)
        (ms, choice), (second, _) = ranked[0], ranked[min(1, len(ranked) - 1)]
        yield {"shape": dict(shape), "choice": dict(choice), "predicted_ms": round(ms, 4), "next_ms": round(second, 4)}


def main() -> None:
    """Predict, print, and with `--write` rewrite the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    epilogues: tuple[gemm.Epilogue, ...] = ("gelu", "swiglu")
    for arch in ARCHS:
        path = TABLES / f"{arch}.json"
        operations = dispatch.read_table(path)
        operations |= {f"linear_{epilogue}": list(rows(arch, epilogue)) for epilogue in epilogues}
        for (dtype, epilogue), name in scaled_gemm.OPERATIONS.items():
            if (arch, dtype) in SCALED_SHARES:
                operations[name] = list(scaled_rows(arch, dtype, epilogue))
        for name, table in operations.items():
            for row in table:
                print(arch, name, row["shape"], row["choice"], row.get("predicted_ms", ""))
        if arguments.write:
            path.write_text(table_text(operations), encoding="utf-8")


def table_text(operations: Mapping[str, list[Choice]]) -> str:
    """A table file, one row a line."""
    origin = "predicted by bench/predict.py and, for attention, chosen by published rates; not measured"
    parts = [
        f"    {json.dumps(name)}: [\n" + ",\n".join(f"      {json.dumps(row)}" for row in table) + "\n    ]"
        for name, table in sorted(operations.items())
    ]
    return f'{{\n  "origin": {json.dumps(origin)},\n  "operations": {{\n' + ",\n".join(parts) + "\n  }\n}\n"


if __name__ == "__main__":
    main()
