"""InternVL-C's original file: the same model under the names of its time, and what it cannot do."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vitrail.runtime import Runtime
from vitrail.runtime.config import ORIGINAL_C, ContrastiveConfig, load_any_config, parse_any_config
from vitrail.runtime.errors import CheckpointError, UnsupportedError
from vitrail.runtime.tokenizer import load_tokenizer
from vitrail.runtime.weights import expected_tensors, load_model

from ..official_configs import INTERNVL_14B_224PX
from ..random_checkpoints import contrastive_config, random_weights
from .tiny_contrastive import write_tiny_contrastive
from .tiny_model import picture

WIDE = picture(200, 100, 2)


def original_name(name: str) -> str:
    """A name of the later checkpoint as the original file has it."""
    renamed = {
        "vision_model.embeddings.class_embedding": "cls_token",
        "vision_model.embeddings.position_embedding": "pos_embed",
        "vision_model.embeddings.patch_embedding": "patch_embed.proj",
        "vision_model.encoder.layers.": "blocks.",
        "qllama.model.": "transformer.",
    }
    for later, original in renamed.items():
        name = name.replace(later, original)
    return f"{name}.gamma" if name.endswith((".ls1", ".ls2")) else name


def original_file(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    dropped = ("clip_projector2.", "query_tokens", "itm_head.", "qllama.lm_head.")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith(dropped)}
    return {
        original_name(name): tensor for name, tensor in kept.items() if "cross_attn" not in name.partition(".")[2]
    } | {name: tensor for name, tensor in kept.items() if name.startswith("clip_projector.")}


@pytest.fixture(scope="module")
def pair(
    sentencepiece_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[Runtime]]:
    """The later checkpoint, and the original file with the same weights."""
    folder = write_tiny_contrastive(sentencepiece_folder(tokens=[]))
    values = json.loads((folder / "config.json").read_text())
    original = tmp_path_factory.mktemp("original")
    torch.save({"module": original_file(random_weights(values))}, original / ORIGINAL_C)
    config = parse_any_config(values | {"original_c": True})
    model = load_model(original, config, dtype=torch.float32, device=torch.device("cpu"))
    with Runtime.from_pretrained(folder, dtype="float32", device="cpu") as later:
        yield [later, Runtime(model, load_tokenizer(folder), name="the original")]


def test_the_file_without_a_config_is_the_released_internvl_c(tmp_path: Path) -> None:
    (tmp_path / ORIGINAL_C).write_bytes(b"")
    config = load_any_config(tmp_path)
    released = parse_any_config(INTERNVL_14B_224PX)
    assert isinstance(config, ContrastiveConfig)
    assert isinstance(released, ContrastiveConfig)
    assert (config.vision, config.llm, config.embed_dim) == (released.vision, released.llm, released.embed_dim)
    assert config.num_query_tokens == 0
    tensors = expected_tensors(tmp_path)
    assert len(tensors) == (4 + 48 * 13) + 14 + (2 + 32 * 9) + 2
    assert round(sum(map(math.prod, tensors.values())) / 1e9, 2) == 12.62
    assert tensors["blocks.47.ls2.gamma"] == (3200,)
    assert tensors["transformer.layers.31.self_attn.q_proj.weight"] == (4096, 4096)
    assert tensors["transformer.embed_tokens.weight"] == (49954, 4096)


def test_it_embeds_and_scores_as_the_later_checkpoint(pair: list[Runtime]) -> None:
    later, original = pair
    assert torch.equal(original.embed(images=WIDE), later.embed(images=WIDE))
    assert torch.equal(original.embed("a red circle"), later.embed("a red circle"))
    assert torch.equal(original.score(WIDE, ["one", "two"]), later.score(WIDE, ["one", "two"]))
    found = original.classify(WIDE, ["cat", "dog"]).probabilities
    assert torch.equal(found, later.classify(WIDE, ["cat", "dog"]).probabilities)


@pytest.mark.parametrize(
    "call",
    [
        lambda rt: rt.embed(images=WIDE, mode="g"),
        lambda rt: rt.score(WIDE, ["one"], mode="g"),
        lambda rt: rt.match(WIDE, "one"),
        lambda rt: rt.caption(WIDE),
    ],
    ids=["embed", "score", "match", "caption"],
)
def test_what_only_internvl_g_does_is_refused(pair: list[Runtime], call: Callable[[Runtime], Any]) -> None:
    with pytest.raises(UnsupportedError, match="the original is InternVL-C alone, without what makes InternVL-G of it"):
        call(pair[1])


def test_a_file_that_lacks_tensors_names_them(tmp_path: Path) -> None:
    values = contrastive_config()
    weights = original_file(random_weights(values))
    del weights["blocks.1.ls1.gamma"]
    torch.save(weights, tmp_path / ORIGINAL_C)
    config = parse_any_config(values | {"original_c": True})
    with pytest.raises(CheckpointError, match=r"1 tensors missing: blocks\.1\.ls1\.gamma"):
        load_model(tmp_path, config, dtype=torch.float32, device=torch.device("cpu"))
