"""Ahead-of-time compilation: real, for both architectures, in processes without Triton's interpreter."""

import ast
import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from vitrail.kernels import dispatch, pack
from vitrail.kernels.build import Compiled, KernelError, check, compile_launch, compile_launches
from vitrail.kernels.language import Kernel
from vitrail.kernels.launch import launch
from vitrail.kernels.resources import MULTIPROCESSORS, Resources, faults, tensor_core_opcodes
from vitrail.kernels.signature import Launch

from .local_kernels import load_kernels

KERNELS = """
from vitrail.kernels.language import kernel, tl


@kernel()
def matmul(a_ptr, b_ptr, bias_ptr, out_ptr, k, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    rows, columns, inner = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    acc = tl.zeros((M, N), tl.float32)
    for start in range(0, k, K):
        a = tl.load(a_ptr + rows[:, None] * k + start + inner[None, :])
        b = tl.load(b_ptr + columns[None, :] * k + start + inner[:, None])
        acc = tl.dot(a, b, acc, input_precision="ieee")
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + columns)[None, :]
    tl.store(out_ptr + rows[:, None] * N + columns[None, :], acc.to(out_ptr.dtype.element_ty))


@kernel()
def copy_by_descriptor(x_ptr, out_ptr, rows, B: tl.constexpr):
    x = tl.make_tensor_descriptor(x_ptr, [rows, B], [B, 1], [B, B])
    out = tl.make_tensor_descriptor(out_ptr, [rows, B], [B, 1], [B, B])
    out.store([tl.program_id(0) * B, 0], x.load([tl.program_id(0) * B, 0]))


@kernel()
def is_no_triton(x_ptr, B: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, B), tl.zeros((B, B, B), tl.float32))
"""
# Its module ends every process that compiles.
DEADLY = """
import os, sys
from vitrail.kernels.language import kernel, tl
if "serve()" in sys.orig_argv[-1]:
    os._exit(3)


@kernel()
def deadly(x_ptr, B: tl.constexpr):
    tl.store(x_ptr, 0.0)
"""
WANTED = {
    "product": (128, 128, 64, torch.bfloat16, 8, 3),
    "fp32 product": (32, 32, 32, torch.float32, 4, 2),
    "too large": (128, 128, 64, torch.bfloat16, 8, 10),
}


def record(kernel: Any, *args: Any, **keywords: Any) -> Launch:
    launches: list[Launch] = []
    with dispatch.simulate(dispatch.H200, launches):
        launch(kernel, (1,), *args, **keywords)
    return launches[0]


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Launch]:
    folder = tmp_path_factory.mktemp("kernels")
    kernels = load_kernels(folder / "test_build_kernels.py", KERNELS)
    deadly = load_kernels(folder / "test_build_deadly.py", DEADLY).deadly
    wanted = {"deadly": record(deadly, torch.empty(1), B=1)}
    for name, (m, n, k, dtype, warps, stages) in WANTED.items():
        x = torch.empty(256, 256, dtype=dtype, device="meta")
        options = {"num_warps": warps, "num_stages": stages}
        wanted[name] = record(kernels.matmul, x, x, None, x, 256, M=m, N=n, K=k, **options)
    x = torch.empty(256, 64, dtype=torch.bfloat16, device="meta")
    wanted["descriptors"] = record(kernels.copy_by_descriptor, x, x, 256, B=64)
    wanted["no Triton"] = record(kernels.is_no_triton, x, B=8)
    return wanted


@pytest.fixture(scope="module")
def built(launches: dict[str, Launch]) -> dict[tuple[str, str], Compiled]:
    """Those launches compiled, by name and architecture."""
    once = {("deadly", "sm_80"), ("no Triton", "sm_90")}  # these fail alike for both
    pairs = [pair for pair in product(launches, dispatch.ARCHS) if pair not in once]
    found = compile_launches([(launches[name], arch) for name, arch in pairs], jobs=2)
    return {pairs[index]: compiled for index, compiled in found}


@pytest.mark.parametrize(("arch", "opcode"), [("sm_80", "HMMA"), ("sm_90", "HGMMA")])
def test_a_sound_kernel_compiles_into_a_binary_for_the_architecture(built, arch, opcode) -> None:
    compiled = built["product", arch]
    check(compiled)
    assert compiled.cubin.startswith(b"\x7fELF")
    assert compiled.function == "matmul"
    assert (compiled.scratch_size, compiled.hidden_parameters) == (0, 2)
    resources = compiled.resources
    assert resources is not None
    assert resources.opcodes[opcode] > 0
    assert resources.opcodes["LDGSTS.128"] == resources.opcodes["LDGSTS"]
    assert resources.warps == 8
    assert resources.shared >= 2 * 2 * (128 + 128) * 64  # bytes of two stages
    assert 64 <= resources.registers <= 255
    assert resources.stack == 0
    assert resources.ctas_per_sm >= 1
    assert 300 < resources.instructions < 3000


@pytest.mark.parametrize("arch", dispatch.ARCHS)
def test_a_product_of_all_bits_of_fp32_needs_no_tensor_cores(built, arch) -> None:
    compiled = built["fp32 product", arch]
    check(compiled)
    assert not {"HMMA", "HGMMA"} & set(compiled.resources.opcodes)


@pytest.mark.parametrize("arch", dispatch.ARCHS)
def test_too_large_a_block_is_refused_with_its_numbers(built, arch) -> None:
    compiled = built["too large", arch]
    limit = {"sm_80": 166_912, "sm_90": 232_448}[arch]
    assert compiled.resources.shared > limit
    complaint = (
        rf"^matmul\(.* for {arch}: .*{compiled.resources.shared} bytes of shared memory, where {arch} has {limit}"
    )
    with pytest.raises(KernelError, match=complaint):
        check(compiled)


@pytest.mark.parametrize("arch", dispatch.ARCHS)
def test_tensor_descriptors_ask_for_scratch_memory(built, arch) -> None:
    compiled = built["descriptors", arch]
    check(compiled)
    assert compiled.scratch_size == (2 * 128 if arch == "sm_90" else 0)
    assert ("UTMALDG" in compiled.resources.opcodes) == (arch == "sm_90")
    assert ("UTMASTG" in compiled.resources.opcodes) == (arch == "sm_90")


def test_what_is_no_triton_costs_one_kernel_and_says_why(built) -> None:
    compiled = built["no Triton", "sm_80"]
    assert compiled.cubin == b""
    with pytest.raises(KernelError, match=r"^is_no_triton\(.* for sm_80: it does not compile: .*[a-z]"):
        check(compiled)


def test_a_compiler_that_dies_costs_one_kernel(built) -> None:
    with pytest.raises(KernelError, match=r"^deadly\(.* for sm_90: the compiler died with status 3: it said nothing"):
        check(built["deadly", "sm_90"])
    assert len(built) == 10
    assert sum(not compiled.faults for compiled in built.values()) == 6


def test_binaries_go_into_a_pack_and_are_found_by_their_launch(built, launches, tmp_path) -> None:
    sound = [compiled for compiled in built.values() if not compiled.faults]
    written = pack.write_pack(tmp_path, sound, sound[0].triton_version)
    assert pack.read_pack(tmp_path) == written
    entry = written.binaries["sm_90"][launches["descriptors"].key]
    assert (tmp_path / entry.file).read_bytes() == built["descriptors", "sm_90"].cubin
    assert entry.scratch_size == 256
    assert len(list(tmp_path.glob("*/*.cubin"))) == 6


@pytest.mark.skipif(torch.cuda.is_available(), reason="no interpreter where there is a GPU")
def test_a_process_with_the_interpreter_says_that_it_cannot_compile(launches) -> None:
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set"):
        compile_launch(launches["product"], "sm_80")


def test_constants_that_cannot_be_recorded_are_refused(launches) -> None:
    odd = replace(launches["product"], constants=(("M", torch.float32),))
    with pytest.raises(TypeError, match=r"matmul: M is torch\.float32"):
        next(compile_launches([(odd, "sm_80")]))


def test_no_function_that_kernels_call_returns_none() -> None:
    # Triton 3.6 compiles none: what is not there is None where it is used.
    functions = [
        function
        for file in Path(pack.__file__).parent.glob("*.py")
        for function in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(function, ast.FunctionDef) and any(ast.unparse(d) == "jit" for d in function.decorator_list)
    ]
    assert {"gelu", "_scales", "_row_scales"} <= {function.name for function in functions}
    for function in functions:
        returned = [node.value for node in ast.walk(function) if isinstance(node, ast.Return)]
        values = [part for value in returned for part in (value.elts if isinstance(value, ast.Tuple) else [value])]
        assert not any(isinstance(value, ast.Constant) and value.value is None for value in values), function.name


def test_the_tables_of_all_tritons_hold_the_same_launches() -> None:
    # Only one Triton is at hand here: a table that was not written anew with the others would stay behind unseen.
    files = sorted((Path(__file__).parent / "resources").glob("triton-*.json"))
    tables = [json.loads(file.read_text(encoding="utf-8"))["launches"] for file in files]
    keys = [{arch: set(rows) for arch, rows in table.items()} for table in tables]
    assert [file.name for file in files] == ["triton-3.6.json", "triton-3.9.json"]
    assert keys[0] == keys[1]


def test_nothing_asked_for_is_nothing_compiled() -> None:
    assert list(compile_launches([])) == []


# Registers a thread, bytes of shared memory, warps; CTAs at a time on an A100 and an H200. From NVIDIA's tables: 64 K
# registers given out by 256 a warp, 164 and 228 KB of which each CTA loses 1 KB, 64 warps, 32 CTAs.
@pytest.mark.parametrize(
    ("registers", "shared", "warps", "a100", "h200"),
    [
        (32, 0, 8, 8, 8),
        (32, 0, 1, 32, 32),
        (40, 0, 8, 6, 6),
        (255, 0, 8, 1, 1),
        (128, 0, 4, 4, 4),
        (168, 0, 12, 1, 1),
        (255, 0, 16, 0, 0),
        (32, 48 * 1024, 4, 3, 4),
        (32, 166_912, 4, 1, 1),
        (32, 166_913, 4, 0, 1),
        (32, 232_448, 4, 0, 1),
    ],
)
def test_occupancy_is_the_least_of_registers_shared_memory_and_warps(registers, shared, warps, a100, h200) -> None:
    assert MULTIPROCESSORS["sm_80"].ctas(registers, shared, warps) == a100
    assert MULTIPROCESSORS["sm_90"].ctas(registers, shared, warps) == h200


SOUND = Resources(128, 0, 1000, warps=8, ctas_per_sm=2, instructions=500, opcodes={"HMMA": 8})
DOT = "%r = tt.dot %a, %b, %c{} : tensor<{}> * tensor<{}> -> tensor<64x64xf32> loc(#loc18)"


def scale(x_ptr):
    """Never run: stands for a kernel."""


def found_faults(
    resources: Resources, arch: dispatch.Arch, ttir: str, ttgir: str = "", kind: str = "*bf16:16"
) -> list[str]:
    launch = Launch(Kernel(scale), "scale", (kind, "i32", "None"), (), num_warps=4, num_stages=2)
    return list(faults(resources, arch, launch, ttir, ttgir))


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({}, None),
        ({"stack": 48}, "48 bytes of stack"),
        ({"opcodes": {"HMMA": 8, "LDL": 3}}, "3 LDL"),
        ({"opcodes": {"HMMA": 8, "STL": 2}}, "2 STL"),
        ({"shared": 166_912}, None),
        ({"shared": 166_913}, "166913 bytes of shared memory, where sm_80 has 166912"),
        ({"opcodes": {"FFMA": 8}}, "no HMMA instruction for the product tensor<64x32xbf16> * tensor<32x64xbf16>"),
        ({"ctas_per_sm": 0}, "8 warps of 128 registers a thread fit no multiprocessor"),
    ],
)
def test_a_fault_of_a_binary_is_named_with_its_number(changed, complaint) -> None:
    found = found_faults(replace(SOUND, **changed), "sm_80", DOT.format("", "64x32xbf16", "32x64xbf16"))
    assert len(found) == (complaint is not None)
    assert complaint is None or complaint in found[0]


@pytest.mark.parametrize(("ttgir", "count"), [("ttg.warp_specialize(", 0), ("scf.for", 1)])
def test_warp_specialisation_that_was_asked_for_must_be_there(ttgir, count) -> None:
    assert len(found_faults(SOUND, "sm_90", "} {tt.warp_specialize}", ttgir)) == count


@pytest.mark.parametrize(("kind", "count"), [("*fp32:16", 0), ("*bf16:16", 1), ("*fp16", 1), ("*i8:16", 1)])
def test_only_a_kernel_of_fp32_tensors_may_multiply_all_bits_of_fp32(kind, count) -> None:
    found = found_faults(SOUND, "sm_90", DOT.format("", "64x32xf32", "32x64xf32"), kind=kind)
    assert len(found) == count
    assert all("no tensor core computes the product tensor<64x32xf32> * tensor<32x64xf32>" in one for one in found)


@pytest.mark.parametrize(
    ("precision", "a", "b", "warps", "ampere", "hopper"),
    [
        (", inputPrecision = tf32", "64x32xbf16", "32x64xbf16", 4, "HMMA", "HGMMA"),
        ("", "128x32xf16", "32x256xf16", 8, "HMMA", "HGMMA"),
        ("", "128x32xi8", "32x256xi8", 8, "IMMA", "IGMMA"),
        (" {maxNumImpreciseAcc = 1 : i32}", "64x32xf8E4M3FN", "32x8xf8E4M3FN", 4, "HMMA", "QGMMA"),
        ("", "16x32xbf16", "32x64xbf16", 4, "HMMA", "HMMA"),
        ("", "64x32xbf16", "32x64xbf16", 2, "HMMA", "HMMA"),
        ("", "16x64x32xbf16", "16x32x64xbf16", 4, "HMMA", "HMMA"),
        (", inputPrecision = tf32", "64x32xf32", "32x64xf32", 4, "HMMA", "HGMMA"),
        ("", "64x32xf32", "32x64xf32", 4, None, None),
    ],
)
def test_a_product_should_become_the_architectures_instruction(precision, a, b, warps, ampere, hopper) -> None:
    ttir = DOT.format(precision, a, b)
    for arch, opcode in (("sm_80", ampere), ("sm_90", hopper)):
        assert list(tensor_core_opcodes(ttir, arch, warps).values()) == [opcode]


def test_all_products_of_a_kernel_count() -> None:
    lines = [DOT.format("", "64x32xbf16", "32x64xbf16"), DOT.format("", "16x32xi8", "32x64xi8")]
    assert list(tensor_core_opcodes("\n".join(lines), "sm_90", 4).values()) == ["HGMMA", "IMMA"]
