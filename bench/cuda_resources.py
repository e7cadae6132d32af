"""What every kernel of csrc/cuda asks of an A100 and an H200, against the committed table of this nvcc. Needs no GPU.

    python bench/cuda_resources.py            compile if need be, compare; exit 1 if a kernel is faulty or has changed
    python bench/cuda_resources.py --write    write the table of this nvcc, tests/kernels/resources/nvcc-<version>.json,
                                              and docs/kernels.md

Of an nvcc without a table only the faults are looked for; without nvcc, nothing.
"""

import argparse
import json
import re
import runpy
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vitrail.bench.kernel_resources import DOCUMENT, TABLES, Rows, differences
from vitrail.kernels import cubins, int4_decode, int8_gemm
from vitrail.kernels.dispatch import ARCHS, REPRESENTATIVE, Arch
from vitrail.kernels.resources import MULTIPROCESSORS, SPILLS, Resources, read_resources

BUILD = cubins.SOURCES / "build.py"
REGION = re.compile(r"(<!-- kernels:cuda-resources -->\n).*?(<!-- end -->)", re.DOTALL)
TENSOR_CORES = {"int8_gemm": "IMMA", "int4_decode": "HMMA"}


def table_file(nvcc_version: str) -> Path:
    return TABLES / f"nvcc-{nvcc_version}.json"


def measure(folder: Path) -> dict[str, dict[str, Any]]:
    """For each architecture what every kernel in `folder` needs, by its name."""
    return {arch: {name: asdict(needs) for name, needs in _read(folder, arch)} for arch in ARCHS}


def _read(folder: Path, arch: Arch) -> Iterator[tuple[str, Resources]]:
    binaries = {name: (folder / arch / f"{name}.cubin").read_bytes() for name in TENSOR_CORES}
    for kernel in (*int4_decode.kernels(), *int8_gemm.kernels()):
        needs = read_resources(binaries[kernel.file], arch, kernel.shared, kernel.threads // 32, kernel.function)
        yield kernel.function, needs


def faults(rows: Mapping[str, Rows]) -> list[str]:
    """What is wrong whatever the compiler: spills, too much shared memory, products without tensor cores."""
    found = []
    for arch in ARCHS:
        for name, row in rows[arch].items():
            wanted = TENSOR_CORES["int8_gemm" if name.startswith("int8_gemm") else "int4_decode"]
            if row["stack"] or any(opcode in row["opcodes"] for opcode in SPILLS):
                found.append(f"{arch} {name}: {row['stack']} bytes of stack a thread, where registers should do")
            if row["shared"] > MULTIPROCESSORS[arch].max_shared:
                found.append(f"{arch} {name}: {row['shared']} bytes of shared memory")
            if "dequantize" not in name and wanted not in row["opcodes"]:
                found.append(f"{arch} {name}: its products did not become {wanted}")
    return found


def render(rows: Mapping[str, Rows]) -> str:
    """The kernels of bf16 as markdown; those of fp16 differ by a register or two."""
    lines = []
    for arch in ARCHS:
        lines += [f"**{arch}** ({REPRESENTATIVE[arch].name})", ""]
        lines += ["| kernel | warps | registers | stack | shared memory | CTAs/SM | instructions | opcodes |"]
        lines += ["|---|---:|---:|---:|---:|---:|---:|---|"]
        for name, row in rows[arch].items():
            if "bf16" in name:
                opcodes = ", ".join(f"{opcode} {count}" for opcode, count in row["opcodes"].items())
                numbers = (row[key] for key in ("warps", "registers", "stack", "shared", "ctas_per_sm", "instructions"))
                lines.append(f"| {' | '.join([name, *map(str, numbers), opcodes])} |")
        lines.append("")
    return "\n".join(lines)


def write_document(rows: Mapping[str, Rows]) -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    DOCUMENT.write_text(REGION.sub(lambda region: region[1] + render(rows) + region[2], text), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description="Check what the CUDA kernels need.")
    parser.add_argument("--write", action="store_true", help="write the table and docs/kernels.md")
    write = parser.parse_args().write
    script = runpy.run_path(str(BUILD))
    nvcc = script["find_nvcc"]()
    if nvcc is None:
        print("CUDA kernels: not compiled, there is no nvcc")
        return 0
    script["build"](cubins.FOLDER, nvcc)
    version = script["nvcc_version"](nvcc)
    rows = measure(cubins.FOLDER)
    complaints = faults(rows)
    file = table_file(version)
    if write:
        file.write_text(json.dumps({"nvcc": version, "kernels": rows}, indent=1) + "\n", encoding="utf-8")
        write_document(rows)
    elif file.exists():
        table = json.loads(file.read_text(encoding="utf-8"))["kernels"]
        complaints += [f"{arch} {line}" for arch in ARCHS for line in differences(table[arch], rows[arch])]
    else:
        print(f"CUDA kernels: not compared, there is no table of nvcc {version}")
    print(*complaints, sep="\n", end="\n" if complaints else "")
    print(f"CUDA kernels: {sum(map(len, rows.values()))} binaries of nvcc {version}, {len(complaints)} faults")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
