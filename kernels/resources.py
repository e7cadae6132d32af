"""What a compiled kernel asks of a multiprocessor, read from its binary, and what is wrong with it.

A kernel that spills registers, asks for more shared memory than there is, or has lost its tensor-core instructions
compiles all the same: without a GPU at hand, this is where that shows.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from .dispatch import Arch
from .signature import Launch


@dataclass(frozen=True)
class Multiprocessor:
    """What a streaming multiprocessor has for the CTAs that run on it at a time. `shared` in bytes."""

    shared: int
    max_ctas: int = 32
    max_warps: int = 64
    registers: int = 65536

    # Every CTA loses this much to the driver, so that no CTA can have all.
    reserved = 1024

    @property
    def max_shared(self) -> int:
        """The most shared memory one CTA can ask for."""
        return self.shared - self.reserved

    def ctas(self, registers: int, shared: int, warps: int) -> int:
        """How many CTAs with `registers` a thread, `shared` bytes and `warps` warps run at a time."""
        registers_per_warp = -(-registers // 8) * 8 * 32
        # Warps come and go in fours, one for each scheduler.
        by_registers = self.registers // registers_per_warp // 4 * 4 // warps
        by_shared = self.shared // (-(-(shared + self.reserved) // 128) * 128)
        return min(by_registers, by_shared, self.max_warps // warps, self.max_ctas)


MULTIPROCESSORS: Mapping[Arch, Multiprocessor] = {
    "sm_80": Multiprocessor(shared=164 * 1024),
    "sm_90": Multiprocessor(shared=228 * 1024),
}

# Counted one by one; `.128` are the accesses of 16 bytes a thread.
TENSOR_CORE_OPCODES = ("HMMA", "IMMA", "HGMMA", "IGMMA", "QGMMA")
OPCODES = (
    *TENSOR_CORE_OPCODES,
    *("UTMALDG", "UTMASTG", "LDGSTS", "LDGSTS.128", "LDG", "LDG.128", "STG", "STG.128"),
)
SPILLS = ("LDL", "STL")


@dataclass(frozen=True)
class Resources:
    """What a binary needs: registers a thread, bytes of stack a thread and of shared memory a CTA, instructions."""

    registers: int
    stack: int
    shared: int
    warps: int
    ctas_per_sm: int
    instructions: int
    opcodes: Mapping[str, int]


def read_resources(cubin: bytes, arch: Arch, shared: int, warps: int, function: str | None = None) -> Resources:
    """`shared` and `warps` are what the launch will ask for: a binary does not tell. `function`: which of several."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        if function is None:
            usage = _run(knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
            listing = _run(knobs.nvidia.nvdisasm.path, "-c", file.name)
        else:
            usage = _run(knobs.nvidia.cuobjdump.path, "-res-usage", "-fun", function, file.name)
            listing = _run(knobs.nvidia.cuobjdump.path, "-sass", "-fun", function, file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump tells no registers: {usage!r}")
    registers, stack = map(int, found.groups())
    # `/*0a40*/  @!P0 LDG.E.128 R4, ...`: an address, perhaps a predicate, the opcode with its modifiers.
    names = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[0-9T]+\s+)?([A-Z][A-Z0-9_.]*)", listing)
    counts = Counter(name.partition(".")[0] for name in names)
    counts.update(f"{name.partition('.')[0]}.128" for name in names if "128" in name.split("."))
    return Resources(
        registers=registers,
        stack=stack,
        shared=shared,
        warps=warps,
        ctas_per_sm=MULTIPROCESSORS[arch].ctas(registers, shared, warps),
        instructions=sum(name != "NOP" for name in names),  # the end is padded with those
        opcodes={opcode: counts[opcode] for opcode in (*OPCODES, *SPILLS) if counts[opcode]},
    )


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed: {done.stderr.strip()}")
    return done.stdout


def faults(resources: Resources, arch: Arch, launch: Launch, ttir: str, ttgir: str) -> Iterator[str]:
    """What is wrong with a launch's binary, given its Triton IR before and after Triton planned it for a GPU."""
    if resources.stack:
        yield f"{resources.stack} bytes of stack a thread, where registers should do"
    for opcode in SPILLS:
        if opcode in resources.opcodes:
            yield f"{resources.opcodes[opcode]} {opcode} instructions, where registers should do"
    limit = MULTIPROCESSORS[arch].max_shared
    if resources.shared > limit:
        yield f"{resources.shared} bytes of shared memory, where {arch} has {limit}"
    elif not resources.ctas_per_sm:
        yield f"{resources.warps} warps of {resources.registers} registers a thread fit no multiprocessor"
    for product, wanted in tensor_core_opcodes(ttir, arch, launch.num_warps).items():
        if wanted is None and any(kind.startswith(NARROW) for kind in launch.signature):
            yield f"no tensor core computes the product {product}, and the kernel's tensors are narrower"
        elif wanted is not None and wanted not in resources.opcodes:
            yield f"no {wanted} instruction for the product {product}"
    if "tt.warp_specialize" in ttir and "ttg.warp_specialize" not in ttgir:
        yield "warp specialisation was asked for and is not there"


NARROW = ("*bf16", "*fp16", "*fp8", "*i8")  # pointers, as `Launch.signature` describes them
# `tt.dot %a, %b, %c, inputPrecision = tf32 : tensor<64x32xbf16> * tensor<32x128xbf16> -> tensor<64x128xf32>`
_DOT = re.compile(
    r"tt\.dot (?P<operands>.*?) : "
    r"(?P<product>tensor<(?P<a>[\dx]+)x(?P<type>[a-z]\w*)> \* tensor<(?P<b>[\dx]+)x[a-z]\w*>)"
)
# Of Ampere (mma.sync), for any shape, and Hopper's own (wgmma), for large ones.
_MMA = {"bf16": "HMMA", "f16": "HMMA", "f8E4M3FN": "HMMA", "f8E5M2": "HMMA", "f32": "HMMA", "i8": "IMMA"}
_WGMMA = {"bf16": "HGMMA", "f16": "HGMMA", "f8E4M3FN": "QGMMA", "f8E5M2": "QGMMA", "f32": "HGMMA", "i8": "IGMMA"}


def tensor_core_opcodes(ttir: str, arch: Arch, num_warps: int) -> dict[str, str | None]:
    """The products in a kernel's Triton IR, each with the tensor-core instruction it should become.

    Hopper's own take 64 rows, 8 columns and four warps at a time. Products of all bits of fp32 have none.
    """
    found: dict[str, str | None] = {}
    for dot in _DOT.finditer(ttir):
        rows, columns = int(dot["a"].split("x")[-2]), int(dot["b"].split("x")[-1])
        large = rows % 64 == 0 and columns % 8 == 0 and num_warps % 4 == 0 and dot["a"].count("x") == 1
        exact = dot["type"] == "f32" and "tf32" not in dot["operands"]
        found[dot["product"]] = None if exact else (_WGMMA if arch == "sm_90" and large else _MMA).get(dot["type"])
    return found
