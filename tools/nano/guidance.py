"""A hint for attention: when the answer repeats a printed character, look at the visual token that shows it.

The drawing knows where each character of an answer stands. In one layer, the first half of the heads is rewarded for
attending there from the place where that character is to be written. Without the hint the language half needs many
more pictures to discover that reading is looking up.
"""

import torch
from torch import Tensor, nn

from vitrail.kernels.rope import apply_rope, rotary_table
from vitrail.runtime.models.decoder import Decoder


class Guidance:
    """Listens to the queries and keys of one layer of a decoder during its forward pass."""

    def __init__(self, decoder: Decoder, layer: int, inv_freq: Tensor) -> None:
        config = decoder.config
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.inv_freq = inv_freq
        self.entering = torch.empty(0)  # hidden states that the layer was given, (batch, tokens, hidden)
        self._qkv = torch.empty(0)
        decoder.get_submodule(f"layers.{layer}").register_forward_pre_hook(self._keep_input)
        decoder.get_submodule(f"layers.{layer}.attention.qkv").register_forward_hook(self._keep_qkv)

    def _keep_input(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.entering = inputs[0]

    def _keep_qkv(self, module: nn.Module, inputs: tuple[Tensor, ...], qkv: Tensor) -> None:
        self._qkv = qkv

    def loss(self, queries: Tensor, sources: Tensor) -> Tensor:
        """Mean cross-entropy of where the guided heads look, after a forward pass.

        queries: (n, 2) int64, sequence and place; sources: (n,) int64, the place in that sequence to look at.
        """
        batch, tokens, _ = self._qkv.shape
        qkv = self._qkv.float().view(batch, tokens, -1, self.head_dim)
        guided = self.kv_heads // 2
        positions = torch.arange(tokens, device=qkv.device)[None]
        cos, sin = rotary_table(positions, self.inv_freq, 1.0, torch.float32)
        k = apply_rope(qkv[:, :, self.heads : self.heads + guided], cos, sin)
        rows, places = queries[:, 0], queries[:, 1]
        group = self.heads // self.kv_heads
        cos, sin = rotary_table(places[:, None], self.inv_freq, 1.0, torch.float32)
        q = apply_rope(qkv[rows, places, : guided * group].unsqueeze(1), cos, sin).squeeze(1)
        q = q.view(-1, guided, group, self.head_dim)
        # [n, guided, group, tokens], keys after the query hidden
        scores = torch.einsum("nghd,ntgd->nght", q, k[rows]) / self.head_dim**0.5
        scores = scores.masked_fill(positions[0] > places[:, None, None, None], float("-inf"))
        chosen = scores.log_softmax(-1)[torch.arange(len(rows)), :, :, sources]
        return -chosen.mean()
