"""What every kernel asks of an A100 and an H200, from compiled binaries, against the committed tables. Needs no GPU.

    python bench/kernel_resources.py            compile all, compare; exit 1 if a kernel is faulty or has changed
    python bench/kernel_resources.py --write    compile all, and write the table of this Triton and docs/kernels.md
    python bench/kernel_resources.py --docs     only write docs/kernels.md anew, from the table

The tables, `tests/kernels/resources/triton-<version>.json`, hold every launch of the known models in bfloat16, and of
some in float32 and quantised. Registers, shared memory and instructions may differ by 5 %; the rest, and stack above
all, may not.
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from vitrail.kernels import dispatch
from vitrail.kernels.attention import tile_attention
from vitrail.kernels.build import Compiled, compile_launches
from vitrail.kernels.dequantize import dequantize, few_rows_linear
from vitrail.kernels.dispatch import ARCHS, REPRESENTATIVE, Arch, Target
from vitrail.kernels.int4_decode import DecodeWeight
from vitrail.kernels.linear import linear_gelu
from vitrail.kernels.paged_attention import paged_attention
from vitrail.kernels.quantize import QuantizedRows
from vitrail.kernels.quantized_cache import Cache, QuantizedCache
from vitrail.kernels.resources import TENSOR_CORE_OPCODES
from vitrail.kernels.scaled_gemm import OPERATIONS, PARTS, scaled_linear
from vitrail.kernels.signature import Launch
from vitrail.kernels.swiglu import linear_swiglu
from vitrail.runtime.kernel_pack import DEFAULT_MODELS, find_config, record_launches
from vitrail.runtime.quantization.config import QuantizationConfig

REPOSITORY = Path(__file__).resolve().parent.parent
TABLES = REPOSITORY / "tests" / "kernels" / "resources"
DOCUMENT = REPOSITORY / "docs" / "kernels.md"
REGION = re.compile(r"(<!-- kernels:resources -->\n).*?(<!-- end -->)", re.DOTALL)
# The table that docs/kernels.md shows, and the model whose launches it shows.
DOCUMENTED_TRITON, DOCUMENTED_MODEL = "3.9.0", "InternVL-Chat-V1-5"


@dataclass(frozen=True)
class Workload:
    """A model as it is run; `name` says what about it is not as in bfloat16."""

    model: str
    name: str
    dtype: torch.dtype = torch.bfloat16
    quantization: QuantizationConfig | None = None
    cache_dtype: torch.dtype | None = None

    @classmethod
    def quantized(cls, model: str, method: str, *, vision: bool = True, int8_cache: bool = False) -> "Workload":
        """Both halves, or the language model alone, by one method."""
        quantization = QuantizationConfig(method, method if vision else None)
        return cls(model, f"{model} {method}", torch.bfloat16, quantization, torch.int8 if int8_cache else None)

    def runs_on(self, arch: Arch) -> bool:
        """Whether the GPU has what it computes with: e4m3 is Hopper's."""
        return arch == "sm_90" or self.quantization is None or self.quantization.llm != "fp8"


# What the tables hold, besides the rows of the dispatch tables.
WORKLOADS = (
    *(Workload(model, model) for model in DEFAULT_MODELS),
    Workload(DOCUMENTED_MODEL, f"{DOCUMENTED_MODEL} float32", torch.float32),
    Workload.quantized(DOCUMENTED_MODEL, "int8", int8_cache=True),
    Workload.quantized(DOCUMENTED_MODEL, "fp8"),
    Workload.quantized(DOCUMENTED_MODEL, "int8-weight"),
    Workload.quantized("InternVL2_5-1B", "int8", int8_cache=True),
)
# Whose launches the document shows.
DOCUMENTED = {DOCUMENTED_MODEL, *(f"{DOCUMENTED_MODEL} {method}" for method in ("int8", "fp8", "int8-weight", "int4"))}

SCALED = {name: product for product, name in OPERATIONS.items()}

TOLERANCE = 0.05
TOLERATED = ("registers", "shared", "instructions")
EXACT = ("stack", "warps")

# For each architecture, what every launch needs, by the key of the launch.
Rows = Mapping[str, Mapping[str, Any]]


def table_file(triton_version: str) -> Path:
    """Where the table of a Triton version is, e.g. `triton-3.9.json`: patch releases share one."""
    return TABLES / f"triton-{'.'.join(triton_version.split('.')[:2])}.json"


def read_table(triton_version: str) -> dict[str, Rows]:
    """The committed table of a Triton version."""
    return json.loads(table_file(triton_version).read_text(encoding="utf-8"))["launches"]


def record() -> list[tuple[Launch, Arch, list[str]]]:
    """Every launch of the workloads on both architectures, each once, with the models that have it.

    And those of the dispatch tables' rows, at the shapes that they stand for: no row is chosen that was not compiled.
    """
    found: dict[tuple[str, str], tuple[Launch, Arch, list[str]]] = {}
    for arch, target in REPRESENTATIVE.items():
        for workload in WORKLOADS:
            if not workload.runs_on(arch):
                continue
            for launch in record_launches(
                find_config(workload.model),
                target,
                workload.dtype,
                quantization=workload.quantization,
                cache_dtype=workload.cache_dtype,
            ):
                found.setdefault((arch, launch.key), (launch, arch, []))[2].append(workload.name)
        for launch in _record_rows(target):
            found.setdefault((arch, launch.key), (launch, arch, []))
        for launch in _record_int4(target):
            found.setdefault((arch, launch.key), (launch, arch, []))[2].append(f"{DOCUMENTED_MODEL} int4")
    return list(found.values())


def _record_rows(target: Target) -> list[Launch]:
    launches: list[Launch] = []
    with torch.device("meta"), dispatch.simulate(target, launches):
        for operation, rows in dispatch.read_table(dispatch.TABLES / f"{target.arch}.json").items():
            for row in rows:
                with dispatch.override(operation, row["choice"]):
                    _run(operation, row["shape"])
    return launches


def _record_int4(target: Target) -> list[Launch]:
    """Weights of 4 bits want memory to be checked in: a small one stands for all whose sizes divide as its do."""
    launches: list[Launch] = []
    codes = torch.zeros(256, 2048, dtype=torch.uint8)
    with dispatch.simulate(target, launches):
        for group_size in (128, 32):
            weight = DecodeWeight(codes, torch.ones(256, 2048 // group_size))
            dequantize(weight, torch.bfloat16)
            for rows in (1, 32):
                few_rows_linear(torch.empty(rows, 2048, dtype=torch.bfloat16), weight)
    return launches


def _run(operation: str, shape: Mapping[str, int]) -> None:
    """An operation of the dispatch tables at a shape as they describe it."""

    def empty(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(sizes, dtype=dtype)

    match operation:
        case "linear_gelu":
            linear_gelu(empty(shape["m"], shape["k"]), empty(shape["n"], shape["k"]), empty(shape["n"]))
        case "linear_swiglu":
            linear_swiglu(empty(shape["m"], shape["k"]), empty(2 * shape["n"], shape["k"]))
        case "tile_attention":
            tile_attention(*empty(1, shape["tokens"], 3, shape["batch"], shape["head_dim"]).unbind(2))
        case "paged_prefill" | "paged_decode" | "paged_prefill_int8" | "paged_decode_int8":
            new = 64 if operation.startswith("paged_prefill") else 1
            dtype = torch.int8 if operation.endswith("_int8") else torch.bfloat16
            codes = empty(32, 64, 1, shape["head_dim"], dtype=dtype)
            cache: Cache = codes
            if dtype == torch.int8:
                cache = QuantizedCache(codes, empty(32, 64, 1, dtype=torch.float32))
            borders, lens = empty(2, dtype=torch.int32), empty(1, dtype=torch.int32)
            q, tables = empty(new, shape["group"], shape["head_dim"]), empty(1, 32, dtype=torch.int32)
            paged_attention(q, cache, cache, tables, borders, lens, max_seqlen_q=new)
        case name if name in SCALED:
            dtype, epilogue = SCALED[name]
            outputs = PARTS[epilogue] * shape["n"]
            x, scales = empty(shape["m"], shape["k"], dtype=dtype), empty(shape["m"], dtype=torch.float32)
            weight, target = empty(outputs, shape["k"], dtype=dtype), dispatch.target_of(x)
            assert target is not None
            scaled_linear(
                *(target, QuantizedRows(x, scales, torch.bfloat16), weight, empty(outputs, dtype=torch.float32)),
                None if epilogue == "swiglu" else empty(outputs),
                epilogue=epilogue,
            )
        case _:
            raise NotImplementedError(f"how {operation} is run at a shape of the dispatch tables")


def measure(wanted: Sequence[tuple[Launch, Arch, list[str]]]) -> tuple[dict[str, dict[str, Any]], list[Compiled]]:
    """Rows of the launches, and those among them that are faulty."""
    rows: dict[str, dict[str, Any]] = {arch: {} for arch in ARCHS}
    faulty = []
    with tqdm(total=len(wanted), desc="compiling", unit="kernel", disable=None) as bar:
        for index, compiled in compile_launches([(launch, arch) for launch, arch, _ in wanted]):
            bar.update()
            launch, arch, models = wanted[index]
            if compiled.faults:
                faulty.append(compiled)
            if compiled.resources is not None:
                rows[arch][launch.key] = row(launch, compiled, models)
    return {arch: dict(sorted(held.items())) for arch, held in rows.items()}, faulty


def row(launch: Launch, compiled: Compiled, models: Sequence[str]) -> dict[str, Any]:
    """A launch's entry in the table."""
    assert compiled.resources is not None
    absent = [
        name.removesuffix("_ptr")
        for name, kind in zip(launch.kernel.arguments, launch.signature, strict=True)
        if kind == "None"
    ]
    described = {"kernel": launch.name.strip("_").removesuffix("_kernel"), "without": absent}
    return {**described, "constants": dict(launch.constants), "models": list(models), **asdict(compiled.resources)}


def differences(table: Rows, rows: Rows) -> list[str]:
    """How the rows differ from the committed ones, by more than is tolerated; a line each."""
    found = [f"{key}: is not in the table" for key in rows if key not in table]
    found += [f"{key}: is in the table and no longer launched" for key in table if key not in rows]
    for key in table.keys() & rows.keys():
        expected, actual = table[key], rows[key]
        for metric in (*TOLERATED, *EXACT):
            allowed = TOLERANCE * expected[metric] if metric in TOLERATED else 0
            if abs(actual[metric] - expected[metric]) > allowed:
                found.append(f"{key}: {metric} {actual[metric]}, in the table {expected[metric]}")
        for opcode, count in expected["opcodes"].items():
            now = actual["opcodes"].get(opcode, 0)
            if now == 0 or (opcode in TENSOR_CORE_OPCODES and abs(now - count) > TOLERANCE * count):
                found.append(f"{key}: {now} {opcode} instructions, in the table {count}")
    return sorted(found)


def render(table: Mapping[str, Rows]) -> str:
    """The documented model's kernels as markdown, a table for each architecture."""
    lines = []
    for arch in ARCHS:
        lines += [f"**{arch}** ({REPRESENTATIVE[arch].name})", ""]
        lines += [
            "| kernel | constants | warps | registers | stack | shared memory | CTAs/SM | instructions | opcodes |"
        ]
        lines += ["|---|---|---:|---:|---:|---:|---:|---:|---|"]
        lines += [_line(held) for held in table[arch].values() if DOCUMENTED & set(held["models"])]
        lines.append("")
    return "\n".join(lines)


def _line(held: Mapping[str, Any]) -> str:
    without = f", no {', '.join(held['without'])}" if held["without"] else ""
    constants = " ".join(f"{name}={value}" for name, value in held["constants"].items())
    opcodes = ", ".join(f"{opcode} {count}" for opcode, count in held["opcodes"].items())
    numbers = (held[name] for name in ("warps", "registers", "stack", "shared", "ctas_per_sm", "instructions"))
    return f"| {held['kernel']}{without} | {constants} | {' | '.join(map(str, numbers))} | {opcodes} |"


def refresh(text: str) -> str:
    """`text` with the table between its markers rendered anew."""
    table = render(read_table(DOCUMENTED_TRITON))
    return REGION.sub(lambda match: f"{match[1]}{table}{match[2]}", text)


def main(argv: Sequence[str] | None = None) -> int:
    """Compile and compare, or write; the exit status."""
    parser = argparse.ArgumentParser(description="Compile every kernel and compare what it needs with the tables.")
    parser.add_argument(
        "--write", action="store_true", help="write the table of the installed Triton, and the document"
    )
    parser.add_argument("--docs", action="store_true", help="only write the document, from the table")
    options = parser.parse_args(argv)
    if options.docs:
        DOCUMENT.write_text(refresh(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
        return 0

    import triton

    rows, faulty = measure(record())
    file = table_file(triton.__version__)
    if options.write:
        file.parent.mkdir(exist_ok=True)
        content = json.dumps({"triton": triton.__version__, "launches": rows}, indent=1)
        file.write_text(content + "\n", encoding="utf-8")
        if file == table_file(DOCUMENTED_TRITON):
            DOCUMENT.write_text(refresh(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
    if options.write or not file.exists():
        complaints = [_fault(one) for one in faulty]
    else:
        complaints = compare(read_table(triton.__version__), rows, faulty)
    for complaint in complaints:
        print(complaint)
    count = sum(map(len, rows.values()))
    against = f"against {file.name}" if file.exists() else f"there is no {file.name} to compare with"
    print(f"{count} binaries, {against}: {len(complaints) or 'no'} complaints")
    return 1 if complaints else 0


def compare(table: Mapping[str, Rows], rows: Mapping[str, Rows], faulty: Sequence[Compiled]) -> list[str]:
    """Complaints, a line each: faults that the table does not know of, and differences from it.

    The table of another Triton may know of stack: its registers are given out differently, by no fault of the kernel.
    """
    complaints = []
    uncompiled: dict[str, set[str]] = {arch: set() for arch in ARCHS}
    for one in faulty:
        held = table[one.arch].get(one.launch.key)
        if one.resources is None:
            uncompiled[one.arch].add(one.launch.key)
        elif held is not None and held["stack"] == one.resources.stack > 0:
            continue
        complaints.append(_fault(one))
    for arch in ARCHS:
        expected = {key: held for key, held in table[arch].items() if key not in uncompiled[arch]}
        complaints += [f"{arch} {line}" for line in differences(expected, rows[arch])]
    return complaints


def _fault(compiled: Compiled) -> str:
    return f"{compiled.arch} {compiled.launch.key}: {'; '.join(compiled.faults)}"


if __name__ == "__main__":
    sys.exit(main())
