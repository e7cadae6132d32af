"""vitrail against transformers' `InternVLForConditionalGeneration`: same random weights, fp32, CPU."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import InternVLForConditionalGeneration

from vitrail.runtime.models.internvl import InternVLModel

from ..random_checkpoints import INTERNVIT_6B, INTERNVIT_300M, build, chat_config, random_tiles, random_weights
from . import greedy
from .conftest import Compare
from .in_transformers import IMAGE_TOKEN, internvl, pixel_values

VISION = {
    "internvit-6b": INTERNVIT_6B,
    "internvit-300m": INTERNVIT_300M,
    "rms-norm-biases": {"norm_type": "rms_norm", "qk_normalization": False, "qkv_bias": True},
    "layer-norm-qk-norm": {"norm_type": "layer_norm", "qk_normalization": True, "qkv_bias": False},
}
NEW_TOKENS = 32


@dataclass
class Pair:
    """The same checkpoint in both implementations, and one prompt around two tiles."""

    ours: InternVLModel
    theirs: InternVLForConditionalGeneration
    tiles: Tensor
    prompt: Tensor

    def spliced(self) -> Tensor:
        visual = self.ours.encode_tiles(self.tiles).flatten(0, 1)
        return self.ours.splice(self.prompt, visual, IMAGE_TOKEN)


def make_pair(seed: int, *, faint: bool = False, **config_changes: Any) -> Pair:
    config = chat_config(**config_changes)
    weights = random_weights(config, seed)
    if faint:
        for name, tensor in weights.items():
            if name.startswith("vision_model.embeddings.") or name.endswith((".ls1", ".ls2", "embed_tokens.weight")):
                tensor *= 1e-3
    ours = build(config, weights)
    tiles = random_tiles(2, ours.config.tile_size, seed)
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(0, IMAGE_TOKEN, (12,), generator=generator)
    image = torch.full((ours.config.tokens_per_tile,), IMAGE_TOKEN)
    # Text between the tiles too, as two images of one prompt have it.
    prompt = torch.cat((words[:5], image, words[5:8], image, words[8:]))
    return Pair(ours, internvl(config, weights), tiles, prompt)


@pytest.fixture(scope="module", params=["Qwen2ForCausalLM", "LlamaForCausalLM"])
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=VISION)
def pair(request: pytest.FixtureRequest, architecture: str) -> Pair:
    return make_pair(list(VISION).index(request.param), architecture=architecture, vision=VISION[request.param])


@torch.no_grad()
def test_vit_hidden_states_agree_at_every_layer(pair: Pair, compare: Compare) -> None:
    depth = pair.ours.config.vision.num_hidden_layers
    ours = pair.ours.vision_model.hidden_states(pair.tiles, range(depth + 1))
    theirs = pair.theirs.model.vision_tower(pixel_values(pair.tiles), output_hidden_states=True).hidden_states
    assert len(theirs) == depth + 1
    for layer, expected in enumerate(theirs):
        compare(f"ViT hidden state {layer}", ours[layer], expected)
    assert torch.equal(pair.ours.vision_model(pair.tiles), ours[depth])


@torch.no_grad()
def test_visual_tokens_of_uint8_tiles_agree(pair: Pair, compare: Compare) -> None:
    theirs = pair.theirs.get_image_features(pixel_values(pair.tiles)).pooler_output
    compare("visual tokens", pair.ours.encode_tiles(pair.tiles), theirs)


@torch.no_grad()
def test_logits_agree_at_every_position_of_a_prompt_with_images(pair: Pair, compare: Compare) -> None:
    theirs = pair.theirs(input_ids=pair.prompt[None], pixel_values=pixel_values(pair.tiles)).logits[0]
    compare("logits", greedy.all_logits(pair.ours.language_model, pair.spliced()), theirs)


@torch.no_grad()
def test_greedy_tokens_agree_with_and_without_the_kv_cache(pair: Pair, compare: Compare) -> None:
    decoder = pair.ours.language_model
    theirs = greedy.in_transformers(pair.theirs, pair.prompt, NEW_TOKENS, pixel_values=pixel_values(pair.tiles))
    ours = greedy.cached(decoder, pair.spliced(), NEW_TOKENS)
    compare("logits of 32 greedy tokens", ours.logits, theirs.logits)
    # Any lead this wide decides the token whatever the order of sums.
    assert theirs.smallest_gap > 1e-4
    assert ours.ids == theirs.ids
    assert greedy.uncached(decoder, pair.spliced(), NEW_TOKENS).ids == theirs.ids
    assert len(set(ours.ids)) > NEW_TOKENS // 4, "a sequence that repeats one token proves little"


@torch.no_grad()
@pytest.mark.parametrize("stored", [56, 112], ids=["to-a-larger-grid", "to-a-smaller-grid"])
def test_visual_tokens_agree_when_positions_are_interpolated(stored: int, compare: Compare) -> None:
    pair = make_pair(7, architecture="Qwen2ForCausalLM", vision={"image_size": stored}, force_image_size=84)
    theirs = pair.theirs.get_image_features(pixel_values(pair.tiles)).pooler_output
    compare(f"visual tokens, positions {stored // 14} to 6 a side", pair.ours.encode_tiles(pair.tiles), theirs)


@torch.no_grad()
def test_visual_tokens_agree_when_an_inner_layer_is_selected(compare: Compare) -> None:
    pair = make_pair(8, architecture="Qwen2ForCausalLM", vision={"num_hidden_layers": 6}, select_layer=-4)
    assert len(pair.ours.vision_model.encoder.layers) == 3
    theirs = pair.theirs.get_image_features(pixel_values(pair.tiles)).pooler_output
    compare("visual tokens of layer -4", pair.ours.encode_tiles(pair.tiles), theirs)


@torch.no_grad()
@pytest.mark.parametrize("kind", [INTERNVIT_6B, INTERNVIT_300M], ids=["internvit-6b", "internvit-300m"])
def test_faint_activations_agree_so_every_norm_has_the_right_epsilon(kind: dict[str, Any], compare: Compare) -> None:
    # With a mean square of 1e-6 the 1e-6 of the blocks, the 1e-5 of the projector and of the decoder all count.
    pair = make_pair(9, faint=True, architecture="Qwen2ForCausalLM", vision=kind)
    depth = pair.ours.config.vision.num_hidden_layers
    ours = pair.ours.vision_model.hidden_states(pair.tiles, range(depth + 1))
    theirs = pair.theirs.model.vision_tower(pixel_values(pair.tiles), output_hidden_states=True).hidden_states
    for layer, expected in enumerate(theirs):
        compare(f"faint ViT hidden state {layer}", ours[layer], expected)
    native = pair.theirs(input_ids=pair.prompt[None], pixel_values=pixel_values(pair.tiles))
    visual = pair.ours.encode_tiles(pair.tiles)
    compare("faint visual tokens", visual, native.image_hidden_states)
    spliced = pair.ours.splice(pair.prompt, visual.flatten(0, 1), IMAGE_TOKEN)
    compare("faint logits", greedy.all_logits(pair.ours.language_model, spliced), native.logits[0])
