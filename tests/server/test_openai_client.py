"""OpenAI's own client, unchanged: what its users call works and comes back as its own types."""

import asyncio
from pathlib import Path

import openai
import pytest

from ..runtime.tiny_model import assert_same_answer
from .conftest import ask, data_url

IMAGE = data_url()


def test_models_are_listed(server):
    [model] = server.openai.models.list().data
    assert (model.id, model.owned_by) == ("tiny", "vitrail")


def test_a_chat_completion_comes_back(server):
    answer = server.openai.chat.completions.create(model="tiny", **ask("Which?", IMAGE))
    assert answer.choices[0].message.content == server.chat("Which?", IMAGE).json()["choices"][0]["message"]["content"]
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.model_extra["vitrail"]["images"][0]["tiles"] > 0


def test_a_stream_comes_back(server):
    whole = server.openai.chat.completions.create(model="tiny", **ask("Which?", IMAGE))
    options = {"stream": True, "stream_options": {"include_usage": True}}
    with server.openai.chat.completions.create(model="tiny", **ask("Which?", IMAGE), **options) as stream:
        *chunks, last = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert last.usage == whole.usage.model_copy(update={"prompt_tokens_details": last.usage.prompt_tokens_details})


def test_the_clients_own_assembly_of_a_stream_works(server):
    with server.openai.chat.completions.stream(model="tiny", **ask()) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
        snapshot = stream.current_completion_snapshot
    expected = server.chat().json()["choices"][0]
    assert text == snapshot.choices[0].message.content == expected["message"]["content"]
    assert snapshot.choices[0].finish_reason == expected["finish_reason"]


def test_many_at_once_are_answered_each_by_its_own(server):
    questions = {f"many-{number}": f"Question {number}?" for number in range(12)}
    runtime = server.service.runtime
    alone = {name: runtime.generate(text, max_new_tokens=6, logprobs=2) for name, text in questions.items()}
    completions = {}

    def note(request_id, requests):
        completions[request_id] = requests[0].completions[0]

    async def together():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            calls = [
                client.chat.completions.create(
                    model="tiny", **ask(text, max_tokens=6), extra_headers={"x-request-id": name}
                )
                for name, text in questions.items()
            ]
            return [answer.choices[0].message.content for answer in await asyncio.gather(*calls)]

    server.service.on_request.append(note)
    try:
        answers = dict(zip(questions, asyncio.run(together()), strict=True))
        server.assert_nothing_is_held()
    finally:
        server.service.on_request.remove(note)
    assert answers == {name: completions[name].text for name in questions}
    for name, expected in alone.items():
        assert_same_answer(expected.outputs[0], completions[name])


def test_plain_completions_come_back(server):
    whole = server.openai.completions.create(model="tiny", prompt=["Once", "The total"], n=2, max_tokens=4, logprobs=1)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    assert whole.choices[0].text == whole.choices[1].text
    assert len(whole.choices[0].logprobs.tokens) == 4 or whole.choices[0].finish_reason == "stop"
    stream = server.openai.completions.create(model="tiny", prompt="Once", max_tokens=4, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text


def test_a_structured_answer_is_parsed(server):
    pytest.importorskip("llguidance")
    described = {"type": "json_schema", "json_schema": {"name": "yes", "schema": {"const": True}}}
    answer = server.openai.chat.completions.create(model="tiny", **ask(), response_format=described)
    assert answer.choices[0].message.content.strip() == "true"


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda client: client.chat.completions.create(model="gpt", messages=ask()["messages"]), openai.NotFoundError),
        (lambda client: client.chat.completions.create(model="tiny", messages=[]), openai.BadRequestError),
        (lambda client: client.embeddings.create(model="tiny", input="a"), openai.BadRequestError),
        (lambda client: client.responses.create(model="tiny", input="a"), openai.NotFoundError),
    ],
)
def test_errors_come_back_as_the_clients_own(server, call, error):
    with pytest.raises(error) as raised:
        call(server.openai)
    assert raised.value.body["message"]
    assert raised.value.request_id


def test_an_error_in_the_middle_of_a_stream_is_raised(server, monkeypatch):
    def broken(*_):
        raise RuntimeError("no more")

    ours = {"ignore_eos": True}  # fields that the client does not know go here
    stream = server.openai.chat.completions.create(model="tiny", **ask(max_tokens=500), stream=True, extra_body=ours)
    next(iter(stream))
    monkeypatch.setattr(type(server.engine), "_accept", broken)
    with pytest.raises(openai.APIError, match="failed inside"):
        list(stream)
    monkeypatch.undo()
    assert server.chat().status_code == 200


def test_the_readmes_picture_is_answered_by_nano(tmp_path):
    """Only here: the bundled model behind a server, by the client."""
    from vitrail.runtime import Runtime
    from vitrail.runtime.server.settings import Settings

    from .conftest import LiveServer, wait_until

    settings = Settings(device="cpu", mm_per_request_timeout=7.0)
    live = LiveServer(lambda: Runtime.from_pretrained("nano", **settings.runtime_options()), settings)
    try:
        wait_until(lambda: live.http.get("/ready").status_code == 200, "nano is loaded", 60)
        receipt = Path(__file__).parents[2] / "examples" / "receipt.png"
        import base64

        url = f"data:image/png;base64,{base64.b64encode(receipt.read_bytes()).decode()}"
        answer = live.openai.chat.completions.create(model="nano", **ask("What is the total?", url))
        assert answer.choices[0].message.content == "$25.90"
        assert live.service.runtime.limits.max_decode_s == live.service.runtime.media.timeout_s == 7
    finally:
        live.close()
