"""The table of released checkpoints: halves, template and end of an answer of each, pinned by strings and ids."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vitrail.runtime.api import _stop_token_ids
from vitrail.runtime.config import parse_config
from vitrail.runtime.errors import ConfigError
from vitrail.runtime.prompt import as_text, get_template, render, stop_tokens
from vitrail.runtime.tokenizer import Tokenizer, load_tokenizer
from vitrail.runtime.weights import expected_tensors

from ..official_configs import INTERNVIT_300M, QWEN3_8B, chat
from ..released_checkpoints import BILLIONS, NOT_RUN, RELEASED
from .conftest import INTERNVL_TOKENS, added_token
from .test_prompt import SYS_A, SYS_B

ROOT = Path(__file__).resolve().parents[2]

# A prompt of "<image>\nHi" for each template, and the token that ends its answer.
GOLDEN = {
    "internvl_zh": (" <human>: <image>\nHi <bot>:", "</s>"),
    "Hermes-2": (
        f"<|im_start|>system\n{SYS_A}<|im_end|><|im_start|>user\n<image>\nHi<|im_end|><|im_start|>assistant\n",
        "<|im_end|>",
    ),
    "phi3-chat": (f"<|system|>\n{SYS_A}<|end|><|user|>\n<image>\nHi<|end|><|assistant|>\n", "<|end|>"),
    "internvl2_5": (
        f"<|im_start|>system\n{SYS_B}<|im_end|>\n<|im_start|>user\n<image>\nHi<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>",
    ),
}
GOLDEN["internlm2-chat"] = GOLDEN["Hermes-2"]

# Ids of the first image token, and of the control tokens of each tokenizer whose ids are published.
CHATML_INTERNLM2 = {"<|im_end|>": 92542, "<|im_start|>": 92543}
CHATML_QWEN = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}
IDS = {92553: (92544, CHATML_INTERNLM2), 151655: (151646, CHATML_QWEN), 151674: (151665, CHATML_QWEN)}
IDS[151936] = (151669, CHATML_QWEN)


@pytest.mark.parametrize("name", RELEASED)
def test_the_prompt_of_a_checkpoint_is_its_golden_string(name: str) -> None:
    config = parse_config(RELEASED[name][0])
    template = get_template(config.template)
    prompt, stop = GOLDEN[config.template]
    assert as_text(render(template, [("<image>\nHi", None)], config.system_message)) == prompt
    assert stop_tokens(template) == (stop,)


@pytest.mark.parametrize("name", [name for name, (_, stops) in RELEASED.items() if stops is not None])
def test_answers_end_at_the_published_ids(name: str, tokenizers: Callable[[int], Tokenizer]) -> None:
    values, stops = RELEASED[name]
    config = parse_config(values)
    tokenizer = tokenizers(config.llm.vocab_size)
    assert _stop_token_ids(tokenizer, stop_tokens(get_template(config.template))) == stops
    if config.llm.vocab_size in IDS:
        first, _ = IDS[config.llm.vocab_size]
        assert tokenizer.token_to_id("<IMG_CONTEXT>") == first + 2
        assert tokenizer.token_to_id("</box>") == first + 8
        assert tokenizer.vocab_size == (first + 9) <= config.llm.vocab_size


@pytest.fixture(scope="module")
def tokenizers(
    sentencepiece_folder: Callable[..., Path], qwen2_folder: Callable[..., Path]
) -> Callable[[int], Tokenizer]:
    """`tokenizers(vocab_size)`: the control tokens of a released tokenizer over a tiny vocabulary."""
    found: dict[int, Tokenizer] = {}

    def make(vocab_size: int) -> Tokenizer:
        if vocab_size not in found:
            first, control = IDS.get(vocab_size, (1000, {}))
            folder = qwen2_folder() if control is CHATML_QWEN else sentencepiece_folder()
            file = folder / "tokenizer_config.json"
            ids = control | {token: first + index for index, token in enumerate(INTERNVL_TOKENS)}
            if control is not CHATML_QWEN:
                ids |= {"<unk>": 0, "<s>": 1, "</s>": 2}
            settings: dict[str, Any] = json.loads(file.read_text())
            added = {str(index): added_token(token) for token, index in ids.items()}
            file.write_text(json.dumps(settings | {"added_tokens_decoder": added, "additional_special_tokens": []}))
            found[vocab_size] = load_tokenizer(folder)
        return found[vocab_size]

    return make


@pytest.mark.parametrize("name", BILLIONS)
def test_language_models_have_their_published_numbers_of_parameters(name: str) -> None:
    llm, billions = BILLIONS[name]
    tensors = expected_tensors(chat(INTERNVIT_300M, llm))
    total = sum(math.prod(shape) for key, shape in tensors.items() if key.startswith("language_model."))
    assert round(total / 1e9, 3) == billions


@pytest.mark.parametrize(
    ("name", "tensors"),
    [
        ("InternVL-Chat-V1-1", 4 + 48 * 13 + 6 + 3 + 40 * 9),
        ("InternVL-Chat-V1-2", 4 + 45 * 13 + 6 + 3 + 60 * 9),
        ("InternVL-Chat-V1-5", 4 + 45 * 13 + 6 + 3 + 48 * 7),
        ("InternVL2-1B", 637),
        ("InternVL2-4B", 4 + 24 * 14 + 6 + 3 + 32 * 6),
        ("InternVL2_5-78B", 4 + 45 * 13 + 6 + 3 + 80 * 12),
        ("InternVL3_5-38B", 4 + 45 * 13 + 6 + 3 + 64 * 11),
    ],
)
def test_full_size_checkpoints_have_their_tensors(name: str, tensors: int) -> None:
    assert len(expected_tensors(RELEASED[name][0])) == tensors


def test_v1_1_and_v1_2_shuffle_as_version_1_and_take_one_tile() -> None:
    for name, blocks, layers in (("InternVL-Chat-V1-1", 48, 45), ("InternVL-Chat-V1-2", 45, 45)):
        config = parse_config(RELEASED[name][0])
        assert (config.ps_version, config.dynamic_image_size, config.tokens_per_tile) == ("v1", False, 256)
        assert (config.vision.num_hidden_layers, config.vision_depth) == (blocks, layers)


@pytest.mark.parametrize("name", NOT_RUN)
def test_other_checkpoints_are_refused_by_the_name_of_their_language_model(name: str) -> None:
    llm = QWEN3_8B | {"architectures": [NOT_RUN[name]]}
    with pytest.raises(ConfigError, match=f"unknown architecture '{NOT_RUN[name]}'; known: InternLM2ForCausalLM"):
        parse_config(chat(INTERNVIT_300M, llm, template="internvl2_5"))


def test_the_table_of_the_documentation_is_this_one() -> None:
    text = (ROOT / "docs" / "models.md").read_text(encoding="utf-8").replace("\\|", "|")
    rows = re.findall(r"^\| (\S+) \| (.+?) \| (.+?) \| `(.+?)` \| `(.+?)` \| (.+?) \|$", text, re.MULTILINE)
    told = {name: (vision, template, stop, ids) for name, vision, _, template, stop, ids in rows}
    assert told.keys() == RELEASED.keys()
    for name, (values, stops) in RELEASED.items():
        config = parse_config(values)
        size = "6B" if config.vision.hidden_size == 3200 else "300M"
        ids = "by name" if stops is None else ", ".join(map(str, sorted(stops, reverse=True)))
        expected = (f"{size}, {config.vision_depth} blocks", config.template, GOLDEN[config.template][1], ids)
        assert told[name] == expected, name
    assert all(f"`{architecture}`" in text for architecture in NOT_RUN.values())
