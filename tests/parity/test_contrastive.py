"""InternVL-C/G against direct transcriptions of its formulas in float64, and its LLaMA against transformers'.

The transcriptions below work on a checkpoint's tensors by their official names and share no code with the models:
masks are whole matrices of booleans, keys and values of the attention pool are made.
"""

import math
from collections.abc import Callable, Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from vitrail.runtime.models.contrastive import ContrastiveModel
from vitrail.runtime.models.qllama import QLLaMACache
from vitrail.runtime.texts import embed_texts, encode_ids

from ..random_checkpoints import build_contrastive, contrastive_config, random_tiles, random_weights
from .conftest import Compare

CONFIG = contrastive_config()
LLM = CONFIG["qllama_config"]
QUERIES, HIDDEN = CONFIG["num_query_token"], LLM["hidden_size"]
HEADS, POOL_HEADS = LLM["num_attention_heads"], CONFIG["attn_pool_num_heads"]

Weights = Mapping[str, Tensor]


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return random_weights(CONFIG)


@pytest.fixture(scope="module")
def exact(weights: Weights) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in weights.items()}


@pytest.fixture(scope="module")
def model(weights: Weights) -> ContrastiveModel:
    return build_contrastive(CONFIG, weights)


@pytest.fixture(scope="module")
def vision(model: ContrastiveModel) -> Tensor:
    """What the ViT makes of three images; its own parity stands in test_chat_models.py."""
    return model.vision_model(random_tiles(3, 84))


# The formulas


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + LLM["rms_norm_eps"]).sqrt()


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """q: (n, queries, width), k and v: (n, keys, width); mask: (queries, keys), true where a query sees a key."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf)
    return (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)


def rotated(x: Tensor, positions: Tensor) -> Tensor:
    x = x.unflatten(-1, (HEADS, -1))
    half = x.shape[-1] // 2
    angles = positions[:, None] * LLM["rope_theta"] ** (-torch.arange(half, dtype=torch.float64) / half)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).flatten(2)


def plain_pool(x: Tensor, w: Weights, prefix: str) -> Tensor:
    """The attention pool with keys and values of every token, as the reference writes it."""

    def part(name: str, source: Tensor) -> Tensor:
        norm = f"{prefix}.norm1_{name}"
        normed = F.layer_norm(source, source.shape[-1:], w[f"{norm}.weight"], w[f"{norm}.bias"], 1e-5)
        return normed @ w[f"{prefix}.cross_attn.{name}.weight"].T + w[f"{prefix}.cross_attn.{name}_bias"]

    out = attend(part("q", x.mean(1, keepdim=True)), part("k", x), part("v", x), POOL_HEADS)
    return out[:, 0] @ w[f"{prefix}.cross_attn.proj.weight"].T + w[f"{prefix}.cross_attn.proj.bias"]


def plain_qllama(x: Tensor, w: Weights, mask: Tensor, vision: Tensor | None = None, start: int = 0) -> Tensor:
    """Final hidden states of a whole sequence under a whole mask."""
    positions = torch.arange(start, start + x.shape[1], dtype=torch.float64)
    for layer in range(LLM["num_hidden_layers"]):
        own = {
            name.removeprefix(f"qllama.model.layers.{layer}."): tensor
            for name, tensor in w.items()
            if name.startswith(f"qllama.model.layers.{layer}.")
        }
        y = rms(x, own["input_layernorm.weight"])
        q, k, v = (y @ own[f"self_attn.{part}_proj.weight"].T for part in "qkv")
        out = attend(rotated(q, positions), rotated(k, positions), v, HEADS, mask)
        x = x + out @ own["self_attn.o_proj.weight"].T
        if vision is not None and layer % 2 == 0:
            y, seen = rms(x[:, :QUERIES], own["cross_attn.norm1.weight"]), rms(vision, own["cross_attn.norm2.weight"])
            q = y @ own["cross_attn.q_proj.weight"].T
            k, v = (seen @ own[f"cross_attn.{part}_proj.weight"].T for part in "kv")
            looked = attend(q, k, v, HEADS) @ own["cross_attn.o_proj.weight"].T
            x = torch.cat((x[:, :QUERIES] + looked, x[:, QUERIES:]), 1)
        y = rms(x, own["post_attention_layernorm.weight"])
        gate, up = y @ own["mlp.gate_proj.weight"].T, y @ own["mlp.up_proj.weight"].T
        x = x + (gate * gate.sigmoid() * up) @ own["mlp.down_proj.weight"].T
    return rms(x, w["qllama.model.norm.weight"])


def with_queries(w: Weights, ids: Tensor) -> Tensor:
    return torch.cat((w["query_tokens"].expand(len(ids), -1, -1), w["qllama.model.embed_tokens.weight"][ids]), 1)


def caption_mask(tokens: int) -> Tensor:
    """Queries see each other and no text; text sees all queries and the text up to itself."""
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    mask[:QUERIES, :QUERIES] = True
    return mask


def token_ids(rows: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(3, LLM["vocab_size"], (rows, tokens), generator=torch.Generator().manual_seed(seed))


def positions(rows: int, tokens: int) -> Tensor:
    return torch.arange(tokens).expand(rows, -1)


# Images


@pytest.mark.parametrize("prefix", ["clip_projector", "clip_projector2"])
def test_attention_pooling_without_keys_and_values_is_attention_pooling(
    prefix: str, model: ContrastiveModel, exact: Weights, vision: Tensor, compare: Compare
) -> None:
    x = vision if prefix == "clip_projector" else model.encode_queries(vision)
    pooled = getattr(model, prefix)(x)
    assert pooled.shape == (3, 20)
    compare(f"attention pool of {x.shape[-1]} channels", pooled.double(), plain_pool(x.double(), exact, prefix))


def test_attention_pooling_in_half_precision_errs_as_the_plain_form_does(
    weights: Weights, exact: Weights, vision: Tensor
) -> None:
    expected = plain_pool(vision.double(), exact, "clip_projector")
    half = {name: tensor.bfloat16() for name, tensor in weights.items()}
    ours = build_contrastive(CONFIG, weights, torch.bfloat16).clip_projector(vision.bfloat16())
    plain = plain_pool(vision.bfloat16(), half, "clip_projector")
    assert (ours - expected).square().mean() <= 4 * (plain - expected).square().mean()


def test_queries_look_at_the_image_in_every_second_layer(
    model: ContrastiveModel, exact: Weights, vision: Tensor, compare: Compare
) -> None:
    everything = torch.ones(QUERIES, QUERIES, dtype=torch.bool)
    expected = plain_qllama(exact["query_tokens"].expand(3, -1, -1), exact, everything, vision.double())
    compare("QLLaMA as image encoder", model.encode_queries(vision).double(), expected)


def test_g_is_the_sum_of_two_unit_vectors_and_c_the_raw_pool(
    model: ContrastiveModel, exact: Weights, vision: Tensor, compare: Compare
) -> None:
    tiles = random_tiles(3, 84)
    everything = torch.ones(QUERIES, QUERIES, dtype=torch.bool)
    pooled = plain_pool(vision.double(), exact, "clip_projector")
    queries = plain_qllama(exact["query_tokens"].expand(3, -1, -1), exact, everything, vision.double())
    second = plain_pool(queries, exact, "clip_projector2")
    compare("C", model.embed_images(tiles, "c").double(), pooled)
    expected = pooled / pooled.norm(dim=1, keepdim=True) + second / second.norm(dim=1, keepdim=True)
    compare("G", model.embed_images(tiles, "g").double(), expected)


# Texts


def test_the_text_encoder_is_the_last_token_of_a_causal_llama(
    model: ContrastiveModel, exact: Weights, compare: Compare
) -> None:
    ids = token_ids(4, 11)
    causal = torch.ones(11, 11, dtype=torch.bool).tril()
    hidden = plain_qllama(exact["qllama.model.embed_tokens.weight"][ids], exact, causal)
    last = torch.tensor([10, 4, 0, 7])
    expected = hidden[torch.arange(4), last] @ exact["text_projection"]
    compare("text embeddings", model.embed_texts(ids, positions(4, 11), last).double(), expected)


@pytest.mark.parametrize("unknown", [(), (3,), (2, 5), (4, 5, 6)])
def test_unknown_tokens_are_hidden_and_shift_the_token_that_is_read(
    unknown: tuple[int, ...], model: ContrastiveModel, exact: Weights, compare: Compare
) -> None:
    ids = token_ids(1, 12)
    ids[0, list(unknown)] = 0
    ids[0, -1] = 2
    seen = ids[0] > 0
    causal = torch.ones(12, 12, dtype=torch.bool).tril() & seen
    hidden = plain_qllama(exact["qllama.model.embed_tokens.weight"][ids], exact, causal)
    expected = hidden[0, int(seen.sum()) - 1] @ exact["text_projection"]
    text = encode_ids(ids[0, :-1].tolist(), 2)
    compare(f"a text with {len(unknown)} unknown tokens", embed_texts(model, [text])[0].double(), expected)


def test_qllama_without_an_image_is_the_llama_of_transformers(
    model: ContrastiveModel, weights: Weights, compare: Compare
) -> None:
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    same += ("num_key_value_heads", "rms_norm_eps", "max_position_embeddings")
    rope = {"rope_type": "default", "rope_theta": LLM["rope_theta"]}
    config = LlamaConfig(**{key: LLM[key] for key in same}, rope_parameters=rope, tie_word_embeddings=False)
    config._attn_implementation = "eager"
    theirs = LlamaForCausalLM(config).eval()
    state = {
        name.removeprefix("qllama."): tensor
        for name, tensor in weights.items()
        if name.startswith("qllama.") and "cross_attn" not in name
    }
    theirs.load_state_dict(state, strict=True)
    ids = token_ids(2, 23)
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
    compare("QLLaMA's LLaMA", model.qllama.logits(model.qllama(model.qllama.embed(ids), positions(2, 23))), expected)


# Both


def test_matching_sees_queries_and_text_in_both_directions(
    model: ContrastiveModel, exact: Weights, vision: Tensor, compare: Compare
) -> None:
    ids = token_ids(3, 5)
    mask = torch.ones(QUERIES + 5, QUERIES + 5, dtype=torch.bool)
    hidden = plain_qllama(with_queries(exact, ids), exact, mask, vision.double())
    each = hidden[:, :QUERIES] @ exact["itm_head.weight"].T + exact["itm_head.bias"]
    compare("image-text matching", model.match(vision, ids).double(), each.mean(1))


def test_captions_are_read_from_the_queries_with_a_cache_as_without(
    model: ContrastiveModel, exact: Weights, vision: Tensor, compare: Compare
) -> None:
    ids = token_ids(3, 9)
    total = QUERIES + 9
    hidden = plain_qllama(with_queries(exact, ids), exact, caption_mask(total), vision.double())
    expected = hidden[:, QUERIES + 3 :] @ exact["qllama.lm_head.weight"].T
    cache = QLLaMACache(model.config.llm, 3, total, dtype=torch.float32, device=torch.device("cpu"))
    seen = [model.begin_caption(vision, ids[:, :4], cache)]
    for step in range(4, 9):
        assert cache.used == QUERIES + step
        seen.append(model.continue_caption(ids[:, step], cache))
    compare("caption logits", torch.stack(seen, 1).double(), expected)


@pytest.mark.parametrize(
    ("planted", "apply"),
    [
        ("a layer that does not look", lambda w: w | _silenced(w)),
        ("norm2 of another layer", lambda w: w | _swapped(w, "layers.0.cross_attn.norm2", "layers.2.cross_attn.norm2")),
        ("k and v swapped", lambda w: w | _swapped(w, "layers.0.cross_attn.k_proj", "layers.0.cross_attn.v_proj")),
    ],
)
def test_the_comparison_would_see(
    planted: str, apply: Callable[[dict[str, Tensor]], dict[str, Tensor]], weights: dict[str, Tensor], vision: Tensor
) -> None:
    model, faulty = build_contrastive(CONFIG, weights), build_contrastive(CONFIG, apply(weights))
    difference = model.encode_queries(vision) - faulty.encode_queries(vision)
    assert difference.abs().max() > 1e-3, planted


def _swapped(weights: Weights, first: str, second: str) -> dict[str, Tensor]:
    first, second = f"qllama.model.{first}.weight", f"qllama.model.{second}.weight"
    return {first: weights[second], second: weights[first]}


def _silenced(weights: Weights) -> dict[str, Tensor]:
    name = "qllama.model.layers.2.cross_attn.o_proj.weight"
    return {name: torch.zeros_like(weights[name])}
