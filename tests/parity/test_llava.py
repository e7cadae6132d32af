"""InternVL-Chat 1.0: its LLaMA against transformers', its projectors against the formulas in float64."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.runtime.models.llava import LlavaModel

from ..random_checkpoints import build, build_contrastive, llava_config, random_tiles, random_weights
from . import greedy
from .conftest import Compare
from .in_transformers import language_model

PLACE = 0  # `<unk>`, whose places in a prompt visual tokens take
NEW_TOKENS = 8
TOWER = "model.vision_tower.vision_tower."
Weights = dict[str, Tensor]


def make(seed: int = 0, **changes: Any) -> tuple[LlavaModel, Weights]:
    config = llava_config(**changes)
    weights = random_weights(config, seed)
    model = build(config, weights)
    assert isinstance(model, LlavaModel)
    return model, weights


def linear(x: Tensor, weights: Weights, name: str) -> Tensor:
    return x @ weights[f"{name}.weight"].double().T + weights[f"{name}.bias"].double()


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


@torch.no_grad()
@pytest.mark.parametrize("entries", [{}, {"bias": True}], ids=["Vicuna", "InternLM-7B"])
def test_the_chat_is_transformers_llama_behind_our_visual_tokens(entries: dict[str, Any], compare: Compare) -> None:
    model, weights = make(3, **entries)
    biased = "model.layers.0.self_attn.o_proj.bias" in weights
    assert biased == bool(entries)
    llm = llava_config(**entries) | {"architectures": ["LlamaForCausalLM"], "attention_bias": biased}
    llama = {name: weights[name] for name in weights if name.startswith(("model.layers.", "model.norm.", "lm_head."))}
    llama["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"]
    theirs = language_model(llm, {f"language_model.{name}": tensor for name, tensor in llama.items()})

    visual = model.encode_tiles(random_tiles(1, 336)).flatten(0, 1)
    prompt = torch.tensor([1, 17, 201, *[PLACE] * len(visual), 45, 46, 47])
    spliced = model.splice(prompt, visual, PLACE)
    embedded = weights["model.embed_tokens.weight"][prompt]
    embedded[3 : 3 + len(visual)] = visual
    assert torch.equal(spliced, embedded)
    expected = theirs(inputs_embeds=embedded[None]).logits[0]
    compare("logits", greedy.all_logits(model.language_model, spliced), expected)

    ours = greedy.cached(model.language_model, spliced, NEW_TOKENS)
    sequence = embedded
    for token in ours.ids:
        logits = theirs(inputs_embeds=sequence[None]).logits[0, -1]
        assert int(logits.argmax()) == token
        sequence = torch.cat((sequence, weights["model.embed_tokens.weight"][[token]]))


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "feature", "select_layer"),
    [
        ("mlp2x_gelu", "patch", -2),
        ("mlp3x_gelu_ln", "patch", -1),
        ("mlp1x_gelu", "patch", 1),
        ("linear", "cls_patch", -3),
    ],
)
def test_patches_pass_the_projector_that_the_config_names(
    kind: str, feature: str, select_layer: int, compare: Compare
) -> None:
    settings = {"mm_projector_type": kind, "mm_vision_select_feature": feature, "mm_vision_select_layer": select_layer}
    model, weights = make(4, **settings)
    tiles = random_tiles(2, 336)
    layer = select_layer % 4
    assert len(model.vision_model.encoder.layers) == layer
    x = model.vision_model.hidden_states(tiles, {layer})[layer].double()
    x = x if feature == "cls_patch" else x[:, 1:]
    name = "model.mm_projector"
    if kind.endswith("ln"):
        x = F.layer_norm(x, x.shape[-1:], weights[f"{name}.0.weight"].double(), weights[f"{name}.0.bias"].double())
    layers = [name] if kind == "linear" else sorted({key.rpartition(".")[0] for key in weights if name in key})
    layers = [key for key in layers if not (kind.endswith("ln") and key == f"{name}.0")]
    for index, key in enumerate(layers):
        x = linear(gelu(x) if index else x, weights, key)
    assert len(layers) == (1 if kind == "linear" else int(kind[3]))
    compare(f"visual tokens, {kind}", model.encode_tiles(tiles).double(), x)
    assert model.encode_tiles(tiles).shape[1] == model.config.tokens_per_tile


@torch.no_grad()
def test_with_qllama_its_queries_stand_before_the_patches(compare: Compare) -> None:
    model, weights = make(5, qllama=True)
    whole = build_contrastive(llava_config(qllama=True)["vision_tower_config"], _tower(weights))
    tiles = random_tiles(2, 336)
    states = whole.vision_model.hidden_states(tiles, {2, 3})
    parts = []
    for name, x in (("mlp2", whole.encode_queries(states[3])), ("mlp1", states[2][:, 1:])):
        first = linear(x.double(), weights, f"model.mm_projector.{name}.0")
        parts.append(linear(gelu(first), weights, f"model.mm_projector.{name}.2"))
    visual = model.encode_tiles(tiles)
    assert visual.shape[1] == model.config.tokens_per_tile == 6 + 576
    compare("queries, then patches", visual.double(), torch.cat(parts, dim=1))


def _tower(weights: Weights) -> Weights:
    """The whole InternVL-14B that the vision half of a checkpoint with QLLaMA was taken from."""
    whole = random_weights(llava_config(qllama=True)["vision_tower_config"])
    return whole | {name.removeprefix(TOWER): tensor for name, tensor in weights.items() if name.startswith(TOWER)}
