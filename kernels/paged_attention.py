"""Causal attention of packed sequences over paged keys and values, with grouped queries.

All queries of the heads that share a KV head are rows of one matrix, row = query * group + head of the group, so that
keys and values are read once for the group. Prefill is FlashAttention-2 (Dao, arXiv:2307.08691): a program keeps a
block of rows and walks over the keys that any of them sees, first the blocks that all see, then those on the diagonal.
Decoding, one query a sequence, has too few rows to fill a GPU: as in Flash-Decoding (Dao, Haziza, Massa, Sizov, 2023)
a sequence's keys are split among programs, and a second kernel joins what they found.
Pages hold a power of two of tokens (PagedAttention: Kwon et al., arXiv:2309.06180).

A cache may be int8 codes with a scale for each token and head. Codes are whole numbers of up to 127, which bf16 holds
exactly: products take them as they are, a key's scale meets its scores, and a value's scale the weights of its token.
"""

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import causal_attention_reference
from .cpu_extension import CpuExtension, cache_arguments
from .dispatch import Arch, Choice, choose, cpu_extension, target_of
from .language import cdiv, jit, kernel, next_power_of_2, tl
from .launch import launch
from .quantized_cache import Cache, QuantizedCache, codes_of, scales_of

NARROWEST = 16  # rows or columns of a tensor core's instruction, and so of a block
MAX_SPLITS = 64  # of one sequence: what the joining kernel holds in registers
NEVER = tl.constexpr(-1e30)  # below any score, and finite: the difference of two is 0 where that of infinities is NaN


def _prefill(block_m: int, block_n: int, num_warps: int, num_stages: int) -> Choice:
    blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n}
    return {"implementation": "triton", **blocks, "num_warps": num_warps, "num_stages": num_stages}


def _decode(block_n: int, num_warps: int, num_stages: int, programs_per_sm: int) -> Choice:
    options = {"num_warps": num_warps, "num_stages": num_stages, "programs_per_sm": programs_per_sm}
    return {"implementation": "triton", "BLOCK_N": block_n, **options}


# What the tables choose from, by operation.
CONFIGS: Mapping[str, Mapping[Arch, tuple[Choice, ...]]] = {
    "paged_prefill": {
        "sm_80": (_prefill(128, 64, 8, 3), _prefill(128, 32, 8, 3), _prefill(64, 32, 4, 3)),
        "sm_90": (_prefill(128, 64, 8, 3), _prefill(128, 64, 8, 2), _prefill(64, 64, 4, 3)),
    },
    # A program that decodes has 64 KB in flight at head_dim 128. The latency of memory times its bandwidth is 11 KB an
    # SM on an A100 and 27 KB on an H200; of two programs on an SM one loads on while the other waits for its own.
    "paged_decode": {
        "sm_80": (_decode(64, 4, 3, 2), _decode(32, 4, 4, 2), _decode(64, 4, 2, 3)),
        "sm_90": (_decode(64, 4, 3, 2), _decode(64, 4, 4, 2), _decode(32, 4, 4, 2)),
    },
    # Codes are half as many bytes: more stages. Each warp of an Ampere converts all keys of its block for itself.
    "paged_prefill_int8": {
        "sm_80": (_prefill(64, 32, 4, 3), _prefill(128, 32, 8, 3), _prefill(128, 64, 8, 3)),
        "sm_90": (_prefill(128, 64, 8, 3), _prefill(128, 64, 8, 4), _prefill(64, 64, 4, 3)),
    },
    "paged_decode_int8": {
        "sm_80": (_decode(64, 4, 5, 2), _decode(32, 4, 4, 4), _decode(64, 4, 3, 3)),
        "sm_90": (_decode(64, 4, 5, 2), _decode(32, 4, 4, 4), _decode(64, 4, 4, 2)),
    },
}
# fp32 has no tensor core of its own: its products want small blocks, and there is nothing to choose.
PRECISE: Mapping[str, Choice] = {"paged_prefill": _prefill(32, 16, 8, 2), "paged_decode": _decode(16, 8, 3, 2)}


@jit
def _pages(block_table_ptr, start, context, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The page of the key block at `start`, or of each of its keys where a block is more than a page."""
    if PAGE % BLOCK_N == 0:
        return tl.load(block_table_ptr + start // PAGE, mask=start < context, other=0)
    else:
        tokens = start + tl.arange(0, BLOCK_N)
        return tl.load(block_table_ptr + tokens // PAGE, mask=tokens < context, other=0)


@jit
def _keys_and_values(
    k_ptr, v_ptr,  # the first slot of one head
    pages, start, context, slot_stride,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Keys and values of the block at `start`, zeros from `context` on and right of HEAD_DIM.

    FULL: all of them exist. What a page holds beyond `context` is never read: it may be anything, NaN included.
    """
    tokens, columns = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    if PAGE % BLOCK_N == 0:
        first = (pages.to(tl.int64) * PAGE + start % PAGE) * slot_stride
        offsets = tokens[:, None] * slot_stride + columns[None, :]
        k_ptr += first
        v_ptr += first
    else:
        slots = pages.to(tl.int64) * PAGE + tokens % PAGE  # a block begins with a page
        offsets = (slots * slot_stride)[:, None] + columns[None, :]
    if not FULL:
        there = (start + tokens < context)[:, None] & (columns < HEAD_DIM)[None, :]
        return tl.load(k_ptr + offsets, mask=there, other=0.0), tl.load(v_ptr + offsets, mask=there, other=0.0)
    elif BLOCK_D != HEAD_DIM:
        there = (columns < HEAD_DIM)[None, :]
        return tl.load(k_ptr + offsets, mask=there, other=0.0), tl.load(v_ptr + offsets, mask=there, other=0.0)
    else:
        return tl.load(k_ptr + offsets), tl.load(v_ptr + offsets)


@jit
def _scales(
    k_scales_ptr, v_scales_ptr,  # the first slot of one head
    pages, start, context, kv_heads, PAGE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Scales of the keys and of the values of the block at `start`, 0 from `context` on."""
    tokens = tl.arange(0, BLOCK_N)
    if PAGE % BLOCK_N == 0:
        slots = pages.to(tl.int64) * PAGE + start % PAGE + tokens
    else:
        slots = pages.to(tl.int64) * PAGE + tokens % PAGE
    there = start + tokens < context
    k_scales = tl.load(k_scales_ptr + slots * kv_heads, mask=there, other=0.0)
    return k_scales, tl.load(v_scales_ptr + slots * kv_heads, mask=there, other=0.0)


@jit
def _see(q, k, v, k_scales, v_scales, visible, scale, acc, total, peak):
    """What the rows know after one more block of keys; visible: (rows, keys), None for all; scales: None for 1."""
    scores = tl.dot(q, k.to(q.dtype).T, input_precision="ieee")
    if k_scales is not None:
        scores *= k_scales[None, :]
    if visible is not None:
        scores = tl.where(visible, scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - new_peak[:, None])
    shrink = tl.exp2(peak - new_peak)
    total = total * shrink + tl.sum(weights, 1)
    if v_scales is not None:
        weights *= v_scales[None, :]
    acc = tl.dot(weights.to(q.dtype), v.to(q.dtype), acc * shrink[:, None], input_precision="ieee")
    return acc, total, new_peak


@kernel(unspecialized=("table_stride", "kv_heads"))
def _paged_prefill_kernel(
    q_ptr, k_cache_ptr, v_cache_ptr, k_scales_ptr, v_scales_ptr,  # scales of int8 caches, or None
    block_tables_ptr, cu_seqlens_q_ptr, context_lens_ptr, out_ptr,
    table_stride, kv_heads,
    scale,  # log2(e) / sqrt(HEAD_DIM)
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    head, sequence = tl.program_id(0), tl.program_id(1)
    block = tl.num_programs(2) - 1 - tl.program_id(2)  # the last queries see most keys: they begin first
    first_token = tl.load(cu_seqlens_q_ptr + sequence)
    queries = tl.load(cu_seqlens_q_ptr + sequence + 1) - first_token
    context = tl.load(context_lens_ptr + sequence)
    if block * BLOCK_M >= queries * GROUP:
        return
    rows, columns = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    token_heads = ((first_token + rows // GROUP).to(tl.int64) * kv_heads + head) * GROUP + rows % GROUP
    offsets = token_heads[:, None] * HEAD_DIM + columns[None, :]
    inside = (rows < queries * GROUP)[:, None] & (columns < HEAD_DIM)[None, :]
    q = tl.load(q_ptr + offsets, mask=inside, other=0.0)
    k_cache_ptr += head * HEAD_DIM
    v_cache_ptr += head * HEAD_DIM
    if k_scales_ptr is not None:
        k_scales_ptr += head
        v_scales_ptr += head
    block_tables_ptr += sequence.to(tl.int64) * table_stride

    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    peak = tl.full((BLOCK_M,), NEVER, tl.float32)
    cached = context - queries
    last_key = cached + rows // GROUP  # that a row sees
    common = tl.maximum(cached + block * BLOCK_M // GROUP + 1, 0) // BLOCK_N * BLOCK_N  # keys that all rows see
    end = tl.minimum(cached + (block * BLOCK_M + BLOCK_M - 1) // GROUP + 1, context)
    # The page is known a block ahead: looked up where it is needed, it would hold back the loads in flight.
    pages = _pages(block_tables_ptr, 0, context, PAGE, BLOCK_N)
    for start in tl.range(0, common, BLOCK_N):
        k, v = _keys_and_values(
            k_cache_ptr, v_cache_ptr,
            pages, start, context, kv_heads * HEAD_DIM,
            HEAD_DIM, BLOCK_D, PAGE, BLOCK_N, True,
        )  # fmt: skip
        k_scales, v_scales = None, None
        if k_scales_ptr is not None:
            k_scales, v_scales = _scales(k_scales_ptr, v_scales_ptr, pages, start, context, kv_heads, PAGE, BLOCK_N)
        pages = _pages(block_tables_ptr, start + BLOCK_N, context, PAGE, BLOCK_N)
        acc, total, peak = _see(q, k, v, k_scales, v_scales, None, scale, acc, total, peak)
    for start in tl.range(common, end, BLOCK_N):
        k, v = _keys_and_values(
            k_cache_ptr, v_cache_ptr,
            pages, start, context, kv_heads * HEAD_DIM,
            HEAD_DIM, BLOCK_D, PAGE, BLOCK_N, False,
        )  # fmt: skip
        k_scales, v_scales = None, None
        if k_scales_ptr is not None:
            k_scales, v_scales = _scales(k_scales_ptr, v_scales_ptr, pages, start, context, kv_heads, PAGE, BLOCK_N)
        pages = _pages(block_tables_ptr, start + BLOCK_N, context, PAGE, BLOCK_N)
        visible = (start + tl.arange(0, BLOCK_N))[None, :] <= last_key[:, None]
        acc, total, peak = _see(q, k, v, k_scales, v_scales, visible, scale, acc, total, peak)

    out = acc * (1 / tl.where(total > 0, total, 1.0))[:, None]  # zeros for a sequence without keys
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=inside)


@jit
def _split_size(context, num_splits, BLOCK_N: tl.constexpr):
    """Keys of each split of a sequence: whole blocks, as equal as can be."""
    return tl.cdiv(tl.cdiv(context, BLOCK_N), num_splits) * BLOCK_N


@kernel(unspecialized=("table_stride", "kv_heads"))
def _paged_decode_kernel(
    q_ptr, k_cache_ptr, v_cache_ptr, k_scales_ptr, v_scales_ptr,  # scales of int8 caches, or None
    block_tables_ptr, cu_seqlens_q_ptr, context_lens_ptr,
    out_ptr, partial_ptr, log_total_ptr,  # either the result, or (sequence, head, split) of both others in fp32
    table_stride, kv_heads,
    scale,  # log2(e) / sqrt(HEAD_DIM)
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    # Heads are neighbours: they read neighbouring bytes at the same time.
    head, split, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    token = tl.load(cu_seqlens_q_ptr + sequence)
    context = tl.load(context_lens_ptr + sequence)
    size = _split_size(context, tl.num_programs(1), BLOCK_N)
    begin = split * size
    end = tl.minimum(begin + size, context)
    if tl.load(cu_seqlens_q_ptr + sequence + 1) == token:
        return
    if (partial_ptr is not None) and begin >= end:
        return
    rows, columns = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    inside = (rows < GROUP)[:, None] & (columns < HEAD_DIM)[None, :]
    q_heads = (token.to(tl.int64) * kv_heads + head) * GROUP + rows
    q = tl.load(q_ptr + q_heads[:, None] * HEAD_DIM + columns[None, :], mask=inside, other=0.0)
    k_cache_ptr += head * HEAD_DIM
    v_cache_ptr += head * HEAD_DIM
    if k_scales_ptr is not None:
        k_scales_ptr += head
        v_scales_ptr += head
    block_tables_ptr += sequence.to(tl.int64) * table_stride

    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    peak = tl.full((ROWS,), NEVER, tl.float32)
    # One loop, with a mask that only the last block needs: a loop of its own would wait for memory once more.
    pages = _pages(block_tables_ptr, begin, context, PAGE, BLOCK_N)
    for start in tl.range(begin, end, BLOCK_N):
        k, v = _keys_and_values(
            k_cache_ptr, v_cache_ptr,
            pages, start, context, kv_heads * HEAD_DIM,
            HEAD_DIM, BLOCK_D, PAGE, BLOCK_N, False,
        )  # fmt: skip
        k_scales, v_scales = None, None
        if k_scales_ptr is not None:
            k_scales, v_scales = _scales(k_scales_ptr, v_scales_ptr, pages, start, context, kv_heads, PAGE, BLOCK_N)
        pages = _pages(block_tables_ptr, start + BLOCK_N, context, PAGE, BLOCK_N)
        visible = (start + tl.arange(0, BLOCK_N) < context)[None, :]
        acc, total, peak = _see(q, k, v, k_scales, v_scales, visible, scale, acc, total, peak)

    out = acc * (1 / tl.where(total > 0, total, 1.0))[:, None]  # zeros for a sequence without keys
    if partial_ptr is None:
        pointers = out_ptr + q_heads[:, None] * HEAD_DIM + columns[None, :]
        tl.store(pointers, out.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        parts = ((sequence.to(tl.int64) * kv_heads + head) * GROUP + rows) * tl.num_programs(1) + split
        tl.store(partial_ptr + parts[:, None] * HEAD_DIM + columns[None, :], out, mask=inside)
        tl.store(log_total_ptr + parts, peak + tl.log2(total), mask=rows < GROUP)


@kernel(unspecialized=("num_splits",))
def _join_splits_kernel(
    partial_ptr, log_total_ptr, cu_seqlens_q_ptr, context_lens_ptr, out_ptr,
    num_splits,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SPLITS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    head, sequence = tl.program_id(0), tl.program_id(1)
    token = tl.load(cu_seqlens_q_ptr + sequence)
    context = tl.load(context_lens_ptr + sequence)
    if tl.load(cu_seqlens_q_ptr + sequence + 1) == token:
        return
    splits, columns = tl.arange(0, BLOCK_SPLITS), tl.arange(0, BLOCK_D)
    there = (splits < num_splits) & (splits * _split_size(context, num_splits, BLOCK_N) < context)
    parts = (sequence.to(tl.int64) * tl.num_programs(0) + head) * num_splits + splits

    log_total = tl.load(log_total_ptr + parts, mask=there, other=NEVER)
    weights = tl.where(there, tl.exp2(log_total - tl.max(log_total, 0)), 0.0)
    inside = there[:, None] & (columns < HEAD_DIM)[None, :]
    partial = tl.load(partial_ptr + parts[:, None] * HEAD_DIM + columns[None, :], mask=inside, other=0.0)
    total = tl.sum(weights, 0)
    out = tl.sum(partial * weights[:, None], 0) / tl.where(total > 0, total, 1.0)

    pointers = out_ptr + (token.to(tl.int64) * tl.num_programs(0) + head) * HEAD_DIM + columns
    tl.store(pointers, out.to(out_ptr.dtype.element_ty), mask=columns < HEAD_DIM)


def paged_attention(
    q: Tensor,
    k_cache: Cache,
    v_cache: Cache,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    context_lens: Tensor,
    *,
    max_seqlen_q: int,
) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of packed sequences, causal. Returns q's shape, contiguous.

    q: (num_tokens, heads, d), the new tokens of all sequences one after the other; query head h reads KV head
    h // (heads / kv_heads). k_cache, v_cache: (num_blocks, block_size, kv_heads, d), contiguous on a GPU, block_size a
    power of two; on a CPU with evenly spaced slots, best with the tokens of each head together, kv_heads outermost; or
    `QuantizedCache`s.
    block_tables: (num_seqs, max_blocks) int32, the blocks of each sequence in order, anything behind the last it needs.
    cu_seqlens_q: (num_seqs + 1,) int32 from 0 to num_tokens; sequence i has the tokens cu_seqlens_q[i] ..
    cu_seqlens_q[i + 1]. context_lens: (num_seqs,) int32, its keys, those of the new tokens being the last; without any,
    as where a batch is padded, its result is zeros. max_seqlen_q: the most new tokens of a sequence.
    """
    heads, head_dim = q.shape[1:]
    block_size, kv_heads = k_cache.shape[1:3]
    num_seqs = context_lens.shape[0]
    if k_cache.shape != v_cache.shape or k_cache.shape[3] != head_dim or heads % kv_heads:
        raise ValueError(
            f"paged_attention: q {tuple(q.shape)} and caches {tuple(k_cache.shape)}, {tuple(v_cache.shape)} do not fit"
        )
    if block_tables.shape[0] != num_seqs or cu_seqlens_q.shape != (num_seqs + 1,):
        raise ValueError(
            f"paged_attention: block tables {tuple(block_tables.shape)}, borders {tuple(cu_seqlens_q.shape)} "
            f"and contexts {tuple(context_lens.shape)} are not of the same sequences"
        )
    keys, values = codes_of(k_cache), codes_of(v_cache)
    target = target_of(q, keys)
    if target is None:
        arguments = (q, k_cache, v_cache, block_tables, cu_seqlens_q, context_lens)
        extension = cpu_extension(q, keys, values)
        if extension is None or keys.stride() != values.stride():
            return paged_attention_reference(*arguments, max_seqlen_q=max_seqlen_q)
        return _on_cpu(extension, *arguments, max_seqlen_q)
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()) or block_size & (block_size - 1):
        raise ValueError(f"paged_attention: caches of strides {codes_of(k_cache).stride()} in blocks of {block_size}")
    operation = "paged_prefill" if max_seqlen_q > 1 else "paged_decode"
    padded = max(next_power_of_2(head_dim), NARROWEST)
    if q.dtype == torch.float32:
        choice = PRECISE[operation]
    else:
        table = f"{operation}_int8" if isinstance(k_cache, QuantizedCache) else operation
        choice = choose(table, target, head_dim=padded, group=heads // kv_heads)
    tensors = (q.contiguous(), k_cache, v_cache, block_tables, cu_seqlens_q, context_lens)
    if max_seqlen_q > 1:
        return _launch_prefill(*tensors, max_seqlen_q, choice)
    return _launch_decode(*tensors, target.num_sms, choice)


def _on_cpu(
    extension: CpuExtension,
    q: Tensor,
    k_cache: Cache,
    v_cache: Cache,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    context_lens: Tensor,
    max_seqlen_q: int,
) -> Tensor:
    """The sequences of one token that come first by the extension, as all do in a decode step; the rest by torch."""
    (num_tokens, heads, head_dim), kv_heads = q.shape, k_cache.shape[2]
    single = num_tokens
    if max_seqlen_q > 1:
        single = next(first for first, (start, end) in enumerate(pairwise(cu_seqlens_q.tolist())) if end - start != 1)
    q, tables, out = q.contiguous(), block_tables.contiguous(), torch.empty(q.shape, dtype=q.dtype)
    extension.paged_decode(
        *(q.dtype == torch.bfloat16, single, heads, kv_heads, head_dim),
        *(q.data_ptr(), tables.data_ptr(), tables.shape[1], context_lens.data_ptr(), out.data_ptr()),
        *(cache_arguments(codes_of(k_cache), codes_of(v_cache)), torch.get_num_threads(), ""),
    )
    if single < num_tokens:
        rest = (block_tables[single:], cu_seqlens_q[single:] - single, context_lens[single:])
        out[single:] = paged_attention_reference(q[single:], k_cache, v_cache, *rest, max_seqlen_q=max_seqlen_q)
    return out


def _launch_prefill(
    q: Tensor,
    k_cache: Cache,
    v_cache: Cache,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    context_lens: Tensor,
    max_seqlen_q: int,
    choice: Choice,
) -> Tensor:
    kv_heads, constants = k_cache.shape[2], _constants(q, k_cache)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    launch(
        _paged_prefill_kernel,
        (kv_heads, context_lens.shape[0], cdiv(max_seqlen_q * constants["GROUP"], choice["BLOCK_M"])),
        *(q, codes_of(k_cache), codes_of(v_cache), scales_of(k_cache), scales_of(v_cache)),
        *(block_tables, cu_seqlens_q, context_lens, out),
        *(block_tables.stride(0), kv_heads),
        _scale(q),
        num_warps=choice["num_warps"],
        num_stages=choice["num_stages"],
        BLOCK_M=choice["BLOCK_M"],
        BLOCK_N=choice["BLOCK_N"],
        **constants,
    )
    return out


def _launch_decode(
    q: Tensor,
    k_cache: Cache,
    v_cache: Cache,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    context_lens: Tensor,
    num_sms: int,
    choice: Choice,
) -> Tensor:
    block_n, constants = choice["BLOCK_N"], _constants(q, k_cache)
    kv_heads, num_seqs = k_cache.shape[2], context_lens.shape[0]
    # What is known without asking the GPU: the context that the tables have room for.
    max_blocks = cdiv(block_tables.shape[1] * k_cache.shape[1], block_n)
    wanted = choice["programs_per_sm"] * num_sms // (num_seqs * kv_heads)
    num_splits = max(min(wanted, max_blocks, MAX_SPLITS), 1)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    partial, log_total = None, None
    if num_splits > 1:
        parts = (num_seqs, q.shape[1], num_splits)
        partial = torch.empty((*parts, q.shape[2]), dtype=torch.float32, device=q.device)
        log_total = torch.empty(parts, dtype=torch.float32, device=q.device)
    launch(
        _paged_decode_kernel,
        (kv_heads, num_splits, num_seqs),
        *(q, codes_of(k_cache), codes_of(v_cache), scales_of(k_cache), scales_of(v_cache)),
        *(block_tables, cu_seqlens_q, context_lens),
        *(out, partial, log_total),
        *(block_tables.stride(0), kv_heads),
        _scale(q),
        num_warps=choice["num_warps"],
        num_stages=choice["num_stages"],
        ROWS=max(next_power_of_2(constants["GROUP"]), NARROWEST),
        BLOCK_N=block_n,
        **constants,
    )
    if partial is not None:
        launch(
            _join_splits_kernel,
            (q.shape[1], num_seqs),
            *(partial, log_total, cu_seqlens_q, context_lens, out),
            num_splits,
            num_warps=4,
            HEAD_DIM=constants["HEAD_DIM"],
            BLOCK_D=constants["BLOCK_D"],
            BLOCK_SPLITS=next_power_of_2(num_splits),
            BLOCK_N=block_n,
        )
    return out


def _constants(q: Tensor, k_cache: Cache) -> dict[str, Any]:
    head_dim = q.shape[2]
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(next_power_of_2(head_dim), NARROWEST),
        "GROUP": q.shape[1] // k_cache.shape[2],
        "PAGE": k_cache.shape[1],
    }


def _scale(q: Tensor) -> float:
    """Of scores: powers of two are cheaper than powers of e."""
    return math.log2(math.e) / math.sqrt(q.shape[2])


def paged_attention_reference(
    q: Tensor,
    k_cache: Cache,
    v_cache: Cache,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    context_lens: Tensor,
    *,
    max_seqlen_q: int,
) -> Tensor:
    num_tokens, heads, head_dim = q.shape
    block_size, kv_heads = k_cache.shape[1:3]
    decoding = max_seqlen_q == 1 and num_tokens == len(context_lens)
    if decoding:
        # The queries of a KV head attend as if they were its tokens: keys are read once, and nothing is masked.
        queries = q.reshape(num_tokens, 1, kv_heads, heads // kv_heads, head_dim).unbind()
    else:
        queries = q.unsqueeze(0).split([end - start for start, end in pairwise(cu_seqlens_q.tolist())], dim=1)
    out = []
    for new, table, context in zip(queries, block_tables.tolist(), context_lens.tolist(), strict=True):
        if context == 0:
            out.append(torch.zeros_like(new))
            continue
        blocks = table[: cdiv(context, block_size)]
        k, v = (_keys(cache, blocks, context, q.dtype) for cache in (k_cache, v_cache))
        attend = F.scaled_dot_product_attention if decoding else causal_attention_reference
        out.append(attend(new, k, v))
    return (out[0] if len(out) == 1 else torch.cat(out, dim=0 if decoding else 1)).reshape(q.shape)


def _keys(cache: Cache, blocks: list[int], context: int, dtype: torch.dtype) -> Tensor:
    """The keys or values of a sequence: (1, kv_heads, context, d)."""
    runs: list[slice] = []  # neighbours are read in place, or copied together
    for block in blocks:
        if runs and runs[-1].stop == block:
            runs[-1] = slice(runs[-1].start, block + 1)
        else:
            runs.append(slice(block, block + 1))
    parts = [cache[run] for run in runs]
    chosen = [part.dequantize(dtype) if isinstance(part, QuantizedCache) else part for part in parts]
    heads_first = [part.permute(2, 0, 1, 3).flatten(1, 2) for part in chosen]
    return (heads_first[0] if len(runs) == 1 else torch.cat(heads_first, dim=1))[None, :, :context]
