"""Decoding with weights of 4 and 8 bits, the kernels of csrc/cuda under the emulator, and on a GPU with `-m gpu`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.kernels import cubins, int4_decode
from vitrail.kernels.int4_decode import (
    PADDED_TO,
    STEP,
    VARIANTS,
    DecodeWeight,
    Variant,
    choose_variant,
    int4_decode_reference,
)

from .emulator import COMPILER, Emulator, compile_kernels, shared_folder
from .measure import assert_errs_like, random
from .sanitizer import assert_clean

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


def drawn(low: int, high: int, *shape: int, dtype: torch.dtype = torch.uint8, seed: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def canonical(
    bits: int, outputs: int, inputs: int, group: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scales and zeros; a result of normal activations is about 1."""
    if bits == 8:
        return drawn(-128, 128, outputs, inputs, dtype=torch.int8), scales(outputs, 1) / 74 / inputs**0.5
    codes, scale = drawn(0, 16, outputs, inputs), scales(outputs, inputs // group) / 5 / inputs**0.5
    return (codes, scale) if symmetric else (codes, scale, drawn(0, 17, *scale.shape, dtype=torch.int64, seed=1))


def scales(*shape: int) -> Tensor:
    return random(*shape, seed=2).abs() + 0.1


def weight_of(bits: int, outputs: int, inputs: int, group: int = 128, symmetric: bool = False) -> DecodeWeight:
    return DecodeWeight(*canonical(bits, outputs, inputs, group, symmetric))


def assert_right(
    result: Tensor, x: Tensor, weight: DecodeWeight, bias: Tensor | None = None, *, gated: bool = False
) -> None:
    """As good as plain torch on the dequantised weight in the same type."""

    def linear(x: Tensor, matrix: Tensor) -> Tensor:
        y = F.linear(x, matrix, None if bias is None else bias.to(matrix.dtype))
        if not gated:
            return y
        gate, up = y.chunk(2, -1)
        return F.silu(gate) * up

    exact = linear(x.double(), weight.dequantize().double())
    assert_errs_like(result, linear(x, weight.dequantize().to(x.dtype)), exact)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_kernels(shared_folder(tmp_path_factory), "int4_decode")


@pytest.fixture
def emulator(library: Path, monkeypatch: pytest.MonkeyPatch) -> Emulator:
    emulator = Emulator(library)
    monkeypatch.setattr(int4_decode, "cubins", emulator)
    return emulator


def name_of(variant: Variant) -> str:
    return f"{variant.bits}-{variant.rows}x{variant.outputs}"


def several_rounds(variant: Variant) -> int:
    """Inputs of which no two slices of a CTA have as many, and all have more than the ring has stages."""
    return (variant.slices * (variant.stages + 1) + variant.slices // 2) * variant.depth * STEP


@needs_compiler
@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_every_kernel_multiplies(emulator, variant) -> None:
    inputs = several_rounds(variant)
    weight = weight_of(variant.bits, variant.outputs, inputs, variant.depth * STEP)
    x, bias = random(variant.rows - 1, inputs).bfloat16(), random(variant.outputs, seed=3).bfloat16()
    assert_right(int4_decode.int4_decode(x, weight, bias, variant=variant), x, weight, bias)
    assert emulator.launched == [(variant.kernel(torch.bfloat16), 1)]


# One of a kind each: a CTA of one warp beside and of two, depth 1 and 2, 4 and 8 bits.
@needs_compiler
@pytest.mark.parametrize("variant", [VARIANTS[0], VARIANTS[6], VARIANTS[7], VARIANTS[8]], ids=name_of)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gates_meet_what_they_gate(emulator, variant, dtype) -> None:
    weight = weight_of(variant.bits, 2 * variant.outputs, 256, symmetric=True)
    x = random(3, 256).to(dtype)
    result = int4_decode.int4_decode(x, weight, gated=True, variant=variant)
    assert result.shape == (3, variant.outputs)
    assert_right(result, x, weight, gated=True)


# Rows, outputs, inputs, group: tiny; outputs that fill no tile; groups of 64 and of all inputs.
@needs_compiler
@pytest.mark.parametrize(("rows", "outputs", "inputs", "group"), [(1, 1, 64, 64), (5, 77, 384, 128), (9, 48, 192, 192)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [4, 8])
def test_ragged_shapes_and_groups(emulator, rows, outputs, inputs, group, dtype, bits) -> None:
    weight = weight_of(bits, outputs, inputs, group)
    x = random(rows, inputs).to(dtype)
    assert_right(int4_decode.int4_decode(x, weight), x, weight)
    assert len(emulator.launched) == 1


@needs_compiler
def test_activations_may_stand_apart_and_have_leading_dimensions(emulator) -> None:
    weight = weight_of(4, 32, 128)
    wide = random(6, 136).bfloat16()
    x, odd = wide[:, :128], wide[:, 4:132]
    expected = int4_decode.int4_decode(x.contiguous(), weight)
    assert torch.equal(int4_decode.int4_decode(x, weight), expected)
    assert torch.equal(int4_decode.int4_decode(x.reshape(2, 3, 128), weight), expected.view(2, 3, 32))
    assert torch.equal(int4_decode.int4_decode(odd, weight), int4_decode.int4_decode(odd.clone(), weight))
    assert int4_decode.int4_decode(x[:0], weight).shape == (0, 32)


@needs_compiler
def test_a_row_does_not_depend_on_the_others(emulator) -> None:
    weight, x = weight_of(4, 64, 256), random(7, 256).bfloat16()
    together = int4_decode.int4_decode(x, weight, variant=VARIANTS[0])
    for alone, row in zip(x.split(1), together.split(1), strict=True):
        assert torch.equal(int4_decode.int4_decode(alone, weight, variant=VARIANTS[0]), row)


@needs_compiler
@pytest.mark.parametrize("bits", [4, 8])
def test_unpacking_is_exact(emulator, bits) -> None:
    # Every code, with the zeros of symmetric weights, by activations that pick one input each.
    inputs = 256
    codes = torch.arange(-128, 128).to(torch.int8).repeat(32, 1) if bits == 8 else drawn(0, 16, 32, inputs)
    weight = DecodeWeight(codes, torch.ones(32, 1 if bits == 8 else 2))
    for dtype in (torch.bfloat16, torch.float16):
        for start in range(0, inputs, 32):
            x = torch.eye(inputs, dtype=dtype)[start : start + 32]
            expected = codes[:, start : start + 32].T.to(dtype) - (8 if bits == 4 else 0)
            assert torch.equal(int4_decode.int4_decode(x, weight), expected)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_matrix_is_the_dequantised_weight_rounded(emulator, bits, dtype) -> None:
    weight = weight_of(bits, 41, 320, 64)
    assert torch.equal(weight.matrix(dtype), weight.dequantize().to(dtype))
    assert len(emulator.launched) == 1


@pytest.mark.parametrize("bits", [4, 8])
def test_the_layout_is_the_documented_one(bits) -> None:
    codes, scale, *zeros = canonical(bits, 40, 192, 64, symmetric=False)
    weight = DecodeWeight(codes, scale, *zeros)
    words = weight.words.tolist()
    for output, step, position in ((0, 0, 0), (13, 1, 37), (39, 2, 63), (22, 0, 10), (8, 2, 49)):
        tile, h, g = output // 16, output % 16 // 8, output % 8
        t, k, b, i = position // 16, position % 16 // 4, position % 4 // 2, position % 2
        code = int(codes[output, step * 64 + position])
        if bits == 8:
            assert words[tile][step][k // 2][4 * g + t][8 * (k % 2) + 4 * b + 2 * i + h] == code + 128
        else:
            nibble = 8 * k + 4 * i + 2 * b + h
            assert words[tile][step][0][4 * g + t][nibble // 2] >> nibble % 2 * 4 & 15 == code
        group = step if bits == 4 else 0
        word = weight.scale_words[tile, group, g, h]
        assert int(word) & 255 == (int(zeros[0][output, group]) if zeros else 128)
        assert word.view(torch.float32).item() == pytest.approx(scale[output, group].item(), rel=2**-16)


def test_dequantised_is_what_was_packed_but_for_the_last_bits_of_scales() -> None:
    codes, scale, zeros = canonical(4, 77, 256, 128, symmetric=False)
    exact = (codes.double().unflatten(1, (2, 128)) - zeros[..., None]) * scale.double()[..., None]
    error = (DecodeWeight(codes, scale, zeros).dequantize() - exact.flatten(1)).abs()
    assert (error <= 2**-16 * exact.flatten(1).abs() + 1e-12).all()


FAULTS: dict[str, tuple[dict[str, str], str]] = {
    "no barrier between the lanes that share scales": ({"      warp_barrier();\n": ""}, r"under way|race"),
    "no barrier before sums are added": (
        {"  block_barrier();\n  // Output": "  // Output"},
        r"race|nothing was written",
    ),
    "no barrier before sums reuse the rings": (
        {"wait_for_copies<0>();\n  block_barrier();": "wait_for_copies<0>();"},
        r"race|under way",
    ),
    "one copy too few is waited for": ({"<kStages - 2>": "<kStages - 1>"}, "under way"),
    "rows beyond the last are read": ({"token < decode.tokens);": "token < 8);"}, r"of a buffer of|no argument"),
    "a wrong stride of weights": (
        {"tile_words = rounds": "tile_words = 2 * rounds"},
        r"of a buffer of|no argument",
    ),
    "a stage too large": ({"kX + kXLoads * kFragment;": "kX + 2 * kXLoads * kFragment;"}, "outside the"),
}


@needs_compiler
@pytest.mark.parametrize("fault", FAULTS)
def test_the_emulator_finds(fault, tmp_path_factory, monkeypatch) -> None:
    replaced, complaint = FAULTS[fault]
    library = compile_kernels(shared_folder(tmp_path_factory), "int4_decode", replaced, only="(4, 8, 32,")
    monkeypatch.setattr(int4_decode, "cubins", Emulator(library))
    variant = VARIANTS[0]
    weight = weight_of(4, 64, several_rounds(variant))
    with pytest.raises(RuntimeError, match=rf"int4_decode_bf16_8x32: CTA \d+, thread \d+: .*({complaint})"):
        int4_decode.int4_decode(random(7, weight.in_features).bfloat16(), weight, variant=variant)


@needs_compiler
def test_the_emulator_finds_no_barrier_between_warps_that_share_activations(tmp_path_factory, monkeypatch) -> None:
    replaced = {"      block_barrier();\n": "      warp_barrier();\n"}
    library = compile_kernels(shared_folder(tmp_path_factory), "int4_decode", replaced, only="(4, 32, 128,")
    monkeypatch.setattr(int4_decode, "cubins", Emulator(library))
    weight = weight_of(4, 128, several_rounds(VARIANTS[6]))
    with pytest.raises(RuntimeError, match=r"int4_decode_bf16_32x128: .*(under way|race|nothing was written)"):
        int4_decode.int4_decode(random(17, weight.in_features).bfloat16(), weight, variant=VARIANTS[6])


# Outputs and inputs of the linear layers of InternLM2-20B and Qwen2-0.5B.
@pytest.mark.parametrize(
    ("outputs", "inputs", "gated"),
    [
        *[(8192, 6144, False), (6144, 6144, False), (32768, 6144, True), (6144, 16384, False)],
        *[(1152, 896, False), (896, 896, False), (9728, 896, True), (896, 4864, False)],
    ],
)
@pytest.mark.parametrize("bits", [4, 8])
def test_every_layer_has_a_kernel_for_every_number_of_rows(outputs, inputs, gated, bits) -> None:
    weight = DecodeWeight.__new__(DecodeWeight)
    weight.bits, weight.out_features, weight.in_features = bits, outputs, inputs
    weight.group_size = 128 if bits == 4 else inputs
    for rows in range(1, 33):
        for sms in (108, 132):
            variant = choose_variant(weight, rows, gated, sms)
            assert variant is not None
            assert variant.rows == (8 if rows <= 8 else 16 if rows <= 16 else 32)
            assert variant.takes(weight, gated)


def test_wide_tiles_are_for_many_rows_of_many_outputs() -> None:
    def outputs(weight: DecodeWeight, *rows: int) -> list[int | None]:
        chosen = [choose_variant(weight, number, False, 132) for number in rows]
        return [variant and variant.outputs for variant in chosen]

    assert outputs(weight_of(4, 1024, 128), 4, 8, 16, 32) == [32, 32, 32, 32]
    assert outputs(weight_of(4, 6144, 128), 4, 8, 16, 32) == [32, 64, 64, 64]
    assert outputs(weight_of(4, 16384, 128), 4, 8, 16, 32) == [32, 64, 64, 128]


@needs_compiler
def test_gates_that_fill_no_fragment_are_left_to_the_reference(emulator) -> None:
    weight, x = weight_of(4, 40, 128), random(2, 128).bfloat16()
    assert choose_variant(weight, 2, True, 108) is None
    assert torch.equal(int4_decode.int4_decode(x, weight, gated=True), int4_decode_reference(x, weight, gated=True))
    assert emulator.launched == []


def test_on_a_cpu_the_reference_runs() -> None:
    weight, x = weight_of(4, 40, 128), random(2, 128).bfloat16()
    assert torch.equal(int4_decode.int4_decode(x, weight), int4_decode_reference(x, weight))
    assert torch.equal(weight.matrix(torch.bfloat16), weight.dequantize().bfloat16())


def linear(rows: int, inputs: int = 128, **keywords: Any) -> Callable[[], object]:
    return lambda: int4_decode.int4_decode(torch.zeros(rows, inputs), weight_of(4, 8, 128), **keywords)


CODES = drawn(0, 16, 8, 128)


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (linear(33), "33 rows, at most 32"),
        (linear(1, 64), r"x has 64 channels, the weight is \(8, 128\), bias None"),
        (linear(1, bias=torch.zeros(9)), r"bias \(9,\)"),
        (linear(1, bias=torch.zeros(8), gated=True), "8 outputs with a bias cannot be gated"),
        (lambda: DecodeWeight(CODES + 1, torch.ones(8, 1)), "uint8 of 0..15 or int8, got torch.uint8 up to 16"),
        (lambda: DecodeWeight(CODES, torch.ones(8, 3)), r"scales \(8, 3\) do not fit codes \(8, 128\)"),
        (lambda: DecodeWeight(CODES, torch.ones(8, 8)), "128 inputs in groups of 16: must be multiples of 64 and 32"),
        (lambda: DecodeWeight(CODES.to(torch.int8), torch.ones(8, 2)), "one scale an output and no zeros"),
        (lambda: DecodeWeight(CODES, torch.ones(8, 1), torch.ones(8, 1)), "zeros must be integers"),
        (lambda: DecodeWeight(CODES, torch.ones(8, 1), torch.full((8, 1), 128)), r"0..127, they reach from 128 to 128"),
    ],
)
def test_what_does_not_fit_is_an_error_with_the_numbers(call, complaint) -> None:
    with pytest.raises(ValueError, match=complaint):
        call()


def on_gpu(weight: DecodeWeight) -> DecodeWeight:
    weight.words, weight.scale_words = weight.words.cuda(), weight.scale_words.cuda()
    return weight


@pytest.fixture
def gpu() -> torch.device:
    device = torch.device("cuda", 0)
    if not cubins.available(device):
        pytest.skip("the CUDA kernels are not built")
    return device


# Tiny, odd, and layers of InternLM2-20B: wo and the gated w1 with w3.
@pytest.mark.gpu
@pytest.mark.parametrize(
    ("outputs", "inputs", "gated"), [(1, 128, False), (77, 384, False), (6144, 6144, False), (32768, 6144, True)]
)
@pytest.mark.parametrize("rows", [1, 3, 8, 13, 32])
@pytest.mark.parametrize("bits", [4, 8])
def test_on_a_gpu_it_gives_what_the_reference_gives(gpu, outputs, inputs, gated, rows, bits) -> None:
    weight = on_gpu(weight_of(bits, outputs, inputs))
    for dtype in (torch.bfloat16, torch.float16):
        x = random(rows, inputs).to(gpu, dtype)
        variants = [variant for variant in VARIANTS if variant.rows >= rows and variant.takes(weight, gated)]
        for variant in variants:
            result = int4_decode.int4_decode(x, weight, gated=gated, variant=variant)
            assert_right(result, x, weight, gated=gated)
            assert torch.equal(int4_decode.int4_decode(x, weight, gated=gated, variant=variant), result)
        assert torch.equal(weight.matrix(dtype), weight.dequantize().to(dtype))


@pytest.mark.gpu
def test_in_a_cuda_graph_it_gives_the_same(gpu) -> None:
    weight, x = on_gpu(weight_of(4, 640, 1024)), random(4, 1024).to(gpu, torch.bfloat16)
    expected = int4_decode.int4_decode(x, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = int4_decode.int4_decode(x, weight)
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer_finds_nothing(gpu, tool) -> None:
    code = """
    from vitrail.kernels.int4_decode import VARIANTS, DecodeWeight, int4_decode
    for variant in VARIANTS:
        if variant.bits == 4:
            codes, scales = torch.randint(0, 16, (256, 1152), dtype=torch.uint8), torch.ones(256, 9)
        else:
            codes, scales = torch.randint(-128, 128, (256, 1152), dtype=torch.int8), torch.ones(256, 1)
        weight = DecodeWeight(codes.cuda(), scales.cuda())
        for gated in (False, True):
            x = torch.randn(variant.rows - 1, 1152, device="cuda", dtype=torch.bfloat16)
            int4_decode(x, weight, gated=gated, variant=variant)
        weight.matrix(torch.bfloat16)
    torch.cuda.synchronize()
    """
    assert_clean(tool, code)


def test_padding_is_small_enough_for_the_narrowest_kernel() -> None:
    assert all(variant.outputs % PADDED_TO == 0 for variant in VARIANTS)
