"""Answers that keep to a form, whatever the model would rather say."""

import json
import math
import re
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitrail.runtime.api import Runtime
from vitrail.runtime.errors import UnsupportedError
from vitrail.runtime.request import GenerationConfig
from vitrail.runtime.sampler import SamplingState, sample
from vitrail.runtime.structured import Grammars
from vitrail.runtime.tokenizer import load_tokenizer
from vitrail.runtime.weights import resolve_checkpoint

from .tiny_model import picture

TOKENIZER = load_tokenizer(resolve_checkpoint("nano"))
VOCAB = 700  # more rows than the tokenizer has tokens, as many models have
END = TOKENIZER.eos_token_id
GRAMMARS = Grammars(TOKENIZER, VOCAB, [END])

RECEIPT = {
    "type": "object",
    "properties": {"total": {"type": "string", "pattern": r"^\$[0-9]{1,3}\.[0-9]{2}$"}, "paid": {"type": "boolean"}},
    "required": ["total", "paid"],
    "additionalProperties": False,
}
TOTAL = r"\$[0-9]{1,3}\.[0-9]{2}"


def answer(response_format: dict[str, object], seed: int, longest: int = 200) -> tuple[str, bool]:
    """What a model that draws every token at random says, and whether it came to an end."""
    config = GenerationConfig(response_format=response_format, temperature=1.0, seed=seed)
    state = SamplingState(config, grammar=GRAMMARS.matcher(response_format))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(longest):
        [sampled] = sample(torch.randn(1, VOCAB, generator=generator), [state])
        if sampled.token_id == END:
            return TOKENIZER.decode(state.token_ids[:-1]), True
    return TOKENIZER.decode(state.token_ids), False


@settings(max_examples=20)
@given(seed=st.integers(0, 2**31))
def test_a_random_model_keeps_to_an_expression(seed) -> None:
    text, ended = answer({"type": "regex", "regex": TOTAL}, seed)
    assert ended
    assert re.fullmatch(TOTAL, text)


@settings(max_examples=10)
@given(seed=st.integers(0, 2**31))
def test_a_random_model_keeps_to_a_schema(seed) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "receipt", "schema": RECEIPT}}
    text, ended = answer(wanted, seed, longest=2000)
    if ended:  # white space may go on for long
        found = json.loads(text)
        assert found.keys() == {"total", "paid"}
        assert re.fullmatch(TOTAL, found["total"])
        assert isinstance(found["paid"], bool)


def test_any_object_is_json() -> None:
    text, ended = answer({"type": "json_object"}, seed=3, longest=3000)
    assert text.lstrip().startswith("{")
    assert not ended or isinstance(json.loads(text), dict)


def test_rows_without_a_form_are_left_alone() -> None:
    free = SamplingState(GenerationConfig())
    bound = SamplingState(GenerationConfig(), grammar=GRAMMARS.matcher({"type": "regex", "regex": "9"}))
    logits = torch.zeros(2, VOCAB)
    logits[:, 300] = 1.0
    first, second = sample(logits, [free, bound])
    assert first.token_id == 300
    assert TOKENIZER.decode([second.token_id]) == "9"
    assert logits[1, 300] == 1.0


def test_where_nothing_can_follow_the_answer_ends() -> None:
    matcher = GRAMMARS.matcher({"type": "regex", "regex": "9"})
    token = int(matcher.allowed().nonzero()[0])
    other = matcher.copy()
    matcher.accept(token)
    assert matcher.allowed().nonzero().flatten().tolist() == [END]
    assert other.allowed()[token]
    matcher.accept(END)
    assert matcher.error == ""


def test_a_token_that_is_not_allowed_leaves_nothing_to_say() -> None:
    matcher = GRAMMARS.matcher({"type": "regex", "regex": "9"})
    matcher.accept(300)
    assert matcher.error
    assert not matcher.allowed().any()


def test_a_contradiction_ends_its_row_alone() -> None:
    config = GenerationConfig(min_new_tokens=5)
    matcher = GRAMMARS.matcher({"type": "regex", "regex": "9"})
    matcher.accept(int(matcher.allowed().nonzero()[0]))
    bound = SamplingState(config, eos_token_ids=[END], grammar=matcher)
    outcome = sample(torch.zeros(2, VOCAB), [bound, SamplingState(GenerationConfig())])
    assert "response_format together rule out every token" in str(outcome[0])
    assert outcome[1].token_id == 0


def test_logprobs_are_the_models_own() -> None:
    matcher = GRAMMARS.matcher({"type": "regex", "regex": "9"})
    state = SamplingState(GenerationConfig(logprobs=0), grammar=matcher)
    [sampled] = sample(torch.zeros(1, VOCAB), [state])
    assert sampled.logprobs == pytest.approx([-math.log(VOCAB)])


def test_text_needs_no_grammar() -> None:
    assert GRAMMARS.matcher(None) is GRAMMARS.matcher({"type": "text"}) is None


def test_without_the_library_it_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'vitrail\[structured\]'"):
        Grammars(TOKENIZER, VOCAB, [END]).matcher({"type": "json_object"})


def test_streams_and_batches_keep_to_a_form_and_what_runs_beside_them_does_not() -> None:
    wanted = {"type": "regex", "regex": "(yes|no), [0-9]{3}!"}
    question, images = "What is the total?", [[picture(224, 224, seed)] for seed in range(3)]
    with Runtime.from_pretrained("nano", dtype="float32", device="cpu") as rt:
        free = rt.generate(question, images[0], max_new_tokens=8)
        beside = rt._submit(
            rt._conversation(question, images[0], None, None, None), GenerationConfig(max_new_tokens=8), "beside"
        )
        formed = rt.generate([question] * 3, images, response_format=wanted)
        streamed = "".join(delta.text for delta in rt.stream(question, images[0], response_format=wanted))
        list(rt.engine.stream(beside))
    assert all(re.fullmatch(wanted["regex"], output.text) for output in formed)
    assert [output.finish_reason for output in formed] == ["stop"] * 3
    assert streamed == formed[0].text
    assert beside.completions[0].text == free.text
    assert not re.fullmatch(wanted["regex"], free.text)


def test_an_answer_cut_off_says_so_and_is_a_beginning_of_the_form() -> None:
    with Runtime.from_pretrained("nano", dtype="float32", device="cpu") as rt:
        output = rt.generate("Hello", response_format={"type": "regex", "regex": "a{40}"}, max_new_tokens=3)
    assert output.finish_reason == "length"
    assert set(output.text) == {"a"}
