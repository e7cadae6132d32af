import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vitrail.kernels.qk_norm import qk_norm, qk_norm_reference

from .measure import FP32_BOUND, assert_errs_like, check_gradients, on, random, relative_error

# Tiny, odd, and some tokens of InternViT-6B. The last dim is that of q, of k and of v.
SHAPES = [(1, 2), (5, 123), (2, 3, 8), pytest.param((6, 3200), id="6 tokens of InternViT-6B")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def arguments(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    hidden = shape[-1]
    return random(*shape[:-1], 3 * hidden, scale=3), random(hidden, seed=1), random(hidden, seed=2)


def exact_qk_norm(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv.double().chunk(3, dim=-1)
    q, k = (x / (x.square().mean(-1, keepdim=True) + eps).sqrt() for x in (q, k))
    return q * q_weight.double(), k * k_weight.double(), v


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_reference_norms_q_and_k_over_all_channels_and_leaves_v(shape: tuple[int, ...], eps: float) -> None:
    inputs = arguments(*shape)
    for result, exact in zip(qk_norm_reference(*inputs, eps), exact_qk_norm(*inputs, eps), strict=True):
        assert relative_error(result, exact) < FP32_BOUND


def test_on_the_cpu_the_launcher_is_the_reference_and_leaves_its_input() -> None:
    qkv, q_weight, k_weight = arguments(5, 123)
    before = qkv.clone()
    expected = qk_norm_reference(qkv, q_weight, k_weight, 1e-6)
    for result, reference in zip(qk_norm(qkv, q_weight, k_weight, 1e-6), expected, strict=True):
        assert torch.equal(result, reference)
    assert torch.equal(qkv, before)


def test_gradients_flow_to_the_projection_and_both_weights() -> None:
    check_gradients(
        lambda *inputs: torch.cat(qk_norm(*inputs, 1e-5), dim=-1),
        lambda *inputs: torch.cat(exact_qk_norm(*inputs, 1e-5), dim=-1),
        *arguments(5, 123),
    )


@pytest.mark.parametrize(("channels", "q", "k"), [(25, 8, 8), (24, 7, 8), (24, 8, 7)])
def test_widths_that_do_not_match_are_refused_with_all_of_them(channels: int, q: int, k: int) -> None:
    with pytest.raises(ValueError, match=f"qk_norm: qkv has {channels} channels, the weights {q} and {k}"):
        qk_norm(torch.zeros(2, channels), torch.ones(q), torch.ones(k), 1e-6)


# --- the kernel ---


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_errs_no_more_than_the_reference(any_device, shape, dtype) -> None:
    inputs = on(any_device, *arguments(*shape), dtype=dtype)
    plain, exact = qk_norm_reference(*inputs, 1e-6), exact_qk_norm(*inputs, 1e-6)
    for result, reference, truth in zip(qk_norm(*inputs, 1e-6), plain, exact, strict=True):
        assert_errs_like(result, reference, truth)


def test_the_kernel_casts_before_the_weight_as_released_models_do(any_device) -> None:
    qkv, q_weight, k_weight = on(any_device, *arguments(8, 400), dtype=torch.bfloat16)
    plain = qk_norm_reference(qkv, q_weight, k_weight, 1e-6)
    for result, reference in zip(qk_norm(qkv, q_weight, k_weight, 1e-6), plain, strict=True):
        # fp32 statistics may land on the other side of a rounding boundary in one element of some thousand.
        assert (result != reference).float().mean() < 2e-3


def test_the_kernel_works_in_place_and_touches_neither_values_nor_neighbours(any_device) -> None:
    buffer, q_weight, k_weight = on(any_device, random(4, 3 * 40, scale=3), *arguments(4, 40)[1:], dtype=torch.float32)
    before = buffer.clone()
    qkv = buffer[1:3]
    q, k, v = qk_norm(qkv, q_weight, k_weight, 1e-6)
    for part, offset in ((q, 0), (k, 40), (v, 80)):
        assert part.data_ptr() == qkv[0, offset:].data_ptr() and part.stride() == qkv.stride()
    assert torch.equal(buffer[[0, 3]], before[[0, 3]])
    assert torch.equal(v, before[1:3, 80:])
    assert not torch.equal(q, before[1:3, :40]) and not torch.equal(k, before[1:3, 40:80])


def test_a_buffer_that_cannot_be_normed_in_place_is_refused(any_device) -> None:
    qkv, weight = on(any_device, torch.zeros(2, 25)[:, :24], torch.ones(8), dtype=torch.float32)
    wider = torch.zeros(2, 25, device=any_device)[:, :24]
    assert len(qk_norm(qkv.contiguous(), weight, weight, 1e-6)) == 3
    with pytest.raises(ValueError, match=r"qk_norm: qkv \(2, 24\) with strides \(25, 1\) is not contiguous"):
        qk_norm(wider, weight, weight, 1e-6)


@settings(max_examples=30)
@given(rows=st.integers(1, 4), hidden=st.integers(1, 300))
def test_the_kernel_norms_rows_of_any_length(interpreted, rows, hidden) -> None:
    inputs = arguments(rows, hidden)
    exact = exact_qk_norm(*inputs, 1e-5)
    with interpreted():
        results = qk_norm(*inputs, 1e-5)
    for result, truth in zip(results, exact, strict=True):
        assert relative_error(result, truth) < 2 * FP32_BOUND
