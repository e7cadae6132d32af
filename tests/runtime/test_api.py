"""`Runtime` and `runtime.generate`: what callers may ask for, and what they get."""

import asyncio
import io
import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vitrail import runtime
from vitrail.runtime import GenerationConfig, Runtime, api
from vitrail.runtime.engine.engine import Engine
from vitrail.runtime.engine.processor import Conversation, Picture, Processor
from vitrail.runtime.errors import CapacityError, CheckpointError, ConfigError, InvalidRequestError, UnsupportedError
from vitrail.runtime.image import tile_image, tile_static
from vitrail.runtime.models.internvl import InternVLModel

from .tiny_model import assert_idle, assert_same_answer, clip, picture, write_tiny_model

SQUARE, WIDE, TALL = picture(90, 90, 1), picture(200, 100, 2), picture(100, 300, 3)
# More prompts than rows, of uneven lengths, each with its own number of images.
PROMPTS = ["hello", "What is the total?" * 5, "How many red circles?", "compare", "<image> or <image>?", "hello", "x"]
IMAGES = [None, WIDE, [SQUARE], [TALL, SQUARE], [SQUARE, WIDE], [], TALL]
ROWS = 3


@pytest.fixture(scope="module")
def folder(sentencepiece_folder):
    return write_tiny_model(sentencepiece_folder())


@pytest.fixture(scope="module")
def rt(folder):
    with Runtime.from_pretrained(folder, dtype="float32", device="cpu", max_num_seqs=ROWS) as runtime:
        yield runtime


@pytest.fixture(autouse=True)
def _idle_afterwards(rt):
    yield
    assert_idle(rt.engine)


def joined(deltas):
    return "".join(delta.text for delta in deltas)


# --- prompts and images ---


def test_a_list_of_prompts_is_answered_in_order_as_each_is_alone(rt):
    alone = [
        rt.generate(prompt, images, max_new_tokens=6, logprobs=2)
        for prompt, images in zip(PROMPTS, IMAGES, strict=True)
    ]
    together = rt.generate(PROMPTS, IMAGES, max_new_tokens=6)
    assert len(together) == len(PROMPTS) > 2 * ROWS
    for expected, got in zip(alone, together, strict=True):
        assert_same_answer(expected.outputs[0], got.outputs[0])
        assert got.prompt_token_ids == expected.prompt_token_ids
        assert got.num_tiles == expected.num_tiles
        assert got.usage == expected.usage
        assert got.error is None
    assert [output.num_tiles for output in together] == [[], [3], [1], [4, 1], [1, 3], [], [4]]


def test_a_list_without_images_a_tuple_and_an_empty_list_are_lists(rt):
    assert rt.generate([], max_new_tokens=2) == []
    first, second = rt.generate(("hello", "x"), max_new_tokens=2)
    assert first.usage.image_tiles == second.usage.image_tiles == 0
    assert isinstance(rt.generate(["hello"], [SQUARE], max_new_tokens=2), list)


def test_prompts_ahead_of_their_turn_are_not_held_in_memory(rt, monkeypatch):
    most = 0
    submit = Engine.submit

    def counted(self, *args):
        nonlocal most
        request = submit(self, *args)
        most = max(most, len(self._requests))
        return request

    monkeypatch.setattr(Engine, "submit", counted)
    outputs = rt.generate(["hello"] * 20, [SQUARE] * 20, max_new_tokens=2)
    assert len(outputs) == 20
    assert most <= 2 * ROWS + 1


def test_one_bad_prompt_of_a_list_becomes_an_error_and_the_others_are_answered(rt):
    outputs = rt.generate(
        ["hello", "hello", 5, "<image>", "hello"], [None, "/nowhere.png", None, None, SQUARE], max_new_tokens=3
    )
    reasons = [output.finish_reason == "error" for output in outputs]
    assert reasons == [False, True, True, True, False]
    assert [output.error and output.error.code for output in outputs[1:4]] == ["InvalidRequestError"] * 3
    assert "no such file" in outputs[1].error.message
    assert outputs[0].token_ids == rt.generate("hello", max_new_tokens=3).token_ids


def test_a_request_that_breaks_inside_becomes_an_error_of_its_list_entry(rt, monkeypatch):
    expected = rt.generate(["hello", "x"], [SQUARE, WIDE], max_new_tokens=3)
    rt.engine.vision_cache.clear()
    encode_tiles = InternVLModel.encode_tiles

    def encode(self, tiles):
        if len(tiles) != 1:
            raise RuntimeError("only one at a time")
        return encode_tiles(self, tiles)

    monkeypatch.setattr(InternVLModel, "encode_tiles", encode)
    good, bad = rt.generate(["hello", "x"], [SQUARE, WIDE], max_new_tokens=3)
    assert good.token_ids == expected[0].token_ids
    assert bad.finish_reason == "error"
    assert bad.error.code == "VitrailError"
    assert "only one at a time" in bad.error.message


def test_an_interrupted_list_leaves_no_request_behind(rt, monkeypatch):
    prepare = Processor.prepare

    def interrupted(self, conversation, **keywords):
        if conversation.turns[-1][0] == "stop here":
            raise KeyboardInterrupt
        return prepare(self, conversation, **keywords)

    monkeypatch.setattr(Processor, "prepare", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rt.generate(["hello", "hello", "stop here"])
    assert_idle(rt.engine)


@pytest.mark.parametrize("images", [[None], [None] * 3, SQUARE, "a.png"])
def test_a_list_of_prompts_needs_an_entry_of_images_for_each(rt, images):
    with pytest.raises(InvalidRequestError, match="2 prompts need a list of as many image entries, not"):
        rt.generate(["a", "b"], images)


@pytest.mark.parametrize("keywords", [{"video": [SQUARE]}, {"history": [("a", "b")]}])
def test_a_list_of_prompts_takes_neither_video_nor_history(rt, keywords):
    with pytest.raises(InvalidRequestError, match="single prompt"):
        rt.generate(["a", "b"], **keywords)


def test_images_without_marks_stand_before_the_question(rt):
    assert ids_of(rt, "what?", WIDE) == ids_of(rt, "<image>\nwhat?", WIDE)
    labelled = "Image-1: <image>\nImage-2: <image>\nwhat?"
    assert ids_of(rt, "what?", [WIDE, SQUARE]) == ids_of(rt, labelled, [WIDE, SQUARE])
    assert ids_of(rt, "what <image> is <image>?", [WIDE, SQUARE]) != ids_of(rt, labelled, [WIDE, SQUARE])


def ids_of(rt, prompt, images=None, **keywords):
    return rt.generate(prompt, images, max_new_tokens=1, **keywords).prompt_token_ids


def test_images_of_all_kinds_give_the_same_answer(rt, tmp_path):
    image = Image.fromarray(WIDE)
    image.save(tmp_path / "wide.png")
    data = (tmp_path / "wide.png").read_bytes()
    sources = [WIDE, image, tmp_path / "wide.png", str(tmp_path / "wide.png"), data]
    answers = [rt.generate("what?", source, max_new_tokens=4).token_ids for source in sources]
    assert answers == [answers[0]] * len(sources)


def test_history_keeps_its_turns_and_its_images(rt):
    history = [("<image>\nwhat is it?", "a sign"), ("and its colour?", "red")]
    output = rt.generate("sure?", WIDE, history=history, max_new_tokens=3)
    expected = rt.processor.prepare(Conversation([*history, ("sure?", None)], [Picture(WIDE)]))
    assert output.prompt_token_ids == expected.token_ids
    assert output.num_tiles == [3]
    assert rt.count_tokens("sure?", WIDE, history=history).prompt_tokens == output.usage.prompt_tokens
    assert ids_of(rt, "sure?", history=[list(turn) for turn in history[1:]]) == ids_of(rt, "sure?", history=history[1:])


@pytest.mark.parametrize("history", ["ab", [("only",)], [("a", None)], [("a", "b", "c")], 5, {"a": "b"}])
def test_history_of_another_form_is_refused(rt, history):
    with pytest.raises(InvalidRequestError, match="history"):
        rt.generate("x", history=history)


def test_a_system_message_replaces_the_checkpoints_own(rt):
    assert ids_of(rt, "x", system="Answer.") == ids_of(rt, "x")
    assert ids_of(rt, "x", system="Be brief.") != ids_of(rt, "x")
    with pytest.raises(InvalidRequestError, match="system must be a string, not list"):
        rt.generate("x", system=["Be brief."])


def test_frames_of_a_video_stand_a_line_each_with_one_tile(rt):
    frames = [WIDE, TALL, WIDE]
    output = rt.generate("what happens?", video=frames, max_new_tokens=3)
    assert output.num_tiles == [1, 1, 1]
    marked = "Frame-1: <image>\nFrame-2: <image>\nFrame-3: <image>\nwhat happens?"
    assert output.prompt_token_ids == ids_of(rt, marked, frames, max_tiles=1)
    assert "Frame-1: " in rt.tokenizer.decode(ids_of(rt, "what?", video=frames[:1]))
    with pytest.raises(InvalidRequestError, match="images or a video, not both"):
        rt.generate("x", WIDE, video=frames)


def test_a_video_file_is_sampled_into_eight_frames(rt, tmp_path):
    (tmp_path / "clip.mp4").write_bytes(data := clip())
    output = rt.generate("what happens?", video=tmp_path / "clip.mp4", max_new_tokens=3)
    assert output.num_tiles == [1] * 8
    assert "".join(joined([delta]) for delta in rt.stream("what happens?", video=data, max_new_tokens=3)) == output.text


def test_tiles_keep_to_the_limits_of_the_call(rt):
    assert rt.generate("x", TALL, max_new_tokens=1, max_tiles=1).num_tiles == [1]
    assert rt.generate("x", TALL, max_new_tokens=1, max_tiles=2).num_tiles == [3]
    assert rt.generate("x", TALL, max_new_tokens=1).num_tiles == [4]
    assert rt.generate("x", [TALL, TALL], max_new_tokens=1, total_max_tiles=7).num_tiles == [3, 3]
    with pytest.raises(InvalidRequestError, match="total_max_tiles=1 is too few for 2 image"):
        rt.generate("x", [TALL, TALL], total_max_tiles=1)


@pytest.mark.parametrize("text", ["<|im_end|>", "<IMG_CONTEXT>", "<img>", "</s>", "<|im_start|>user\n"])
def test_control_tokens_that_a_user_types_are_text(rt, text):
    controls = rt.tokenizer.special_ids
    plain = [token for token in ids_of(rt, "look", SQUARE) if token in controls]
    typed = ids_of(rt, f"lo{text}ok", SQUARE)
    assert [token for token in typed if token in controls] == plain
    assert f"lo{text}ok" in rt.tokenizer.decode(typed, skip_special_tokens=False)


# --- settings ---

texts = {}  # prompt -> the pieces that its greedy answer streams in


def pieces_of(rt, prompt):
    if prompt not in texts:
        texts[prompt] = [delta.text for delta in rt.stream(prompt, max_new_tokens=24, ignore_eos=True)]
    return texts[prompt]


@settings(max_examples=25)
@given(data=st.data(), prompt=st.sampled_from(["hello", "What is the total?", "x"]))
def test_a_stop_string_cuts_the_answer_wherever_its_tokens_end(rt, data, prompt):
    full = "".join(pieces_of(rt, prompt))
    begin = data.draw(st.integers(0, len(full) - 1))
    stop = full[begin : data.draw(st.integers(begin + 1, min(begin + 12, len(full))))]
    stops = data.draw(st.sampled_from([stop, [stop], ["never to be found", stop]]))
    keeps = data.draw(st.booleans())
    keywords = {"stop": stops, "include_stop_str_in_output": keeps, "max_new_tokens": 24, "ignore_eos": True}
    output = rt.generate(prompt, **keywords)
    end = full.index(stop) + len(stop)
    assert output.text == full[: end if keeps else end - len(stop)]
    assert output.finish_reason == "stop"
    deltas = list(rt.stream(prompt, **keywords))
    assert joined(deltas) == output.text
    assert [token for delta in deltas for token in delta.token_ids] == output.token_ids


def test_stop_ids_are_the_templates_the_tokenizers_and_the_callers(rt):
    end, eos, word = (rt.tokenizer.token_to_id(token) for token in ("<|im_end|>", "</s>", "▁the"))
    assert rt.engine.stop_token_ids == {end, eos}
    for token in (end, eos):
        stopped = rt.generate("x", max_new_tokens=5, logit_bias={token: 100})
        assert (stopped.text, stopped.token_ids, stopped.finish_reason) == ("", [token], "stop")
        ignored = rt.generate("x", max_new_tokens=5, logit_bias={token: 100}, ignore_eos=True)
        assert (ignored.text, ignored.token_ids, ignored.finish_reason) == ("", [token] * 5, "length")
        shown = rt.generate("x", max_new_tokens=2, logit_bias={token: 100}, ignore_eos=True, skip_special_tokens=False)
        assert shown.text == {end: "<|im_end|>", eos: "</s>"}[token] * 2
    own = rt.generate("x", max_new_tokens=5, logit_bias={word: 100}, stop_token_ids=[word])
    assert (own.token_ids, own.finish_reason) == ([word], "stop")
    late = rt.generate("x", max_new_tokens=5, logit_bias={end: 100}, min_new_tokens=3)
    assert late.token_ids[3:] == [end]
    assert end not in late.token_ids[:3]


def test_greedy_log_probabilities_are_of_the_best_tokens(rt):
    output = rt.generate("hello", WIDE, max_new_tokens=6, logprobs=3, ignore_eos=True)
    assert len(output.logprobs) == len(output.token_ids) == 6
    for token, (chosen, *best) in zip(output.token_ids, output.logprobs, strict=True):
        assert len(best) == 3
        assert best[0] == (token, chosen)
        assert [value for _, value in best] == sorted((value for _, value in best), reverse=True)
        assert sum(math.exp(value) for _, value in best) <= 1 + 1e-6
    assert [len(entry) for entry in rt.generate("hello", max_new_tokens=2, logprobs=0).logprobs] == [1, 1]
    assert rt.generate("hello", max_new_tokens=2).logprobs is None


def test_log_probabilities_are_the_models_own_whatever_is_picked(rt):
    plain = rt.generate("hello", max_new_tokens=8, ignore_eos=True, logprobs=1)
    first = plain.token_ids[0]
    biased = rt.generate("hello", max_new_tokens=8, ignore_eos=True, logprobs=1, logit_bias={first: -100})
    assert first not in biased.token_ids
    assert biased.logprobs[0][1] == plain.logprobs[0][1]
    assert biased.logprobs[0][0] < plain.logprobs[0][0]


def test_bad_words_never_come_up(rt):
    word = rt.tokenizer.token_to_id("▁the")
    assert rt.generate("hello", max_new_tokens=4, logit_bias={word: 100}).token_ids == [word] * 4
    assert word not in rt.generate("hello", max_new_tokens=4, logit_bias={word: 100}, bad_words=["the"]).token_ids


def test_a_seed_gives_the_same_tokens_alone_and_in_any_batch(rt):
    keywords = {"temperature": 1.0, "top_p": 0.95, "max_new_tokens": 8, "ignore_eos": True, "seed": 11}
    alone = rt.generate("How many?", SQUARE, **keywords).token_ids
    assert rt.generate("How many?", SQUARE, **keywords).token_ids == alone
    batch = rt.generate([*PROMPTS, "How many?"], [*IMAGES, SQUARE], **keywords)
    assert batch[-1].token_ids == alone
    assert rt.generate("How many?", SQUARE, **{**keywords, "seed": 12}).token_ids != alone
    unseeded = {tuple(rt.generate("How many?", **{**keywords, "seed": None}).token_ids) for _ in range(3)}
    assert len(unseeded) > 1


def test_n_completions_differ_and_the_first_is_mirrored(rt):
    output = rt.generate("hello", SQUARE, n=3, temperature=1.0, seed=3, max_new_tokens=6, ignore_eos=True, logprobs=1)
    assert len(output.outputs) == 3
    assert len({tuple(completion.token_ids) for completion in output.outputs}) == 3
    first = output.outputs[0]
    mirrored = (output.text, output.token_ids, output.finish_reason, output.logprobs)
    assert mirrored == (first.text, first.token_ids, first.finish_reason, first.logprobs)
    assert output.usage.completion_tokens == 18
    one = rt.generate("hello", SQUARE, temperature=1.0, seed=3, max_new_tokens=6, ignore_eos=True)
    assert one.token_ids == first.token_ids
    greedy = rt.generate("hello", n=2, max_new_tokens=4)
    assert greedy.outputs[0] == greedy.outputs[1]


def test_keywords_go_on_top_of_a_generation_config(rt):
    config = GenerationConfig(max_new_tokens=3, ignore_eos=True)
    assert len(rt.generate("hello", generation_config=config).token_ids) == 3
    assert len(rt.generate("hello", generation_config=config, max_tokens=5).token_ids) == 5
    assert len(list(rt.stream("hello", generation_config=config))) == 3
    with pytest.raises(TypeError, match="generation_config must be a GenerationConfig"):
        rt.generate("hello", generation_config={"max_new_tokens": 3})


@pytest.mark.parametrize(
    ("call", "keyword", "nearest"),
    [
        ("generate", "temperatur", "temperature"),
        ("generate", "imges", "images"),
        ("generate", "use_tdqm", "use_tqdm"),
        ("generate", "max_new_token", "max_new_tokens"),
        ("stream", "request_ids", "request_id"),
        ("chat", "mesages", "messages"),
        ("chat", "generation_confg", "generation_config"),
    ],
)
def test_an_unknown_keyword_names_the_nearest(rt, call, keyword, nearest):
    given = [{"role": "user", "content": "x"}] if call == "chat" else "x"
    with pytest.raises(TypeError, match=f"^unknown keyword '{keyword}'; the nearest one is '{nearest}'$"):
        getattr(rt, call)(given, **{keyword: 1})


@pytest.mark.parametrize(("call", "keyword"), [("generate", "request_id"), ("stream", "use_tqdm"), ("chat", "images")])
def test_a_keyword_of_another_call_is_unknown_to_this_one(rt, call, keyword):
    given = [{"role": "user", "content": "x"}] if call == "chat" else "x"
    with pytest.raises(TypeError, match=f"^unknown keyword '{keyword}'; the nearest one is '(?!{keyword}')"):
        getattr(rt, call)(given, **{keyword: 1})


def test_a_progress_bar_is_shown_only_where_asked_for(rt, capsys):
    rt.generate(["hello", "x"], max_new_tokens=1)
    assert capsys.readouterr() == ("", "")
    rt.generate(["hello", "x"], max_new_tokens=1, use_tqdm=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "2/2" in err


def test_an_answer_ends_where_the_context_does(folder):
    with Runtime.from_pretrained(folder, dtype="float32", max_model_len=40) as small:
        output = small.generate("hello", ignore_eos=True)
        assert output.usage.prompt_tokens + output.usage.completion_tokens == 40
        assert output.finish_reason == "length"


# --- counting ---


@settings(max_examples=20)
@given(
    sizes=st.lists(st.tuples(st.integers(2, 400), st.integers(2, 400)), max_size=3),
    kind=st.sampled_from(["PNG", "JPEG", "WEBP", "BMP", "GIF"]),
    max_tiles=st.sampled_from([None, 1, 3, 9]),
    prompt=st.text("ab <>image\n|", max_size=12).filter(lambda text: "<image>" not in text),
)
def test_counted_tokens_are_those_that_generating_reports(rt, sizes, kind, max_tiles, prompt):
    images = []
    for size in sizes:
        Image.new("RGB", size, (10, 200, 30)).save(buffer := io.BytesIO(), kind)
        images.append(buffer.getvalue())

    def refuse(*_args, **_keywords):
        raise AssertionError("decoded")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vitrail.runtime.engine.processor.open_image", refuse)
        patch.setattr(InternVLModel, "encode_tiles", refuse)
        counted = rt.count_tokens(prompt, images, max_tiles=max_tiles)
    usage = rt.generate(prompt, images, max_tiles=max_tiles, max_new_tokens=1).usage
    assert counted == replace(usage, completion_tokens=0)
    assert usage.completion_tokens == 1


# --- streams ---


def test_a_stream_raises_at_once_and_not_at_its_first_delta(rt):
    with pytest.raises(InvalidRequestError, match="no such file"):
        rt.stream("x", "/nowhere.png")
    with pytest.raises(InvalidRequestError, match="temperature"):
        rt.stream("x", temperature=-1)


def test_a_stream_that_fails_on_the_way_raises_its_error(rt, monkeypatch):
    rt.engine.vision_cache.clear()
    monkeypatch.setattr(InternVLModel, "encode_tiles", lambda *_: 1 / 0)
    stream = rt.stream("x", SQUARE)
    with pytest.raises(runtime.errors.VitrailError, match="ZeroDivisionError"):
        list(stream)


def test_a_stream_can_be_aborted_by_its_id(rt):
    stream = rt.stream("x", request_id="mine", ignore_eos=True)
    next(stream)
    assert rt.abort("mine")
    assert list(stream)[-1].finish_reason == "abort"
    assert not rt.abort("mine")


# --- asynchronous calls ---


def test_asynchronous_requests_get_what_they_get_alone(rt):
    async def ask():
        calls = [rt.agenerate(prompt, images, max_new_tokens=6) for prompt, images in zip(PROMPTS, IMAGES, strict=True)]
        return await asyncio.gather(*calls)

    for (prompt, images), got in zip(zip(PROMPTS, IMAGES, strict=True), asyncio.run(ask()), strict=True):
        assert_same_answer(rt.generate(prompt, images, max_new_tokens=6, logprobs=2).outputs[0], got.outputs[0])


def test_an_asynchronous_call_takes_what_generate_takes(rt):
    config = GenerationConfig(max_new_tokens=4)
    got = asyncio.run(rt.agenerate("sure?", history=[("a", "b")], system="Be brief.", generation_config=config))
    expected = rt.generate("sure?", history=[("a", "b")], system="Be brief.", generation_config=config)
    assert got.prompt_token_ids == expected.prompt_token_ids
    assert got.token_ids == expected.token_ids
    with pytest.raises(TypeError, match="'temperatur'; the nearest one is 'temperature'"):
        asyncio.run(rt.agenerate("x", temperatur=1))
    with pytest.raises(InvalidRequestError, match="no such file"):
        asyncio.run(rt.agenerate("x", "/nowhere.png"))


def test_cancelling_aborts_a_request_that_runs(rt):
    async def ask():
        task = asyncio.create_task(rt.agenerate("x", request_id="mine", ignore_eos=True, max_new_tokens=900))
        while not rt.engine.running:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not rt.abort("mine")
        assert not rt.engine.running

    asyncio.run(ask())


def test_cancelling_while_images_are_read_leaves_no_request_behind(rt, monkeypatch):
    reading, go_on = threading.Event(), threading.Event()
    prepare = Processor.prepare

    def slow(self, *args, **keywords):
        reading.set()
        assert go_on.wait(30)
        return prepare(self, *args, **keywords)

    monkeypatch.setattr(Processor, "prepare", slow)

    async def ask():
        task = asyncio.create_task(rt.agenerate("x", SQUARE))
        await asyncio.to_thread(reading.wait, 30)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go_on.set()

    asyncio.run(ask())  # waits for its threads
    assert_idle(rt.engine)


def test_threads_that_generate_at_once_get_what_they_get_alone(rt):
    expected = [
        rt.generate(prompt, images, max_new_tokens=6, logprobs=2)
        for prompt, images in zip(PROMPTS, IMAGES, strict=True)
    ]
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        outputs = pool.map(lambda prompt, images: rt.generate(prompt, images, max_new_tokens=6), PROMPTS, IMAGES)
        for wanted, got in zip(expected, outputs, strict=True):
            assert_same_answer(wanted.outputs[0], got.outputs[0])


# --- what the model sees ---


@pytest.mark.parametrize(("max_tiles", "grid"), [(None, (3, 2)), (1, (1, 1)), (3, (2, 1))])
def test_visual_tokens_are_those_of_the_tiles(rt, max_tiles, grid):
    image = picture(250, 150)
    encoded = rt.encode_image(image, max_tiles=max_tiles)
    tiles = tile_image(image, 84, 1, max_tiles or 6, True)
    assert encoded.num_tiles == len(tiles)
    assert encoded.grid == grid
    assert encoded.tokens.shape == (len(tiles) * 9, 64)
    assert torch.equal(encoded.tokens, rt.model.encode_tiles(torch.from_numpy(tiles)).flatten(0, 1))


@pytest.mark.parametrize("call", ["embed", "score", "classify", "match", "caption"])
def test_contrastive_calls_say_which_models_have_them(rt, call):
    with pytest.raises(UnsupportedError, match=rf"^{call}: .* is a chat model; only contrastive models"):
        getattr(rt, call)(["a"], ["b"])


# --- checkpoints ---


@pytest.mark.parametrize("pad2square", [False, True])
def test_a_checkpoint_without_dynamic_tiling_shows_each_image_as_one_tile(sentencepiece_folder, pad2square):
    folder = write_tiny_model(sentencepiece_folder(), dynamic_image_size=False, pad2square=pad2square)
    with Runtime.from_pretrained(folder, dtype="float32") as fixed:
        output = fixed.generate("what?", [TALL, WIDE], max_new_tokens=3, max_tiles=5)
        assert output.num_tiles == [1, 1]
        assert fixed.count_tokens("what?", [TALL, WIDE]).image_tokens == 18
        tiles = tile_static(WIDE, 84, pad2square=pad2square)
        expected = fixed.model.encode_tiles(torch.from_numpy(tiles)).flatten(0, 1)
        assert torch.equal(fixed.encode_image(WIDE).tokens, expected)


@pytest.fixture(scope="module")
def qwen(qwen2_folder):
    folder = write_tiny_model(qwen2_folder(), "Qwen2ForCausalLM", template="internvl2_5")
    with Runtime.from_pretrained(folder, dtype="float32") as runtime:
        yield runtime


def test_a_qwen2_checkpoint_speaks_its_own_template(qwen):
    output = qwen.generate("What is the total?", WIDE, max_new_tokens=5)
    shown = qwen.tokenizer.decode(output.prompt_token_ids, skip_special_tokens=False)
    image = "<img>" + "<IMG_CONTEXT>" * 27 + "</img>"
    assert shown == (
        "<|im_start|>system\nAnswer.<|im_end|>\n"
        f"<|im_start|>user\n{image}\nWhat is the total?<|im_end|>\n<|im_start|>assistant\n"
    )
    together = qwen.generate(PROMPTS, IMAGES, max_new_tokens=5)
    alone = qwen.generate(PROMPTS[4], IMAGES[4], max_new_tokens=5, logprobs=2)
    assert_same_answer(alone.outputs[0], together[4].outputs[0])


def test_a_qwen2_checkpoint_also_stops_at_its_own_end_of_text(qwen):
    ends = {qwen.tokenizer.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>")}
    assert qwen.engine.stop_token_ids == ends
    for end in ends:
        assert qwen.generate("x", logit_bias={end: 100}).token_ids == [end]


def test_bad_words_are_ruled_out_behind_a_space_too(qwen):
    [word] = qwen.tokenizer.encode(" the", add_bos=False)
    assert qwen.generate("x", max_new_tokens=3, logit_bias={word: 100}).token_ids == [word] * 3
    assert word not in qwen.generate("x", max_new_tokens=3, logit_bias={word: 100}, bad_words=["the"]).token_ids


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
def test_a_checkpoint_loads_in_half_precision(folder, dtype):
    with Runtime.from_pretrained(folder, dtype=dtype) as half:
        assert {parameter.dtype for parameter in half.model.parameters()} == {
            torch.bfloat16 if dtype == "bfloat16" else torch.float16
        }
        assert len(half.generate("What?", WIDE, max_new_tokens=3, ignore_eos=True).token_ids) == 3


@pytest.mark.parametrize(
    "option",
    [
        {"vision_devices": ["cuda:90"]},
        {"llm_devices": ["cuda:91"]},
        {"device": "mps"},
        {"device": "cuda:99"},
    ],
)
def test_a_device_that_is_not_there_is_refused_before_loading(folder, option, monkeypatch):
    monkeypatch.setattr(api, "open_halves", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(UnsupportedError, match=next(iter(option))):
        Runtime.from_pretrained(folder, **option)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"dtype": "float8"}, "dtype 'float8' is not known; known: float32, float16, bfloat16"),
        ({"device": "gpu"}, "device 'gpu' is not known"),
        ({"max_num_seqs": 0}, "max_num_seqs must be a positive integer, not 0"),
        ({"max_model_len": 0}, "max_model_len must be a positive integer, not 0"),
        ({"max_model_len": 2000}, "max_model_len 2000 exceeds the 1024 positions"),
        ({"max_image_pixels": 0}, "max_image_pixels must be a positive integer, not 0"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype must be 'auto' or 'int8', got 'fp8'"),
    ],
)
def test_an_option_out_of_range_is_refused(folder, option, message):
    with pytest.raises(ConfigError, match=message):
        Runtime.from_pretrained(folder, **option)


def test_options_that_change_no_answer_are_taken(folder):
    options = {
        "max_num_batched_tokens": 64,
        "enable_prefix_caching": False,
        "vision_cache_gb": 0,
        "enforce_eager": True,
    }
    with Runtime.from_pretrained(folder, dtype="float32", **options) as other:
        assert other.generate("hello", max_new_tokens=1).finish_reason == "length"


def test_image_limits_are_the_runtimes(folder):
    options = {"max_image_pixels": 10_000, "max_aspect_ratio": 2.5, "limit_mm_per_prompt": {"image": 2}}
    with Runtime.from_pretrained(folder, dtype="float32", **options) as strict:
        for image, message in ((picture(200, 100), "10000 pixels"), (picture(90, 30), "aspect ratio limit of 2.5")):
            with pytest.raises(InvalidRequestError, match=message):
                strict.generate("x", image)
            with pytest.raises(InvalidRequestError, match=message):
                strict.encode_image(image)
        with pytest.raises(InvalidRequestError, match="3 images exceed the limit of 2"):
            strict.generate("x", [SQUARE] * 3)


def test_exif_orientation_is_applied_unless_turned_off(rt, folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(WIDE).save(buffer := io.BytesIO(), "PNG", exif=exif)
    upright = Image.fromarray(WIDE).transpose(Image.Transpose.ROTATE_270)
    assert rt.encode_image(buffer.getvalue()).grid == (1, 2)
    assert torch.equal(rt.encode_image(buffer.getvalue()).tokens, rt.encode_image(upright).tokens)
    with Runtime.from_pretrained(folder, dtype="float32", exif_orientation=False) as plain:
        assert torch.equal(plain.encode_image(buffer.getvalue()).tokens, plain.encode_image(WIDE).tokens)


def test_a_tokenizer_that_lacks_the_image_tokens_or_has_too_many_is_refused(rt, folder):
    model, tokenizer = rt.model, rt.tokenizer
    config = replace(model.config, llm=replace(model.config.llm, vocab_size=tokenizer.vocab_size - 1))
    smaller = InternVLModel(config)
    with pytest.raises(CheckpointError, match=r"the tokenizer has \d+ tokens, the model \d+"):
        Runtime(smaller, tokenizer)


def test_a_tokenizer_without_image_tokens_is_refused(sentencepiece_folder):
    folder = write_tiny_model(sentencepiece_folder(tokens=["<|im_end|>", "<|im_start|>"]))
    with pytest.raises(CheckpointError, match="no <IMG_CONTEXT> token"):
        Runtime.from_pretrained(folder)


# --- life ---


def test_a_closed_runtime_says_so_whatever_is_asked(folder):
    with Runtime.from_pretrained(folder, dtype="float32") as closed:
        stream = closed.stream("hello", ignore_eos=True)
        next(stream)
    assert list(stream)[-1].finish_reason == "abort"
    messages = [{"role": "user", "content": "x"}]
    calls = {
        "generate": lambda: closed.generate("x"),
        "stream": lambda: closed.stream("x"),
        "chat": lambda: closed.chat(messages),
        "agenerate": lambda: asyncio.run(closed.agenerate("x")),
        "encode_image": lambda: closed.encode_image(SQUARE),
        "count_tokens": lambda: closed.count_tokens("x"),
        "features": lambda: closed.features(SQUARE),
    }
    for call in calls.values():
        with pytest.raises(InvalidRequestError, match="this Runtime is closed"):
            call()
    assert [output.error.message for output in closed.generate(["x"])] == ["this Runtime is closed"]
    closed.close()
    assert not closed.abort("mine")


def test_one_runtime_is_kept_for_each_model_and_options(folder, monkeypatch):
    monkeypatch.setattr(api, "_runtimes", {})
    loaded = []
    from_pretrained = Runtime.from_pretrained

    def counted(model, **options):
        loaded.append(options)
        return from_pretrained(model, **options)

    monkeypatch.setattr(Runtime, "from_pretrained", counted)
    with ThreadPoolExecutor(2) as pool:
        options = {"dtype": "float32"}
        ask = [
            pool.submit(runtime.generate, "hello", model=model, runtime_options=options, max_new_tokens=2)
            for model in (folder, str(folder))
        ]
        first, second = (future.result() for future in ask)
    assert first.token_ids == second.token_ids
    runtime.generate("hello", SQUARE, model=folder, runtime_options={"dtype": "float32"}, max_new_tokens=1)
    assert loaded == [{"dtype": "float32"}]
    runtime.generate(["hello"], model=folder, runtime_options={"dtype": "float32", "max_num_seqs": 2}, max_new_tokens=1)
    assert loaded[1:] == [{"dtype": "float32", "max_num_seqs": 2}]


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"modle": "nano"}, TypeError, "unknown keyword 'modle'; the nearest one is 'model'"),
        ({"imagse": "a.png"}, TypeError, "unknown keyword 'imagse'; the nearest one is 'images'"),
        ({"temperature": -1}, InvalidRequestError, "temperature=-1"),
    ],
)
def test_mistakes_are_found_before_a_model_is_loaded(monkeypatch, keywords, error, message):
    monkeypatch.setattr(Runtime, "from_pretrained", lambda *_args, **_options: 1 / 0)
    with pytest.raises(error, match=message):
        runtime.generate("x", **keywords)


def test_expected_tensors_are_those_of_a_folder_or_its_config(folder):
    expected = runtime.expected_tensors(folder)
    assert expected == runtime.expected_tensors(json.loads((folder / "config.json").read_text()))
    assert expected["vision_model.embeddings.class_embedding"] == (1, 1, 48)


# --- what a careful reader found ---


def test_a_head_can_be_trained_on_features_and_visual_tokens(rt):
    pooled = rt.features([SQUARE, WIDE])[-1].pooled
    for tensor in (pooled, rt.encode_image(SQUARE).tokens):
        head = torch.nn.Linear(tensor.shape[-1], 2)
        head(tensor).sum().backward()
        assert head.weight.grad is not None


def test_decode_steps_that_keep_breaking_end_every_entry_with_our_error(rt, monkeypatch):
    def broken(self):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_decode", broken)
        outputs = rt.generate(["hello", "x"], max_new_tokens=4)
        assert [output.finish_reason for output in outputs] == ["error", "error"]
        assert "out of memory" in outputs[0].error.message
    assert rt.generate("hello", max_new_tokens=2).finish_reason == "length"


@pytest.mark.parametrize("video", [5, [], {}])
def test_a_video_of_another_form_is_refused(rt, video):
    with pytest.raises(InvalidRequestError, match="video"):
        rt.generate("x", video=video)


def test_the_largest_top_k_is_answered_and_a_larger_one_refused(rt):
    assert rt.generate("x", top_k=2**31 - 1, seed=0, max_new_tokens=2).finish_reason == "length"
    with pytest.raises(InvalidRequestError, match="top_k"):
        rt.generate("x", top_k=2**63)


def test_images_go_with_the_first_question_of_a_history_without_marks(rt):
    with_marks = rt.generate("again?", SQUARE, history=[("<image>\nwhat?", "this")], max_new_tokens=1)
    without = rt.generate("again?", SQUARE, history=[("what?", "this")], max_new_tokens=1)
    assert without.prompt_token_ids == with_marks.prompt_token_ids


def test_a_prompt_that_is_too_long_is_counted(rt):
    text = "hello " * 2000
    assert rt.count_tokens(text).prompt_tokens > rt.max_model_len
    with pytest.raises(CapacityError, match="context"):
        rt.generate(text)


def test_frames_of_a_video_are_counted(rt):
    frames = [SQUARE, WIDE]
    assert rt.count_tokens("x", video=frames) == replace(
        rt.generate("x", video=frames, max_new_tokens=1).usage, completion_tokens=0
    )


def test_a_video_part_of_a_message_is_the_video_of_generate(rt):
    frames = [SQUARE, WIDE]
    parts = [{"type": "video", "video": frames}, {"type": "text", "text": "x"}]
    said = rt.chat([{"role": "user", "content": parts}], max_new_tokens=1)
    assert said.prompt_token_ids == rt.generate("x", video=frames, max_new_tokens=1).prompt_token_ids


@pytest.mark.parametrize(
    "option",
    [
        {"limit_mm_per_prompt": {"image": "4"}},
        {"limit_mm_per_prompt": {"image": -1}},
        {"limit_mm_per_prompt": {"audio": 1}},
        {"gpu_memory_utilization": 7},
        {"max_image_pixels": "many"},
        {"max_aspect_ratio": 0},
        {"dtype": []},
    ],
)
def test_an_option_of_another_form_is_refused_before_weights_are_read(folder, option, monkeypatch):
    monkeypatch.setattr(api, "open_halves", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(ConfigError):
        Runtime.from_pretrained(folder, **option)


def test_a_revision_of_a_local_folder_is_refused(folder):
    with pytest.raises(CheckpointError, match="revision"):
        Runtime.from_pretrained(folder, revision="main")
