"""Chat templates: a conversation as strings, control tokens and image places, ready for the tokenizer.

The templates are those of the official code, character by character; which one a checkpoint wants stands in its
`config.json`, and nothing here guesses it. What a user or a model wrote is always a string: control tokens come from
the template alone, and image tokens from images alone.
"""

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .errors import ConfigError, InvalidRequestError
from .tokenizer import Control, Tokenizer

IMAGE_MARK = "<image>"

_SYSTEM_A = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
)
_SYSTEM_B = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
)
_SYSTEM_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_SYSTEM_GPT_OSS = (
    "You are InternVL, a large language model trained by Shanghai AI Laboratory.\n"
    "Knowledge cutoff: 2024-06\nCurrent date: 2025-08-06\n\nReasoning: low\n\n"
    "# Valid channels: final. Channel must be included for every message."
)

# The official defaults until July 2024, by template. V1.2 and V1.5 were released with them: pass one as `system` to
# repeat results of that time.
LEGACY_SYSTEM_MESSAGES = {
    "Hermes-2": "Answer the questions.",
    "internlm2-chat": "You are an AI assistant whose name is InternLM (书生·浦语).",
}


@dataclass(frozen=True)
class ImageSlot:
    """The place of image number `index` (from 0) in a prompt."""

    index: int


Piece = str | Control | ImageSlot

# A user's turn: a string, in which each `<image>` is an image's place, or texts and places already told apart, in which
# an `<image>` is text.
Question = str | Sequence[str | ImageSlot]


@dataclass(frozen=True)
class Template:
    """What stands around the texts of a conversation.

    `before_system` and `after_system` enclose the system message, and so on. The answer to be generated starts after
    `generation`; `after_last` closes an answer that ends the conversation. `system` is the default message; None means
    that the template has no place for one.
    """

    name: str
    system: str | None
    before_system: tuple[str | Control, ...]
    after_system: tuple[str | Control, ...]
    before_user: tuple[str | Control, ...]
    after_user: tuple[str | Control, ...]
    before_answer: tuple[str | Control, ...]
    after_answer: tuple[str | Control, ...]
    generation: tuple[str | Control, ...]
    after_last: tuple[str | Control, ...]
    stop: tuple[str, ...]
    answers_have_channels: bool = False


def _chatml(name: str, system: str, after: tuple[str | Control, ...]) -> Template:
    start = Control("<|im_start|>")
    return Template(
        name,
        system,
        before_system=(start, "system\n"),
        after_system=after,
        before_user=(start, "user\n"),
        after_user=after,
        before_answer=(start, "assistant\n"),
        after_answer=after,
        generation=(start, "assistant\n"),
        after_last=after,
        stop=("<|im_end|>",),
    )


def _vicuna(name: str) -> Template:
    end = Control("</s>")
    return Template(
        name,
        _SYSTEM_VICUNA,
        before_system=(),
        after_system=(" ",),
        before_user=("USER: ",),
        after_user=(" ",),
        before_answer=("ASSISTANT: ",),
        after_answer=(end,),
        generation=("ASSISTANT:",),
        after_last=(end,),
        stop=("</s>",),
    )


_ALL = (
    _chatml("internlm2-chat", _SYSTEM_A, (Control("<|im_end|>"),)),
    _chatml("Hermes-2", _SYSTEM_A, (Control("<|im_end|>"),)),
    _chatml("internvl2_5", _SYSTEM_B, (Control("<|im_end|>"), "\n")),
    Template(
        "phi3-chat",
        _SYSTEM_A,
        before_system=(Control("<|system|>"), "\n"),
        after_system=(Control("<|end|>"),),
        before_user=(Control("<|user|>"), "\n"),
        after_user=(Control("<|end|>"),),
        before_answer=(Control("<|assistant|>"), "\n"),
        after_answer=(Control("<|end|>"),),
        generation=(Control("<|assistant|>"), "\n"),
        after_last=(Control("<|end|>"),),
        stop=("<|end|>",),
    ),
    Template(
        "internvl_zh",
        None,
        before_system=(" ",),
        after_system=(),
        before_user=("<human>: ",),
        after_user=(" ",),
        before_answer=("<bot>: ",),
        after_answer=(Control("</s>"),),
        generation=("<bot>:",),
        after_last=(Control("</s>"),),
        stop=("</s>",),
    ),
    _vicuna("vicuna_v1"),
    _vicuna("vicuna_v1.1"),
    Template(
        "internvl3_5_gpt_oss",
        _SYSTEM_GPT_OSS,
        before_system=(Control("<|start|>"), "system", Control("<|message|>")),
        after_system=(Control("<|end|>"),),
        before_user=(Control("<|start|>"), "user", Control("<|message|>")),
        after_user=(Control("<|end|>"),),
        before_answer=(Control("<|start|>"), "assistant"),
        after_answer=(Control("<|end|>"),),
        generation=(Control("<|start|>"), "assistant"),
        after_last=(Control("<|return|>"),),
        stop=("<|return|>",),
        answers_have_channels=True,
    ),
)
TEMPLATES = {template.name: template for template in _ALL}


def get_template(name: str) -> Template:
    """The template called `name`. Raises ConfigError for one that is unknown, with the nearest and all known names."""
    if name in TEMPLATES:
        return TEMPLATES[name]
    near = difflib.get_close_matches(str(name), TEMPLATES, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"template {name!r} is not known{hint} (known: {', '.join(TEMPLATES)})")


def render(template: Template, turns: Sequence[tuple[Question, str | None]], system: str | None = None) -> list[Piece]:
    """The conversation as pieces; an answer of None, allowed in the last turn only, is the one to be generated.

    Each `<image>` in a question becomes an `ImageSlot`, numbered through the conversation. In an answer or in the
    system message it is text. `system=None` means the template's own message.

    Raises:
        InvalidRequestError: a system message where the template has no place for one, or an open answer before the end.
    """
    if system and template.system is None:
        raise InvalidRequestError(f"template {template.name!r} has no place for a system message")
    pieces: list[Piece] = [*template.before_system]
    pieces.append((template.system if system is None else system) or "")
    pieces += template.after_system
    images = 0
    for number, (question, answer) in enumerate(turns, start=1):
        pieces += template.before_user
        for piece in _split_marks(question) if isinstance(question, str) else question:
            pieces.append(ImageSlot(images) if isinstance(piece, ImageSlot) else piece)
            images += isinstance(piece, ImageSlot)
        pieces += template.after_user
        last = number == len(turns)
        if answer is not None:
            pieces += [*template.before_answer, *_answer(template, answer)]
            pieces += template.after_last if last else template.after_answer
        elif last:
            pieces += template.generation
        else:
            raise InvalidRequestError(f"history: turn {number} of {len(turns)} has no answer")
    return [piece for piece in pieces if piece != ""]


def _split_marks(question: str) -> list[str | ImageSlot]:
    """A question's texts, with a slot, not numbered yet, for each `<image>` between them."""
    first, *others = question.split(IMAGE_MARK)
    pieces: list[str | ImageSlot] = [first]
    for text in others:
        pieces += [ImageSlot(0), text]
    return pieces


def expand(pieces: Iterable[Piece], tokens_per_image: Sequence[int]) -> list[str | Control]:
    """`pieces` with every image slot replaced by `<img>`, that image's number of `<IMG_CONTEXT>`, and `</img>`.

    Raises InvalidRequestError unless there are as many slots as images.
    """
    pieces = list(pieces)
    _check_slots(pieces, tokens_per_image)
    expanded: list[str | Control] = []
    for piece in pieces:
        if isinstance(piece, ImageSlot):
            context = [Control("<IMG_CONTEXT>")] * tokens_per_image[piece.index]
            expanded += [Control("<img>"), *context, Control("</img>")]
        else:
            expanded.append(piece)
    return expanded


def encode_bare(
    tokenizer: Tokenizer, pieces: Iterable[Piece], tokens_per_image: Sequence[int], context_id: int
) -> list[int]:
    """The ids of a prompt as LLaVA's code makes them: that many `context_id` for an image, and nothing around them.

    What stands between images is encoded piece by piece, each as if it began the prompt but for the `<s>`.
    Raises InvalidRequestError unless there are as many slots as images, and for text that has no ids of its own.
    """
    runs: list[list[str | Control]] = [[]]
    counts: list[int] = []
    pieces = list(pieces)
    _check_slots(pieces, tokens_per_image)
    for piece in pieces:
        if isinstance(piece, ImageSlot):
            counts.append(tokens_per_image[piece.index])
            runs.append([])
        else:
            runs[-1].append(piece)
    ids: list[int] = []
    for index, run in enumerate(runs):
        encoded = tokenizer.encode(run, add_bos=index == 0)
        if context_id in encoded:
            raise InvalidRequestError("prompt: has characters that the tokenizer cannot spell")
        ids += encoded
        if index < len(counts):
            ids += [context_id] * counts[index]
    return ids


def _check_slots(pieces: Sequence[Piece], tokens_per_image: Sequence[int]) -> None:
    slots = sum(isinstance(piece, ImageSlot) for piece in pieces)
    if slots != len(tokens_per_image):
        raise InvalidRequestError(
            f"prompt: {_counted(slots, IMAGE_MARK + ' mark')} in the conversation, "
            f"but {_counted(len(tokens_per_image), 'image')} given"
        )


def as_text(pieces: Iterable[Piece]) -> str:
    """The prompt as the official code's string, an image slot being `<image>`. For people to read, not to tokenise."""
    return "".join(
        piece if isinstance(piece, str) else piece.token if isinstance(piece, Control) else IMAGE_MARK
        for piece in pieces
    )


def stop_tokens(template: Template) -> tuple[str, ...]:
    """The control tokens that end an answer. A model's own end-of-text token ends it as well; that is the caller's."""
    return template.stop


def place_images(question: str, num_images: int, has_history: bool, label: str = "Image") -> str:
    """`question` with an `<image>` mark for each of its images, put in front if the caller placed none.

    One image stands on a line of its own; several are `Image-1: <image>`, `Image-2: <image>`, a line each, the official
    form for separate images. Frames of a video (`label="Frame"`) are labelled even if there is only one. A question
    that has marks is left as it is, and so is one with history: there the marks stand in the turns that showed the
    images.
    """
    if num_images == 0 or has_history or IMAGE_MARK in question:
        return question
    if num_images == 1 and label == "Image":
        return f"{IMAGE_MARK}\n{question}"
    return "".join(f"{label}-{number}: {IMAGE_MARK}\n" for number in range(1, num_images + 1)) + question


def _answer(template: Template, answer: str) -> list[Piece]:
    """An earlier answer. GPT-OSS's begin with the channel they were written to, `final` if theirs was cut off."""
    if not template.answers_have_channels:
        return [answer]
    header = re.match(r"<\|channel\|>(\w+)<\|message\|>", answer)
    channel, text = (header.group(1), answer[header.end() :]) if header else ("final", answer)
    return [Control("<|channel|>"), channel, Control("<|message|>"), text]


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
