"""Operations whose own ONNX form we prefer to the exporter's."""

from collections.abc import Callable
from typing import Any

import torch
from onnxscript import opset21

# onnxscript types a value of the graph under construction as one of its own; nothing here depends on which.
Value = Any
op: Any = opset21


def scaled_dot_product_attention(
    query: Value,
    key: Value,
    value: Value,
    attn_mask: Value = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Value:
    """Attention as two products with a softmax between them, all of rank four: what runtimes know to fuse.

    The exporter's own transposes keys by way of shapes that are computed. query, key, value: (batch, heads, tokens, d);
    attn_mask: added to scores. Queries are scaled before the product, which keeps scores within fp16.
    """
    if dropout_p or enable_gqa:
        raise NotImplementedError("attention with dropout or grouped queries")
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scaled = op.Mul(query, op.CastLike(op.Constant(value_float=factor), query))
    scores = op.MatMul(scaled, op.Transpose(key, perm=[0, 1, 3, 2]))
    if is_causal:
        scores = op.Add(scores, _causal_mask(query, key))
    if attn_mask is not None:
        scores = op.Add(scores, attn_mask)
    return op.MatMul(op.Softmax(scores, axis=-1), value)


def _causal_mask(query: Value, key: Value) -> Value:
    """(tokens, context): 0 where a query sees a key, in fp16 and fp32 far below any score where it does not."""
    shape = op.Concat(op.Shape(query, start=2, end=3), op.Shape(key, start=2, end=3), axis=0)
    low = op.Expand(op.CastLike(op.Constant(value_float=-3e4), query), shape)
    return op.Trilu(low, op.Constant(value_int=1), upper=1)


TABLE: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.aten.scaled_dot_product_attention.default: scaled_dot_product_attention,
}
