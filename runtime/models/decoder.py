"""The language half: one decoder for InternLM2, LLaMA, InternLM, Qwen2, Qwen3 and Phi-3.

They differ by flags (biases, per-head QK-norm, rotary scaling) and by how a checkpoint packs its projections, which
`weights.py` undoes: here queries, keys and values are one projection `[q | k | v]`, gate and up another.

Split over several ranks, each has some KV heads with their query heads, as much of every MLP, and a stretch of the
vocabulary. Ranks add up what attention and MLP give, and the embeddings; all else each of them does for itself.
"""

from collections.abc import Iterable
from dataclasses import replace
from math import gcd

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.attention import causal_attention
from ...kernels.paged_attention import paged_attention
from ...kernels.rope import apply_rope, rope_and_cache, rotary_table
from ..config import DecoderConfig
from ..errors import ConfigError
from ..layers.kv_cache import KVBatch
from ..layers.linear import Linear, LinearSwiglu
from ..layers.norm import RMSNorm
from ..layers.parallel import WHOLE, Part, Share, TensorParallel, even_share, summed_linear, vocabulary_share


class Attention(nn.Module):
    """Causal attention with grouped queries and rotary positions."""

    def __init__(self, config: DecoderConfig, layer: int, parallel: TensorParallel | None = None) -> None:
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
        self.o = summed_linear(
            self.num_heads * config.head_dim, config.hidden_size, bias=config.output_bias, parallel=parallel
        )

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

    def __init__(self, config: DecoderConfig, parallel: TensorParallel | None = None) -> None:
        super().__init__()
        self.gate_up = LinearSwiglu(config.hidden_size, config.intermediate_size)
        self.down = summed_linear(config.intermediate_size, config.hidden_size, bias=False, parallel=parallel)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.gate_up(x))


class Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    An addition and the norm after it are one kernel: `forward` takes the residual and what is still to be added to it.
    """

    def __init__(self, config: DecoderConfig, layer: int, parallel: TensorParallel | None = None) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config, layer, parallel)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, parallel)

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
    """The decoder-only language model, or the share of it that a rank holds; `share` is the config of that alone."""

    def __init__(self, config: DecoderConfig, part: Part = WHOLE, parallel: TensorParallel | None = None) -> None:
        super().__init__()
        if (part.rank, part.size) != ((0, 1) if parallel is None else (parallel.rank, parallel.size)):
            raise ValueError(f"rank {part.rank} of {part.size} needs a TensorParallel of its own")
        self.config = config
        self.parallel = parallel
        self.share = share = config_of(config, part)
        self.first_token = vocabulary_share(config.vocab_size, part.rank, part.size).start
        scaling = config.rope_scaling
        self.rope_amplitude = scaling.attention_factor if scaling is not None else 1.0
        self.embedding = nn.Parameter(torch.empty(share.vocab_size, config.hidden_size))
        self.layers = nn.ModuleList([Layer(share, index, parallel) for index in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = Linear(config.hidden_size, share.vocab_size, bias=False)

    def embed(self, token_ids: Tensor, visual: Iterable[tuple[int, Tensor]] = ()) -> Tensor:
        """token_ids: (...) int64. Returns (..., hidden).

        visual: of packed token_ids (num_tokens,), visual tokens (n, hidden) and the place of the first of them. They
        are rank 0's to give; the others have zeros (n, 1) there, so that the sum that makes embeddings hands them out.
        """
        if self.parallel is None:
            x = F.embedding(token_ids, self.embedding)
        else:
            rows = token_ids - self.first_token
            mine = (rows >= 0) & (rows < self.share.vocab_size)
            x = F.embedding(rows.where(mine, 0), self.embedding).masked_fill(~mine[..., None], 0.0)
        for place, tokens in visual:
            x[place : place + len(tokens)] = tokens
        return x if self.parallel is None else self.parallel.all_reduce(x)

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
        """hidden: (..., hidden). Returns (..., vocab) fp32; at other ranks than 0 only their share of it."""
        logits: Tensor = self.head(hidden)
        if self.parallel is not None:
            logits = self.parallel.gather_logits(logits, self.config.vocab_size)
        return logits.float()


def config_of(config: DecoderConfig, part: Part) -> DecoderConfig:
    """The config of the share that falls to a rank. Raises `ConfigError` where heads or MLP cannot be shared."""
    if part.size == 1:
        return config
    for what in ("num_key_value_heads", "intermediate_size"):
        count = getattr(config, what)
        if count % part.size:
            most = gcd(config.num_key_value_heads, config.intermediate_size)
            sizes = ", ".join(str(size) for size in range(1, most + 1) if most % size == 0)
            raise ConfigError(
                f"tensor_parallel_size={part.size} does not divide the language half's {what} {count}; "
                f"sizes that divide all: {sizes}"
            )
    if not vocabulary_share(config.vocab_size, part.size - 1, part.size):
        raise ConfigError(f"tensor_parallel_size={part.size} is too much for a vocabulary of {config.vocab_size}")
    return replace(
        config,
        vocab_size=len(vocabulary_share(config.vocab_size, part.rank, part.size)),
        intermediate_size=config.intermediate_size // part.size,
        num_attention_heads=config.num_attention_heads // part.size,
        num_key_value_heads=config.num_key_value_heads // part.size,
    )


def shares_of(config: DecoderConfig, part: Part) -> dict[str, Share]:
    """Parameter of a Decoder -> what of it a rank holds, of those that are split."""
    q_rows = config.num_attention_heads * config.head_dim
    kv_rows = config.num_key_value_heads * config.head_dim
    wide = config.intermediate_size
    qkv = Share(
        (
            even_share(q_rows, part),
            even_share(kv_rows, part, start=q_rows),
            even_share(kv_rows, part, start=q_rows + kv_rows),
        )
    )
    layer = {
        "attention.qkv.weight": qkv,
        "attention.qkv.bias": qkv,
        "attention.o.weight": Share(columns=even_share(q_rows, part)),
        "mlp.gate_up.weight": Share((even_share(wide, part), even_share(wide, part, start=wide))),
        "mlp.down.weight": Share(columns=even_share(wide, part)),
    }
    vocabulary = Share((vocabulary_share(config.vocab_size, part.rank, part.size),))
    shares = {
        f"layers.{index}.{key}": share for index in range(config.num_hidden_layers) for key, share in layer.items()
    }
    return shares | {"embedding": vocabulary, "head.weight": vocabulary}
