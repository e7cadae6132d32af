"""InternVL-C and InternVL-G: InternViT, QLLaMA, and the heads that bring images and texts to one space.

C embeds an image by pooling the ViT's tokens. G adds what QLLaMA's queries pool from the same tokens, and can also
write captions and tell whether a text matches. Texts are embedded the same way in both.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import ContrastiveConfig
from ..layers.linear import Linear
from ..layers.norm import LayerNorm
from .intern_vit import InternViT
from .qllama import QLLaMA, QLLaMACache

Mode = Literal["c", "g"]

# PyTorch's default, unlike the 1e-6 of the ViT's and QLLaMA's own norms.
POOL_NORM_EPS = 1e-5


class AttentionPool(nn.Module):
    """Multi-head attention of one query, the mean token, to all tokens; then a projection to the embedding.

    Keys and values of the tokens are never made. With one query a head's logits are k_n . q = LN(x_n) . (W_k^T q), and
    its output is W_v (sum_n p_n LN(x_n)) + b_v, so that W_k and W_v meet a vector a head and not every token. The bias
    of the keys adds the same to all logits of a head and falls out of the softmax.
    """

    def __init__(self, size: int, num_heads: int, embed_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_q = LayerNorm(size, POOL_NORM_EPS)
        self.norm_k = LayerNorm(size, POOL_NORM_EPS)
        self.norm_v = LayerNorm(size, POOL_NORM_EPS)
        self.q = Linear(size, size, bias=True)
        self.k = nn.Parameter(torch.empty(size, size))
        self.v = nn.Parameter(torch.empty(size, size))
        self.v_bias = nn.Parameter(torch.empty(size))
        self.proj = Linear(size, embed_dim, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """x: (n, tokens, size). Returns (n, embed_dim)."""
        heads = (self.num_heads, -1)
        q = self.q(self.norm_q(x.mean(1))).unflatten(-1, heads)  # [n, heads, d]
        q = q * q.shape[-1] ** -0.5
        q = torch.einsum("nhd,hdc->nhc", q, self.k.unflatten(0, heads))  # W_k^T q, [n, heads, size]
        weights = (q @ self.norm_k(x).transpose(1, 2)).softmax(-1, dtype=torch.float32)  # [n, heads, tokens]
        pooled = weights.to(x.dtype) @ self.norm_v(x)  # [n, heads, size]
        out = torch.einsum("nhc,hdc->nhd", pooled, self.v.unflatten(0, heads)).flatten(1)
        return self.proj(out + self.v_bias)


class ContrastiveModel(nn.Module):
    """All parts of an InternVL-14B checkpoint, or of InternVL-C's original file, which has no queries."""

    def __init__(self, config: ContrastiveConfig) -> None:
        super().__init__()
        self.config = config
        hidden = config.llm.hidden_size
        self.vision_model = InternViT(config.vision)
        self.clip_projector = AttentionPool(config.vision.hidden_size, config.pool_heads, config.embed_dim)
        if config.num_query_tokens:
            self.query_tokens = nn.Parameter(torch.empty(1, config.num_query_tokens, hidden))
        self.qllama = QLLaMA(config)
        if config.num_query_tokens:
            self.clip_projector2 = AttentionPool(hidden, config.pool_heads, config.embed_dim)
        self.text_projection = nn.Parameter(torch.empty(hidden, config.embed_dim))
        self.logit_scale = nn.Parameter(torch.empty(()))
        if config.num_query_tokens:
            self.itm_head = Linear(hidden, 2, bias=True)

    def embed_images(self, tiles: Tensor, mode: Mode) -> Tensor:
        """Raw embeddings, not of unit length. tiles: (n, side, side, 3) uint8. Returns (n, embed_dim) fp32.

        "c": the pooled ViT tokens. "g": the sum of two unit vectors, those and the pooled queries.
        """
        vision = self.vision_model(tiles)
        pooled = self.clip_projector(vision).float()
        if mode == "c":
            return pooled
        queries = self.clip_projector2(self.encode_queries(vision)).float()
        return F.normalize(pooled, dim=-1) + F.normalize(queries, dim=-1)

    def encode_queries(self, vision: Tensor) -> Tensor:
        """What QLLaMA's queries gather. vision: (n, tokens, vision hidden). Returns (n, queries, hidden)."""
        return self.qllama.gather(self.query_tokens, vision)

    def embed_texts(self, token_ids: Tensor, positions: Tensor, last: Tensor) -> Tensor:
        """Raw embeddings of texts. token_ids, positions: (n, tokens) int64, padded on the right with anything.

        last: (n,) int64, the index of the token that stands for its text. Returns (n, embed_dim) fp32.
        """
        hidden = self.qllama(self.qllama.embed(token_ids), positions)
        rows = torch.arange(len(last), device=last.device)
        return (hidden[rows, last] @ self.text_projection).float()

    def match(self, vision: Tensor, token_ids: Tensor) -> Tensor:
        """Logits (no match, match) of image-text pairs. token_ids: (n, tokens), unpadded. Returns (n, 2) fp32."""
        x = self._behind_queries(token_ids)
        hidden = self.qllama(x, _positions(x), prefix=x.shape[1], vision=vision)
        return self.itm_head(hidden[:, : self.qllama.num_queries]).float().mean(1)

    def begin_caption(self, vision: Tensor, prompt_ids: Tensor, cache: QLLaMACache) -> Tensor:
        """Prefill of captions. prompt_ids: (n, tokens), of one length. Returns (n, vocab) fp32 logits.

        In one piece: a part of the prompt that came later as a chunk of its own would not see the image.
        """
        x = self._behind_queries(prompt_ids)
        hidden = self.qllama(x, _positions(x), prefix=self.qllama.num_queries, vision=vision, cache=cache)
        return self.qllama.logits(hidden[:, -1])

    def continue_caption(self, token_ids: Tensor, cache: QLLaMACache) -> Tensor:
        """One more token of every caption. token_ids: (n,). Returns (n, vocab) fp32 logits."""
        positions = torch.full((len(token_ids), 1), cache.used, device=token_ids.device)
        hidden = self.qllama(self.qllama.embed(token_ids[:, None]), positions, cache=cache)
        return self.qllama.logits(hidden[:, -1])

    def _behind_queries(self, token_ids: Tensor) -> Tensor:
        """(n, queries + tokens, hidden) embeddings."""
        queries = self.query_tokens.expand(len(token_ids), -1, -1)
        return torch.cat((queries, self.qllama.embed(token_ids)), dim=1)


def _positions(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
