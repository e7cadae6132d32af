"""InternViT's QK-norm: RMSNorm over all heads of a token at once, for queries and for keys.

One kernel norms both in the buffer that the joint projection wrote, [q | k | v]: one read and one write of q and of k,
and attention takes views of that buffer. Statistics in fp32, cast to the dtype *before* the weight, as in `norm.py`.
"""

from torch import Tensor

from .dispatch import target_of
from .language import kernel, next_power_of_2, row_warps, tl
from .launch import launch
from .norm import rms_norm, rms_norm_reference


@kernel()
def _qk_norm_kernel(
    qkv_ptr,  # rows of [q | k | v]; two programs a row
    q_weight_ptr, k_weight_ptr,
    hidden,
    eps,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0) // 2, tl.program_id(0) % 2
    columns = tl.arange(0, BLOCK)
    inside = columns < hidden
    x_ptr = qkv_ptr + row.to(tl.int64) * (3 * hidden) + part * hidden + columns
    weight_ptr = q_weight_ptr if part == 0 else k_weight_ptr

    x = tl.load(x_ptr, mask=inside, other=0.0).to(tl.float32)
    dtype = qkv_ptr.dtype.element_ty
    y = (x * tl.rsqrt(tl.sum(x * x, 0) / hidden + eps)).to(dtype).to(tl.float32)
    # Not before the sum: 32 registers instead of 38, and with 3,200 channels eight rows at a time on a multiprocessor.
    y *= tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)

    tl.store(x_ptr, y.to(dtype), mask=inside)


def qk_norm(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of a joint projection, q and k normed over all channels: on a GPU views of `qkv`, normed in place.

    qkv: (..., 3 * hidden), contiguous, not to be used afterwards; weights: (hidden,). Returns three (..., hidden).
    """
    hidden = q_weight.shape[0]
    if qkv.shape[-1] != 3 * hidden or k_weight.shape[0] != hidden:
        raise ValueError(f"qk_norm: qkv has {qkv.shape[-1]} channels, the weights {hidden} and {k_weight.shape[0]}")
    if target_of(qkv, q_weight, k_weight) is None:
        q, k, v = qkv.chunk(3, dim=-1)
        return rms_norm(q, q_weight, eps), rms_norm(k, k_weight, eps), v
    if not qkv.is_contiguous():
        raise ValueError(f"qk_norm: qkv {tuple(qkv.shape)} with strides {qkv.stride()} is not contiguous")
    block = next_power_of_2(hidden)
    launch(
        _qk_norm_kernel,
        (2 * (qkv.numel() // (3 * hidden)),),
        *(qkv, q_weight, k_weight),
        hidden,
        eps,
        num_warps=row_warps(block),
        BLOCK=block,
    )
    q, k, v = qkv.chunk(3, dim=-1)
    return q, k, v


def qk_norm_reference(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv.chunk(3, dim=-1)
    return rms_norm_reference(q, q_weight, eps), rms_norm_reference(k, k_weight, eps), v
