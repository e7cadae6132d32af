"""The transformers-native form of a checkpoint, written by transformers itself, against the official form of it."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from vitrail.runtime.config import load_config
from vitrail.runtime.weights import load_model

from ..random_checkpoints import INTERNVIT_6B, INTERNVIT_300M, build, chat_config, random_tiles, random_weights
from . import greedy
from .conftest import Compare
from .in_transformers import IMAGE_TOKEN, internvl, pixel_values

# Names as `save_pretrained` writes them, as the model's own `state_dict` has them, and as the official converter's
# 6B ones were written.
SPELLINGS: dict[str, Callable[[str], str]] = {
    "published": lambda name: name,
    "of the modules": lambda name: (
        re.sub(r"^language_model\.model\.", "model.language_model.", name).replace("language_model.lm_head", "lm_head")
        if name.startswith("language_model.")
        else f"model.{name}"
    ),
    "of the official converter": lambda name: re.sub(r"\.attention\.([qk]_norm)", r".attn.\1", name),
}


@torch.no_grad()
@pytest.mark.parametrize(
    ("architecture", "vision"),
    [
        ("Qwen2ForCausalLM", INTERNVIT_300M),
        ("Qwen3ForCausalLM", INTERNVIT_6B),
        ("LlamaForCausalLM", INTERNVIT_300M),
    ],
)
def test_a_checkpoint_that_transformers_saved_is_the_official_one(
    architecture: str, vision: dict[str, Any], tmp_path: Path, compare: Compare
) -> None:
    # Transformers writes its rotary settings as one entry, and LLaMA's with dynamic scaling.
    llm = {"rope_scaling": {"type": "dynamic", "factor": 2.0}} if architecture == "LlamaForCausalLM" else {}
    config = chat_config(architecture, vision=vision, llm=llm, template="internvl2_5")
    weights = random_weights(config)
    theirs = internvl(config, weights)
    theirs.save_pretrained(tmp_path)
    official = build(config, weights)
    native = load_model(tmp_path, load_config(tmp_path), dtype=torch.float32, device=torch.device("cpu"))
    assert native.config.layout == "transformers"
    parameters = dict(native.named_parameters())
    assert len(parameters) == len(list(official.parameters()))
    for name, parameter in official.named_parameters():
        assert torch.equal(parameters[name], parameter), name

    tiles = random_tiles(2, 84)
    prompt = torch.tensor([1, 2, *[IMAGE_TOKEN] * (2 * native.config.tokens_per_tile), 3, 4])
    expected = theirs(input_ids=prompt[None], pixel_values=pixel_values(tiles)).logits[0]
    spliced = native.splice(prompt, native.encode_tiles(tiles).flatten(0, 1), IMAGE_TOKEN)
    compare(f"{architecture}, -hf: logits", greedy.all_logits(native.language_model, spliced), expected)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_the_names_is_known(spelling: str, tmp_path: Path) -> None:
    config = chat_config("Qwen2ForCausalLM", vision=INTERNVIT_6B)
    weights = random_weights(config)
    internvl(config, weights).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    respelt = {SPELLINGS[spelling](name): tensor for name, tensor in tensors.items()}
    assert (respelt.keys() == tensors.keys()) == (spelling == "published")
    save_file(respelt, file)
    native = load_model(tmp_path, load_config(tmp_path), dtype=torch.float32, device=torch.device("cpu"))
    parameters = dict(native.named_parameters())
    for name, parameter in build(config, weights).named_parameters():
        assert torch.equal(parameters[name], parameter), name


def test_a_head_that_is_the_embedding_need_not_be_stored(tmp_path: Path) -> None:
    config = chat_config("Qwen2ForCausalLM", vision=INTERNVIT_300M)
    internvl(config, random_weights(config)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["language_model.lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    written = json.loads((tmp_path / "config.json").read_text())
    del written["tie_word_embeddings"]
    written["text_config"]["tie_word_embeddings"] = True
    (tmp_path / "config.json").write_text(json.dumps(written))
    native = load_model(tmp_path, load_config(tmp_path), dtype=torch.float32, device=torch.device("cpu"))
    assert native.language_model.head.weight is native.language_model.embedding
