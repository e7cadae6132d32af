"""InternVL-Chat 1.0 through `Runtime`: prompts as LLaVA's code makes them, and answers by the ordinary engine."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch

from vitrail.runtime import Runtime
from vitrail.runtime.config import load_any_config
from vitrail.runtime.errors import CheckpointError, InvalidRequestError
from vitrail.runtime.image import open_image, tile_static
from vitrail.runtime.models.llava import LlavaModel
from vitrail.runtime.resize import fit_image
from vitrail.runtime.tokenizer import load_tokenizer

from ..random_checkpoints import llava_config, random_weights, write_checkpoint
from .tiny_model import picture

MakeFolder = Callable[..., Path]
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
TOWER = "model.vision_tower.vision_tower."
WIDE = picture(200, 100, 2)


def write_llava(folder: Path, **changes: Any) -> Path:
    """Random weights beside the tokenizer that `folder` holds."""
    vocabulary = {"vocab_size": load_tokenizer(folder).vocab_size, "max_position_embeddings": 2048}
    config = llava_config(**{**vocabulary, **changes})
    write_checkpoint(folder, config, random_weights(config))
    return folder


def load(folder: Path) -> Runtime:
    return Runtime.from_pretrained(folder, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def folder(sentencepiece_folder: MakeFolder) -> Path:
    return write_llava(sentencepiece_folder(tokens=()))


@pytest.fixture(scope="module")
def rt(folder: Path) -> Iterator[Runtime]:
    with load(folder) as runtime:
        yield runtime


def pieces(folder: Path, *texts: str) -> list[list[int]]:
    """The ids of each text by itself, without `<s>`: one that begins with a word gets its space."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    return [model.encode(text) for text in texts]


def test_a_prompt_is_tokenised_piece_by_piece_around_its_images(rt: Runtime, folder: Path) -> None:
    output = rt.generate("What is the total?", WIDE, max_new_tokens=1)
    before, after = pieces(folder, f"{SYSTEM} USER: ", "\nWhat is the total? ASSISTANT:")
    assert output.prompt_token_ids == [1, *before, *[0] * 576, *after]
    assert (output.num_tiles, output.usage.image_tokens) == ([1], 576)


def test_earlier_turns_end_with_the_end_token_and_no_space(rt: Runtime, folder: Path) -> None:
    history = [("<image>\nWhat?", "A total.")]
    output = rt.generate("How many?", WIDE, history=history, max_new_tokens=1)
    parts = pieces(folder, f"{SYSTEM} USER: ", "\nWhat? ASSISTANT: A total.", "USER: How many? ASSISTANT:")
    assert output.prompt_token_ids == [1, *parts[0], *[0] * 576, *parts[1], 2, *parts[2]]


def test_a_tokenizer_of_the_newer_kind_puts_the_space_behind_images_too(sentencepiece_folder: MakeFolder) -> None:
    folder = write_llava(sentencepiece_folder(tokens=(), config={"legacy": False}))
    with load(folder) as runtime:
        ids = runtime.generate("<image>What", WIDE, max_new_tokens=1).prompt_token_ids
    (after,) = pieces(folder, "What ASSISTANT:")
    assert ids[-len(after) :] == after
    assert ids[-len(after) - 1] == 0


def test_answers_are_those_of_the_model_itself(rt: Runtime) -> None:
    output = rt.generate("What is the total?", WIDE, max_new_tokens=4, logprobs=1, ignore_eos=True)
    model = rt.model
    assert isinstance(model, LlavaModel)
    tiles = torch.from_numpy(tile_static(WIDE, 336, pad2square=True))
    with torch.no_grad():
        visual = model.encode_tiles(tiles).flatten(0, 1)
        ids = list(output.prompt_token_ids)
        for token in output.token_ids:
            x = model.splice(torch.tensor(ids[: len(output.prompt_token_ids)]), visual, 0)
            x = torch.cat((x, model.language_model.embed(torch.tensor(ids[len(output.prompt_token_ids) :]).long())))
            inv_freq = 1 / 10000 ** (torch.arange(0, 16, 2) / 16)
            hidden = model.language_model(x[None], torch.arange(len(x))[None], inv_freq)
            assert int(model.language_model.logits(hidden[0, -1]).argmax()) == token
            ids.append(token)


def test_chat_and_stream_say_what_generate_says(rt: Runtime) -> None:
    said = rt.generate("What is the total?", WIDE, max_new_tokens=5)
    deltas = list(rt.stream("What is the total?", WIDE, max_new_tokens=5))
    assert "".join(delta.text for delta in deltas) == said.text
    content = [{"type": "image", "image": WIDE}, {"type": "text", "text": "What is the total?"}]
    chatted = rt.chat([{"role": "user", "content": content}], max_new_tokens=5)
    assert chatted.num_tiles == [1]
    batch = rt.generate(["What is the total?", "hello"], [[WIDE, WIDE], None], max_new_tokens=3)
    assert [output.usage.image_tokens for output in batch] == [1152, 0]


def test_an_image_is_padded_to_a_square_or_its_middle_cut_out(rt: Runtime, sentencepiece_folder: MakeFolder) -> None:
    padded, _ = rt.processor.tile(WIDE)
    assert np.array_equal(padded, tile_static(WIDE, 336, pad2square=True))
    with load(write_llava(sentencepiece_folder(tokens=()), image_aspect_ratio=None)) as runtime:
        cut, _ = runtime.processor.tile(WIDE)
    assert np.array_equal(cut[0], fit_image(open_image(WIDE), (336, 336), crop=True))
    assert not np.array_equal(cut, padded)


def test_a_checkpoint_with_qllama_generates(sentencepiece_folder: MakeFolder) -> None:
    folder = write_llava(sentencepiece_folder(tokens=()), qllama=True)
    with load(folder) as runtime:
        output = runtime.generate("What is the total?", WIDE, max_new_tokens=3, ignore_eos=True)
        assert output.usage.image_tokens == 6 + 576
        assert len(output.token_ids) == 3
        shape = runtime.encode_image(WIDE).tokens.shape
    assert shape == (6 + 576, 64)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_the_vision_half_may_lie_in_a_folder_of_its_own(suffix: str, folder: Path, rt: Runtime, tmp_path: Path) -> None:
    for file in folder.glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    weights = random_weights(config)
    vision = {name.removeprefix(TOWER): weights.pop(name) for name in list(weights) if name.startswith(TOWER)}
    vision_config = config.pop("vision_tower_config")
    write_checkpoint(tmp_path, config | {"mm_hidden_size": 48}, weights, suffix=suffix)
    with pytest.raises(Exception, match="unknown mm_vision_tower 'tiny-84px'"):
        load(tmp_path)
    write_checkpoint(tmp_path / "tiny-84px", vision_config, vision, suffix=suffix)
    assert load_any_config(tmp_path) == rt.model.config
    with load(tmp_path) as runtime:
        assert torch.equal(runtime.encode_image(WIDE).tokens, rt.encode_image(WIDE).tokens)


def test_a_checkpoint_without_its_vision_half_says_what_to_do(folder: Path, tmp_path: Path) -> None:
    for file in folder.glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    weights = {name: tensor for name, tensor in random_weights(config).items() if not name.startswith(TOWER)}
    write_checkpoint(tmp_path, config, weights)
    with pytest.raises(CheckpointError, match="lack the vision half; put the folder of tiny-84px into it"):
        load(tmp_path)


def test_text_that_would_read_as_an_image_place_is_refused(sentencepiece_folder: MakeFolder) -> None:
    folder = write_llava(sentencepiece_folder(tokens=(), byte_fallback=False))
    with (
        load(folder) as runtime,
        pytest.raises(InvalidRequestError, match="characters that the tokenizer cannot spell"),
    ):
        runtime.generate("What is \N{SNOWMAN}?", WIDE)
