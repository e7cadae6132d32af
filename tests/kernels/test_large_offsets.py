"""Elements behind the 2^31-th: of caches, of rows and tiles that are far apart. Memory that nobody touches is free."""

import numpy as np
import pytest
import torch
from torch import Tensor

from vitrail.kernels import dispatch
from vitrail.kernels.attention import tile_attention, tile_attention_reference
from vitrail.kernels.gemm import gemm, tile_config
from vitrail.kernels.linear import linear_gelu_reference
from vitrail.kernels.norm import rms_norm, rms_norm_reference
from vitrail.kernels.paged_attention import paged_attention, paged_attention_reference
from vitrail.kernels.pixel_shuffle import pixel_shuffle_norm, pixel_shuffle_norm_reference
from vitrail.kernels.quantize import quantize_rows, quantize_rows_reference
from vitrail.kernels.quantized_cache import QuantizedCache
from vitrail.kernels.rope import rope_and_cache, rope_and_cache_reference
from vitrail.kernels.swiglu import swiglu, swiglu_reference

from .measure import random

FAR = 2**31
PAGE, KV_HEADS, D = 64, 8, 128
PAGES = FAR // (PAGE * KV_HEADS * D) + 2


@pytest.fixture(autouse=True)
def _on_a_cpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU's memory is not for nothing")


def untouched(num_bytes: int) -> Tensor:
    return torch.from_numpy(np.empty(num_bytes, np.uint8))


def far_apart(x: Tensor) -> Tensor:
    """x with its first dimension spread, so that its last part begins behind the 2^31-th element."""
    stride = -(-FAR // (len(x) - 1) // 16) * 16
    memory = untouched(((len(x) - 1) * stride + x[0].numel()) * x.itemsize).view(x.dtype)
    spread = memory.as_strided(x.shape, (stride, *x.stride()[1:]))
    spread.copy_(x)
    return spread


@pytest.mark.parametrize("new", [1, 3])
def test_a_cache_may_hold_more_than_two_to_the_31(any_device, new) -> None:
    def cache() -> QuantizedCache:
        codes = untouched(PAGES * PAGE * KV_HEADS * D).view(torch.int8).view(PAGES, PAGE, KV_HEADS, D)
        return QuantizedCache(codes, torch.zeros(PAGES, PAGE, KV_HEADS))

    far, near = (cache(), cache()), [QuantizedCache(cache().codes[:2], torch.zeros(2, PAGE, KV_HEADS)) for _ in "kv"]
    heads, tokens = 2 * KV_HEADS, 5
    qkv = random(tokens, (heads + 2 * KV_HEADS) * D)
    cos, sin = (random(tokens, D // 2, seed=seed).repeat(1, 2) for seed in (1, 2))
    offsets = torch.arange(tokens)
    q = rope_and_cache(qkv, cos, sin, *far, (PAGES - 1) * PAGE + offsets, heads)
    rope_and_cache_reference(qkv, cos, sin, *near, PAGE + offsets, heads)
    for ours, theirs in zip(far, near, strict=True):
        assert (ours.codes[-1, :tokens].int() - theirs.codes[1, :tokens].int()).abs().max() <= 1
        torch.testing.assert_close(ours.scales[-1], theirs.scales[1])
    borders, contexts = torch.tensor([0, new], dtype=torch.int32), torch.tensor([tokens], dtype=torch.int32)
    results = [
        attend(q[:new], *caches, torch.tensor([[page]], dtype=torch.int32), borders, contexts, max_seqlen_q=new)
        for attend, caches, page in ((paged_attention, far, PAGES - 1), (paged_attention_reference, near, 1))
    ]
    torch.testing.assert_close(*results, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("operation", ["norm", "codes", "swiglu", "gelu"])
def test_rows_may_be_far_apart(any_device, operation) -> None:
    x, weight = random(5, 64).bfloat16(), random(64, seed=1).bfloat16()
    spread = far_apart(x)
    if operation == "norm":
        torch.testing.assert_close(rms_norm(spread, weight, 1e-6), rms_norm_reference(x, weight, 1e-6))
    elif operation == "swiglu":
        torch.testing.assert_close(swiglu(spread), swiglu_reference(x), rtol=0.02, atol=0.01)
    elif operation == "gelu":
        matrix, choice = random(32, 64, seed=1).bfloat16(), tile_config("pipelined", 16, 64, 64, 4, 4)
        y = gemm("gelu", dispatch.A100, spread, matrix, weight[:32], choice)
        torch.testing.assert_close(y, linear_gelu_reference(x, matrix, weight[:32]), rtol=0.02, atol=0.05)
    else:
        ours, theirs = quantize_rows(spread), quantize_rows_reference(x)
        assert (ours.codes.int() - theirs.codes.int()).abs().max() <= 1
        torch.testing.assert_close(ours.scales, theirs.scales)


def test_tiles_may_be_far_apart(any_device) -> None:
    q, k, v = (random(3, 17, 2, 16, seed=seed).bfloat16() for seed in range(3))
    expected = tile_attention_reference(q.float(), k.float(), v.float())
    out = tile_attention(far_apart(q), far_apart(k), far_apart(v)).float()
    torch.testing.assert_close(out, expected, rtol=0.02, atol=0.02)
    x, weight, bias = random(3, 16, 8).bfloat16(), random(32, seed=1).bfloat16(), random(32, seed=2).bfloat16()
    shuffled = pixel_shuffle_norm(far_apart(x), weight, bias, 1e-5, 2, "v2")
    torch.testing.assert_close(
        shuffled, pixel_shuffle_norm_reference(x, weight, bias, 1e-5, 2, "v2"), rtol=0.02, atol=0.02
    )
