import math

import pytest
import torch
from torch import Tensor

from vitrail.kernels.linear import linear, linear_gelu, linear_gelu_reference, linear_reference

from .measure import FP32_BOUND, check_gradients, random, relative_error

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
