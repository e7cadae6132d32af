"""Embedding throughput of a scaled-down InternVL-C/G on a CPU, against the same model in eager torch.

    python bench/embed.py [--batch 8] [--repeats N] [--dtypes float32 bfloat16] [--out DIR]

The shape is a sixth of InternVL-14B's in width and fewer blocks: RMSNorm, QK-norm, heads of 128, pooling by 16 heads.
Eager torch has fused norms and SDPA attention, and pools as the official code does: keys and values of every token are
made. Both have the same random weights and start from uint8 tiles; `difference` is between their embeddings, of the
largest value. Images are embedded as InternVL-C and as G, texts of 80 tokens.
"""

import argparse
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.bench.harness import compare, results_path, write_results
from vitrail.bench.models import INTERNVL_14B, randomize
from vitrail.kernels.patch_embedding import IMAGENET_MEAN, IMAGENET_STD
from vitrail.kernels.rope import apply_rope, rotary_table
from vitrail.runtime.layers.rotary import inverse_frequencies
from vitrail.runtime.models.contrastive import AttentionPool, ContrastiveModel

SHAPE = replace(
    INTERNVL_14B,
    vision=replace(
        INTERNVL_14B.vision, hidden_size=512, num_attention_heads=4, intermediate_size=2048, num_hidden_layers=8
    ),
    llm=replace(
        INTERNVL_14B.llm,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=4,
        vocab_size=1024,
        num_attention_heads=4,
        num_key_value_heads=4,
    ),
)
TEXT_TOKENS = 80


class Eager:
    """The model written in plain torch on the parameters of ours."""

    def __init__(self, model: ContrastiveModel) -> None:
        self.model: Any = model
        self.config = model.config

    def embed_images(self, tiles: Tensor, mode: str) -> Tensor:
        """tiles: (n, side, side, 3) uint8. Returns (n, embed_dim) fp32."""
        vision = self.vision(tiles)
        pooled = self.pool(self.model.clip_projector, vision).float()
        if mode == "c":
            return pooled
        queries = self.model.query_tokens.expand(len(tiles), -1, -1)
        seen = self.pool(self.model.clip_projector2, self.llama(queries, vision)).float()
        return F.normalize(pooled, dim=-1) + F.normalize(seen, dim=-1)

    def embed_texts(self, token_ids: Tensor) -> Tensor:
        """token_ids: (n, tokens), none of them padding. Returns (n, embed_dim) fp32."""
        hidden = self.llama(self.model.qllama.embedding[token_ids])
        return cast(Tensor, (hidden[:, -1] @ self.model.text_projection).float())

    def vision(self, tiles: Tensor) -> Tensor:
        """The ViT: (n, 1 + patches, hidden)."""
        model, heads = self.model.vision_model, self.config.vision.num_attention_heads
        embeddings, eps = model.embeddings, self.config.vision.layer_norm_eps
        weight, bias = embeddings.patch_embedding["weight"], embeddings.patch_embedding["bias"]
        pixels = (tiles.float() / 255 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
        patches = F.conv2d(pixels.permute(0, 3, 1, 2).to(weight.dtype), weight, bias, stride=weight.shape[-1])
        tokens = patches.flatten(2).transpose(1, 2)
        x = torch.cat((embeddings.class_embedding.expand(len(tiles), -1, -1), tokens), dim=1)
        x = x + embeddings.position_embedding
        for block in model.encoder.layers:
            y = F.rms_norm(x, x.shape[-1:], block.norm1.weight, eps)
            q, k, v = F.linear(y, block.attn.qkv.weight).chunk(3, dim=-1)
            q = F.rms_norm(q, q.shape[-1:], block.attn.q_norm.weight, eps)
            k = F.rms_norm(k, k.shape[-1:], block.attn.k_norm.weight, eps)
            out = _attend(*(part.unflatten(-1, (heads, -1)) for part in (q, k, v)))
            x = x + block.ls1 * F.linear(out, block.attn.proj.weight, block.attn.proj.bias)
            y = F.rms_norm(x, x.shape[-1:], block.norm2.weight, eps)
            y = F.gelu(F.linear(y, block.mlp.fc1.weight, block.mlp.fc1.bias))
            x = x + block.ls2 * F.linear(y, block.mlp.fc2.weight, block.mlp.fc2.bias)
        return x

    def llama(self, x: Tensor, vision: Tensor | None = None) -> Tensor:
        """QLLaMA: causal on texts, and with `vision` bidirectional on its queries, which look at it."""
        llm, eps = self.config.llm, self.config.llm.rms_norm_eps
        positions = torch.arange(x.shape[1]).expand(len(x), -1)
        cos, sin = rotary_table(positions, inverse_frequencies(llm), 1.0, x.dtype)
        for layer in self.model.qllama.layers:
            y = F.rms_norm(x, x.shape[-1:], layer.attention_norm.weight, eps)
            q, k, v = F.linear(y, layer.attention.qkv.weight).unflatten(-1, (3, llm.num_attention_heads, -1)).unbind(2)
            out = _attend(apply_rope(q, cos, sin), apply_rope(k, cos, sin), v, causal=vision is None)
            x = x + F.linear(out, layer.attention.o.weight)
            if vision is not None and layer.cross_attn is not None:
                cross = layer.cross_attn
                q = F.linear(F.rms_norm(x, x.shape[-1:], cross.norm1.weight, eps), cross.q.weight)
                kv = F.linear(F.rms_norm(vision, vision.shape[-1:], cross.norm2.weight, eps), cross.kv.weight)
                k, v = kv.unflatten(-1, (2, llm.num_attention_heads, -1)).unbind(2)
                out = _attend(q.unflatten(-1, (llm.num_attention_heads, -1)), k, v)
                x = x + F.linear(out, cross.o.weight)
            y = F.rms_norm(x, x.shape[-1:], layer.mlp_norm.weight, eps)
            gate, up = F.linear(y, layer.mlp.gate_up.weight).chunk(2, dim=-1)
            x = x + F.linear(F.silu(gate) * up, layer.mlp.down.weight)
        return F.rms_norm(x, x.shape[-1:], self.model.qllama.norm.weight, eps)

    @staticmethod
    def pool(pool: AttentionPool, x: Tensor) -> Tensor:
        """The attention pool with keys and values made; their bias of keys is zero here."""
        size = x.shape[-1:]

        def norm(layer: Any, values: Tensor) -> Tensor:
            return F.layer_norm(values, size, layer.weight, layer.bias, layer.eps)

        q = F.linear(norm(pool.norm_q, x.mean(1, keepdim=True)), cast(Tensor, pool.q.weight), pool.q.bias)
        k = F.linear(norm(pool.norm_k, x), pool.k)
        v = F.linear(norm(pool.norm_v, x), pool.v, pool.v_bias)
        out = _attend(*(part.unflatten(-1, (pool.num_heads, -1)) for part in (q, k, v)))
        return F.linear(out[:, 0], cast(Tensor, pool.proj.weight), pool.proj.bias)


def _attend(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """(n, tokens, heads, d) each. Returns (n, tokens, heads * d)."""
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=causal)
    return out.transpose(1, 2).flatten(2)


def measure(dtype_name: str, batch: int, repeats: int) -> list[dict[str, Any]]:
    """One row for images as C, images as G, and texts."""
    with torch.device("meta"):
        empty = ContrastiveModel(SHAPE).to(getattr(torch, dtype_name))
    model = randomize(empty.to_empty(device="cpu"))
    eager = Eager(model)
    side = SHAPE.vision.image_size
    tiles = torch.randint(0, 256, (batch, side, side, 3), dtype=torch.uint8)
    ids = torch.randint(3, SHAPE.llm.vocab_size, (batch, TEXT_TOKENS))
    positions, last = torch.arange(TEXT_TOKENS).expand(batch, -1), torch.full((batch,), TEXT_TOKENS - 1)
    cases: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
        "images, C": (lambda: model.embed_images(tiles, "c"), lambda: eager.embed_images(tiles, "c")),
        "images, G": (lambda: model.embed_images(tiles, "g"), lambda: eager.embed_images(tiles, "g")),
        "texts": (lambda: model.embed_texts(ids, positions, last), lambda: eager.embed_texts(ids)),
    }
    rows = []
    for name, (ours, theirs) in cases.items():
        expected = theirs()
        difference = ((ours() - expected).abs().max() / expected.abs().max()).item()
        timings = compare({"vitrail": ours, "eager": theirs}, warmup=2, repeats=repeats)
        milliseconds = {contender: timing.median for contender, timing in timings.items()}
        rows.append(
            {
                "inputs": name,
                "dtype": dtype_name,
                "batch": batch,
                **{f"{contender}_ms": value for contender, value in milliseconds.items()},
                "vitrail_per_second": 1e3 * batch / milliseconds["vitrail"],
                "times_as_fast": milliseconds["eager"] / milliseconds["vitrail"],
                "difference": difference,
                "n": timings["vitrail"].n,
            }
        )
    return rows


def main() -> None:
    """Measure, print, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=10, help="timed rounds")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--out", help="folder of the JSON; bench/results/<device> by default")
    arguments = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # these are figures of a CPU, whatever else is there
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        for dtype_name in arguments.dtypes:
            for row in measure(dtype_name, arguments.batch, arguments.repeats):
                rows.append(row)
                print(
                    f"{row['inputs']:10} {row['dtype']:9} vitrail {row['vitrail_ms']:8.2f} ms, "
                    f"eager torch {row['eager_ms']:8.2f} ms, {row['times_as_fast']:.2f} times as fast, "
                    f"{row['vitrail_per_second']:.1f} a second, differ by {row['difference']:.1e}",
                    flush=True,
                )
    path = write_results(
        results_path("embed", arguments.out),
        rows,
        title="Embeddings of a scaled-down InternVL-C/G, vitrail against eager torch",
        notes="Medians of a batch; eager torch with fused norms, SDPA and plain attention pooling.",
    )
    print(f"written to {path}")


if __name__ == "__main__":
    main()
