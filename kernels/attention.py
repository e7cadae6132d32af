"""Attention of the two halves: bidirectional over the tokens of a tile, causal with grouped queries over a context.

`tile_attention` is FlashAttention-2 (Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work
Partitioning", arXiv:2307.08691): a program keeps a block of queries, walks over the keys in blocks, and rescales what
it has summed whenever a row's largest score grows, so that scores never reach memory. The class token makes token
counts odd, 1025 = 8 * 128 + 1. Padding would waste 16 % of the matrix multiplications; instead the last keys are a
narrow block of their own, and the last queries of each head a short program of their own.
InternViT's QK-norm stays outside: as row and column scales of the scores it would save less than 1 % of a layer.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .dispatch import Arch, Choice, choose, target_of
from .language import cdiv, jit, kernel, next_power_of_2, tl
from .launch import launch

# torch's backends by the name of the preferred one; the others serve what it refuses. cuDNN must be asked for: on
# Hopper it is 1.6 times as fast as FlashAttention-2, which torch prefers everywhere.
_REST = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
BACKENDS: Mapping[str, list[SDPBackend]] = {"flash": _REST, "cudnn": [SDPBackend.CUDNN_ATTENTION, *_REST]}
HALF = (torch.bfloat16, torch.float16)
NARROW = 16  # the least extent of a tensor core's operand


def _triton(block_m: int, block_n: int, num_warps: int, num_stages: int, tail_stages: int, tma: bool = False) -> Choice:
    return {
        "implementation": "triton",
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "TAIL_STAGES": tail_stages,
        "TMA": tma,
        "num_warps": num_warps,
        "num_stages": num_stages,
    }


CONFIGS: Mapping[Arch, tuple[Choice, ...]] = {
    "sm_80": (
        {"implementation": "flash"},
        _triton(128, 64, 8, 3, 4),
        # For heads of 64: warps of 32 queries read each key from shared memory half as often as warps of 16.
        _triton(128, 64, 4, 3, 4),
        _triton(128, 32, 4, 3, 4),
        _triton(64, 64, 4, 3, 4),
        _triton(32, 64, 8, 2, 2),  # for heads of 256
    ),
    "sm_90": (
        {"implementation": "cudnn"},
        {"implementation": "flash"},
        # Two programs share a multiprocessor, this one at heads of 128, the next at 64: one multiplies, one takes exp.
        _triton(128, 64, 8, 2, 4, tma=True),
        _triton(128, 128, 8, 2, 3, tma=True),
        _triton(128, 64, 8, 3, 4, tma=True),
        _triton(128, 64, 8, 3, 4),
        _triton(128, 32, 8, 2, 2, tma=True),  # for heads of 256
    ),
}


@jit
def _rows(
    ptr, stride, first, end, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, ALL: tl.constexpr
):
    """Rows from `first` of a (rows, HEAD_DIM) matrix, zeros right of HEAD_DIM and, unless ALL exist, from `end` on."""
    rows, columns = first + tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    pointers = ptr + rows[:, None] * stride + columns[None, :]
    if not ALL:
        return tl.load(pointers, mask=(rows < end)[:, None] & (columns < HEAD_DIM)[None, :], other=0.0)
    elif BLOCK_D != HEAD_DIM:
        return tl.load(pointers, mask=(columns < HEAD_DIM)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@jit
def _see(q, k, v, count, scale, acc, total, peak, KEYS: tl.constexpr, ALL: tl.constexpr):
    """(acc, total, peak) of the queries after KEYS more keys, of which the first `count` or ALL exist."""
    scores = tl.dot(q, k.T)
    if not ALL:
        scores = tl.where((tl.arange(0, KEYS) < count)[None, :], scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - new_peak[:, None])
    shrink = tl.exp2(peak - new_peak)
    total = total * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None])
    return acc, total, new_peak


@jit
def _attend(
    q_ptr, k_ptr, v_ptr, out_ptr, k_tensor, v_tensor,  # of one head; k_tensor, v_tensor: descriptors, with TMA
    first, queries, keys,
    q_stride, k_stride, v_stride, out_stride,
    scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, TAIL_N: tl.constexpr,
    STAGES: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """ROWS queries from `first` on attend to all keys."""
    q = _rows(q_ptr, q_stride, first, queries, HEAD_DIM, BLOCK_D, ROWS, False)
    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    peak = tl.full((ROWS,), float("-inf"), tl.float32)

    whole = keys // BLOCK_N * BLOCK_N
    for start in tl.range(0, whole, BLOCK_N, num_stages=STAGES):
        if TMA:
            k, v = k_tensor.load([start, 0]), v_tensor.load([start, 0])
        else:
            k = _rows(k_ptr, k_stride, start, keys, HEAD_DIM, BLOCK_D, BLOCK_N, True)
            v = _rows(v_ptr, v_stride, start, keys, HEAD_DIM, BLOCK_D, BLOCK_N, True)
        acc, total, peak = _see(q, k, v, BLOCK_N, scale, acc, total, peak, BLOCK_N, True)
    # Not skipped where no key is left: a branch here costs registers, and with them half the programs of an H200.
    k = _rows(k_ptr, k_stride, whole, keys, HEAD_DIM, BLOCK_D, TAIL_N, False)
    v = _rows(v_ptr, v_stride, whole, keys, HEAD_DIM, BLOCK_D, TAIL_N, False)
    acc, total, peak = _see(q, k, v, keys - whole, scale, acc, total, peak, TAIL_N, False)

    rows, columns = first + tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    out = (acc * (1 / total)[:, None]).to(out_ptr.dtype.element_ty)
    inside = (rows < queries)[:, None] & (columns < HEAD_DIM)[None, :]
    tl.store(out_ptr + rows[:, None] * out_stride + columns[None, :], out, mask=inside)


@kernel(unspecialized=("queries", "keys", "heads", "blocks", "tails"))
def _tile_attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr,  # (tiles, tokens, heads, HEAD_DIM), the last dim contiguous; out wholly
    queries, keys, heads,
    blocks, tails,  # programs of a head: for BLOCK_M queries each, and for TAIL_M of the rest each
    q_tile_stride, q_stride, q_head_stride,
    k_tile_stride, k_stride, k_head_stride,
    v_tile_stride, v_stride, v_head_stride,
    scale,  # log2(e) / sqrt(HEAD_DIM): weights are powers of two
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, TAIL_M: tl.constexpr,
    BLOCK_N: tl.constexpr, TAIL_N: tl.constexpr, TAIL_STAGES: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    # Blocks of one head are neighbours: its keys and values come from memory once and then from L2. The short programs
    # of a tile follow its long ones, so that they find keys in L2 and fill the gaps of the last wave.
    programs = heads * (blocks + tails)
    tile = (tl.program_id(0) // programs).to(tl.int64)
    program = tl.program_id(0) % programs
    tail = program - heads * blocks
    if tail < 0:
        head, first = program // blocks, program % blocks * BLOCK_M
    else:
        head, first = tail // tails, blocks * BLOCK_M + tail % tails * TAIL_M

    q_ptr += tile * q_tile_stride + head * q_head_stride
    k_ptr += tile * k_tile_stride + head * k_head_stride
    v_ptr += tile * v_tile_stride + head * v_head_stride
    out_ptr += (tile * queries * heads + head) * HEAD_DIM
    out_stride = heads * HEAD_DIM
    if TMA:
        k_tensor = tl.make_tensor_descriptor(k_ptr, [keys, HEAD_DIM], [k_stride, 1], [BLOCK_N, BLOCK_D])
        v_tensor = tl.make_tensor_descriptor(v_ptr, [keys, HEAD_DIM], [v_stride, 1], [BLOCK_N, BLOCK_D])
    else:
        k_tensor, v_tensor = None, None

    if tail < 0:
        _attend(
            q_ptr, k_ptr, v_ptr, out_ptr, k_tensor, v_tensor,
            first, queries, keys,
            q_stride, k_stride, v_stride, out_stride,
            scale,
            HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, TAIL_N, None, TMA,
        )  # fmt: skip
    else:
        # So few rows finish their arithmetic long before the next keys arrive: more of them are under way.
        _attend(
            q_ptr, k_ptr, v_ptr, out_ptr, k_tensor, v_tensor,
            first, queries, keys,
            q_stride, k_stride, v_stride, out_stride,
            scale,
            HEAD_DIM, BLOCK_D, TAIL_M, BLOCK_N, TAIL_N, TAIL_STAGES, TMA,
        )  # fmt: skip


def tile_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v without a mask.

    q: (tiles, queries, heads, d); k, v: (tiles, keys, heads, d); strided views allowed. Returns q's shape.
    """
    if k.shape != v.shape or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise ValueError(f"tile_attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit")
    target = target_of(q, k, v)
    if target is None:
        return tile_attention_reference(q, k, v)
    tiles, queries, heads, head_dim = q.shape
    choice = choose("tile_attention", target, tokens=queries, head_dim=_block_d(head_dim), batch=tiles * heads)
    implementation = choice["implementation"]
    if implementation == "triton" and _takes(q, k, v):
        return _launch(q, k, v, choice)
    with sdpa_kernel(BACKENDS.get(implementation, BACKENDS["flash"]), set_priority=True):
        return tile_attention_reference(q, k, v)


def tile_attention_reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2)


def _takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernel can: fp32 has no tensor cores without loss, and offsets within a tile are 32 bits wide."""
    extent = max((x.shape[1] + NARROW) * x.stride(1) for x in (q, k, v))
    return q.dtype in HALF and q.shape[3] <= 256 and extent < 2**31


def _launch(q: Tensor, k: Tensor, v: Tensor, choice: Choice) -> Tensor:
    tiles, queries, heads, head_dim = q.shape
    keys = k.shape[1]
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    block_m, block_n = choice["BLOCK_M"], choice["BLOCK_N"]
    blocks, rest = divmod(queries, block_m)
    # A short program takes about a quarter of a long one's time, for keys are read all the same.
    short = 8 * rest <= 3 * block_m
    blocks, tails = (blocks, cdiv(rest, NARROW)) if short else (blocks + 1, 0)
    launch(
        _tile_attention_kernel,
        (tiles * heads * (blocks + tails),),
        *(q, k, v, out),
        *(queries, keys, heads),
        *(blocks, tails),
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        math.log2(math.e) / math.sqrt(head_dim),
        num_warps=choice["num_warps"],
        num_stages=choice["num_stages"],
        HEAD_DIM=head_dim,
        BLOCK_D=_block_d(head_dim),
        BLOCK_M=block_m,
        TAIL_M=NARROW,
        BLOCK_N=block_n,
        TAIL_N=max(next_power_of_2(keys % block_n), NARROW),
        TAIL_STAGES=choice["TAIL_STAGES"],
        TMA=choice["TMA"] and _aligned(k) and _aligned(v),
    )
    return out


def _block_d(head_dim: int) -> int:
    return max(next_power_of_2(head_dim), NARROW)


def _aligned(x: Tensor) -> bool:
    """Whether the copy engine can read x: rows begin at multiples of 16 bytes."""
    steps = (x.data_ptr(), *(n * x.itemsize for n in (x.storage_offset(), *x.stride()[:3])))
    return x.stride(1) > 0 and all(step % 16 == 0 for step in steps)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, context_lens: Tensor | None = None) -> Tensor:
    """Causal attention with grouped queries; query head h reads KV head h // (heads / kv_heads).

    q: (batch, tokens, heads, d); k, v: (batch, kv_heads, context, d).
    context_lens: (batch,) int64, how many keys of each row count, the row's last query being the last of them.
    None: every row uses all `context` keys. Returns (batch, tokens, heads, d).
    """
    if q.shape[2] % k.shape[1] or q.shape[1] > k.shape[2]:
        raise ValueError(f"causal_attention: q {tuple(q.shape)} does not fit k {tuple(k.shape)}")
    target = target_of(q, k, v)
    if target is not None and q.dtype in HALF and context_lens is None and 1 < q.shape[1] == k.shape[2]:
        with sdpa_kernel(BACKENDS["cudnn" if target.arch == "sm_90" else "flash"], set_priority=True):
            out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2)
    return causal_attention_reference(q, k, v, context_lens)


def causal_attention_reference(q: Tensor, k: Tensor, v: Tensor, context_lens: Tensor | None = None) -> Tensor:
    batch, tokens, heads, head_dim = q.shape
    kv_heads, context = k.shape[1], k.shape[2]
    group = heads // kv_heads
    if tokens == 1:
        # All queries of a KV head attend as its own several queries: keys are read once, not `group` times.
        mask = None if context_lens is None else _visible_keys(context_lens, 1, context, q.device)
        grouped = q.reshape(batch, kv_heads, group, head_dim)
        return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask).reshape(batch, 1, heads, head_dim)
    if group > 1:
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    if context_lens is None and tokens == context:
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, is_causal=True)
    else:
        lens = torch.full((batch,), context, device=q.device) if context_lens is None else context_lens
        mask = _visible_keys(lens, tokens, context, q.device)
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask)
    return out.transpose(1, 2)


def _visible_keys(context_lens: Tensor, tokens: int, context: int, device: torch.device) -> Tensor:
    """(batch, 1, tokens, context) bool: query t of a row sits at context_len - tokens + t, sees keys up to itself."""
    last_key = context_lens[:, None] - tokens + torch.arange(tokens, device=device)
    return (torch.arange(context, device=device) <= last_key[:, :, None])[:, None]
