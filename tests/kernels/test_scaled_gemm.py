from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from vitrail.kernels import dispatch
from vitrail.kernels.quantize import QuantizedRows
from vitrail.kernels.scaled_gemm import CONFIGS, OPERATIONS, PARTS, Epilogue, scaled_linear

from .access import forbid_access_outside
from .measure import random, relative_error

INT8, E4M3 = torch.int8, torch.float8_e4m3fn
EPILOGUES: list[Epilogue] = ["none", "gelu", "swiglu"]
# Tiles so small that small sizes have many, in several groups of rows, and some for every one of four multiprocessors.
SMALL = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3, "programs_per_sm": 1}
FOUR_SMS = dispatch.Target("sm_90", 4, "a GPU of four multiprocessors")
# Sums of codes are exact or fp32; the activations' own errors are 4e-6 of their arguments.
BOUND = 1e-5


class Product:
    """Random operands of one product, and what it is in fp64."""

    def __init__(
        self,
        epilogue: Epilogue,
        m: int,
        n: int,
        k: int,
        *,
        dtype: torch.dtype = INT8,
        row_scales: bool = True,
        bias: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        self.epilogue = epilogue
        outputs = PARTS[epilogue] * n
        x, weight = random(m, k, scale=40), random(outputs, k, seed=1, scale=40)
        codes = [t.round().clamp(-127, 127).to(dtype).to(device) for t in (x, weight)]
        scale = 1 / (40 * k**0.5)
        scales = random(m, seed=2).abs().add(0.5).to(device) if row_scales else None
        self.x = QuantizedRows(codes[0], scales, torch.float32)
        self.weight, self.scales = codes[1], (random(outputs, seed=3).abs() + 0.5).to(device) * scale / 40
        self.bias = random(n, seed=4).to(device) if bias and epilogue != "swiglu" else None
        self.next_scales = (random(n, seed=5).abs() * 0.01 + 0.002).to(device)

    def run(self, **options: Any) -> Tensor:
        """Into memory that is poisoned until it is written, and with no access to any but its own."""
        target, empty = dispatch.target_of(self.weight), torch.empty
        own = [self.x.codes, self.x.scales, self.weight, self.scales, self.bias, self.next_scales]
        own = [tensor for tensor in own if tensor is not None]
        assert target is not None

        def poisoned(*args: Any, **kwargs: Any) -> Tensor:
            memory = empty(*args, **kwargs)
            own.append(memory.fill_(-128 if memory.dtype == INT8 else torch.nan))
            return own[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "empty", poisoned)
            if not self.weight.is_cuda:
                forbid_access_outside(own, patch)
            return scaled_linear(
                *(target, self.x, self.weight, self.scales, self.bias), epilogue=self.epilogue, **options
            )

    def exact(self) -> Tensor:
        x, weight = self.x.codes.double(), self.weight.double() * self.scales.double()[:, None]
        if self.x.scales is not None:
            x = x * self.x.scales.double()[:, None]
        y = F.linear(x, weight, None if self.bias is None else self.bias.double())
        if self.epilogue == "swiglu":
            gate, up = y.chunk(2, dim=-1)
            return F.silu(gate) * up
        return F.gelu(y) if self.epilogue == "gelu" else y

    def check(self) -> None:
        assert relative_error(self.run(out_dtype=torch.float32), self.exact()) < BOUND
        if self.epilogue != "swiglu":
            self.check_codes()

    def check_codes(self) -> None:
        codes = self.run(next_scales=self.next_scales)
        assert codes.dtype == self.weight.dtype
        exact = self.exact() / self.next_scales.double()
        if codes.dtype == INT8:
            assert ((codes.double() - exact.clamp(-127, 127)).abs() <= 0.5 + 127 * BOUND).all()
        else:  # four significant bits
            exact = exact.clamp(-448, 448)
            assert ((codes.double() - exact).abs() <= 2**-4 * exact.abs() + 2**-10 + 448 * BOUND).all()


@settings(max_examples=10)
@given(
    epilogue=st.sampled_from(EPILOGUES),
    m=st.integers(1, 70),
    n=st.integers(1, 70),
    k=st.integers(1, 90),
    dtype=st.sampled_from([INT8, E4M3]),
    row_scales=st.booleans(),
    bias=st.booleans(),
)
@example(epilogue="none", m=1, n=1, k=1, dtype=INT8, row_scales=True, bias=False)
@example(epilogue="gelu", m=145, n=33, k=32, dtype=INT8, row_scales=False, bias=True)  # ten rows of tiles: two groups
@example(epilogue="swiglu", m=17, n=17, k=33, dtype=INT8, row_scales=True, bias=False)  # a column in the last tile
def test_the_pipelined_kernel_takes_any_sizes(interpreted, epilogue, m, n, k, dtype, row_scales, bias) -> None:
    product = Product(epilogue, m, n, k, dtype=dtype, row_scales=row_scales, bias=bias)
    with interpreted(), dispatch.override(OPERATIONS[dtype, epilogue], SMALL | {"implementation": "pipelined"}):
        product.check()


@settings(max_examples=10)
@given(
    epilogue=st.sampled_from(EPILOGUES),
    m=st.integers(1, 70),
    n=st.integers(1, 4).map(lambda words: 16 * words),
    k=st.integers(1, 6).map(lambda words: 16 * words),
    dtype=st.sampled_from([INT8, E4M3]),
    row_scales=st.booleans(),
    bias=st.booleans(),
)
@example(epilogue="none", m=1, n=16, k=16, dtype=E4M3, row_scales=True, bias=False)
@example(epilogue="gelu", m=145, n=48, k=48, dtype=INT8, row_scales=False, bias=True)
@example(epilogue="swiglu", m=17, n=48, k=32, dtype=INT8, row_scales=True, bias=False)
def test_the_persistent_kernel_takes_any_sizes_of_whole_words(
    interpreted, epilogue, m, n, k, dtype, row_scales, bias
) -> None:
    product = Product(epilogue, m, n, k, dtype=dtype, row_scales=row_scales, bias=bias)
    choice = SMALL | {"implementation": "persistent"}
    with interpreted(), dispatch.simulate(FOUR_SMS), dispatch.override(OPERATIONS[dtype, epilogue], choice):
        product.check()


@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_every_configuration_is_the_formula(device, epilogue: Epilogue) -> None:
    target = dispatch.target_of(torch.empty(0, device=device))
    assert target is not None
    size = (1025, 2064, 1168) if device.type == "cuda" else (40, 144, 80)
    for dtype in (INT8, E4M3) if target.arch == "sm_90" else (INT8,):
        product = Product(epilogue, *size, dtype=dtype, device=device)
        for choice in CONFIGS[target.arch]:
            with dispatch.override(OPERATIONS[dtype, epilogue], choice):
                if dtype == INT8:
                    product.check()
                else:  # Hopper adds products of e4m3 with 14 bits, until they leave the tensor core
                    assert relative_error(product.run(out_dtype=torch.float32), product.exact()) < 2**-8


@pytest.mark.parametrize("implementation", ["pipelined", "persistent"])
def test_sums_of_int8_products_are_exact(interpreted, implementation: str) -> None:
    product = Product("none", 33, 48, 112)
    product.x, product.scales = QuantizedRows(product.x.codes, None, torch.float32), torch.ones(48)
    product.bias = None
    exact = product.x.codes.long() @ product.weight.long().T
    choice = SMALL | {"implementation": implementation}
    with interpreted(), dispatch.simulate(FOUR_SMS), dispatch.override("int8_linear", choice):
        assert torch.equal(product.run().long(), exact)


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16])
def test_results_are_rounded_once(any_device, out_dtype) -> None:
    product = Product("none", 21, 32, 64, device=any_device)
    result, exact = product.run(out_dtype=out_dtype), product.exact()
    assert result.dtype == out_dtype
    assert ((result.double() - exact).abs() <= torch.finfo(out_dtype).eps / 1.9 * exact.abs() + 1e-6).all()


def test_leading_dimensions_are_kept_and_no_rows_are_no_work(any_device) -> None:
    product = Product("gelu", 6, 32, 64, device=any_device)
    flat = product.run()
    codes, scales = product.x.codes.view(2, 3, 64), product.x.scales
    assert scales is not None
    product.x = QuantizedRows(codes, scales.view(2, 3), torch.float32)
    assert torch.equal(product.run(), flat.view(2, 3, 32))
    product.x = QuantizedRows(codes[:0], scales.view(2, 3)[:0], torch.float32)
    assert product.run().shape == (0, 3, 32)


def test_what_tma_does_not_take_goes_to_the_other_kernel(interpreted) -> None:
    choice = SMALL | {"implementation": "persistent"}
    with interpreted(), dispatch.simulate(FOUR_SMS), dispatch.override("int8_linear", choice):
        for size in ((5, 24, 64), (5, 32, 40), (3, 1, 1)):
            Product("none", *size).check()
