"""Texts as token ids: cut, ended, unknown tokens set aside."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitrail.runtime.texts import MAX_TOKENS, encode_ids

END = 2
# Drawn by length: left to itself, a list is hardly ever as long as the limit.
KNOWN = st.integers(0, 120).map(lambda length: [1, *range(3, 3 + length)])


@given(KNOWN)
def test_a_text_keeps_its_start_and_its_end_within_80_tokens(ids):
    text = encode_ids(ids, END)
    assert text.token_ids == [*ids[:79], END]
    assert text.positions == list(range(len(text.token_ids)))
    assert text.last == len(text.token_ids) - 1
    assert len(text.token_ids) <= MAX_TOKENS
    assert text.truncated == (len(ids) + 1 > MAX_TOKENS)


@pytest.mark.parametrize(("length", "truncated"), [(79, False), (80, True)])
def test_eighty_tokens_with_both_ends_are_not_too_many(length, truncated):
    assert encode_ids([1] * length, END).truncated is truncated


@given(st.lists(st.integers(0, 5), max_size=100).map(lambda ids: [1, *ids]))
def test_unknown_tokens_are_hidden_and_shift_the_token_that_stands_for_the_text(ids):
    padded = [*ids[:79], END]
    seen = [index for index, token in enumerate(padded) if token > 0]
    selected = len(seen) - 1  # as the reference counts: the sum of the mask, less one
    text = encode_ids(ids, END)
    assert text.positions == seen
    assert text.token_ids == [padded[index] for index in seen]
    assert text.positions[text.last] <= selected
    assert padded[selected] == 0 or text.positions[text.last] == selected
