import pytest
import torch
from torch import Tensor

from vitrail.kernels.swiglu import swiglu, swiglu_reference

from .measure import FP32_BOUND, check_gradients, random, relative_error


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


def test_on_the_cpu_the_launcher_is_the_reference() -> None:
    x = random(5, 246)
    assert torch.equal(swiglu(x), swiglu_reference(x))


def test_gradients_flow_to_gate_and_up() -> None:
    check_gradients(swiglu, exact_swiglu, random(5, 246))


def test_an_odd_width_is_refused() -> None:
    with pytest.raises(ValueError, match="swiglu: 7 channels do not split"):
        swiglu(torch.zeros(2, 7))
