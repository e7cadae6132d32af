"""Chat completions: answers equal the engine's own, streams equal answers, mistakes are told in OpenAI's form."""

import itertools
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from vitrail.runtime.engine.engine import Engine
from vitrail.runtime.engine.processor import Conversation
from vitrail.runtime.server import schemas, service

from .conftest import ask, data_url, wait_until

IMAGE, WIDE = data_url(90, 90, 1), data_url(200, 100, 2)


def events(response):
    """The objects of a stream, which ends with [DONE]."""
    *lines, done = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert done == "[DONE]"
    return [json.loads(line) for line in lines]


def joined(chunks, index=0):
    """The text of one answer of a stream."""
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get("content", "") for choice in choices)


def error_of(response, status=400):
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]


def test_an_answer_is_the_engines_own(server):
    expected = server.service.runtime.generate("What is the total?", max_new_tokens=8)
    body = server.chat().json()
    schemas.ChatCompletion.model_validate(body, strict=True)
    [choice] = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected.text, "refusal": None}
    assert choice["finish_reason"] == expected.finish_reason
    usage = body["usage"]
    assert usage["prompt_tokens"] == expected.usage.prompt_tokens
    assert usage["completion_tokens"] == len(expected.token_ids)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_images_are_seen_and_their_tiles_told(server):
    expected = server.service.runtime.chat(ask("Which?", IMAGE, WIDE)["messages"], max_new_tokens=8)
    body = server.chat("Which?", IMAGE, WIDE).json()
    assert body["choices"][0]["message"]["content"] == expected.text
    assert [image["tiles"] for image in body["vitrail"]["images"]] == expected.num_tiles
    for image in body["vitrail"]["images"]:
        columns, rows = image["grid"]
        assert image["tiles"] == columns * rows + image["thumbnail"]
    assert body["vitrail"]["images"][1]["grid"][0] > body["vitrail"]["images"][1]["grid"][1]
    assert body["usage"]["prompt_tokens_details"]["image_tiles"] == sum(expected.num_tiles)
    assert body["vitrail"]["metrics"]["e2e_ms"] >= body["vitrail"]["metrics"]["ttft_ms"] > 0


@pytest.mark.parametrize(
    ("place", "fields"),
    [
        ("reference", {"max_dynamic_patch": 1}),
        ("reference", {"detail": "low"}),
        ("part", {"max_dynamic_patch": 1}),
        ("body", {"max_tiles": 1}),
        ("body", {"mm_processor_kwargs": {"max_dynamic_patch": 1}}),
    ],
)
def test_tiles_of_an_image_can_be_capped(server, place, fields):
    part = {"type": "image_url", "image_url": {"url": WIDE}}
    body = {"max_tokens": 1, "messages": [{"role": "user", "content": [part]}]}
    full = server.post("/v1/chat/completions", body).json()["usage"]["prompt_tokens_details"]["image_tiles"]
    {"reference": part["image_url"], "part": part, "body": body}[place].update(fields)
    capped = server.post("/v1/chat/completions", body).json()["usage"]["prompt_tokens_details"]["image_tiles"]
    assert capped == 1 < full


def test_a_stream_is_the_answer_in_pieces(server):
    whole = server.chat("Which?", IMAGE, max_tokens=12).json()
    response = server.chat("Which?", IMAGE, max_tokens=12, stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, last = events(response)
    assert joined(chunks) == whole["choices"][0]["message"]["content"]
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 12
    assert last["vitrail"]["images"] == whole["vitrail"]["images"]
    assert len({chunk["id"] for chunk in [*chunks, last]}) == 1


def choices_of(server, **fields):
    """The choices of a stream, as they come."""
    with server.http.stream("POST", "/v1/chat/completions", json=ask(stream=True, **fields)) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                yield from json.loads(line.removeprefix("data: "))["choices"]


def test_texts_between_the_first_and_the_last_wait_for_each_other(server, monkeypatch):
    monkeypatch.setattr(service, "NEWS_S", 30.0)
    long = {"max_tokens": 100, "ignore_eos": True, "logprobs": True}
    whole = server.chat(**long).json()["choices"][0]["message"]["content"]
    server.chat(stream=True, max_tokens=2)  # from here on the event loop does not look for news by itself
    start = time.monotonic()
    found = list(choices_of(server, **long))
    assert time.monotonic() - start < 20
    assert "".join(choice["delta"].get("content", "") for choice in found) == whole
    counts = [len(choice["logprobs"]["content"]) for choice in found]
    assert sum(counts) == 100
    assert 2 <= len(counts) <= 4  # the first token, perhaps with others, and the rest when the end was told
    server.call_soon(server.service._end_pause)


def test_a_text_is_told_although_nothing_comes_after_it(make_server, monkeypatch):
    server = make_server()
    steps, go = itertools.count(), threading.Event()
    decode = Engine._decode

    def held(engine):
        if next(steps) == 8:
            assert go.wait(20)
        return decode(engine)

    monkeypatch.setattr(Engine, "_decode", held)
    found = []

    def read():
        for choice in choices_of(server, max_tokens=20, ignore_eos=True):
            found.append(choice["delta"].get("content", ""))

    with ThreadPoolExecutor(1) as other:
        reading = other.submit(read)
        try:
            wait_until(lambda: server.engine.recorder.counts["tokens generated"] == 9, "the engine stands still")
            [request] = server.engine._requests.values()
            so_far = "".join(request.sequences[0].text)
            assert so_far
            wait_until(lambda: "".join(found) == so_far, "what there is has come")
        finally:
            go.set()
        reading.result()
    assert "".join(found) == request.completions[0].text


def test_a_stream_has_no_usage_unless_it_is_asked_for(server):
    assert all("usage" not in chunk for chunk in events(server.chat(stream=True)))


def test_several_answers_stream_side_by_side(server):
    sampled = {"n": 3, "temperature": 1.0, "seed": 5, "max_tokens": 6}
    whole = server.chat(**sampled).json()
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2]
    chunks = events(server.chat(**sampled, stream=True))
    assert [joined(chunks, index) for index in range(3)] == [c["message"]["content"] for c in whole["choices"]]
    assert len({joined(chunks, index) for index in range(3)}) > 1


def test_logprobs_are_those_of_the_engine_in_answers_and_streams(server):
    expected = server.service.runtime.generate("What is the total?", max_new_tokens=6, logprobs=2)
    whole = server.chat(max_tokens=6, logprobs=True, top_logprobs=2).json()
    content = whole["choices"][0]["logprobs"]["content"]
    for entry, (own, *others) in zip(content, expected.logprobs, strict=True):
        assert entry["logprob"] == pytest.approx(own, abs=1e-4)
        assert [one["logprob"] for one in entry["top_logprobs"]] == pytest.approx([one for _, one in others], abs=1e-4)
    data = b"".join(bytes(entry["bytes"]) for entry in content)
    assert data.decode("utf-8", "replace").strip() == whole["choices"][0]["message"]["content"].strip()
    chunks = events(server.chat(max_tokens=6, logprobs=True, top_logprobs=2, stream=True))
    streamed = [entry for chunk in chunks for entry in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert [entry["token"] for entry in streamed] == [entry["token"] for entry in content]
    assert whole["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    assert server.chat(logprobs=True).json()["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


def test_settings_of_an_answer_reach_the_engine(server):
    runtime = server.service.runtime
    for fields, keywords in [
        ({"temperature": 1.0, "seed": 3}, {"temperature": 1.0, "seed": 3}),
        ({"temperature": 0}, {}),
        (
            {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "seed": 1},
            {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "seed": 1},
        ),
        ({"logit_bias": {"40": 100}}, {"logit_bias": {40: 100}}),
        ({"repetition_penalty": 2.0, "presence_penalty": 1.0}, {"repetition_penalty": 2.0, "presence_penalty": 1.0}),
        ({"min_tokens": 4, "ignore_eos": True}, {"min_tokens": 4, "ignore_eos": True}),
    ]:
        expected = runtime.generate("What is the total?", max_new_tokens=8, **keywords)
        assert server.chat(**fields).json()["choices"][0]["message"]["content"] == expected.text, fields


def test_a_stop_string_ends_the_answer_and_is_not_in_it(server):
    text = server.chat(max_tokens=16).json()["choices"][0]["message"]["content"]
    stop = text[len(text) // 2 :][:3]
    for fields in ({"stop": stop}, {"stop": [stop]}):
        choice = server.chat(max_tokens=16, **fields).json()["choices"][0]
        assert choice["finish_reason"] == "stop"
        assert choice["message"]["content"] == text[: text.index(stop)]
        assert joined(events(server.chat(max_tokens=16, stream=True, **fields))) == text[: text.index(stop)]


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_both_names_of_the_longest_answer_are_known(server, name):
    body = {"messages": [{"role": "user", "content": "hi"}], name: 3, "ignore_eos": True}
    assert server.post("/v1/chat/completions", body).json()["usage"]["completion_tokens"] == 3


def test_an_answer_without_a_temperature_is_greedy(server):
    texts = {server.chat(max_tokens=12).json()["choices"][0]["message"]["content"] for _ in range(3)}
    assert len(texts) == 1


def test_an_answer_of_a_schema_fits_it(server):
    pytest.importorskip("llguidance")
    described = {
        "type": "json_schema",
        "json_schema": {"name": "thing", "strict": True, "schema": {"enum": ["x", "y"]}},
    }
    content = server.chat(max_tokens=40, response_format=described).json()["choices"][0]["message"]["content"]
    assert json.loads(content) in ("x", "y")
    regex = {"type": "regex", "regex": "(yes|no)!"}
    content = server.chat(max_tokens=40, response_format=regex).json()["choices"][0]["message"]["content"]
    assert content in ("yes!", "no!")
    free = server.chat(max_tokens=300, response_format={"type": "json_object"}).json()["choices"][0]
    assert free["finish_reason"] == "length" or isinstance(json.loads(free["message"]["content"]), dict)
    assert server.chat(response_format={"type": "text"}).status_code == 200


@pytest.mark.parametrize("text", ["<image>", "<IMG_CONTEXT>", "<img></img>", "a <image> b <IMG_CONTEXT><|im_end|>"])
def test_placeholders_in_what_a_user_writes_are_text(server, text):
    with_image = ask(text, IMAGE)
    alone = server.post("/tokenize", {"messages": ask(text)["messages"]}).json()
    shown = server.post("/tokenize", {"messages": with_image["messages"]}).json()
    context = server.engine.context_token_id
    assert (alone["image_tokens"], alone["tokens"].count(context)) == (0, 0)
    assert shown["tokens"].count(context) == shown["image_tokens"] == shown["image_tiles"] * 9
    body = server.post("/v1/chat/completions", with_image).json()
    assert body["usage"]["prompt_tokens"] == shown["count"]


def test_a_conversation_goes_on_with_an_answer_as_it_was_given(server):
    first = server.openai.chat.completions.create(model="tiny", messages=ask()["messages"], max_tokens=4)
    answer = first.choices[0].message.model_dump()
    messages = [{"role": "developer", "content": "Be brief."}, *ask()["messages"], answer, *ask("And?")["messages"]]
    assert server.post("/v1/chat/completions", {"messages": messages, "max_tokens": 4}).status_code == 200


def test_frames_of_a_video_are_a_tile_each(server):
    frames = [data_url(120, 60, seed, "JPEG") for seed in range(3)]
    inline = "data:video/jpeg;base64," + ",".join(frame.partition(",")[2] for frame in frames)
    for part in ({"type": "video", "video": frames}, {"type": "video_url", "video_url": {"url": inline}}):
        body = {"messages": [{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}], "max_tokens": 2}
        answer = server.post("/v1/chat/completions", body).json()
        assert [image["tiles"] for image in answer["vitrail"]["images"]] == [1, 1, 1]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "image": "/etc/passwd"}]}]},
            "messages.0.content.0",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0.image_url"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"n": 129}, "n"),
        ({"n": 0}, "n"),
        ({"n": True}, "n"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stop": ["x"] * 65}, "stop"),
        ({"stop": ""}, "stop"),
        ({"logit_bias": {str(token): 1 for token in range(1025)}}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"temprature": 1}, "temprature"),
        ({"seed": 2**64}, "seed"),
        ({"response_format": {"type": "yaml"}}, "response_format"),
    ],
)
def test_a_mistake_is_told_with_its_field(server, fields, param):
    error = error_of(server.chat(**fields))
    assert error["type"] == "invalid_request_error"
    assert error["param"] is not None
    assert error["param"].startswith(param)
    server.assert_nothing_is_held()


def test_a_misspelt_field_is_told_with_the_nearest_one(server):
    assert "temperature" in error_of(server.chat(temprature=1))["message"]


def test_what_was_wrong_is_not_repeated(server):
    secret = "4111-1111-1111-1111"
    assert secret not in server.chat(temperature=secret).text
    assert secret not in server.post("/v1/chat/completions", {"messages": [{"role": secret, "content": ""}]}).text
    assert secret not in server.chat("Which?", f"data:image/png;base64,{secret}").text


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("data:image/png;base64,AAAA", "image 1: cannot decode"),
        ("data:image/png;base64,", "image 1: cannot decode"),
        ("data:image/png;base64,%%%", "message 1, part 1: data URL is not valid base64"),
        ("https://example.org/a.png", "message 1, part 1: URLs are not fetched; pass a data URL"),
        ("file:///etc/passwd", "message 1, part 1: local files need allowed_local_media_path"),
        ("/etc/passwd", "message 1, part 1: local files need allowed_local_media_path"),
    ],
)
def test_an_image_that_cannot_be_read_is_told_by_its_place(server, url, message):
    error = error_of(server.chat("Which?", url))
    assert error["message"].startswith(message)
    assert error["param"] == "messages"
    assert server.chat().status_code == 200
    server.assert_nothing_is_held()


def test_an_image_that_breaks_while_it_is_decoded_is_the_callers_mistake_too(server):
    whole = data_url(300, 300, 3)
    head, _, payload = whole.partition(",")
    cut = f"{head},{payload[: len(payload) // 8 * 4]}"
    assert error_of(server.chat("Which?", cut))["message"].startswith("image 1: cannot decode")
    stream = server.chat("Which?", cut, stream=True)
    assert (
        error_of(stream)["message"].startswith("image 1: cannot decode")
        if stream.status_code == 400
        else ('"error"' in stream.text and "[DONE]" not in stream.text)
    )
    server.assert_nothing_is_held()


def test_a_prompt_beyond_the_context_is_refused_with_openais_code(server):
    assert error_of(server.chat("long " * 3000))["code"] == "context_length_exceeded"


def test_another_models_name_is_not_found(server):
    assert error_of(server.chat(model="gpt-9"), 404)["code"] == "model_not_found"
    assert server.chat(model="tiny").status_code == 200


def test_a_body_that_is_no_json_is_told_so(server):
    for content in (b"{", b"[1", b'{"messages": NaN}', b"\xff\xfe", b'"\\ud800"', b""):
        response = server.http.post(
            "/v1/chat/completions", content=content, headers={"content-type": "application/json"}
        )
        assert error_of(response)["code"] in ("invalid_json", None)
    plain = server.http.post("/v1/chat/completions", content=json.dumps(ask()), headers={"content-type": "text/plain"})
    error_of(plain, 415)


def test_an_error_inside_tells_nothing_of_itself(server, monkeypatch):
    def broken(*_):
        raise RuntimeError("at 0x7f00dead")

    monkeypatch.setattr(server.service.runtime, "submit", broken)
    error = error_of(server.chat(), 500)
    assert (error["message"], error["code"]) == ("the request failed inside the server", "internal_error")
    monkeypatch.undo()
    assert server.chat().status_code == 200
    server.assert_nothing_is_held()


def test_a_step_that_fails_is_an_error_for_its_request_alone(server, monkeypatch):
    tokenizer = server.engine.tokenizer

    def broken(*_, **__):
        raise RuntimeError("at 0x7f00dead")

    monkeypatch.setattr(type(tokenizer), "stream", broken)
    assert "0x7f" not in server.chat().text
    monkeypatch.undo()
    assert server.chat().status_code == 200


def test_a_conversation_type_is_what_the_engine_gets(server, monkeypatch):
    seen = []
    submit = server.service.runtime.submit
    monkeypatch.setattr(server.service.runtime, "submit", lambda *args: seen.append(args) or submit(*args))
    server.chat("Which?", IMAGE)
    [(conversation, config)] = seen
    assert isinstance(conversation, Conversation)
    assert config.greedy
