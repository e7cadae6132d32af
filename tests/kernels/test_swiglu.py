import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vitrail.kernels.swiglu import linear_swiglu, linear_swiglu_reference, swiglu, swiglu_reference

from .measure import FP32_BOUND, assert_errs_like, check_gradients, on, random, relative_error


def exact_swiglu(gate_up: Tensor) -> Tensor:
    half = gate_up.shape[-1] // 2
    gate, up = gate_up[..., :half], gate_up[..., half:]
    return gate / (1 + torch.exp(-gate)) * up


# Tiny, odd, and some tokens of InternLM2-20B.
@pytest.mark.parametrize("shape", [(1, 2), (5, 2 * 123), (2, 3, 6), (40, 2 * 16384)])
def test_reference_is_the_formula_with_the_gate_first(shape: tuple[int, ...]) -> None:
    x = random(*shape, scale=3)
    assert relative_error(swiglu_reference(x), exact_swiglu(x.double())) < FP32_BOUND


def test_extreme_gates_neither_overflow_nor_leak() -> None:
    gate = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4])
    result = swiglu(torch.cat((gate, torch.full((5,), 2.0))))
    assert torch.equal(result[2:], torch.tensor([0.0, 200.0, 2e4]))
    assert result[:2].abs().max() < 1e-30


def test_on_the_cpu_the_launchers_are_the_references() -> None:
    x, weight = random(5, 246), random(14, 246, seed=1)
    assert torch.equal(swiglu(x), swiglu_reference(x))
    assert torch.equal(linear_swiglu(x, weight), linear_swiglu_reference(x, weight))


def test_the_projection_has_the_rows_of_the_gate_first() -> None:
    x, gate, up = random(5, 24), random(7, 24, seed=1), random(7, 24, seed=2)
    exact = exact_swiglu(torch.cat((x.double() @ gate.double().T, x.double() @ up.double().T), dim=-1))
    assert relative_error(linear_swiglu(x, torch.cat((gate, up))), exact) < FP32_BOUND


def test_gradients_flow_to_gate_and_up() -> None:
    check_gradients(swiglu, exact_swiglu, random(5, 246))


def test_an_odd_width_is_refused() -> None:
    with pytest.raises(ValueError, match="swiglu: 7 channels do not split"):
        swiglu(torch.zeros(2, 7))


def test_a_projection_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"x has 8 channels, the weight of gate and up is \(6, 7\)"):
        linear_swiglu(torch.zeros(2, 8), torch.zeros(6, 7))
    with pytest.raises(ValueError, match=r"x has 7 channels, the weight of gate and up is \(5, 7\)"):
        linear_swiglu(torch.zeros(2, 7), torch.zeros(5, 7))


# --- the kernels ---

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("shape", [(1, 2), (5, 2 * 123), (2, 3, 6), (0, 6), pytest.param((4, 2 * 16384), id="20B")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_errs_no_more_than_the_reference(any_device, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = on(any_device, random(*shape, scale=3), dtype=dtype)
    result = swiglu(x)
    assert result.shape == (*shape[:-1], shape[-1] // 2)
    if x.numel():
        assert_errs_like(result, swiglu_reference(x), exact_swiglu(x.double()))


def test_extreme_gates_neither_overflow_nor_leak_from_the_kernel(any_device) -> None:
    gate = torch.tensor([-3e38, -1e4, -100.0, 0.0, 100.0, 1e4])
    result = swiglu(on(any_device, torch.cat((gate, torch.full((6,), 2.0))), dtype=torch.float32))
    assert torch.equal(result[3:].cpu(), torch.tensor([0.0, 200.0, 2e4]))
    assert result[:3].abs().max() < 1e-30


@settings(max_examples=20)
@given(rows=st.integers(1, 4), half=st.integers(1, 1100), step=st.integers(1, 2))
def test_the_kernel_takes_rows_of_any_length_inside_wider_ones(interpreted, rows: int, half: int, step: int) -> None:
    x = random(rows, 2 * half * step + 3)[:, 2 : 2 + 2 * half * step : step]
    with interpreted():
        result = swiglu(x)
    assert relative_error(result, exact_swiglu(x.double())) < FP32_BOUND


@pytest.mark.parametrize(
    ("shape", "intermediate"),
    [
        ((1, 8), 8),
        ((5, 123), 7),  # not aligned: the library, and the kernel for SwiGLU alone
        pytest.param((1, 3, 256), 512, id="decoding with nano"),
        pytest.param((67, 128), 136, id="an odd prompt"),
        *(
            pytest.param((tokens, 6144), 16384, marks=pytest.mark.gpu, id=f"{tokens} tokens of InternLM2-20B")
            for tokens in (1, 16, 32, 64, 128, 1856)
        ),
        pytest.param((1856, 896), 4864, marks=pytest.mark.gpu, id="a prompt for Qwen2-0.5B"),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_swiglu_errs_no_more_than_the_reference(device, shape, intermediate, dtype) -> None:
    x, weight = random(*shape), random(2 * intermediate, shape[-1], seed=1, scale=shape[-1] ** -0.5)
    x, weight = on(device, x, weight, dtype=dtype)
    exact = exact_swiglu(x.double() @ weight.double().T)
    assert_errs_like(linear_swiglu(x, weight), linear_swiglu_reference(x, weight), exact)


def test_linear_swiglu_takes_no_rows_at_all(device) -> None:
    x, weight = on(device, random(0, 3, 64), random(128, 64), dtype=torch.bfloat16)
    assert linear_swiglu(x, weight).shape == (0, 3, 64)
