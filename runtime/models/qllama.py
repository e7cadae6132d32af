"""QLLaMA, the language half of InternVL-C/G: a LLaMA in which every second layer also looks at an image.

One module is four things, told apart by how many leading positions form the `prefix`: they see each other and nothing
behind them, while every later position sees all up to itself.

- text encoder: no prefix, no image; plain causal LLaMA;
- image encoder: the queries are the whole sequence, and all of it is prefix;
- captioner: the queries are the prefix, prompt and answer follow;
- image-text matching: queries and text are all prefix.

Where image tokens are given, the queries at the head of the sequence attend to them between self-attention and MLP;
text reads of the image only what the queries gathered.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.attention import causal_attention, tile_attention
from ...kernels.rope import apply_rope, rotary_table
from ..config import ContrastiveConfig, DecoderConfig
from ..layers.linear import Linear
from ..layers.norm import RMSNorm
from ..layers.rotary import inverse_frequencies
from .decoder import MLP


class QLLaMACache:
    """Keys and values of self-attention for a batch of sequences that grow together, allocated at once.

    keys, values: (layers, batch, heads, length, head_dim), of which the first `used` positions hold something.
    """

    def __init__(
        self, config: DecoderConfig, batch: int, length: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (config.num_hidden_layers, batch, config.num_attention_heads, length, config.head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.used = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (batch, heads, tokens, d) of one layer behind what is used; return all up to their end."""
        end = self.used + k.shape[2]
        if end > self.keys.shape[3]:
            raise ValueError(f"qllama cache: {end} tokens exceed the {self.keys.shape[3]} allocated")
        keys, values = self.keys[layer, :, :, :end], self.values[layer, :, :, :end]
        keys[:, :, self.used :] = k
        values[:, :, self.used :] = v
        return keys, values

    def reorder(self, rows: Tensor) -> None:
        """Make each sequence continue another. rows: (batch,) int64, which it was until now."""
        for stored in (self.keys, self.values):
            stored[:, :, :, : self.used] = stored[:, rows, :, : self.used]


class SelfAttention(nn.Module):
    """Attention with rotary positions, bidirectional within the prefix and causal behind it."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads = config.num_attention_heads
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o = Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, prefix: int, cache: QLLaMACache | None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)  # each [batch, tokens, heads, d]
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        keys, values = k.transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            keys, values = cache.append(self.layer, keys, values)
        if prefix == 0:
            out = causal_attention(q, keys, values)
        elif prefix == x.shape[1]:
            out = tile_attention(q, k, v)
        else:
            among = tile_attention(q[:, :prefix], k[:, :prefix], v[:, :prefix])
            behind = causal_attention(q[:, prefix:], keys, values)
            out = torch.cat((among, behind), dim=1)
        return self.o(out.flatten(2))


class CrossAttention(nn.Module):
    """Queries of QLLaMA to raw tokens of the ViT, class token included: no rotation, no mask, no gate."""

    def __init__(self, config: DecoderConfig, vision_size: int) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.norm1 = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.norm2 = RMSNorm(vision_size, config.rms_norm_eps)
        self.q = Linear(config.hidden_size, config.hidden_size, bias=False)
        self.kv = Linear(vision_size, 2 * config.hidden_size, bias=False)
        self.o = Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, vision: Tensor) -> Tensor:
        q = self.q(self.norm1(x)).unflatten(-1, (self.num_heads, -1))
        k, v = self.kv(self.norm2(vision)).unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        return self.o(tile_attention(q, k, v).flatten(2))


class Layer(nn.Module):
    """x + attention(norm(x)), the queries + cross_attn(queries, image), then x + mlp(norm(x)).

    As in the decoder, an addition and the norm after it are one kernel where nothing stands between them.
    """

    def __init__(self, config: ContrastiveConfig, layer: int) -> None:
        super().__init__()
        llm = config.llm
        self.num_queries = config.num_query_tokens
        self.attention_norm = RMSNorm(llm.hidden_size, llm.rms_norm_eps)
        self.attention = SelfAttention(llm, layer)
        crosses = config.has_cross_attention(layer)
        self.cross_attn = CrossAttention(llm, config.vision.hidden_size) if crosses else None
        self.mlp_norm = RMSNorm(llm.hidden_size, llm.rms_norm_eps)
        self.mlp = MLP(llm)

    def forward(
        self,
        x: Tensor,
        branch: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        prefix: int,
        vision: Tensor | None,
        cache: QLLaMACache | None,
    ) -> tuple[Tensor, Tensor]:
        """x: the residual; branch: what is to be added to it first, None in the first layer. Returns both anew."""
        if branch is None:
            normed = self.attention_norm(x)
        else:
            x, normed = self.attention_norm.after_residual(x, branch)
        branch = self.attention(normed, cos, sin, prefix, cache)
        if self.cross_attn is None or vision is None:
            x, normed = self.mlp_norm.after_residual(x, branch)
        else:
            x = x + branch
            queries, text = x[:, : self.num_queries], x[:, self.num_queries :]
            x = torch.cat((queries + self.cross_attn(queries, vision), text), dim=1)
            normed = self.mlp_norm(x)
        return x, self.mlp(normed)


class QLLaMA(nn.Module):
    """The decoder and its language head.

    reads_text: false if only queries will come, which need no vocabulary. Without queries it has no head.
    """

    def __init__(self, config: ContrastiveConfig, *, reads_text: bool = True) -> None:
        super().__init__()
        llm = config.llm
        self.config = llm
        self.num_queries = config.num_query_tokens
        if reads_text:
            self.embedding = nn.Parameter(torch.empty(llm.vocab_size, llm.hidden_size))
        self.layers = nn.ModuleList([Layer(config, index) for index in range(llm.num_hidden_layers)])
        self.norm = RMSNorm(llm.hidden_size, llm.rms_norm_eps)
        if reads_text and config.num_query_tokens:
            self.head = Linear(llm.hidden_size, llm.vocab_size, bias=False)

    def embed(self, token_ids: Tensor) -> Tensor:
        """token_ids: (...) int64. Returns (..., hidden)."""
        return F.embedding(token_ids, self.embedding)

    def gather(self, query_tokens: Tensor, vision: Tensor) -> Tensor:
        """What the queries see of images. query_tokens: (1, queries, hidden); vision: (n, tokens, vision hidden).

        Returns (n, queries, hidden).
        """
        x = query_tokens.expand(vision.shape[0], -1, -1)
        positions = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
        return self(x, positions, prefix=x.shape[1], vision=vision)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        *,
        prefix: int = 0,
        vision: Tensor | None = None,
        cache: QLLaMACache | None = None,
    ) -> Tensor:
        """Final hidden states, normed: (batch, tokens, hidden).

        x: (batch, tokens, hidden) embeddings; positions: (batch, tokens) int64. vision: (batch, image tokens, vision
        hidden), what the queries at the head of `x` look at. cache: keys and values of earlier calls, which the tokens
        of this one join; a `prefix` goes with an empty cache only.
        """
        if vision is not None and x.shape[1] < self.num_queries:
            raise ValueError(f"qllama: an image needs {self.num_queries} queries, x has {x.shape[1]} positions")
        if prefix and cache is not None and cache.used:
            raise ValueError(f"qllama: a prefix of {prefix} behind {cache.used} cached positions")
        inv_freq = inverse_frequencies(self.config).to(x.device)
        cos, sin = rotary_table(positions, inv_freq, 1.0, x.dtype)
        branch = None
        for layer in self.layers:
            x, branch = layer(x, branch, cos, sin, prefix, vision, cache)
        if cache is not None:
            cache.used += x.shape[1]
        return self.norm(x) if branch is None else self.norm.after_residual(x, branch)[1]

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: (..., hidden). Returns (..., vocab) fp32."""
        return self.head(hidden).float()
