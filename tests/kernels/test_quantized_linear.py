import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from vitrail.kernels import cpu_weight
from vitrail.kernels.cpu_extension import extension, missing_because
from vitrail.kernels.cpu_weight import CpuWeight, round_activations
from vitrail.kernels.quantized_linear import int4_linear_reference, int8_linear_reference, pack_int4, pack_int8

from .measure import FP32_BOUND, random

ISAS = extension.instruction_sets() if extension else []
# (rows, in, out): tiny, odd, decode and prefill of Qwen2-0.5B's k/v and down projections.
SHAPES_INT8 = [(1, 1, 1), (5, 123, 7), (1, 896, 128), (41, 896, 128), (1, 4864, 96), (250, 588, 33)]
# (rows, in, out, group): one ragged group, one block of rows and a bit, many groups.
SHAPES_INT4 = [
    (1, 1, 1, 1),
    (5, 123, 7, 123),
    (13, 24, 17, 8),
    (1, 896, 128, 128),
    (41, 896, 48, 32),
    (3, 4864, 40, 128),
]

needs_extension = pytest.mark.skipif(extension is None, reason=missing_because)
every_isa = pytest.mark.parametrize("isa", ISAS or [pytest.param("", marks=needs_extension)])


def codes(out: int, width: int, bits: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 1 << bits, (out, width), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def scales(out: int, groups: int) -> Tensor:
    return random(out, groups, seed=3).abs() + 0.01


def signed(weight: Tensor) -> Tensor:
    return (weight.to(torch.int16) - 128).to(torch.int8)


def exact_linear(
    x: Tensor, weight: Tensor, scale: Tensor, zeros: Tensor | None, bits: int, bias: Tensor | None
) -> Tensor:
    """Rounded activations by dequantised weights in fp64, summed one group after the other."""
    groups = scale.shape[1]
    rounded = round_activations(x, groups).double().unflatten(-1, (groups, -1))
    centred = weight.double().unflatten(-1, (groups, -1))
    centred = centred - (2.0 ** (bits - 1) if zeros is None else zeros.double()[..., None])
    product = torch.einsum("mgk,ngk,ng->mn", rounded, centred, scale.double())
    return product if bias is None else product + bias.double()


def mean_error(result: Tensor, exact: Tensor) -> float:
    """Mean deviation relative to the mean magnitude."""
    assert result.shape == exact.shape
    return ((result.double() - exact).abs().mean() / exact.abs().mean()).item()


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# The reference


@pytest.mark.parametrize(("rows", "width", "out"), SHAPES_INT8)
def test_the_int8_reference_is_the_formula(rows: int, width: int, out: int) -> None:
    x, weight, bias = random(rows, width), codes(out, width, 8), random(out, seed=2)
    scale = scales(out, 1)
    exact = exact_linear(x, weight, scale, None, 8, bias)
    assert mean_error(int8_linear_reference(x, signed(weight), scale[:, 0], bias), exact) < FP32_BOUND


@pytest.mark.parametrize("with_zeros", [False, True], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize(("rows", "width", "out", "group"), SHAPES_INT4)
def test_the_int4_reference_is_the_formula(rows: int, width: int, out: int, group: int, with_zeros: bool) -> None:
    x, weight, scale = random(rows, width), codes(out, width, 4), scales(out, width // group)
    zeros = codes(out, width // group, 4, seed=5) if with_zeros else None
    exact = exact_linear(x, weight, scale, zeros, 4, None)
    result = int4_linear_reference(x, weight, scale, zeros)
    assert (result.double() - exact).abs().max() <= FP32_BOUND * exact.abs().max().clamp(min=1)


def test_activations_are_rounded_to_the_nearest_of_127_steps_of_their_group() -> None:
    x = torch.tensor([[0.0, 1.0, -2.0, 254.0], [127.0, 0.5, 1.5, -2.5], [1e-35, 0.0, 0.0, -1e-35]])
    assert round_activations(x, 1).tolist() == [[0, 0, -2, 254], [127, 0, 2, -2], [0, 0, 0, 0]]  # ties to even
    assert round_activations(x[:1], 2).tolist() == [[0, 1, -2, 254]]
    broken = round_activations(torch.tensor([[1.0, float("inf"), 3.0, 4.0]]), 2)
    assert broken[0, :2].isnan().all()
    assert broken[0, 2:].isfinite().all()


@pytest.mark.parametrize("outlier", [1.0, 100.0])
def test_rounding_activations_adds_little_to_what_4_bits_cost(outlier: float) -> None:
    x, weight = random(16, 896), random(64, 896, seed=1)
    x[:, 5] *= outlier
    exact = x.double() @ weight.double().T
    grouped = weight.unflatten(1, (7, 128))
    scale = grouped.abs().amax(-1) / 7
    quantised = (grouped / scale[..., None]).round().clamp(-8, 7).add(8).to(torch.uint8).flatten(1)
    dequantised = ((quantised.unflatten(1, (7, 128)).double() - 8) * scale[..., None]).flatten(1)
    of_weights = mean_error(x.double() @ dequantised.T, exact)
    both = mean_error(pack_int4(quantised, scale).linear(x), exact)
    assert both < 1.05 * of_weights


# The extension


@every_isa
@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(("rows", "width", "out"), SHAPES_INT8)
def test_int8_is_the_formula(rows: int, width: int, out: int, with_bias: bool, isa: str) -> None:
    x, weight, bias = random(rows, width), codes(out, width, 8), random(out, seed=2) if with_bias else None
    scale = scales(out, 1)
    result = pack_int8(signed(weight), scale[:, 0]).linear(x, bias, isa=isa)
    assert mean_error(result, exact_linear(x, weight, scale, None, 8, bias)) < FP32_BOUND


@every_isa
@pytest.mark.parametrize("with_zeros", [False, True], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize(("rows", "width", "out", "group"), SHAPES_INT4)
def test_int4_is_the_formula(rows: int, width: int, out: int, group: int, with_zeros: bool, isa: str) -> None:
    x, weight, bias = random(rows, width), codes(out, width, 4), random(out, seed=2)
    scale = scales(out, width // group)
    zeros = codes(out, width // group, 4, seed=5) if with_zeros else None
    result = pack_int4(weight, scale, zeros).linear(x, bias, isa=isa)
    assert mean_error(result, exact_linear(x, weight, scale, zeros, 4, bias)) < FP32_BOUND


@every_isa
def test_8_bits_with_groups_and_zeros_are_the_formula(isa: str) -> None:
    x, weight, scale, zeros = random(6, 96), codes(20, 96, 8), scales(20, 4), codes(20, 4, 8, seed=5)
    result = CpuWeight(weight, scale, zeros, bits=8).linear(x, None, isa=isa)
    assert mean_error(result, exact_linear(x, weight, scale, zeros, 8, None)) < FP32_BOUND


@every_isa
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("code", [0, -1], ids=["lowest", "highest"])
def test_the_largest_products_do_not_saturate(bits: int, code: int, isa: str) -> None:
    weight = torch.full((16, 256), code % (1 << bits), dtype=torch.uint8)
    x = torch.tensor([[127.0], [-127.0]]).expand(2, 256)
    result = CpuWeight(weight, torch.ones(16, 1), None, bits).linear(x, None, isa=isa)
    value = (code % (1 << bits) - (1 << bits - 1)) * 127 * 256
    assert result.tolist() == [[value] * 16, [-value] * 16]


@every_isa
@pytest.mark.parametrize("bits", [8, 4])
def test_every_number_of_rows_gives_each_row_its_own_result(bits: int, isa: str) -> None:
    """To the last bit: decode and prefill, alone and in a batch, on every instruction set."""
    x, weight, scale = random(30, 160), codes(40, 160, bits), scales(40, 4)
    packed = CpuWeight(weight, scale, codes(40, 4, bits, seed=5), bits)
    alone = torch.cat([packed.linear(row[None], None, isa="portable") for row in x])
    for rows in range(1, 31):
        assert torch.equal(packed.linear(x[:rows], None, isa=isa), alone[:rows])


@every_isa
@pytest.mark.parametrize("bits", [8, 4])
def test_threads_change_nothing(bits: int, isa: str, threads: None) -> None:
    x, packed = random(37, 256), CpuWeight(codes(1000, 256, bits), scales(1000, 2), None, bits)
    torch.set_num_threads(1)
    expected = packed.linear(x, None, isa=isa)
    for count in (2, 3, 7):
        torch.set_num_threads(count)
        assert torch.equal(packed.linear(x, None, isa=isa), expected)


@every_isa
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_float32_rounded_at_the_end(dtype: torch.dtype, isa: str) -> None:
    x, bias = random(5, 123).to(dtype), random(35, seed=2).to(dtype)
    packed = CpuWeight(codes(35, 123, 8), scales(35, 1), None, 8)
    result = packed.linear(x, bias, isa=isa)
    assert result.dtype == dtype
    assert torch.equal(result, packed.linear(x.float(), bias.float(), isa=isa).to(dtype))


@every_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_spoils_its_own_row(bad: float, dtype: torch.dtype, isa: str) -> None:
    x = random(20, 64).to(dtype)
    packed = CpuWeight(codes(24, 64, 4), scales(24, 2), None, 4)
    expected = packed.linear(x, None, isa=isa)
    x[7, 40] = bad
    result = packed.linear(x, None, isa=isa)
    assert result[7].isnan().all()
    rest = [row for row in range(20) if row != 7]
    assert torch.equal(result[rest], expected[rest])


@every_isa
def test_rows_of_zeros_and_of_almost_zeros_give_the_bias(isa: str) -> None:
    bias = random(24, seed=2)
    packed = CpuWeight(codes(24, 64, 8), scales(24, 1), None, 8)
    assert torch.equal(packed.linear(torch.zeros(3, 64), bias, isa=isa), bias.expand(3, 24))
    assert torch.equal(packed.linear(torch.full((3, 64), 1e-38), bias, isa=isa), bias.expand(3, 24))


# The launchers


def test_the_launchers_agree_with_their_references_with_and_without_the_extension(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, bias = random(2, 3, 64), random(10, seed=2)
    weight, scale = signed(codes(10, 64, 8)), scales(10, 1)[:, 0]
    weight4, scale4, zeros = codes(10, 64, 4), scales(10, 2), codes(10, 2, 4, seed=5)
    int8 = int8_linear_reference(x, weight, scale, bias)
    int4 = int4_linear_reference(x, weight4, scale4, zeros, bias)
    assert mean_error(pack_int8(weight, scale).linear(x, bias), int8.double()) < FP32_BOUND
    assert mean_error(pack_int4(weight4, scale4, zeros).linear(x, bias), int4.double()) < FP32_BOUND
    monkeypatch.setattr(cpu_weight, "extension", None)
    assert torch.equal(pack_int8(weight, scale).linear(x, bias), int8)
    assert torch.equal(pack_int4(weight4, scale4, zeros).linear(x, bias), int4)


def test_leading_dimensions_strides_and_no_rows_are_kept() -> None:
    packed = CpuWeight(codes(7, 16, 8), scales(7, 1), None, 8)
    x = random(2, 3, 16)
    strided = random(2, 3, 32)[..., ::2].copy_(x)
    assert packed.linear(x).shape == (2, 3, 7)
    assert torch.equal(packed.linear(strided), packed.linear(x))
    assert torch.equal(packed.linear(x[1, 2]), packed.linear(x)[1, 2])
    assert packed.linear(x[:0]).shape == (0, 3, 7)


def test_sizes_and_types_that_do_not_fit_are_refused() -> None:
    packed = pack_int4(codes(10, 64, 4), scales(10, 2))
    with pytest.raises(ValueError, match=r"x has 63 channels, the weight is \(10, 64\)"):
        packed.linear(random(2, 63))
    with pytest.raises(ValueError, match=r"bias \(9,\)"):
        packed.linear(random(2, 64), random(9))
    with pytest.raises(ValueError, match=r"scales \(10, 3\) do not fit a weight \(10, 64\)"):
        pack_int4(codes(10, 64, 4), scales(10, 3))
    with pytest.raises(ValueError, match=r"scales \(9, 2\) do not fit"):
        pack_int4(codes(10, 64, 4), scales(9, 2))
    with pytest.raises(ValueError, match="group size 12 must be a multiple of 8"):
        pack_int4(codes(10, 48, 4), scales(10, 4))
    with pytest.raises(ValueError, match=r"zeros must be integers \(10, 2\), got torch.float32"):
        pack_int4(codes(10, 64, 4), scales(10, 2), scales(10, 2))
    with pytest.raises(ValueError, match=r"must be torch.int8, got torch\.uint8"):
        pack_int8(codes(10, 64, 8), scales(10, 1)[:, 0])
    with pytest.raises(ValueError, match=r"codes must be uint8 below 16, got torch\.int32"):
        pack_int4(codes(10, 64, 4).int(), scales(10, 2))
    with pytest.raises(ValueError, match=r"uint8 below 16, got torch\.uint8 up to 16"):
        pack_int4(torch.full((10, 64), 16, dtype=torch.uint8), scales(10, 2))
    with pytest.raises(ValueError, match=r"zeros must lie in 0\.\.255, they reach from -1 to 0"):
        pack_int4(codes(10, 64, 4), scales(10, 2), -codes(10, 2, 1).int())


@needs_extension
def test_python_threads_can_multiply_at_the_same_time(threads: None) -> None:
    torch.set_num_threads(3)
    packed = CpuWeight(codes(600, 512, 8), scales(600, 1), None, 8)
    inputs = [random(5, 512, seed=seed) for seed in range(4)]
    expected = [packed.linear(x, None) for x in inputs]
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(50):
            if not torch.equal(packed.linear(inputs[index], None), expected[index]):
                wrong.append(index)

    workers = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


@needs_extension
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_can_multiply_with_threads() -> None:
    code = (
        "import os, numpy as np; from vitrail._cpu import Weight; x = np.ones((2, 1024), np.float32); "
        "w = Weight(np.full((64, 256, 16, 4), 129, np.uint8), np.ones((64, 1, 16), np.float32), None, "
        "bits=8, outputs=1024, inputs=1024, group=1024); y = np.empty((2, 1024), np.float32); "
        "w.multiply(x, None, y, threads=3); pid = os.fork(); y[:] = 0; w.multiply(x, None, y, threads=3); "
        "tasks = '/proc/self/task'; alone = os.path.exists(tasks) and len(os.listdir(tasks)) == 1; "
        "wrong = alone or not np.allclose(y, 1024); "
        "os._exit(wrong) if pid == 0 else exit(wrong or os.waitpid(pid, 0)[1] != 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd="/", timeout=60
    )
    assert done.returncode == 0, done.stderr
