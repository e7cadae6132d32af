"""The embedding benchmark compares like with like: eager torch computes what the model computes."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from vitrail.bench import embed


@torch.inference_mode()
def test_both_sides_embed_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    vision = replace(embed.SHAPE.vision, hidden_size=64, intermediate_size=96, num_hidden_layers=2, image_size=56)
    llm = replace(embed.SHAPE.llm, hidden_size=128, intermediate_size=96, num_hidden_layers=3, vocab_size=64)
    llm = replace(llm, num_attention_heads=2, num_key_value_heads=2, head_dim=64)
    small = replace(embed.SHAPE, vision=vision, llm=llm, pool_heads=4, num_query_tokens=5)
    monkeypatch.setattr(embed, "SHAPE", small)
    rows: list[dict[str, Any]] = embed.measure("float32", batch=2, repeats=1)
    assert [row["inputs"] for row in rows] == ["images, C", "images, G", "texts"]
    for row in rows:
        assert row["difference"] < 1e-5, row
        assert row["vitrail_per_second"] > 0
