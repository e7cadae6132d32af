"""Beam search against transformers' `generate`: the same model, the same beams, the same captions."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from vitrail.runtime.beam import BeamSearch

PROMPT = [1, 7, 11]
END = 2


def make_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=24, **sizes, eos_token_id=END, pad_token_id=0, initializer_range=0.6)
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def search(model: LlamaForCausalLM, num_beams: int, fewest: int, most: int) -> BeamSearch:
    beams = BeamSearch(num_beams, (END,), fewest, most)
    while not beams.done:
        ids = torch.tensor([PROMPT + sequence for sequence in beams.sequences])
        beams.advance(model(input_ids=ids).logits[:, -1])
    return beams


@pytest.mark.parametrize(("num_beams", "fewest", "most"), [(5, 8, 14), (3, 0, 10), (2, 3, 4)])
def test_the_best_hypothesis_is_that_of_transformers(num_beams: int, fewest: int, most: int) -> None:
    early = 0
    for seed in range(12):
        model = make_model(seed)
        expected = model.generate(
            torch.tensor([PROMPT]),
            attention_mask=torch.ones(1, 3, dtype=torch.long),
            num_beams=num_beams,
            do_sample=False,
            min_new_tokens=fewest,
            max_new_tokens=most,
        )[0, len(PROMPT) :].tolist()
        found = search(model, num_beams, fewest, most)
        assert found.ended[0][1] == expected
        early += len(expected) < most
    assert early or fewest == 3, "no search ended before the longest answer"


def test_rows_tell_which_beam_each_continues() -> None:
    beams = BeamSearch(2, (), 0, 5)
    first = torch.tensor([[0.0, 3.0, 2.0, -9.0], [9.0, 9.0, 9.0, 9.0]])  # the second beam is not there yet
    assert beams.advance(first) == [0, 0]
    assert beams.sequences == [[1], [2]]
    # The second beam's best continuation is much better than both of the first's.
    assert beams.advance(torch.tensor([[0.1, 0.0, 0.0, 0.0], [9.0, 0.0, 0.0, 0.0]])) == [1, 0]
    assert beams.sequences == [[2, 0], [1, 0]]


def test_no_hypothesis_ends_before_the_fewest_tokens() -> None:
    beams = BeamSearch(2, (0,), 2, 4)
    eager = torch.tensor([[9.0, 0.0, -1.0, -2.0, -3.0]] * 2)
    beams.advance(eager)
    beams.advance(eager)
    assert beams.ended == []
    beams.advance(eager)
    assert beams.ended
    assert all(len(ids) == 3 and ids[-1] == 0 for _, ids in beams.ended)
