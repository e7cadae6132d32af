"""Rotary position embedding in the half-rotation (NeoX) layout, alone or with the write to the paged KV cache.

Channels j and j + d/2 turn together by the angle position * inv_freq[j]. The tables are made in fp32 and cast to the
activations' dtype before the multiply, as the released models do.
Fused, one pass over a token's projection [q | k | v]: RMSNorm of each head of q and k where the model has it, the
rotation of both, and k and v written to the token's slot of the cache, in 8 bits with a scale for each head where the
cache is so. Separate kernels read and write q and k three times.
"""

import torch
from torch import Tensor

from .cpu_extension import address, cache_arguments
from .dispatch import cpu_extension, target_of
from .language import cdiv, jit, kernel, next_power_of_2, tl
from .launch import launch
from .norm import rms_norm_reference
from .quantize import magnitude, scale_of, to_codes
from .quantized_cache import Cache, codes_of, scales_of, write_reference

PROGRAM_CHANNELS = 1024  # of each half of the heads: 16 bytes of bf16 a load for each of 128 threads


@jit
def _rounded(x, DTYPE: tl.constexpr):
    """What is left of fp32 values in DTYPE: every step of the reference ends in it."""
    return x.to(DTYPE).to(tl.float32)


@kernel()
def _rope_and_cache_kernel(
    qkv_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr, slot_mapping_ptr,  # without norms these two are None
    q_ptr, k_cache_ptr, v_cache_ptr,
    k_scales_ptr, v_scales_ptr,  # None unless the caches are int8
    num_heads, kv_heads,
    eps,
    HEAD_DIM: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    half: tl.constexpr = HEAD_DIM // 2
    dtype: tl.constexpr = qkv_ptr.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping_ptr + token)
    heads = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    columns = tl.arange(0, BLOCK_HALF)
    # Heads of q, then of k, then of v.
    first_k, first_v, end = num_heads, num_heads + kv_heads, num_heads + 2 * kv_heads
    inside = (heads < end)[:, None] & (columns < half)[None, :]
    offsets = heads[:, None] * HEAD_DIM + columns[None, :]

    qkv_ptr += token * end * HEAD_DIM
    left = tl.load(qkv_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(qkv_ptr + offsets + half, mask=inside, other=0.0).to(tl.float32)
    # Both halves of a table are the same.
    table = token * HEAD_DIM + columns
    cos = tl.load(cos_ptr + table, mask=columns < half, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + table, mask=columns < half, other=0.0).to(tl.float32)[None, :]

    x, y = left, right
    if q_norm_ptr is not None:
        of_q = (heads < first_k)[:, None]
        q_left = tl.load(q_norm_ptr + columns, mask=columns < half, other=0.0).to(tl.float32)[None, :]
        q_right = tl.load(q_norm_ptr + half + columns, mask=columns < half, other=0.0).to(tl.float32)[None, :]
        k_left = tl.load(k_norm_ptr + columns, mask=columns < half, other=0.0).to(tl.float32)[None, :]
        k_right = tl.load(k_norm_ptr + half + columns, mask=columns < half, other=0.0).to(tl.float32)[None, :]
        factor = tl.rsqrt((tl.sum(x * x, 1) + tl.sum(y * y, 1)) / HEAD_DIM + eps)[:, None]
        x = _rounded(_rounded(x * factor, dtype) * tl.where(of_q, q_left, k_left), dtype)
        y = _rounded(_rounded(y * factor, dtype) * tl.where(of_q, q_right, k_right), dtype)
    turned = (heads < first_v)[:, None]
    left = tl.where(turned, _rounded(x * cos, dtype) - _rounded(y * sin, dtype), left).to(dtype)
    right = tl.where(turned, _rounded(y * cos, dtype) + _rounded(x * sin, dtype), right).to(dtype)

    q_ptr += token * num_heads * HEAD_DIM
    of_q = inside & (heads < first_k)[:, None]
    tl.store(q_ptr + offsets, left, mask=of_q)
    tl.store(q_ptr + offsets + half, right, mask=of_q)
    if slot >= 0:
        if k_scales_ptr is not None:
            x, y = left.to(tl.float32), right.to(tl.float32)
            scales, factors = scale_of(tl.maximum(tl.max(magnitude(x), 1), tl.max(magnitude(y), 1)), tl.int8)
            cached_left, cached_right = to_codes(x * factors[:, None], tl.int8), to_codes(y * factors[:, None], tl.int8)
            is_k, is_v = (heads >= first_k) & (heads < first_v), (heads >= first_v) & (heads < end)
            tl.store(k_scales_ptr + slot * kv_heads + heads - first_k, scales, mask=is_k)
            tl.store(v_scales_ptr + slot * kv_heads + heads - first_v, scales, mask=is_v)
        else:
            cached_left, cached_right = left, right
        k_cache_ptr += (slot * kv_heads - first_k) * HEAD_DIM
        v_cache_ptr += (slot * kv_heads - first_v) * HEAD_DIM
        of_k = inside & ((heads >= first_k) & (heads < first_v))[:, None]
        of_v = inside & (heads >= first_v)[:, None]
        tl.store(k_cache_ptr + offsets, cached_left, mask=of_k)
        tl.store(k_cache_ptr + offsets + half, cached_right, mask=of_k)
        tl.store(v_cache_ptr + offsets, cached_left, mask=of_v)
        tl.store(v_cache_ptr + offsets + half, cached_right, mask=of_v)


def rotary_table(positions: Tensor, inv_freq: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin for `apply_rope`, both (batch, tokens, 1, head_dim) in `dtype`.

    positions: (batch, tokens) int64. inv_freq: (head_dim / 2,) or (batch, head_dim / 2) fp32.
    """
    frequencies = inv_freq if inv_freq.dim() == 2 else inv_freq[None]
    angles = positions[:, :, None].float() * frequencies[:, None, :]
    angles = torch.cat((angles, angles), dim=-1)[:, :, None]
    return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries or keys. x: (batch, tokens, heads, head_dim), any strides; cos, sin: from `rotary_table`."""
    if x.shape[-1] != cos.shape[-1]:
        raise ValueError(f"apply_rope: x has head_dim {x.shape[-1]}, the table {cos.shape[-1]}")
    return apply_rope_reference(x, cos, sin)


def apply_rope_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def rope_and_cache(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Cache,
    v_cache: Cache,
    slot_mapping: Tensor,
    num_heads: int,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Rotated queries (num_tokens, num_heads, d); rotated keys and the values go to the tokens' slots of the cache.

    qkv: (num_tokens, (num_heads + 2 kv_heads) d), contiguous [q | k | v], left as it is; cos, sin: (num_tokens, d), the
    rows of `rotary_table`; slot_mapping: (num_tokens,) int64, -1 where a token is not to be cached.
    k_cache, v_cache: (num_blocks, block_size, kv_heads, d), contiguous on a GPU, elsewhere with evenly spaced slots;
    slot = block * block_size + offset; or `QuantizedCache`s. q_norm, k_norm: (d,) weights of an RMSNorm of each head
    before the rotation.
    """
    num_tokens, channels = qkv.shape
    kv_heads, head_dim = k_cache.shape[2:]
    if k_cache.shape != v_cache.shape or channels != (num_heads + 2 * kv_heads) * head_dim or head_dim % 2:
        raise ValueError(
            f"rope_and_cache: {channels} channels are not {num_heads} query heads and the keys and values "
            f"of caches {tuple(k_cache.shape)} and {tuple(v_cache.shape)}"
        )
    if not cos.shape == sin.shape == (num_tokens, head_dim) or slot_mapping.shape != (num_tokens,):
        raise ValueError(
            f"rope_and_cache: tables {tuple(cos.shape)} and {tuple(sin.shape)} and slots {tuple(slot_mapping.shape)} "
            f"for {num_tokens} tokens of head_dim {head_dim}"
        )
    if (q_norm is None) != (k_norm is None):
        raise ValueError("rope_and_cache: q_norm and k_norm come together")
    keys, values = codes_of(k_cache), codes_of(v_cache)
    weights = [weight for weight in (q_norm, k_norm) if weight is not None]
    target = target_of(qkv, keys, *weights)
    if target is None:
        extension = cpu_extension(qkv, cos, sin, keys, values, *weights)  # none for caches of another dtype
        if extension is None or keys.stride() != values.stride():
            return rope_and_cache_reference(
                *(qkv, cos, sin, k_cache, v_cache, slot_mapping, num_heads), q_norm=q_norm, k_norm=k_norm, eps=eps
            )
        qkv, cos, sin, slots = (tensor.contiguous() for tensor in (qkv, cos, sin, slot_mapping))
        q = torch.empty((num_tokens, num_heads, head_dim), dtype=qkv.dtype)
        extension.rope_and_cache(
            *(qkv.dtype == torch.bfloat16, num_tokens, num_heads, kv_heads, head_dim),
            *(qkv.data_ptr(), cos.data_ptr(), sin.data_ptr(), address(q_norm), address(k_norm)),
            eps,
            slots.data_ptr(),
            q.data_ptr(),
            cache_arguments(keys, values),
            torch.get_num_threads(),
            "",
        )
        return q
    if not all(x.is_contiguous() for x in (qkv, cos, sin, k_cache, v_cache)):
        raise ValueError("rope_and_cache: qkv, tables and caches must be contiguous")
    q = torch.empty((num_tokens, num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    block_half = next_power_of_2(head_dim // 2)
    heads = num_heads + 2 * kv_heads
    block_heads = min(next_power_of_2(heads), max(PROGRAM_CHANNELS // block_half, 1))
    launch(
        _rope_and_cache_kernel,
        (num_tokens, cdiv(heads, block_heads)),
        *(qkv, cos, sin, q_norm, k_norm, slot_mapping),
        *(q, keys, values),
        *(scales_of(k_cache), scales_of(v_cache)),
        *(num_heads, kv_heads),
        eps,
        num_warps=max(block_heads * block_half // 256, 1),
        HEAD_DIM=head_dim,
        BLOCK_HEADS=block_heads,
        BLOCK_HALF=block_half,
    )
    return q


def rope_and_cache_reference(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Cache,
    v_cache: Cache,
    slot_mapping: Tensor,
    num_heads: int,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    kv_heads, head_dim = k_cache.shape[2:]
    # q and k are normed and rotated together: half as many operations, which is what a single token's time goes to.
    qk, v = qkv.view(-1, num_heads + 2 * kv_heads, head_dim).split((num_heads + kv_heads, kv_heads), dim=1)
    if q_norm is not None and k_norm is not None:
        weight = torch.cat((q_norm.expand(num_heads, -1), k_norm.expand(kv_heads, -1)))
        qk = rms_norm_reference(qk, weight, eps)
    q, k = apply_rope_reference(qk, cos.unsqueeze(1), sin.unsqueeze(1)).split((num_heads, kv_heads), dim=1)
    if min(slot_mapping.tolist(), default=0) < 0:
        cached = slot_mapping >= 0
        slot_mapping, k, v = slot_mapping[cached], k[cached], v[cached]
    write_reference(k_cache, slot_mapping, k)
    write_reference(v_cache, slot_mapping, v)
    return q
