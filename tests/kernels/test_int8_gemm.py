"""The int8 GEMM of csrc/cuda under the emulator, and on a GPU with `pytest -m gpu`."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from vitrail.kernels import cubins, int8_gemm
from vitrail.kernels.int8_gemm import choose_columns, int8_gemm_reference

from .emulator import COMPILER, Emulator, compile_kernels, shared_folder
from .measure import random
from .sanitizer import assert_clean

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
# Sums of products are exact; one rounding to 16 bits, and GELU's 4e-6, are not.
ROUNDINGS = {torch.bfloat16: 2**-8, torch.float16: 2**-11}


def codes(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


def operands(rows: int, columns: int, inner: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Results are about 1."""
    return {
        "a": codes(rows, inner),
        "b": codes(columns, inner, seed=1),
        "row_scales": (random(rows, seed=2).abs() + 0.1) / 74,
        "column_scales": (random(columns, seed=3).abs() + 0.1) / 74 / inner**0.5,
        "bias": random(columns, seed=4).to(dtype),
    }


def assert_rounded(result: Tensor, exact: Tensor) -> None:
    assert result.shape == exact.shape
    allowed = ROUNDINGS[result.dtype] * exact.abs() + 1e-5
    assert ((result.float() - exact).abs() <= allowed).all()


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_kernels(shared_folder(tmp_path_factory), "int8_gemm")


@pytest.fixture
def emulator(library: Path, monkeypatch: pytest.MonkeyPatch) -> Emulator:
    emulator = Emulator(library)
    monkeypatch.setattr(int8_gemm, "cubins", emulator)
    return emulator


# Tiny; ragged on every side, with a last chunk of 16 and several tiles; more steps than stages.
SHAPES = [(1, 1, 16, 128), (130, 137, 80, 128), (257, 130, 160, 128), (5, 264, 400, 256)]


@needs_compiler
@pytest.mark.parametrize(("rows", "columns", "inner", "tile"), SHAPES)
def test_products_are_scaled_and_rounded_once(emulator, rows, columns, inner, tile) -> None:
    given = operands(rows, columns, inner)
    result = int8_gemm.int8_gemm(**given, columns_of_tile=tile)
    exact = int8_gemm_reference(**given | {"bias": None}, dtype=torch.float32) + given["bias"].float()
    assert_rounded(result, exact)
    assert emulator.bank_conflicts == 0
    ((kernel, grid),) = emulator.launched
    assert (kernel.function, grid) == (f"int8_gemm_bf16_128x{tile}", -(-rows // 128) * -(-columns // tile))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tile", [128, 256])
def test_gelu_is_the_exact_one_and_may_end_in_codes(emulator, dtype, tile) -> None:
    given = operands(131, 150, 96, dtype)
    exact = torch.nn.functional.gelu(
        int8_gemm_reference(**given | {"bias": None}, dtype=torch.float32) + given["bias"].float()
    )
    assert_rounded(int8_gemm.int8_gemm(**given, gelu=True, dtype=dtype, columns_of_tile=tile), exact)
    scales = random(150, seed=5).abs() / 50 + 0.005
    result = int8_gemm.int8_gemm(**given, gelu=True, next_scales=scales, dtype=dtype, columns_of_tile=tile)
    assert result.dtype == torch.int8
    assert ((result - exact / scales).abs().where((exact / scales).abs() < 127, 0) <= 0.5 + 1e-3).all()
    assert (result == 127).any()
    assert torch.equal((exact / scales > 127.5) & (result != 127), torch.zeros_like(result, dtype=torch.bool))


@needs_compiler
@pytest.mark.parametrize("columns", [72, 75])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_residual_is_added_to_the_rounded_result(emulator, dtype, columns) -> None:
    given = operands(70, columns, 64, dtype)
    residual = random(70, columns, seed=6).to(dtype)
    plain = int8_gemm.int8_gemm(**given, dtype=dtype)
    assert torch.equal(int8_gemm.int8_gemm(**given, dtype=dtype, residual=residual), plain + residual)


@needs_compiler
def test_rows_may_stand_apart_have_leading_dimensions_and_no_scales_or_bias(emulator) -> None:
    given = operands(6, 40, 48) | {"row_scales": None, "bias": None}
    wide = torch.zeros(6, 64, dtype=torch.int8)
    wide[:, :48] = given["a"]
    expected = int8_gemm_reference(**given)
    assert torch.equal(int8_gemm.int8_gemm(**given | {"a": wide[:, :48]}), expected)
    assert torch.equal(int8_gemm.int8_gemm(**given | {"a": given["a"].view(2, 3, 48)}), expected.view(2, 3, 40))
    odd = torch.zeros(6 * 48 + 1, dtype=torch.int8)[1:].view(6, 48).copy_(given["a"])
    assert torch.equal(int8_gemm.int8_gemm(**given | {"a": odd}), expected)
    assert int8_gemm.int8_gemm(**given | {"a": wide[:0, :48]}).shape == (0, 40)


@needs_compiler
def test_sums_are_exact_where_they_are_largest(emulator) -> None:
    a, b = torch.full((3, 2048), -128, dtype=torch.int8), torch.full((9, 2048), -128, dtype=torch.int8)
    result = int8_gemm.int8_gemm(a, b, None, torch.full((9,), 2.0**-20))
    assert torch.equal(result, torch.full((3, 9), 32.0, dtype=torch.bfloat16))


@needs_compiler
def test_every_tile_is_computed_once_whatever_their_number(emulator) -> None:
    # 17 x 3 tiles: two whole groups of row tiles, and one that is not.
    given = operands(17 * 128, 300, 16)
    exact = int8_gemm_reference(**given | {"bias": None}, dtype=torch.float32) + given["bias"].float()
    assert_rounded(int8_gemm.int8_gemm(**given), exact)


FAULTS = {
    "no barrier before a stage is read": (
        {"block_barrier();  // this stage is there for all, and all have left the one that is fetched next": ""},
        r"under way|race",
    ),
    "one copy too few is waited for": (
        {"<kStages - 2>()": "<kStages - 1>()"},
        "under way",
    ),
    "no barrier before outputs reuse the stages": (
        {"wait_for_copies<0>();\n  block_barrier();  // shared": "wait_for_copies<0>();  // shared"},
        "race",
    ),
    "no barrier before staged outputs are read": ({"  warp_barrier();\n": ""}, r"race|nothing was written"),
    "rows beyond the last are read": (
        {"first_row + row < rows &&": "rows > 0 &&"},
        "belong to no argument",
    ),
    "a wrong stride of outputs": (
        {"* gemm.columns + column;": "* (gemm.columns + 8) + column;"},
        r"of a buffer of|no argument",
    ),
    "a stage too large": ({"kStages = 4;": "kStages = 5;"}, "outside the 65536 bytes"),
    "a step that is not of 16 bytes": (
        {"* stride + at,": "* stride + at / 2,"},
        "aligned",
    ),
}


@needs_compiler
@pytest.mark.parametrize("fault", FAULTS)
def test_the_emulator_finds(fault, tmp_path_factory, monkeypatch) -> None:
    replaced, complaint = FAULTS[fault]
    library = compile_kernels(shared_folder(tmp_path_factory), "int8_gemm", replaced, only="int8_gemm_bf16_128x128")
    monkeypatch.setattr(int8_gemm, "cubins", Emulator(library))
    with pytest.raises(RuntimeError, match=rf"int8_gemm_bf16_128x128: CTA \d+, thread \d+: .*({complaint})"):
        int8_gemm.int8_gemm(**operands(130, 136, 400), columns_of_tile=128)


@needs_compiler
def test_without_the_swizzle_shared_memory_has_bank_conflicts(tmp_path_factory, monkeypatch) -> None:
    folder, unswizzled = shared_folder(tmp_path_factory), {"(chunk ^ (row >> 1 & 3))": "chunk"}
    emulator = Emulator(compile_kernels(folder, "int8_gemm", unswizzled, only="int8_gemm_bf16_128x128"))
    monkeypatch.setattr(int8_gemm, "cubins", emulator)
    given = operands(4, 8, 32)
    assert torch.equal(int8_gemm.int8_gemm(**given, columns_of_tile=128), int8_gemm_reference(**given))
    assert emulator.bank_conflicts > 0


def test_on_a_cpu_the_reference_runs() -> None:
    given = operands(5, 7, 32)
    assert torch.equal(int8_gemm.int8_gemm(**given), int8_gemm_reference(**given))


def test_tiles_are_wide_unless_that_takes_more_rounds_or_gelu_is_to_be_hidden() -> None:
    assert choose_columns(7175, 12800, False, 108) == 256
    assert choose_columns(7175, 12800, True, 108) == 128
    assert choose_columns(7175, 9600, False, 108) == 128  # 57 x 38 wide tiles: 20.1 rounds; 57 x 75 narrow ones: 19.8


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"a": codes(4, 24), "b": codes(8, 24)}, "inner size 24 must be a multiple of 16"),
        ({"b": codes(8, 48)}, r"a torch.int8 \(4, 32\), b torch.int8 \(8, 48\)"),
        ({"b": codes(8, 64)[:, :32]}, "b must be contiguous from a multiple of 16 bytes"),
        (
            {"row_scales": torch.ones(5)},
            r"row_scales must be torch.float32 \(4,\), .*; got torch.float32 \(5,\)",
        ),
        ({"column_scales": torch.ones(8).half()}, r"column_scales must be torch.float32"),
        ({"bias": torch.ones(8)}, r"bias must be torch.bfloat16 \(8,\)"),
        ({"residual": torch.ones(4, 9).bfloat16()}, r"residual must be torch.bfloat16 \(4, 8\)"),
        ({"residual": torch.ones(4, 8).bfloat16(), "gelu": True}, "residual is of another type or GELU's"),
        ({"next_scales": torch.ones(8)}, "next_scales are for the codes of GELU"),
        ({"dtype": torch.float32}, "is no 16-bit float"),
    ],
)
def test_what_does_not_fit_is_an_error_with_the_numbers(change, complaint) -> None:
    with pytest.raises(ValueError, match=complaint):
        int8_gemm.int8_gemm(**operands(4, 8, 32) | change)


# Tiny, odd, and the layer of InternViT-6B at one tile: qkv, proj, fc1, fc2.
LAYER = [(1025, 9600, 3200), (1025, 3200, 3200), (1025, 12800, 3200), (1025, 3200, 12800)]


@pytest.mark.gpu
@pytest.mark.parametrize("tile", [128, 256])
@pytest.mark.parametrize(("rows", "columns", "inner"), [(1, 1, 16), (123, 77, 48), *LAYER])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu_it_gives_what_the_reference_gives(rows, columns, inner, dtype, tile) -> None:
    device = torch.device("cuda", 0)
    if not cubins.available(device):
        pytest.skip("the CUDA kernels are not built")
    given = {name: tensor.to(device) for name, tensor in operands(rows, columns, inner, dtype).items()}
    exact = int8_gemm_reference(**given | {"bias": None}, dtype=torch.float32) + given["bias"].float()
    residual, scales = random(rows, columns).to(device, dtype), torch.full((columns,), 0.02, device=device)
    plain = int8_gemm.int8_gemm(**given, dtype=dtype, columns_of_tile=tile)
    assert_rounded(plain, exact)
    added = int8_gemm.int8_gemm(**given, dtype=dtype, residual=residual, columns_of_tile=tile)
    assert torch.equal(added, plain + residual)
    gelu = torch.nn.functional.gelu(exact)
    assert_rounded(int8_gemm.int8_gemm(**given, dtype=dtype, gelu=True, columns_of_tile=tile), gelu)
    result = int8_gemm.int8_gemm(**given, dtype=dtype, gelu=True, next_scales=scales, columns_of_tile=tile)
    assert ((result - gelu / scales).abs().where((gelu / scales).abs() < 127, 0) <= 0.51).all()


@pytest.mark.gpu
def test_in_a_cuda_graph_it_gives_the_same() -> None:
    device = torch.device("cuda", 0)
    if not cubins.available(device):
        pytest.skip("the CUDA kernels are not built")
    given = {name: tensor.to(device) for name, tensor in operands(300, 640, 320).items()}
    expected = int8_gemm.int8_gemm(**given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = int8_gemm.int8_gemm(**given)
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer_finds_nothing(tool) -> None:
    if not cubins.available(torch.device("cuda", 0)):
        pytest.skip("the CUDA kernels are not built")
    code = """
    from vitrail.kernels.int8_gemm import int8_gemm
    codes = lambda *shape: torch.randint(-128, 128, shape, dtype=torch.int8, device="cuda")
    for tile in (128, 256):
        for rows, columns, inner in ((1, 1, 16), (130, 137, 400)):
            scales, residual = torch.ones(columns, device="cuda"), torch.ones(rows, columns, device="cuda").bfloat16()
            for more in ({"residual": residual}, {"gelu": True}, {"gelu": True, "next_scales": scales}):
                int8_gemm(codes(rows, inner), codes(columns, inner), None, scales, columns_of_tile=tile, **more)
    """
    assert_clean(tool, code)
