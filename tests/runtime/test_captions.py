"""Captions of InternVL-G: greedy and sampled, with a cache, all images of a batch at once."""

import numpy as np
import pytest
import torch
from PIL import Image

from vitrail.runtime import GenerationConfig, Runtime, captions
from vitrail.runtime.beam import BeamSearch
from vitrail.runtime.errors import CapacityError, InvalidRequestError, VitrailError
from vitrail.runtime.models.contrastive import ContrastiveModel
from vitrail.runtime.resize import fit_image

from .tiny_contrastive import write_tiny_contrastive
from .tiny_model import NEAR_TIE, assert_same_answer, picture

SQUARE, WIDE, TALL = picture(90, 90, 1), picture(200, 100, 2), picture(100, 300, 3)
PROMPT = "English caption:"
QUERIES = 6


@pytest.fixture(scope="module")
def rt(sentencepiece_folder):
    folder = write_tiny_contrastive(sentencepiece_folder(tokens=[]))
    with Runtime.from_pretrained(folder, dtype="float32", device="cpu") as runtime:
        yield runtime


def greedy_without_cache(rt, image, new_tokens):
    """The whole sequence again for every token: the logits of each, and the token that leads by more than a tie."""
    model = rt.model
    tile = torch.from_numpy(fit_image(Image.fromarray(image), (84, 84), crop=False))[None]
    vision = model.vision_model(tile)
    ids = rt.tokenizer.encode(PROMPT)
    chosen = []
    for _ in range(new_tokens):
        x = torch.cat((model.query_tokens, model.qllama.embed(torch.tensor([ids + chosen]))), 1)
        positions = torch.arange(x.shape[1])[None]
        hidden = model.qllama(x, positions, prefix=QUERIES, vision=vision)
        best, second = model.qllama.logits(hidden[0, -1]).topk(2).values
        assert best - second > NEAR_TIE
        chosen.append(int(model.qllama.logits(hidden[0, -1]).argmax()))
    return chosen


def test_a_greedy_caption_is_that_of_the_whole_sequence_without_a_cache(rt):
    output = rt.caption(WIDE, max_new_tokens=8)
    expected = greedy_without_cache(rt, WIDE, 8)
    assert rt.tokenizer.eos_token_id not in expected
    assert output.token_ids == expected
    assert output.text == rt.tokenizer.decode(expected)
    assert output.finish_reason == "length"
    assert output.prompt_token_ids == rt.tokenizer.encode(PROMPT)
    assert output.num_tiles == [1]
    usage = output.usage
    assert (usage.image_tokens, usage.image_tiles, usage.completion_tokens) == (QUERIES, 1, 8)
    assert usage.prompt_tokens == QUERIES + len(output.prompt_token_ids)
    assert output.metrics.e2e_ms >= output.metrics.ttft_ms > 0


def test_a_list_of_images_is_captioned_in_order_as_each_is_alone(rt, monkeypatch):
    monkeypatch.setattr("vitrail.runtime.contrastive.CAPTIONS_PER_BATCH", 2)
    images = [SQUARE, WIDE, TALL]
    together = rt.caption(images, max_new_tokens=6)
    assert len(together) == 3
    for image, output in zip(images, together, strict=True):
        assert_same_answer(rt.caption(image, max_new_tokens=6, logprobs=2).outputs[0], output.outputs[0])


def test_the_image_and_the_prompt_decide_the_caption(rt):
    answers = {
        tuple(rt.caption(image, prompt, max_new_tokens=6).token_ids)
        for image in (SQUARE, WIDE)
        for prompt in (PROMPT, "describe:")
    }
    assert len(answers) == 4


def test_a_caption_ends_at_the_end_token_and_at_stop_strings(rt):
    end = rt.tokenizer.eos_token_id
    output = rt.caption(WIDE, logit_bias={end: 100})
    assert (output.token_ids, output.text, output.finish_reason) == ([end], "", "stop")
    longer = rt.caption(WIDE, logit_bias={end: 100}, min_new_tokens=4)
    assert len(longer.token_ids) == 5
    text = rt.caption(WIDE, max_new_tokens=8).text
    assert rt.caption(WIDE, max_new_tokens=8, stop=text[3:5]).text == text[: text.find(text[3:5])]


def test_rows_that_end_at_different_lengths_do_not_disturb_each_other(rt):
    first = rt.caption(SQUARE, max_new_tokens=6).token_ids
    second = rt.caption(WIDE, max_new_tokens=6).token_ids
    stop = next(token for token in first if token not in second)
    together = rt.caption([SQUARE, WIDE], max_new_tokens=6, stop_token_ids=[stop])
    assert together[0].token_ids == first[: first.index(stop) + 1]
    assert together[0].finish_reason == "stop"
    assert together[1].token_ids == second


def test_sampling_is_repeatable_and_gives_several_captions(rt):
    keywords = {"max_new_tokens": 6, "temperature": 1.5, "seed": 3, "n": 3}
    outputs = rt.caption([SQUARE, WIDE], **keywords)
    assert [len(output.outputs) for output in outputs] == [3, 3]
    assert len({tuple(completion.token_ids) for completion in outputs[0].outputs}) == 3
    assert outputs[0].usage.completion_tokens == sum(len(c.token_ids) for c in outputs[0].outputs)
    again = rt.caption([SQUARE, WIDE], **keywords)
    assert [o.token_ids for o in again] == [o.token_ids for o in outputs]


def test_logprobs_come_with_every_token(rt):
    output = rt.caption(WIDE, max_new_tokens=4, logprobs=2)
    assert [entry[1][0] for entry in output.logprobs] == output.token_ids
    assert all(entry[0] == entry[1][1] < 0 for entry in output.logprobs)
    assert rt.caption(WIDE, max_new_tokens=1).logprobs is None


def test_a_caption_has_thirty_tokens_at_most_unless_asked_otherwise(rt):
    assert len(rt.caption(WIDE, ignore_eos=True).token_ids) == captions.MAX_NEW_TOKENS == 30
    config = GenerationConfig(max_new_tokens=7, ignore_eos=True)
    assert len(rt.caption(WIDE, generation_config=config).token_ids) == 7
    assert len(rt.caption(WIDE, generation_config=config, max_new_tokens=3).token_ids) == 3


def test_an_answer_ends_where_the_positions_do(rt):
    room = rt.model.config.llm.max_position_embeddings - QUERIES
    prompt = "x y " * ((room - 10) // 4)
    length = len(rt.tokenizer.encode(prompt))
    assert room - 600 < length < room
    output = rt.caption(WIDE, prompt, max_new_tokens=1000, ignore_eos=True)
    assert len(output.token_ids) == room - length
    with pytest.raises(CapacityError, match=rf"the prompt has \d+ tokens; the context holds {room}"):
        rt.caption(WIDE, "x y " * room)


def test_the_image_is_stretched_unless_it_is_cropped(rt):
    whole = rt.caption(WIDE, max_new_tokens=6).token_ids
    assert rt.caption(fit_image(Image.fromarray(WIDE), (84, 84), crop=False), max_new_tokens=6).token_ids == whole
    cut = fit_image(Image.fromarray(WIDE), (84, 84), crop=True)
    assert rt.caption(WIDE, crop=True, max_new_tokens=6).token_ids == rt.caption(cut, max_new_tokens=6).token_ids
    assert rt.caption(cut, max_new_tokens=6).token_ids != whole


def test_mistakes_are_named(rt):
    for call, kind, message in (
        (lambda: rt.caption([]), InvalidRequestError, "no images were given"),
        (lambda: rt.caption([SQUARE, b"x"]), InvalidRequestError, "image 2: cannot decode"),
        (lambda: rt.caption(SQUARE, 5), InvalidRequestError, "prompt must be a string"),
        (lambda: rt.caption(SQUARE, image_size=85), InvalidRequestError, "image_size=85"),
        (lambda: rt.caption(SQUARE, temprature=1), TypeError, "'temperature'"),
        (lambda: rt.caption(SQUARE, stop_token_ids=[10**6]), InvalidRequestError, "vocabulary size"),
    ):
        with pytest.raises(kind, match=message):
            call()


def test_logits_that_are_not_finite_are_an_error(rt, monkeypatch):
    begin = ContrastiveModel.begin_caption
    monkeypatch.setattr(ContrastiveModel, "begin_caption", lambda *args: begin(*args) * np.nan)
    with pytest.raises(VitrailError, match="logits that are not finite"):
        rt.caption(SQUARE)


def test_a_beam_search_is_that_of_whole_sequences_without_a_cache(rt):
    with torch.no_grad():
        model = rt.model
        tiles = [torch.from_numpy(fit_image(Image.fromarray(image), (84, 84), crop=False)) for image in (WIDE, TALL)]
        vision = model.vision_model(torch.stack(tiles))
        prompt = rt.tokenizer.encode(PROMPT)
        expected = []
        for states in vision:
            beams = BeamSearch(3, (rt.tokenizer.eos_token_id,), 2, 6)
            while not beams.done:
                ids = torch.tensor([prompt + sequence for sequence in beams.sequences])
                x = torch.cat((model.query_tokens.expand(3, -1, -1), model.qllama.embed(ids)), 1)
                positions = torch.arange(x.shape[1]).expand(3, -1)
                hidden = model.qllama(x, positions, prefix=QUERIES, vision=states.expand(3, -1, -1))
                beams.advance(model.qllama.logits(hidden[:, -1]))
            expected.append(beams.ended[0][1])
    outputs = rt.caption([WIDE, TALL], num_beams=3, min_new_tokens=2, max_new_tokens=6)
    assert [output.token_ids for output in outputs] == expected
    assert [output.text for output in outputs] == [rt.tokenizer.decode(ids) for ids in expected]
    assert outputs[0].usage.completion_tokens == len(expected[0])
    assert rt.caption(TALL, num_beams=3, min_new_tokens=2, max_new_tokens=6).token_ids == expected[1]


def test_one_beam_is_the_greedy_caption(rt):
    assert rt.caption(WIDE, num_beams=1, max_new_tokens=5).token_ids == rt.caption(WIDE, max_new_tokens=5).token_ids


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 0}, "num_beams=0: must be an integer from 1 to 64"),
        ({"num_beams": 65}, "num_beams=65"),
        ({"num_beams": True}, "num_beams=True"),
        ({"num_beams": 5, "temperature": 0.5}, "num_beams=5 goes with max_new_tokens and min_new_tokens alone"),
        ({"num_beams": 5, "stop": ["a"]}, "goes with max_new_tokens"),
        ({"num_beams": 5, "n": 2}, "goes with max_new_tokens"),
        ({"response_format": {"type": "json_object"}}, "response_format: captions follow no form"),
    ],
)
def test_a_search_is_refused_what_it_has_no_place_for(rt, settings, message):
    with pytest.raises(InvalidRequestError, match=message):
        rt.caption(WIDE, **settings)
