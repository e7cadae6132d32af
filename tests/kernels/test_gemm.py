import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from vitrail.kernels import dispatch
from vitrail.kernels.gemm import CONFIGS, PARTS, Epilogue, fused_linear, gemm

from .access import forbid_access_outside
from .measure import assert_errs_like, on, random, relative_error

# Tiles so small that small sizes have many, in several groups of rows, and some for every one of four multiprocessors.
SMALL = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16, "num_warps": 4, "num_stages": 3, "programs_per_sm": 1}
FOUR_SMS = dispatch.Target("sm_90", 4, "a GPU of four multiprocessors")
# fp32 sums, and an error of 4e-6 in Phi.
FP32_GELU_BOUND = 1e-5


def operands(epilogue: Epilogue, m: int, n: int, k: int) -> tuple[Tensor, Tensor, Tensor | None]:
    x, weight = random(m, k), random(PARTS[epilogue] * n, k, seed=1, scale=k**-0.5)
    return x, weight, random(n, seed=2) if epilogue == "gelu" else None


def plain(epilogue: Epilogue, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = F.linear(x, weight, bias)
    if epilogue == "gelu":
        return F.gelu(y)
    gate, up = y.chunk(2, dim=-1)
    return F.silu(gate) * up


def exact(epilogue: Epilogue, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return plain(epilogue, x.double(), weight.double(), None if bias is None else bias.double())


def multiply(epilogue: Epilogue, choice: dispatch.Choice, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`gemm` into memory that is not a number until it is written, and with no access to any but its own."""
    target, empty, own = dispatch.target_of(x), torch.empty, [t for t in (x, weight, bias) if t is not None]
    assert target is not None

    def poisoned(*args, **kwargs) -> Tensor:
        own.append(empty(*args, **kwargs).fill_(float("nan")))
        return own[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", poisoned)
        if not x.is_cuda:
            forbid_access_outside(own, patch)
        return gemm(epilogue, target, x, weight, bias, choice)


@settings(max_examples=8)
@given(
    epilogue=st.sampled_from(["gelu", "swiglu"]),
    m=st.integers(1, 100),
    n=st.integers(1, 70),
    k=st.integers(1, 50),
)
@example(epilogue="gelu", m=1, n=1, k=1)
@example(epilogue="gelu", m=145, n=33, k=16)  # ten rows of tiles: a whole group, and one of two
@example(epilogue="swiglu", m=17, n=17, k=16)  # one column of gate and of up in the last tile
def test_the_pipelined_kernel_takes_any_sizes(interpreted, epilogue: Epilogue, m: int, n: int, k: int) -> None:
    tensors = operands(epilogue, m, n, k)
    with interpreted():
        result = multiply(epilogue, SMALL | {"implementation": "pipelined"}, *tensors)
    assert relative_error(result, exact(epilogue, *tensors)) < FP32_GELU_BOUND


@settings(max_examples=8)
@given(
    epilogue=st.sampled_from(["gelu", "swiglu"]),
    m=st.integers(1, 100),
    n=st.integers(1, 17).map(lambda quarter: 4 * quarter),
    k=st.integers(1, 12).map(lambda quarter: 4 * quarter),
)
@example(epilogue="gelu", m=1, n=4, k=4)
@example(epilogue="gelu", m=145, n=36, k=20)
@example(epilogue="swiglu", m=17, n=20, k=16)
def test_the_persistent_kernel_takes_any_multiples_of_four(interpreted, epilogue: Epilogue, m, n, k) -> None:
    tensors = operands(epilogue, m, n, k)
    with interpreted(), dispatch.simulate(FOUR_SMS):
        result = multiply(epilogue, SMALL | {"implementation": "persistent"}, *tensors)
    assert relative_error(result, exact(epilogue, *tensors)) < FP32_GELU_BOUND


@pytest.mark.parametrize("epilogue", ["gelu", "swiglu"])
def test_every_configuration_errs_no_more_than_plain_torch(device, epilogue: Epilogue) -> None:
    tensors = operands(epilogue, *((1025, 2064, 1168) if device.type == "cuda" else (40, 144, 80)))
    x, weight, bias = (None if t is None else on(device, t, dtype=torch.bfloat16) for t in tensors)
    target = dispatch.target_of(x)
    assert target is not None
    expected, reference = exact(epilogue, x, weight, bias), plain(epilogue, x, weight, bias)
    for choice in CONFIGS[target.arch]:
        if choice["implementation"] != "torch":
            assert_errs_like(multiply(epilogue, choice, x, weight, bias), reference, expected)


@pytest.mark.parametrize("epilogue", ["gelu", "swiglu"])
@pytest.mark.parametrize("implementation", ["persistent", "pipelined"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_may_be_part_of_wider_ones(interpreted, epilogue: Epilogue, implementation: str, dtype) -> None:
    x, weight, bias = operands(epilogue, 33, 24, 40)
    x, weight = (F.pad(t, (16, 24), value=float("nan")).to(dtype)[:, 16:-24] for t in (x, weight))
    bias = None if bias is None else bias.to(dtype)
    with interpreted(), dispatch.simulate(FOUR_SMS):
        result = multiply(epilogue, SMALL | {"implementation": implementation}, x, weight, bias)
    assert_errs_like(result, plain(epilogue, x, weight, bias), exact(epilogue, x, weight, bias))


def test_what_is_not_aligned_is_left_to_the_library(interpreted) -> None:
    x, weight, bias = (None if t is None else t.bfloat16() for t in operands("gelu", 5, 64, 64))

    def fused(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
        return fused_linear("gelu", dispatch.A100, x, weight, bias) is not None

    with interpreted():
        assert fused(x, weight, bias)
        assert fused(x[:, 16:], weight[:, 16:], bias)
        assert not fused(x[:, 4:-12], weight[:, 16:], bias)  # where rows begin
        assert not fused(x[:, :-8], weight[:, :-8], bias)  # how long they are
        assert not fused(F.pad(x, (0, 8))[:, :64], weight, bias)  # how far apart
        assert not fused(x, weight[:-8], bias[:-8])  # how long the results are
        assert not fused(x, weight.T.contiguous().T, bias)
        assert not fused(x.repeat(1, 2)[:, ::2], weight, bias)
        assert not fused(x[:1].expand(5, -1), weight, bias)
        assert not fused(x.float(), weight.float(), bias.float())
        assert not fused(x[:0], weight, bias)
