"""Questions about one picture as one conversation of token ids, exactly as the runtime's template renders it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from vitrail.bench.nano.picture import Question, token_index
from vitrail.runtime.prompt import expand, get_template, render
from vitrail.runtime.tokenizer import Control, Tokenizer

END = "<|im_end|>"


@dataclass(frozen=True)
class Conversation:
    """ids: all tokens. image: where the first visual token stands.

    answers: per question the places of its answer's tokens, `<|im_end|>` included. sources: per place of an answer
    token that repeats a printed character, the place of the visual token that shows it.
    """

    ids: list[int]
    image: int
    answers: list[range]
    sources: dict[int, int]


class ConversationWriter:
    """Writes conversations for one tokenizer and system message."""

    def __init__(self, tokenizer: Tokenizer, system: str, template: str = "internlm2-chat") -> None:
        self.tokenizer = tokenizer
        self.system = system
        self.template = get_template(template)
        self._encode = cache(lambda text: tuple(tokenizer.encode(text, add_bos=False)))
        self._head = cache(self._make_head)
        end = tokenizer.token_to_id(END)
        assert end is not None
        self._end = end
        between = (Control(END), Control("<|im_start|>"), "assistant\n")
        again = (Control("<|im_start|>"), "user\n")
        self._between = tokenizer.encode(between, add_bos=False)
        self._again = tokenizer.encode(again, add_bos=False)

    def _make_head(self, visual_tokens: int) -> tuple[int, ...]:
        """Everything up to and including `</img>`."""
        pieces = expand(render(self.template, [("<image>", None)], self.system), [visual_tokens])
        last = max(place for place, piece in enumerate(pieces) if piece == Control("</img>"))
        return tuple(self.tokenizer.encode(pieces[: last + 1]))

    def write(self, questions: Sequence[Question], visual_tokens: int) -> Conversation:
        ids = list(self._head(visual_tokens))
        image = len(ids) - 1 - visual_tokens
        answers, sources = [], {}
        for number, question in enumerate(questions):
            if number:
                ids += self._again
            ids += self._encode(("" if number else "\n") + question.text)
            ids += self._between
            answer = self._encode(question.answer)
            if question.sources and len(answer) == len(question.sources):
                for offset, (row, column) in enumerate(question.sources):
                    if row >= 0:
                        sources[len(ids) + offset] = image + token_index(row, column)
            answers.append(range(len(ids), len(ids) + len(answer) + 1))
            ids += answer
            ids.append(self._end)
        return Conversation(ids, image, answers, sources)

    def check(self, questions: Sequence[Question], visual_tokens: int) -> None:
        """Raises where the runtime would tokenise the same conversation otherwise."""
        turns = [(f"<image>\n{questions[0].text}", questions[0].answer)]
        turns += [(question.text, question.answer) for question in questions[1:]]
        wanted = self.tokenizer.encode(expand(render(self.template, turns, self.system), [visual_tokens]))
        if self.write(questions, visual_tokens).ids != wanted:
            raise ValueError(f"conversation: {wanted} is not {self.write(questions, visual_tokens).ids}")
