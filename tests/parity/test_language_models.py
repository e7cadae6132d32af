"""The decoder's other architectures against transformers' models: same random weights, fp32, CPU."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from vitrail.runtime.models.decoder import Decoder

from ..random_checkpoints import build, chat_config, random_weights
from . import greedy
from .conftest import Compare
from .in_transformers import language_model

NEW_TOKENS = 32


def check(ours: Decoder, theirs: PreTrainedModel, compare: Compare, *, tokens: int = 20) -> None:
    """Logits at every position of a prompt, then 32 greedy tokens with the cache and without."""
    ids = token_ids(tokens, ours.config.vocab_size)
    name = ours.config.architecture
    with torch.no_grad():
        embeddings = ours.embed(ids)
        compare(f"{name}: logits", greedy.all_logits(ours, embeddings), theirs(input_ids=ids[None]).logits[0])
        expected = greedy.in_transformers(theirs, ids, NEW_TOKENS)
        cached = greedy.cached(ours, embeddings, NEW_TOKENS)
        compare(f"{name}: logits of 32 greedy tokens", cached.logits, expected.logits)
        assert expected.smallest_gap > 1e-4
        assert cached.ids == expected.ids
        assert greedy.uncached(ours, embeddings, NEW_TOKENS).ids == expected.ids


def token_ids(count: int, vocab_size: int) -> Tensor:
    return torch.randint(0, vocab_size, (count,), generator=torch.Generator().manual_seed(count))


def pair(architecture: str, llm: Mapping[str, Any] | None = None, seed: int = 0) -> tuple[Decoder, PreTrainedModel]:
    """An architecture that transformers has under the checkpoint's own names."""
    config = chat_config(architecture, llm=llm)
    weights = random_weights(config, seed)
    return build(config, weights).language_model, language_model(config["llm_config"], weights)


def test_qwen3_with_per_head_qk_norm_and_its_own_head_size(compare: Compare) -> None:
    ours, theirs = pair("Qwen3ForCausalLM")
    assert ours.config.head_dim == 24 != ours.config.hidden_size // ours.config.num_attention_heads
    check(ours, theirs, compare)


def test_qwen2_with_more_query_groups_and_a_single_kv_head(compare: Compare) -> None:
    check(*pair("Qwen2ForCausalLM", {"num_key_value_heads": 1}), compare)


def test_llama_without_grouped_queries(compare: Compare) -> None:
    check(*pair("LlamaForCausalLM", {"num_key_value_heads": 4}), compare)


def test_internlm_1_is_llama_with_biases_on_q_k_v_and_o(compare: Compare) -> None:
    config = chat_config("InternLMForCausalLM", llm={"num_key_value_heads": 4})
    weights = random_weights(config)
    assert "language_model.model.layers.0.self_attn.o_proj.bias" in weights
    as_llama = config["llm_config"] | {"architectures": ["LlamaForCausalLM"], "attention_bias": True}
    check(build(config, weights).language_model, language_model(as_llama, weights), compare)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (6, 1), (3, 3), (6, 2)])
@pytest.mark.parametrize("bias", [False, True], ids=["", "biases"])
def test_internlm2_is_the_llama_whose_projections_its_wqkv_packs(
    heads: int, kv_heads: int, bias: bool, compare: Compare
) -> None:
    sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "hidden_size": 16 * heads}
    llama = chat_config("LlamaForCausalLM", llm={**sizes, "attention_bias": bias})
    weights = random_weights(llama, seed=heads)
    internlm2 = chat_config("InternLM2ForCausalLM", llm={**sizes, "bias": bias})
    packed = as_internlm2(weights, heads, kv_heads, head_dim=16)
    check(build(internlm2, packed).language_model, language_model(llama["llm_config"], weights), compare)


def as_internlm2(weights: Mapping[str, Tensor], heads: int, kv_heads: int, head_dim: int) -> dict[str, Tensor]:
    """A LLaMA checkpoint under InternLM2's names, `wqkv` filled row by row from the published formulas.

    With g = heads / kv_heads and d = head_dim, for query head h, KV head n and channel e:
    Wq[h d + e] = wqkv[((h div g)(g + 2) + h mod g) d + e], Wk[n d + e] = wqkv[(n (g + 2) + g) d + e],
    Wv[n d + e] = wqkv[(n (g + 2) + g + 1) d + e].
    """
    renamed = {
        "model.embed_tokens": "model.tok_embeddings",
        "lm_head": "output",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    packed: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if ".q_proj." in name or ".k_proj." in name or ".v_proj." in name:
            continue
        for llama, internlm2 in renamed.items():
            name = name.replace(llama, internlm2)
        packed[name] = tensor
    group = heads // kv_heads
    for name, query in weights.items():
        if ".q_proj." not in name:
            continue
        key, value = weights[name.replace("q_proj", "k_proj")], weights[name.replace("q_proj", "v_proj")]
        wqkv = torch.full((query.shape[0] + key.shape[0] + value.shape[0], *query.shape[1:]), torch.nan)
        for e in range(head_dim):
            for h in range(heads):
                wqkv[((h // group) * (group + 2) + h % group) * head_dim + e] = query[h * head_dim + e]
            for n in range(kv_heads):
                wqkv[(n * (group + 2) + group) * head_dim + e] = key[n * head_dim + e]
                wqkv[(n * (group + 2) + group + 1) * head_dim + e] = value[n * head_dim + e]
        packed[name.replace("self_attn.q_proj", "attention.wqkv")] = wqkv
    return packed


@torch.no_grad()
@pytest.mark.parametrize("tokens", [20, 32, 33, 90], ids="short last-short first-long long".split())
def test_phi3_switches_its_longrope_factors_with_the_length(tokens: int, compare: Compare) -> None:
    ours, theirs = pair("Phi3ForCausalLM")
    ids = token_ids(tokens, ours.config.vocab_size)
    logits = greedy.all_logits(ours, ours.embed(ids))
    compare(f"Phi3ForCausalLM: logits of {tokens} tokens, switch at 32", logits, theirs(input_ids=ids[None]).logits[0])


def test_phi3_answers_beyond_the_switch(compare: Compare) -> None:
    check(*pair("Phi3ForCausalLM"), compare, tokens=40)


@torch.no_grad()
@pytest.mark.parametrize(
    "scaling", [{"type": "linear", "factor": 3.0}, {"type": "dynamic", "factor": 2.0}], ids=["linear", "dynamic"]
)
@pytest.mark.parametrize("tokens", [24, 25, 60])
def test_llama_with_rope_scaling_before_and_beyond_its_trained_length(
    scaling: dict[str, Any], tokens: int, compare: Compare
) -> None:
    # A fresh transformers model each time: dynamic NTK there keeps the longest length it has seen.
    ours, theirs = pair("LlamaForCausalLM", {"max_position_embeddings": 24, "rope_scaling": scaling})
    ids = token_ids(tokens, ours.config.vocab_size)
    name = f"LLaMA, {scaling['type']} scaling: logits of {tokens} tokens, trained to 24"
    compare(name, greedy.all_logits(ours, ours.embed(ids)), theirs(input_ids=ids[None]).logits[0])


@torch.no_grad()
def test_dynamic_scaling_keeps_one_base_for_the_planned_length(compare: Compare) -> None:
    scaling = {"type": "dynamic", "factor": 2.0}
    ours, theirs = pair("LlamaForCausalLM", {"max_position_embeddings": 24, "rope_scaling": scaling})
    ids = token_ids(60, ours.config.vocab_size)
    expected = theirs(input_ids=ids[None]).logits[0]
    # The last 20 tokens one by one, after a prefill of 40 planned for 60.
    stepwise = greedy.teacher_forced(ours, ours.embed(ids), prefill=40)
    compare("LLaMA, dynamic scaling: logits of 20 cached steps", stepwise, expected[39:])
