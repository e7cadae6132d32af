"""Picking tokens, against transformers' logits processors and known frequencies; releasing text up to a stop."""

import math
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import NoBadWordsLogitsProcessor, RepetitionPenaltyLogitsProcessor

from vitrail.kernels import dispatch
from vitrail.runtime.errors import InvalidRequestError, VitrailError
from vitrail.runtime.request import FinishReason, GenerationConfig
from vitrail.runtime.sampler import Sampled, SamplingState, StopChecker, edit, sample

VOCAB = 97


def random_logits(rows: int, vocab: int = VOCAB, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def state(answer: Sequence[int] = (), *, prompt: Sequence[int] = (), **keywords: Any) -> SamplingState:
    """A state with `answer` generated already. `eos`, `bad_ids`, `image` and `index` are its own, the rest config."""
    names = {"eos": "eos_token_ids", "bad_ids": "bad_words", "image": "image_token_id", "index": "index"}
    for_state = {names[name]: keywords.pop(name) for name in list(keywords) if name in names}
    result = SamplingState(GenerationConfig(**keywords), prompt_token_ids=prompt, **for_state)
    for token in answer:
        result.append(token)
    return result


def one(logits: Tensor, sequence: SamplingState) -> int:
    (picked,) = sample(logits[None], [sequence])
    assert isinstance(picked, Sampled)
    return picked.token_id


def edited(logits: Tensor, sequence: SamplingState) -> Tensor:
    logits = logits.clone()
    edit(logits[None], [sequence])
    return logits


# --- Picking tokens ---


def test_greedy_takes_the_best_token_of_each_row_and_notes_it() -> None:
    logits = random_logits(5)
    states = [state() for _ in range(5)]
    assert [picked.token_id for picked in sample(logits, states)] == logits.argmax(-1).tolist()  # type: ignore[union-attr]
    assert [sequence.token_ids for sequence in states] == logits.argmax(-1)[:, None].tolist()


@settings(max_examples=25)
@given(
    prompt=st.lists(st.integers(0, VOCAB - 1), max_size=12),
    answer=st.lists(st.integers(0, VOCAB - 1), max_size=12),
    penalty=st.floats(0.1, 5),
    seed=st.integers(0, 99),
)
def test_the_repetition_penalty_is_that_of_transformers(
    prompt: list[int], answer: list[int], penalty: float, seed: int
) -> None:
    logits = random_logits(1, seed=seed)[0]
    ids = torch.tensor([prompt + answer], dtype=torch.long)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits[None])[0]
    torch.testing.assert_close(edited(logits, state(answer, prompt=prompt, repetition_penalty=penalty)), expected)


def test_image_context_tokens_are_not_penalised() -> None:
    logits = random_logits(1)[0]
    plain = edited(logits, state(prompt=[3, 4], repetition_penalty=2.0))
    assert torch.equal(edited(logits, state(prompt=[3, 90, 90, 4], image=90, repetition_penalty=2.0)), plain)


def test_presence_and_frequency_penalties_count_the_answer_alone() -> None:
    logits = random_logits(1)[0]
    result = edited(logits, state([5, 5, 5, 8], prompt=[9, 5], presence_penalty=0.5, frequency_penalty=0.25))
    expected = logits.clone()
    expected[5] -= 0.5 + 3 * 0.25
    expected[8] -= 0.5 + 0.25
    torch.testing.assert_close(result, expected)


def test_a_logit_bias_is_added_before_anything_else() -> None:
    logits = random_logits(1)[0]
    result = edited(logits, state([5], logit_bias={5: 100, "6": -3.5}, repetition_penalty=2.0))
    expected = logits.clone()
    expected[5] = (expected[5] + 100) / 2
    expected[6] -= 3.5
    torch.testing.assert_close(result, expected)


@settings(max_examples=25)
@given(
    answer=st.lists(st.integers(0, 3), max_size=8),
    words=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3), min_size=1, max_size=4),
)
def test_bad_words_are_blocked_as_transformers_does(answer: list[int], words: list[list[int]]) -> None:
    logits = random_logits(1, vocab=10)[0]
    expected = NoBadWordsLogitsProcessor(words)(torch.tensor([answer], dtype=torch.long), logits[None])[0]
    assert torch.equal(edited(logits, state(answer, bad_ids=words)), expected)


def test_no_token_ends_the_answer_before_min_new_tokens() -> None:
    logits = torch.zeros(10)
    logits[[7, 8]] = 5.0
    assert one(logits, state([1], min_new_tokens=2, eos=[7], stop_token_ids=[8])) not in (7, 8)
    assert one(logits, state([1, 2], min_new_tokens=2, eos=[7], stop_token_ids=[8])) in (7, 8)
    assert one(logits, state([1], min_new_tokens=2, eos=[7], stop_token_ids=[8], ignore_eos=True)) == 7


def test_bad_words_that_the_model_has_no_logit_for_rule_out_nothing() -> None:
    logits = random_logits(2, vocab=10)
    kept = logits.clone()
    edit(logits, [state(bad_ids=[[10], [15]]), state()])
    assert torch.equal(logits, kept)


def test_rows_edited_together_get_what_each_gets_alone() -> None:
    logits = random_logits(5)
    states = [
        state([5, 5], prompt=[3, 9], repetition_penalty=1.5, presence_penalty=0.5),
        state(),
        state([1, 2], bad_ids=[[1, 2, 3], [4]], min_new_tokens=3, eos=[7, 8]),
        state([6], logit_bias={6: 2.5, 7: -100}, frequency_penalty=0.25),
        state([2], repetition_penalty=0.8, logit_bias={2: -1}),
    ]
    together = logits.clone()
    edit(together, states)
    for row, sequence in enumerate(states):
        assert torch.equal(together[row], edited(logits[row], sequence))


def test_frequencies_are_those_of_the_distribution() -> None:
    logits = random_logits(1, vocab=8, scale=1.5)
    draws = 4000
    sequence = state(temperature=0.8, seed=1)
    counts = Counter(one(logits[0], sequence) for _ in range(draws))
    expected = (logits[0] / 0.8).softmax(-1) * draws
    chi_square = sum((counts[token] - float(mean)) ** 2 / float(mean) for token, mean in enumerate(expected))
    assert chi_square < 24.3  # 7 degrees of freedom, one in a thousand; the seed is fixed


def test_a_filtered_token_is_never_drawn() -> None:
    logits = random_logits(1)[0]
    likely = set(logits.topk(4).indices.tolist())
    sequence = state(top_k=4, temperature=5.0, seed=3)
    assert {one(logits, sequence) for _ in range(300)} == likely


def run(rows: list[dict[str, Any]], steps: int = 20) -> list[list[int]]:
    """The tokens of sequences that are sampled together, each from its own logits."""
    states = [state(**keywords) for keywords in rows]
    for step in range(steps):
        base = random_logits(1, seed=step)
        sample(base.expand(len(rows), -1).clone(), states)
    return [sequence.token_ids for sequence in states]


def test_a_seeded_request_gives_the_same_tokens_alone_and_in_any_batch() -> None:
    rows: list[dict[str, Any]] = [
        {"seed": 5, "temperature": 0.9},
        {},
        {"seed": 5, "temperature": 0.9, "top_p": 0.7},
        {"temperature": 1.0},
        {"seed": 5, "top_k": 5, "repetition_penalty": 1.3},
        {"seed": 5, "min_p": 0.05, "presence_penalty": 1.0},
    ]
    together = run(rows)
    for row, keywords in enumerate(rows):
        if "seed" in keywords:
            assert run([keywords]) == [together[row]]
    assert run(rows[::-1])[-1] == together[0]


def test_the_completions_of_one_request_have_streams_of_their_own() -> None:
    hot: dict[str, Any] = {"temperature": 2.0, "seed": 5}
    alone = run([{**hot, "index": 1}])
    several = run([{**hot, "index": index} for index in range(4)])
    assert several[1:2] == alone
    assert len({tuple(tokens) for tokens in several}) == 4
    greedy = run([{"seed": 5, "index": index} for index in range(2)])
    assert greedy[0] == greedy[1]


def test_seeds_that_share_their_low_bits_differ() -> None:
    assert len({tuple(run([{"temperature": 2.0, "seed": 5 + high}])[0]) for high in (0, 2**32, 2**33, -(2**40))}) == 4


def test_requests_without_a_seed_differ() -> None:
    first, second = run([{"temperature": 2.0}, {"temperature": 2.0}])
    assert first != second


def test_a_tiny_temperature_is_as_good_as_greedy_and_a_great_one_is_even() -> None:
    logits = random_logits(1, scale=1e4)[0]
    assert one(logits, state(temperature=1e-300)) == int(logits.argmax())
    sequence = state(temperature=100, seed=0)
    assert len({one(logits / 1e4, sequence) for _ in range(200)}) > 60


@pytest.mark.parametrize("keywords", [{}, {"temperature": 1.0}, {"repetition_penalty": 2.0}, {"logprobs": 2}])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_row_of_broken_logits_fails_alone(poison: float, keywords: dict[str, Any]) -> None:
    logits = random_logits(3)
    logits[1, 4] = poison
    states = [state(**keywords) for _ in range(3)]
    before, broken, after = sample(logits, states)
    assert isinstance(before, Sampled)
    assert isinstance(after, Sampled)
    assert isinstance(broken, VitrailError)
    assert "not finite" in str(broken)
    assert states[1].token_ids == []


def test_a_request_that_rules_out_every_token_fails_alone() -> None:
    logits = random_logits(3, vocab=4)
    forbidden = [[token] for token in range(4)]
    several: list[dict[str, Any]] = [{}, {"temperature": 1.0}]
    for keywords in several:
        before, impossible, after = sample(logits, [state(), state(bad_ids=forbidden, **keywords), state()])
        assert isinstance(before, Sampled)
        assert isinstance(after, Sampled)
        assert isinstance(impossible, InvalidRequestError)


def test_the_callers_logits_are_left_alone() -> None:
    logits = random_logits(3)
    kept = logits.clone()
    sample(logits, [state(), state([3], repetition_penalty=2.0), state([3], top_p=0.5, logit_bias={1: 5})])
    assert torch.equal(logits, kept)


def test_logprobs_are_the_models_own_whatever_the_request_changes() -> None:
    logits = random_logits(4)
    states = [
        state(logprobs=3),
        state(),
        state(logprobs=0, logit_bias={11: 100}),
        state(logprobs=2, temperature=0.5, top_k=1, seed=0),
    ]
    results = sample(logits, states)
    expected = logits.log_softmax(-1)
    assert isinstance(results[1], Sampled)
    assert results[1].logprobs is None
    for row, count in ((0, 3), (2, 0), (3, 2)):
        picked = results[row]
        assert isinstance(picked, Sampled)
        assert picked.logprobs is not None
        own, *pairs = picked.logprobs
        assert own == pytest.approx(float(expected[row, picked.token_id]))
        best = expected[row].topk(count)
        assert [pair[0] for pair in pairs] == best.indices.tolist()  # type: ignore[index]
        assert [pair[1] for pair in pairs] == pytest.approx(best.values.tolist())  # type: ignore[index]
    assert results[2].token_id == 11  # type: ignore[union-attr]


ROWS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.9},
    {"top_p": 0.7, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.2},
    {"logit_bias": {3: 100}},
    {"bad_ids": [[token] for token in range(VOCAB)]},
    {"temperature": 2.0},
]


def test_gpu_kernels_pick_what_the_references_pick() -> None:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("Triton compiles for the GPU here")
    logits = random_logits(len(ROWS))
    logits[5, 8] = math.nan
    outcomes = []
    for kernels in (nullcontext(), dispatch.simulate(dispatch.A100)):
        with kernels:
            outcomes.append(sample(logits, [state(seed=3, **keywords) for keywords in ROWS]))
    assert [str(outcome) for outcome in outcomes[0]] == [str(outcome) for outcome in outcomes[1]]
    assert [isinstance(outcome, Sampled) for outcome in outcomes[0]] == [True] * 4 + [False] * 2


@pytest.mark.gpu
def test_a_step_waits_for_the_device_once() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    logits = random_logits(len(ROWS)).cuda()
    states = [state(seed=3, **keywords) for keywords in ROWS]
    sample(logits, states)  # compiles the kernels
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchroniz") as waits:
            sample(logits, states)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waits) == 1


# --- Stopping ---


class Pieces:
    """A detokeniser whose token i is the i-th piece of a text; the last `late` pieces come only when flushed."""

    def __init__(self, pieces: Sequence[str], late: int = 0) -> None:
        self.pieces = pieces
        self.late = late
        self.rest = ""

    def push(self, ids: Sequence[int], /) -> str:
        self.rest += "".join(self.pieces[token] for token in ids)
        if any(token >= len(self.pieces) - self.late for token in ids):
            return ""
        text, self.rest = self.rest, ""
        return text

    def flush(self) -> str:
        text, self.rest = self.rest, ""
        return text


def release(
    pieces: Sequence[str], *, late: int = 0, eos: Sequence[int] = (), room: int | None = None, **keywords: Any
) -> tuple[list[str], FinishReason | None]:
    """What is released token by token, and how it ends; None if the pieces run out first."""
    checker = StopChecker(GenerationConfig(**keywords), Pieces(pieces, late), eos_token_ids=eos, max_new_tokens=room)
    released = []
    for token in range(len(pieces)):
        text, reason = checker.push(token)
        released.append(text)
        if reason:
            assert checker.flush() == ""
            return released, reason
    return [*released, checker.flush()], None


def cut(text: str, stops: Sequence[str], exempt: int, keep: bool) -> str:
    """`text` up to the stop string that is complete first past `exempt`, the longest that ends there. The slow way."""
    for end in range(exempt + 1, len(text) + 1):
        begins = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if begins:
            return text[: end if keep else min(begins)]
    return text


def split(text: str, places: list[int]) -> list[str]:
    edges = [0, *sorted(min(place, len(text)) for place in places), len(text)]
    return [text[begin:end] for begin, end in pairwise(edges)]


any_split_of_any_text = given(
    pieces=st.builds(split, st.text("ab", max_size=14), st.lists(st.integers(0, 14), max_size=8)),
    stops=st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3),
    minimum=st.sampled_from([0, 0, 1, 2, 5]),
    keep=st.booleans(),
    late=st.integers(0, 2),
)


def check_release(pieces: list[str], stops: list[str], minimum: int, keep: bool, late: int) -> None:
    late = late if len(pieces) - late >= minimum else 0  # which tokens a late text belongs to would not be defined
    text, exempt = "".join(pieces), len("".join(pieces[:minimum]))
    released, reason = release(pieces, late=late, stop=stops, min_new_tokens=minimum, include_stop_str_in_output=keep)
    assert "".join(released) == cut(text, stops, exempt, keep)
    assert reason in (None, "stop")
    if reason is None:
        assert late or not any(stop in text[max(0, exempt - len(stop) + 1) :] for stop in stops)


@settings(max_examples=200)
@any_split_of_any_text
def test_however_a_text_is_split_it_is_released_up_to_the_first_stop_string(
    pieces: list[str], stops: list[str], minimum: int, keep: bool, late: int
) -> None:
    check_release(pieces, stops, minimum, keep, late)


@pytest.mark.slow
@settings(max_examples=20_000)
@any_split_of_any_text
def test_however_many_texts_are_split_each_is_released_up_to_its_first_stop_string(
    pieces: list[str], stops: list[str], minimum: int, keep: bool, late: int
) -> None:
    check_release(pieces, stops, minimum, keep, late)


def test_text_is_held_back_only_while_it_may_begin_a_stop_string() -> None:
    assert release(["Hel", "lo E", "N", "o E", "ND", "never"], stop=["END"]) == (
        ["Hel", "lo ", "", "ENo ", ""],
        "stop",
    )


def test_text_held_back_is_released_when_the_answer_ends_otherwise() -> None:
    assert release(["a", "EN"], stop=["END"], max_new_tokens=2) == (["a", "EN"], "length")
    assert release(["a", "EN", "<eos>"], stop=["END"], eos=[2]) == (["a", "", "EN"], "stop")
    assert release(["a", "EN"], stop=["END"]) == (["a", "", "EN"], None)


def test_a_stop_string_completed_by_the_last_flush_still_cuts() -> None:
    assert release(["a", "EN", "D"], late=1, stop=["END"], max_new_tokens=3) == (["a", "", ""], "stop")


def test_stop_strings_of_the_template_count_too() -> None:
    checker = StopChecker(GenerationConfig(stop="x"), Pieces(["hi<|im", "_end|>"]), stop_strings=["<|im_end|>"])
    assert checker.push(0) == ("hi", None)
    assert checker.push(1) == ("", "stop")


def test_a_stop_tokens_text_is_left_out_unless_asked_for() -> None:
    assert release(["a", "b", "c"], stop_token_ids=[1]) == (["a", ""], "stop")
    assert release(["a", "b", "c"], stop_token_ids=[1], include_stop_str_in_output=True) == (["a", "b"], "stop")


def test_end_tokens_are_ignored_where_asked_but_not_the_requests_own() -> None:
    assert release(["a", "b", "c"], eos=[1], ignore_eos=True, stop_token_ids=[2]) == (["a", "b", ""], "stop")


def test_an_answer_ends_at_its_length_or_at_the_end_of_the_context() -> None:
    assert release(["a", "b", "c"], max_new_tokens=2) == (["a", "b"], "length")
    assert release(["a", "b", "c"], room=1) == (["a"], "length")
    assert release(["a", "b"], max_new_tokens=2, eos=[1]) == (["a", ""], "stop")


def test_nothing_stops_an_answer_before_min_new_tokens() -> None:
    assert release(["a", "END", "b", "END", "c"], stop=["END"], min_new_tokens=2) == (["a", "END", "b", ""], "stop")
    assert release(["a", "b", "c"], eos=[1], min_new_tokens=2) == (["a", "b", "c", ""], None)
    assert release(["END"], stop=["END"], min_new_tokens=1, max_new_tokens=1) == (["END"], "length")
