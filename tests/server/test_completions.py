"""Plain completions: prompts go in as they stand, and placeholders in them are text."""

import json

import pytest

from vitrail.runtime import GenerationConfig
from vitrail.runtime.errors import CapacityError
from vitrail.runtime.server import schemas


def complete(server, **fields):
    return server.post("/v1/completions", {"max_tokens": 6, **fields})


def test_a_prompt_goes_on_as_its_tokens_do(server):
    runtime = server.service.runtime
    prompt = "The total is"
    request = runtime.submit_tokens(runtime.tokenizer.encode(prompt), GenerationConfig(max_new_tokens=6))
    for _ in runtime.engine.stream(request):
        pass
    [expected] = request.completions
    body = complete(server, prompt=prompt).json()
    schemas.TextCompletion.model_validate(body, strict=True)
    assert body["choices"][0]["text"] == expected.text
    assert body["usage"]["prompt_tokens"] == len(request.prompt_token_ids)
    assert complete(server, prompt=runtime.tokenizer.encode(prompt)).json()["choices"] == body["choices"]


def test_answers_to_several_prompts_stand_in_their_order(server):
    prompts = ["The total", "Once", "How many"]
    alone = [complete(server, prompt=prompt).json()["choices"][0]["text"] for prompt in prompts]
    whole = complete(server, prompt=prompts, n=2).json()
    together = whole["choices"]
    assert [choice["index"] for choice in together] == list(range(6))
    assert [choice["text"] for choice in together[::2]] == alone
    response = complete(server, prompt=prompts, n=2, stream=True, stream_options={"include_usage": True})
    *lines, done = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    *chunks, last = map(json.loads, lines)
    texts = [""] * 6
    for chunk in chunks:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == [choice["text"] for choice in together]
    assert {choice["finish_reason"] for choice in together} == {"length"}
    assert last["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"] == 6 * 6
    assert done == "[DONE]"


@pytest.mark.parametrize("stream", [False, True])
def test_the_prompt_comes_back_if_it_is_wanted(server, stream):
    plain = complete(server, prompt="Once").json()["choices"][0]["text"]
    response = complete(server, prompt="Once", echo=True, stream=stream)
    if not stream:
        assert response.json()["choices"][0]["text"] == "Once" + plain
    else:
        lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line][:-1]
        assert "".join(json.loads(line)["choices"][0]["text"] for line in lines) == "Once" + plain


def test_logprobs_have_the_form_of_plain_completions(server):
    logprobs = complete(server, prompt="Once", logprobs=2).json()["choices"][0]["logprobs"]
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == len(logprobs["top_logprobs"])
    assert logprobs["text_offset"][0] == 0
    assert all(
        max(top.values()) == pytest.approx(own)
        for top, own in zip(logprobs["top_logprobs"], logprobs["token_logprobs"], strict=True)
    )


def test_placeholders_are_text(server):
    context = server.engine.context_token_id
    tokens = server.post("/tokenize", {"prompt": "<IMG_CONTEXT><image>"}).json()["tokens"]
    assert context not in tokens
    assert complete(server, prompt="<IMG_CONTEXT><image>").json()["usage"]["prompt_tokens"] == len(tokens)
    refused = complete(server, prompt=[1, context])
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "prompt"


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": []},
        {"prompt": [[]]},
        {"prompt": [10**6]},
        {"prompt": [-1]},
        {"prompt": "x " * 3000},
        {"prompt": ["fine", "x " * 3000]},
        {"prompt": "x", "suffix": "y"},
        {"prompt": "x", "best_of": 2},
        {"prompt": "x", "echo": True, "logprobs": 1},
        {},
    ],
)
def test_what_cannot_be_gone_on_with_is_refused(server, fields):
    response = complete(server, **fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"]
    server.assert_nothing_is_held()


def test_where_one_prompt_is_refused_late_the_others_end_as_well(make_server, monkeypatch):
    server = make_server()
    original = server.engine.submit

    def submit(request_id, prepared, *arguments):
        if prepared.token_ids == [7]:
            raise CapacityError("no room for keys and values")
        return original(request_id, prepared, *arguments)

    monkeypatch.setattr(server.engine, "submit", submit)
    response = complete(server, prompt=[[5, 6], [7]], max_tokens=900, ignore_eos=True)
    assert response.status_code == 400
    server.assert_nothing_is_held()
    assert server.engine.recorder.counts["requests aborted"] == 1
