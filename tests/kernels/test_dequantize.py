import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from vitrail.kernels.dequantize import dequantize, few_rows_linear
from vitrail.kernels.int4_decode import DecodeWeight

from .measure import assert_errs_like, random, relative_error

HALF = [torch.bfloat16, torch.float16]


def weight(
    bits: int, out: int, width: int, group: int, *, zeros: bool = False, device: torch.device | str = "cpu"
) -> DecodeWeight:
    generator = torch.Generator().manual_seed(out)
    groups = 1 if bits == 8 else width // group
    scales = random(out, groups, seed=1).abs() + 0.01
    if bits == 8:
        codes = torch.randint(-127, 128, (out, width), generator=generator, dtype=torch.int8)
        return DecodeWeight(codes.to(device), scales.to(device) / 127)
    codes = torch.randint(0, 16, (out, width), generator=generator, dtype=torch.uint8)
    chosen = torch.randint(0, 17, (out, groups), generator=generator, dtype=torch.uint8) if zeros else None
    return DecodeWeight(codes.to(device), scales.to(device) / 8, None if chosen is None else chosen.to(device))


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize(("bits", "zeros"), [(4, False), (4, True), (8, False)])
@pytest.mark.parametrize(
    ("out", "width", "group"), [(1, 64, 64), (37, 448, 64), (16, 1152, 128), (48, 320, 320), (37, 448, 32)]
)
def test_the_matrix_is_that_of_the_codes(any_device, out, width, group, bits, zeros, dtype) -> None:
    packed = weight(bits, out, width, group, zeros=zeros, device=any_device)
    result = dequantize(packed, dtype)
    assert torch.equal(result, packed.dequantize().to(dtype))


def check(packed: DecodeWeight, x: Tensor, bias: Tensor | None) -> None:
    result = few_rows_linear(x, packed, bias)
    exact = F.linear(x.double(), packed.dequantize().double(), None if bias is None else bias.double())
    plain = F.linear(x, packed.dequantize().to(x.dtype), bias)
    assert_errs_like(result, plain, exact)


@settings(max_examples=15)
@given(
    rows=st.integers(1, 32),
    out=st.integers(1, 150),
    steps=st.integers(1, 5),
    bits=st.sampled_from([4, 8]),
    zeros=st.booleans(),
    groups=st.sampled_from([32, 64, 128, None]),
    dtype=st.sampled_from(HALF),
)
@example(rows=32, out=129, steps=4, bits=4, zeros=True, groups=128, dtype=torch.bfloat16)
@example(rows=1, out=1, steps=1, bits=8, zeros=False, groups=None, dtype=torch.float16)
@example(rows=3, out=70, steps=3, bits=4, zeros=True, groups=32, dtype=torch.bfloat16)
@example(rows=3, out=70, steps=3, bits=4, zeros=False, groups=96, dtype=torch.float16)
def test_few_rows_are_multiplied_by_what_the_codes_stand_for(
    interpreted, rows, out, steps, bits, zeros, groups, dtype
) -> None:
    width = 64 * steps
    group = groups if groups is not None and width % groups == 0 else width
    packed = weight(bits, out, width, group, zeros=zeros)
    with interpreted():
        check(packed, random(rows, width, seed=3).to(dtype), random(out, seed=4).to(dtype) if zeros else None)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 17])
def test_decoding_of_internlm2_20b(any_device, bits, rows) -> None:
    out = 6144 if any_device.type == "cuda" else 64
    packed = weight(bits, out, 6144, 128, zeros=True, device=any_device)
    check(packed, random(rows, 6144, seed=3).to(any_device, torch.bfloat16), None)


def test_single_codes_stand_where_they_belong(any_device) -> None:
    for bits in (4, 8):
        codes = torch.zeros(32, 128, dtype=torch.int8 if bits == 8 else torch.uint8)
        codes.view(-1)[::67] = 5
        zeros = None if bits == 8 else torch.zeros(32, 1, dtype=torch.uint8, device=any_device)
        packed = DecodeWeight(codes.to(any_device), torch.ones(32, 1, device=any_device), zeros)
        torch.testing.assert_close(dequantize(packed, torch.float32).cpu(), codes.float(), rtol=1e-4, atol=0)
        identity = torch.eye(128, dtype=torch.bfloat16, device=any_device)
        products = torch.cat([few_rows_linear(part, packed) for part in identity.split(32)])
        assert torch.equal(products.cpu(), codes.T.bfloat16())


def test_rows_keep_their_leading_dimensions_and_may_lie_in_wider_ones(any_device) -> None:
    packed = weight(4, 24, 128, 64, device=any_device)
    buffer = random(2, 3, 160, seed=5).to(any_device, torch.bfloat16)
    x = buffer[..., 16:144]
    result = few_rows_linear(x, packed)
    assert result.shape == (2, 3, 24)
    assert torch.equal(result, few_rows_linear(x.contiguous(), packed))
    assert few_rows_linear(x[:0], packed).shape == (0, 3, 24)
    assert relative_error(result, F.linear(x.double(), packed.dequantize().double())) < 2**-8


def test_many_rows_are_refused_with_their_number(any_device) -> None:
    with pytest.raises(ValueError, match="33 rows, at most 32"):
        few_rows_linear(
            torch.zeros(33, 64, dtype=torch.bfloat16, device=any_device), weight(4, 8, 64, 64, device=any_device)
        )
