"""Attention of the two halves: bidirectional over the tokens of a tile, causal with grouped queries over a context."""

import torch
import torch.nn.functional as F
from torch import Tensor


def tile_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v without a mask. q, k, v: (tiles, tokens, heads, d), strided views allowed.

    Returns (tiles, tokens, heads, d).
    """
    if not q.shape == k.shape == v.shape:
        raise ValueError(f"tile_attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} differ")
    return tile_attention_reference(q, k, v)


def tile_attention_reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, context_lens: Tensor | None = None) -> Tensor:
    """Causal attention with grouped queries; query head h reads KV head h // (heads / kv_heads).

    q: (batch, tokens, heads, d); k, v: (batch, kv_heads, context, d).
    context_lens: (batch,) int64, how many keys of each row count, the row's last query being the last of them.
    None: every row uses all `context` keys. Returns (batch, tokens, heads, d).
    """
    if q.shape[2] % k.shape[1] or q.shape[1] > k.shape[2]:
        raise ValueError(f"causal_attention: q {tuple(q.shape)} does not fit k {tuple(k.shape)}")
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
