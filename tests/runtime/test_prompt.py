"""Chat templates: golden strings written out, images in their places, and user text that stays text to the ids."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitrail.runtime.errors import CheckpointError, ConfigError, InvalidRequestError
from vitrail.runtime.prompt import (
    LEGACY_SYSTEM_MESSAGES,
    TEMPLATES,
    ImageSlot,
    as_text,
    expand,
    get_template,
    place_images,
    render,
    stop_tokens,
)
from vitrail.runtime.tokenizer import Control, Tokenizer, load_tokenizer

Make = Callable[..., Path]

SYS_A = "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
SYS_B = "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"

SYS_V = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
SYS_O = (
    "You are InternVL, a large language model trained by Shanghai AI Laboratory.\n"
    "Knowledge cutoff: 2024-06\nCurrent date: 2025-08-06\n\nReasoning: low\n\n"
    "# Valid channels: final. Channel must be included for every message."
)

# one turn; what a second turn adds; one turn with the system message "Be brief.", where there is a place for it
CHATML = (
    f"<|im_start|>system\n{SYS_A}<|im_end|><|im_start|>user\nQ1<|im_end|><|im_start|>assistant\n",
    "A1<|im_end|><|im_start|>user\nQ2<|im_end|><|im_start|>assistant\n",
    "<|im_start|>system\nBe brief.<|im_end|><|im_start|>user\nQ1<|im_end|><|im_start|>assistant\n",
)
VICUNA = (f"{SYS_V} USER: Q1 ASSISTANT:", " A1</s>USER: Q2 ASSISTANT:", "Be brief. USER: Q1 ASSISTANT:")
GOLDEN = {
    "internlm2-chat": CHATML,
    "Hermes-2": CHATML,
    "internvl2_5": (
        f"<|im_start|>system\n{SYS_B}<|im_end|>\n<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n",
        "A1<|im_end|>\n<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n",
    ),
    "phi3-chat": (
        f"<|system|>\n{SYS_A}<|end|><|user|>\nQ1<|end|><|assistant|>\n",
        "A1<|end|><|user|>\nQ2<|end|><|assistant|>\n",
        "<|system|>\nBe brief.<|end|><|user|>\nQ1<|end|><|assistant|>\n",
    ),
    "internvl_zh": (" <human>: Q1 <bot>:", " A1</s><human>: Q2 <bot>:", None),
    "vicuna_v1": VICUNA,
    "vicuna_v1.1": VICUNA,
    "internvl3_5_gpt_oss": (
        f"<|start|>system<|message|>{SYS_O}<|end|><|start|>user<|message|>Q1<|end|><|start|>assistant",
        "<|channel|>final<|message|>A1<|end|><|start|>user<|message|>Q2<|end|><|start|>assistant",
        "<|start|>system<|message|>Be brief.<|end|><|start|>user<|message|>Q1<|end|><|start|>assistant",
    ),
}
CLOSED = {
    "internlm2-chat": "A1<|im_end|>",
    "Hermes-2": "A1<|im_end|>",
    "internvl2_5": "A1<|im_end|>\n",
    "phi3-chat": "A1<|end|>",
    "internvl_zh": "A1</s>",
    "vicuna_v1": "A1</s>",
    "vicuna_v1.1": "A1</s>",
    "internvl3_5_gpt_oss": "A1<|return|>",
}
STOPS = {
    "internlm2-chat": ("<|im_end|>",),
    "Hermes-2": ("<|im_end|>",),
    "internvl2_5": ("<|im_end|>",),
    "phi3-chat": ("<|end|>",),
    "internvl_zh": ("</s>",),
    "vicuna_v1": ("</s>",),
    "vicuna_v1.1": ("</s>",),
    "internvl3_5_gpt_oss": ("<|return|>",),
}


def test_every_template_has_golden_strings() -> None:
    assert set(TEMPLATES) == set(GOLDEN) == set(CLOSED) == set(STOPS)


@pytest.mark.parametrize("name", GOLDEN)
def test_prompts_are_the_official_strings(name: str) -> None:
    one, second, with_system = GOLDEN[name]
    template = get_template(name)
    assert as_text(render(template, [("Q1", None)], None)) == one
    assert as_text(render(template, [("Q1", "A1"), ("Q2", None)], None)) == one + second
    if with_system is not None:
        assert as_text(render(template, [("Q1", None)], "Be brief.")) == with_system


@pytest.mark.parametrize("name", GOLDEN)
def test_a_conversation_that_ends_with_an_answer_is_closed(name: str) -> None:
    assert as_text(render(get_template(name), [("Q1", "A1")], None)).endswith(CLOSED[name])


@pytest.mark.parametrize("name", GOLDEN)
def test_a_prompt_with_images_holds_their_tokens_where_the_marks_stood(name: str) -> None:
    template = get_template(name)
    one, second, _ = GOLDEN[name]
    turns = [("<image>\nQ1", "A1"), ("Image-1: <image> Q2 <image>", None)]
    pieces = render(template, turns, None)
    assert [piece for piece in pieces if isinstance(piece, ImageSlot)] == [ImageSlot(0), ImageSlot(1), ImageSlot(2)]
    marked = one.replace("Q1", "<image>\nQ1") + second.replace("Q2", "Image-1: <image> Q2 <image>")
    assert as_text(pieces) == marked
    images = ["<img>" + "<IMG_CONTEXT>" * count + "</img>" for count in (2, 3, 1)]
    assert as_text(expand(pieces, [2, 3, 1])) == marked.replace("<image>", "%s") % tuple(images)


def test_control_strings_are_controls_and_all_else_is_text() -> None:
    pieces = render(get_template("internvl2_5"), [("Q1 <|im_end|>", "A1"), ("<img>", None)], "S")
    assert [piece.token for piece in pieces if isinstance(piece, Control)] == [
        *("<|im_start|>", "<|im_end|>") * 4,
        "<|im_start|>",
    ]
    assert Control("<img>") not in pieces
    pieces = render(get_template("vicuna_v1"), [("Q1 </s>", "A1"), ("Q2", None)], None)
    assert [piece for piece in pieces if isinstance(piece, Control)] == [Control("</s>")]


def test_an_image_mark_in_an_answer_or_in_the_system_message_is_text() -> None:
    pieces = render(get_template("internlm2-chat"), [("Q <image>", "a <image>"), ("Q", None)], "s <image>")
    assert [piece for piece in pieces if isinstance(piece, ImageSlot)] == [ImageSlot(0)]
    assert as_text(expand(pieces, [0])).count("<image>") == 2


def test_an_image_mark_is_text_in_a_question_whose_places_are_told_apart() -> None:
    pieces = render(get_template("internvl2_5"), [(["a <image> ", ImageSlot(0), " b"], None)], "S")
    assert [piece for piece in pieces if isinstance(piece, ImageSlot)] == [ImageSlot(0)]
    assert "user\na <image> <img><IMG_CONTEXT></img> b<|im_end|>" in as_text(expand(pieces, [1]))


def test_an_empty_system_message_is_kept_empty() -> None:
    assert as_text(render(get_template("Hermes-2"), [("Q", None)], "")).startswith("<|im_start|>system\n<|im_end|>")
    assert as_text(render(get_template("internvl_zh"), [("Q", None)], "")) == " <human>: Q <bot>:"


def test_a_template_without_a_system_message_refuses_one() -> None:
    with pytest.raises(InvalidRequestError, match="internvl_zh"):
        render(get_template("internvl_zh"), [("Q", None)], "Be brief.")


def test_an_open_answer_before_the_last_turn_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="turn 1 of 2"):
        render(get_template("Hermes-2"), [("Q1", None), ("Q2", None)], None)


def test_gpt_oss_answers_in_history_keep_the_channel_they_came_with() -> None:
    template = get_template("internvl3_5_gpt_oss")
    answered = "<|channel|>analysis<|message|>A <|channel|>1"
    pieces = render(template, [("Q", answered), ("Q2", None)], None)
    assert f"<|start|>assistant{answered}<|end|>" in as_text(pieces)
    assert pieces.count(Control("<|channel|>")) == 1


def test_the_messages_of_v1_5s_time_can_be_asked_for() -> None:
    for name, message in LEGACY_SYSTEM_MESSAGES.items():
        prompt = as_text(render(get_template(name), [("Q", None)], message))
        assert prompt.startswith(f"<|im_start|>system\n{message}<|im_end|>")
    assert LEGACY_SYSTEM_MESSAGES["internlm2-chat"] == "You are an AI assistant whose name is InternLM (书生·浦语)."
    assert LEGACY_SYSTEM_MESSAGES["Hermes-2"] == "Answer the questions."


@pytest.mark.parametrize("name", GOLDEN)
def test_stop_tokens_end_the_answers_of_the_template(name: str) -> None:
    assert stop_tokens(get_template(name)) == STOPS[name]


def test_an_unknown_template_is_named_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"'internlm-chat' is not known; did you mean 'internlm2-chat'\?"):
        get_template("internlm-chat")
    with pytest.raises(ConfigError, match=r"'zzz' is not known \(known: internlm2-chat, Hermes-2, "):
        get_template("zzz")


# ---- image places


def test_a_lone_image_goes_on_a_line_before_the_question() -> None:
    assert place_images("Q", 1, has_history=False) == "<image>\nQ"


def test_several_images_are_numbered_on_lines_before_the_question() -> None:
    assert place_images("Q", 2, has_history=False) == "Image-1: <image>\nImage-2: <image>\nQ"


def test_frames_are_numbered_even_when_there_is_one() -> None:
    assert place_images("Q", 2, has_history=False, label="Frame") == "Frame-1: <image>\nFrame-2: <image>\nQ"
    assert place_images("Q", 1, has_history=False, label="Frame") == "Frame-1: <image>\nQ"


def test_a_question_with_marks_or_with_history_or_without_images_is_left_alone() -> None:
    assert place_images("Look: <image>. Q", 2, has_history=False) == "Look: <image>. Q"
    assert place_images("Q", 1, has_history=True) == "Q"
    assert place_images("Q", 0, has_history=False) == "Q"


@given(marks=st.lists(st.integers(0, 3), min_size=1, max_size=4), images=st.integers(0, 6))
@settings(max_examples=50)
def test_marks_and_images_must_be_equally_many_over_the_conversation(marks: list[int], images: int) -> None:
    turns: list[tuple[str, str | None]] = [("<image> " * count, "A <image>") for count in marks]
    pieces = render(get_template("internvl2_5"), [*turns[:-1], (turns[-1][0], None)], None)
    counts = list(range(1, images + 1))
    if sum(marks) == images:
        expanded = expand(pieces, counts)
        assert expanded.count(Control("<img>")) == expanded.count(Control("</img>")) == images
        assert expanded.count(Control("<IMG_CONTEXT>")) == sum(counts)
    else:
        with pytest.raises(InvalidRequestError, match=rf"{sum(marks)} <image> marks? .*{images} images? given"):
            expand(pieces, counts)


# ---- down to the ids


@pytest.fixture(scope="module")
def tokenizers(sentencepiece_folder: Make, qwen2_folder: Make) -> dict[str, Tokenizer]:
    internlm2 = sentencepiece_folder(config={"tokenizer_class": "InternLM2Tokenizer"}, add_dummy_prefix=False)
    return {"InternLM2": load_tokenizer(internlm2), "Qwen2": load_tokenizer(qwen2_folder())}


CONTROLS = ["<img>", "</img>", "<IMG_CONTEXT>", "<|im_end|>", "<|im_start|>", "</s>", "<|endoftext|>"]
typed = st.lists(st.sampled_from([*CONTROLS, "<|", "im_end", "|>", " a", "\n"]), max_size=6).map("".join)


@pytest.mark.parametrize(("name", "kind"), [("internlm2-chat", "InternLM2"), ("internvl2_5", "Qwen2")])
@given(question=typed, answer=typed, system=typed)
@settings(max_examples=60)
def test_what_people_type_adds_no_control_token_to_the_ids(
    tokenizers: dict[str, Tokenizer], name: str, kind: str, question: str, answer: str, system: str
) -> None:
    tokenizer, template = tokenizers[kind], get_template(name)

    def special(turns: list[tuple[str, str | None]], message: str) -> list[int]:
        ids = tokenizer.encode(expand(render(template, turns, message), [5]))
        return [index for index in ids if index in tokenizer.special_ids]

    innocent = special([("<image>\nQ", "A"), ("Q", None)], "S")
    assert special([(f"<image>\n{question}", answer), (question, None)], system) == innocent
    image = [tokenizer.token_to_id(token) for token in ("<img>", *["<IMG_CONTEXT>"] * 5, "</img>")]
    start = innocent.index(tokenizer.token_to_id("<img>") or -1)
    assert innocent[start : start + 7] == image


def test_a_template_of_another_tokenizer_is_refused_with_the_token_it_lacks(tokenizers: dict[str, Tokenizer]) -> None:
    for tokenizer in tokenizers.values():
        with pytest.raises(CheckpointError, match=r"no token '<\|system\|>'"):
            tokenizer.encode(expand(render(get_template("phi3-chat"), [("Q", None)], None), []))
