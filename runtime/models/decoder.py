"""The language half: one decoder for InternLM2, LLaMA, InternLM, Qwen2, Qwen3 and Phi-3.

They differ by flags (biases, per-head QK-norm, rotary scaling) and by how a checkpoint packs its projections, which
`weights.py` undoes: here queries, keys and values are one projection `[q | k | v]`, gate and up another.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.attention import causal_attention
from ...kernels.paged_attention import paged_attention
from ...kernels.rope import apply_rope, rope_and_cache, rotary_table
from ..config import DecoderConfig
from ..layers.kv_cache import KVBatch
from ..layers.linear import Linear, LinearSwiglu
from ..layers.norm import RMSNorm


class Attention(nn.Module):
    """Causal attention with grouped queries and rotary positions."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        self.eps = config.rms_norm_eps
        heads = self.num_heads + 2 * self.num_kv_heads
        self.qkv = Linear(config.hidden_size, heads * config.head_dim, bias=config.qkv_bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.o = Linear(self.num_heads * config.head_dim, config.hidden_size, bias=config.output_bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, kv: KVBatch | None) -> Tensor:
        qkv = self.qkv(x)
        out = self._whole(qkv, cos, sin) if kv is None else self._paged(qkv, cos, sin, kv)
        return self.o(out)

    def _paged(self, qkv: Tensor, cos: Tensor, sin: Tensor, kv: KVBatch) -> Tensor:
        keys, values = kv.cache.keys[self.layer], kv.cache.values[self.layer]
        q = rope_and_cache(
            *(qkv, cos, sin, keys, values, kv.slot_mapping, self.num_heads),
            q_norm=None if self.q_norm is None else self.q_norm.weight,
            k_norm=None if self.k_norm is None else self.k_norm.weight,
            eps=self.eps,
        )
        out = paged_attention(
            *(q, keys, values, kv.block_tables, kv.cu_seqlens_q, kv.context_lens), max_seqlen_q=kv.max_seqlen_q
        )
        return out.flatten(1)

    def _whole(self, qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        qkv = qkv.unflatten(-1, (-1, self.head_dim))
        q, k, v = qkv.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=-2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)  # per head, before the rotation
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        return causal_attention(q, k.transpose(1, 2), v.transpose(1, 2)).flatten(2)


class MLP(nn.Module):
    """down(SiLU(gate(x)) * up(x))."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_up = LinearSwiglu(config.hidden_size, config.intermediate_size)
        self.down = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.gate_up(x))


class Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    An addition and the norm after it are one kernel: `forward` takes the residual and what is still to be added to it.
    """

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config, layer)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, branch: Tensor | None, cos: Tensor, sin: Tensor, kv: KVBatch | None
    ) -> tuple[Tensor, Tensor]:
        """x: the residual; branch: what is to be added to it first, None in the first layer. Returns both anew."""
        if branch is None:
            normed = self.attention_norm(x)
        else:
            x, normed = self.attention_norm.after_residual(x, branch)
        x, normed = self.mlp_norm.after_residual(x, self.attention(normed, cos, sin, kv))
        return x, self.mlp(normed)


class Decoder(nn.Module):
    """The decoder-only language model."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        scaling = config.rope_scaling
        self.rope_amplitude = scaling.attention_factor if scaling is not None else 1.0
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.layers = nn.ModuleList([Layer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = Linear(config.hidden_size, config.vocab_size, bias=False)

    def embed(self, token_ids: Tensor) -> Tensor:
        """token_ids: (...) int64. Returns (..., hidden)."""
        return F.embedding(token_ids, self.embedding)

    def forward(self, x: Tensor, positions: Tensor, inv_freq: Tensor, kv: KVBatch | None = None) -> Tensor:
        """Final hidden states, normed, in the shape of `x`.

        With `kv` the tokens of all its sequences are packed. x: (num_tokens, hidden) embeddings; positions:
        (num_tokens,) int64; inv_freq: (head_dim / 2,) or (num_tokens, head_dim / 2), from `inverse_frequencies`.
        Without, they are whole sequences of one length, nothing is cached, and gradients flow. x: (batch, tokens,
        hidden); positions: (batch, tokens); inv_freq: (head_dim / 2,) or (batch, head_dim / 2).
        """
        if kv is None:
            cos, sin = rotary_table(positions, inv_freq, self.rope_amplitude, x.dtype)
        else:  # every token is a row of its own
            cos, sin = rotary_table(positions[:, None], inv_freq, self.rope_amplitude, x.dtype)
            cos, sin = cos.flatten(1), sin.flatten(1)
        branch = None
        for layer in self.layers:
            x, branch = layer(x, branch, cos, sin, kv)
        return self.norm(x) if branch is None else self.norm.after_residual(x, branch)[1]

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: (..., hidden). Returns (..., vocab) fp32."""
        return self.head(hidden).float()
