import math

import pytest
import torch
from torch import Tensor

from vitrail.kernels import dispatch
from vitrail.kernels.linear import _gelu_, linear, linear_gelu, linear_gelu_reference, linear_reference

from .measure import FP32_BOUND, assert_errs_like, check_gradients, on, random, relative_error

# (rows, in, out): tiny, odd, one row, and some tokens of InternViT-300M's fc1.
SHAPES = [(1, 1, 1), (5, 123, 7), (1, 64, 48), (41, 1024, 4096)]


def exact_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    product = (x[..., None, :] * weight).sum(-1) if x.numel() * weight.shape[0] < 1e6 else x @ weight.T
    return product if bias is None else product + bias


def exact_gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


@pytest.mark.parametrize(("rows", "width", "out"), SHAPES)
@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
def test_linear_reference_is_the_formula(rows: int, width: int, out: int, with_bias: bool) -> None:
    x, weight, bias = random(rows, width), random(out, width, seed=1), random(out, seed=2) if with_bias else None
    exact = exact_linear(x.double(), weight.double(), bias.double() if with_bias else None)
    assert relative_error(linear_reference(x, weight, bias), exact) < FP32_BOUND


@pytest.mark.parametrize(("rows", "width", "out"), SHAPES)
def test_linear_gelu_reference_is_the_formula_with_erf(rows: int, width: int, out: int) -> None:
    x, weight, bias = random(rows, width), random(out, width, seed=1, scale=width**-0.5), random(out, seed=2)
    exact = exact_gelu(exact_linear(x.double(), weight.double(), bias.double()))
    assert relative_error(linear_gelu_reference(x, weight, bias), exact) < FP32_BOUND


def test_gelu_is_the_erf_form_and_not_the_tanh_form() -> None:
    x = torch.linspace(-6, 6, 241)[:, None]
    result = linear_gelu(x, torch.ones(1, 1), torch.zeros(1))[:, 0]
    exact = torch.tensor([v * (1 + math.erf(v / math.sqrt(2))) / 2 for v in x[:, 0].tolist()], dtype=torch.float64)
    tanh = torch.nn.functional.gelu(x[:, 0], approximate="tanh")
    assert (result - exact).abs().max() < 1e-6
    assert (tanh - exact).abs().max() > 1e-4


def test_leading_dimensions_and_strides_are_kept() -> None:
    x, weight, bias = random(2, 3, 5, 8), random(7, 8, seed=1), random(7, seed=2)
    strided = random(2, 3, 5, 16)[..., ::2].copy_(x)
    for result in (linear(strided, weight, bias), linear(x, weight, bias)):
        assert result.shape == (2, 3, 5, 7)
        assert relative_error(result, exact_linear(x.double(), weight.double(), bias.double())) < FP32_BOUND


def test_on_the_cpu_the_launchers_are_the_references() -> None:
    x, weight, bias = random(5, 123), random(7, 123, seed=1), random(7, seed=2)
    assert torch.equal(linear(x, weight), linear_reference(x, weight))
    assert torch.equal(linear_gelu(x, weight, bias), linear_gelu_reference(x, weight, bias))


def test_gradients_flow_to_input_weight_and_bias() -> None:
    x, weight, bias = random(5, 123), random(7, 123, seed=1, scale=0.1), random(7, seed=2)
    check_gradients(linear, exact_linear, x, weight, bias)
    check_gradients(linear_gelu, lambda x, w, b: exact_gelu(exact_linear(x, w, b)), x, weight, bias)


def test_shapes_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match=r"x has 8 channels, weight is \(6, 7\), bias \(6,\)"):
        linear_gelu(torch.zeros(2, 8), torch.zeros(6, 7), torch.zeros(6))
    with pytest.raises(ValueError, match=r"x has 7 channels, weight is \(6, 7\), bias \(5,\)"):
        linear_gelu(torch.zeros(2, 7), torch.zeros(6, 7), torch.zeros(5))


# --- the kernels ---


@pytest.mark.parametrize(
    ("shape", "out"),
    [
        ((1, 8), 8),
        ((5, 123), 7),  # not aligned: the library, and the kernel for GELU alone
        pytest.param((2, 3, 128), 512, id="fc1 of nano"),
        pytest.param((7, 1025, 3200), 12800, marks=pytest.mark.gpu, id="fc1 of InternViT-6B"),
        pytest.param((1025, 1024), 4096, marks=pytest.mark.gpu, id="fc1 of InternViT-300M"),
        pytest.param((13, 256, 12800), 6144, marks=pytest.mark.gpu, id="projector of V1.5"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linear_gelu_errs_no_more_than_the_reference(device, shape, out, dtype) -> None:
    width = shape[-1]
    x, weight = random(*shape), random(out, width, seed=1, scale=width**-0.5)
    x, weight, bias = on(device, x, weight, random(out, seed=2), dtype=dtype)
    exact = exact_gelu(x.double() @ weight.double().T + bias.double())
    assert_errs_like(linear_gelu(x, weight, bias), linear_gelu_reference(x, weight, bias), exact)


def test_linear_gelu_takes_any_strides_and_no_rows_at_all(device) -> None:
    x, weight, bias = on(device, random(2, 3, 64), random(64, 64, seed=1), random(64, seed=2), dtype=torch.bfloat16)
    exact = exact_gelu(x.double() @ weight.double().T + bias.double())
    for view in (x, x.mT.contiguous().mT, x.repeat(1, 2, 1)[:, ::2][:, :3], x.repeat(1, 1, 2)[..., :64]):
        same = exact_gelu(view.double() @ weight.double().T + bias.double()) if view is not x else exact
        assert_errs_like(linear_gelu(view, weight, bias), linear_gelu_reference(view, weight, bias), same)
    assert linear_gelu(x[:0], weight, bias).shape == (0, 3, 64)


def test_the_gelu_of_kernels_is_exact_to_the_fifth_digit_everywhere(any_device) -> None:
    x = on(any_device, torch.linspace(-6, 6, 4800), dtype=torch.float32)
    # The erf form cancels where x is negative: erfc does not.
    exact = x.double() * torch.erfc(-x.double() / math.sqrt(2)) / 2
    result = _gelu_(x.clone()[None, :])[0]
    assert ((result.double() - exact).abs() <= 1e-5 * exact.abs()).all()
    far = on(any_device, torch.tensor([-1e30, -1e4, -40.0, -9.0, 0.0, 9.0, 40.0, 1e4, 1e30]), dtype=torch.float32)
    result = _gelu_(far.clone()[None, :])[0]
    assert torch.equal(result[4:], far[4:])
    assert (result[:4].abs() < 1e-15).all()


@pytest.mark.parametrize("columns", [1, 2048, 2051])
def test_the_gelu_kernel_covers_every_column_once(any_device, columns: int) -> None:
    # A second GELU would show: the function is not idempotent.
    y = on(any_device, random(3, columns), dtype=torch.bfloat16)
    assert_errs_like(_gelu_(y.clone()), torch.nn.functional.gelu(y), exact_gelu(y.double()))


def test_where_the_table_says_so_one_launch_does_it_all() -> None:
    fused: dict[str, list] = {"sm_80": [], "sm_90": []}
    for arch, launches in fused.items():
        with dispatch.simulate(dispatch.REPRESENTATIVE[arch], launches):
            for tiles, width, out in [(7, 3200, 12800), (7, 1024, 4096)]:
                x, weight = (
                    torch.empty(s, device="meta", dtype=torch.bfloat16) for s in [(tiles, 1025, width), (out, width)]
                )
                assert linear_gelu(x, weight, weight[:, 0].clone()).shape == (tiles, 1025, out)
    assert [launch.name for launch in fused["sm_80"]] == ["_gelu_kernel", "_pipelined_kernel"]
    assert [launch.name for launch in fused["sm_90"]] == ["_persistent_kernel", "_persistent_kernel"]
