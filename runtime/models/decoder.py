"""The language half: one decoder for InternLM2, LLaMA, InternLM, Qwen2, Qwen3 and Phi-3.

They differ by flags (biases, per-head QK-norm, rotary scaling) and by how a checkpoint packs its projections, which
`weights.py` undoes: here queries, keys and values are one projection `[q | k | v]`, gate and up another.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.attention import causal_attention
from ...kernels.rope import apply_rope, rotary_table
from ...kernels.swiglu import swiglu
from ..config import DecoderConfig
from ..layers.kv_cache import KVSlice
from ..layers.linear import Linear
from ..layers.norm import RMSNorm


class Attention(nn.Module):
    """Causal attention with grouped queries and rotary positions."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        heads = self.num_heads + 2 * self.num_kv_heads
        self.qkv = Linear(config.hidden_size, heads * config.head_dim, bias=config.qkv_bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.o = Linear(self.num_heads * config.head_dim, config.hidden_size, bias=config.output_bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, kv: KVSlice | None) -> Tensor:
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).view(batch, tokens, -1, self.head_dim)
        q, k, v = qkv.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)  # per head, before the rotation
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        if kv is None:
            out = causal_attention(q, k.transpose(1, 2), v.transpose(1, 2))
        else:
            keys, values = kv.append(self.layer, k, v)
            # A whole prompt in an empty row is the mask-free causal case.
            out = causal_attention(q, keys, values, kv.context_lens)
        return self.o(out.reshape(batch, tokens, -1))


class MLP(nn.Module):
    """down(SiLU(gate(x)) * up(x))."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_up = Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(swiglu(self.gate_up(x)))


class Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config, layer)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, kv: KVSlice | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, kv)
        return x + self.mlp(self.mlp_norm(x))


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

    def forward(self, x: Tensor, positions: Tensor, inv_freq: Tensor, kv: KVSlice | None = None) -> Tensor:
        """Final hidden states, normed. Without `kv` the tokens are whole sequences and nothing is cached.

        x: (batch, tokens, hidden) embeddings; positions: (batch, tokens) int64;
        inv_freq: (head_dim / 2,) or (batch, head_dim / 2), from `inverse_frequencies`.
        """
        cos, sin = rotary_table(positions, inv_freq, self.rope_amplitude, x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin, kv)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: (..., hidden). Returns (..., vocab) fp32."""
        return self.head(hidden).float()
