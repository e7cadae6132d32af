"""The application before the replicas: who is let in, where calls go, and what becomes of them when a replica ends."""

import asyncio
import json
import threading
from typing import Any

import httpx
import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from vitrail.runtime.server import front as front_module
from vitrail.runtime.server.errors import ApiError
from vitrail.runtime.server.front import Front
from vitrail.runtime.server.joined import joined
from vitrail.runtime.server.metrics import Metrics
from vitrail.runtime.server.picture_key import picture_key
from vitrail.runtime.server.relay import End, ReplicaLost
from vitrail.runtime.server.service import State
from vitrail.runtime.server.settings import Settings

from .conftest import ask, wait_until

START = {"type": "http.response.start", "status": 200}
PLAIN = {**START, "headers": [(b"content-type", b"application/json"), (b"x-request-id", b"of-the-replica")]}
EVENTS = {**START, "headers": [(b"content-type", b"text/event-stream")]}
LAST = {"type": "vitrail.end", "end": End("/v1/chat/completions", None, {"generated_tokens": 3})}


def body(data: bytes, more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}


class FakeReplicas:
    """Replicas that follow a script: of each call the messages, an exception to raise, or an event to wait for."""

    def __init__(self) -> None:
        self.scripts: list[list[Any]] = []
        self.calls: list[tuple[dict[str, Any], bytes, str]] = []
        self.states = [State.READY, State.LOADING]
        self.pages: list[tuple[str, bytes]] = []
        self.closed = 0

    async def send(self, scope, body, key):
        self.calls.append((scope, body, key))
        script = self.scripts.pop(0) if self.scripts else [[PLAIN, body_of(body)], [LAST]]
        try:
            for step in script:
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, threading.Event):
                    while not step.is_set():
                        await asyncio.sleep(0.005)
                else:
                    yield step
        finally:
            self.closed += 1

    async def ask(self, method):
        return self.states if method == "state" else self.pages


def body_of(request: bytes) -> dict[str, Any]:
    return body(json.dumps({"asked": len(request)}).encode())


class FrontServer:
    """A front on a port of its own, and what stands behind it."""

    def __init__(self, **settings: Any) -> None:
        self.replicas = FakeReplicas()
        self.front = Front(self.replicas, Settings(**settings))
        self.ended = threading.Event()
        self.front.on_end = self.ended.set
        self._server = uvicorn.Server(uvicorn.Config(self.front, port=0, log_config=None, timeout_graceful_shutdown=1))
        self._thread = threading.Thread(target=lambda: asyncio.run(self._server.serve()))
        self._thread.start()
        wait_until(lambda: self._server.started, "it listens")
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30)
        wait_until(lambda: self.front.state is not State.LOADING, "it has asked its replicas")

    def chat(self, *arguments: str, **headers: str) -> httpx.Response:
        return self.http.post("/v1/chat/completions", json=ask(*arguments), headers=headers)

    def close(self) -> None:
        self.http.close()
        self._server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()


def in_a_thread(call, *arguments):
    result: list[Any] = []
    thread = threading.Thread(target=lambda: result.append(call(*arguments)))
    thread.start()
    return thread, result


@pytest.fixture
def serve():
    made = []

    def make(**settings):
        made.append(FrontServer(**settings))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_a_call_goes_to_a_replica_and_its_answer_comes_back(serve):
    server = serve()
    response = server.chat("What?", **{"x-request-id": "mine"})
    [(scope, sent, key)] = server.replicas.calls
    assert (response.status_code, response.json()) == (200, {"asked": len(sent)})
    assert json.loads(sent) == ask("What?")
    assert (scope["method"], scope["path"], key) == ("POST", "/v1/chat/completions", "")
    assert [value for name, value in scope["headers"] if name == b"x-request-id"] == [b"mine"]
    assert response.headers.get_list("x-request-id") == ["mine"]


def test_what_the_replica_says_of_a_call_stands_in_the_log_and_the_metrics(serve, caplog):
    server = serve()
    with caplog.at_level("INFO", "vitrail.server"):
        server.chat()
        wait_until(lambda: any(record.message == "request" for record in caplog.records), "the call is logged")
    [record] = [record for record in caplog.records if record.message == "request"]
    assert record.fields["route"] == "/v1/chat/completions"
    assert (record.fields["status"], record.fields["generated_tokens"]) == (200, 3)
    counted = 'vitrail_http_responses_total{replica="front",route="/v1/chat/completions",status="200"} 1.0'
    assert counted in server.http.get("/metrics").text


def test_calls_about_one_picture_have_one_key(serve):
    server = serve()
    server.chat("What?", "data:image/png;base64,AAAA")
    server.chat("Which shop?", "data:image/png;base64,AAAA")
    server.chat("What?", "data:image/png;base64,AAAB")
    first, again, other = (key for _, _, key in server.replicas.calls)
    assert first == again != other
    assert first


def test_who_may_not_come_in_reaches_no_replica(serve):
    server = serve(api_key=("secret",), max_request_bytes=200)
    assert server.chat().status_code == 401
    with_key = {"authorization": "Bearer secret"}
    assert server.chat("x" * 200, **with_key).status_code == 413
    assert server.chat(**with_key, host="elsewhere.example").status_code == 403
    assert server.http.get("/metrics").status_code == 401
    assert server.http.get("/health").status_code == 200
    assert server.replicas.calls == []
    assert server.chat(**with_key).status_code == 200


def test_a_call_whose_replica_is_lost_before_it_answers_goes_to_another_one(serve):
    server = serve()
    server.replicas.scripts = [[ReplicaLost()]]
    assert server.chat().status_code == 200
    assert len(server.replicas.calls) == 2
    assert server.replicas.calls[0] == server.replicas.calls[1]


def test_a_call_that_loses_two_replicas_fails_and_may_come_again(serve):
    server = serve()
    server.replicas.scripts = [[ReplicaLost()], []]  # the second ends without a word
    response = server.chat()
    assert (response.status_code, response.json()["error"]["code"]) == (503, "replica_lost")
    assert int(response.headers["retry-after"]) > 0
    assert len(server.replicas.calls) == 2


def test_a_stream_whose_replica_is_lost_ends_with_an_error(serve):
    server = serve()
    server.replicas.scripts = [[[EVENTS, body(b"data: {}\n\n", more=True)], ReplicaLost()]]
    response = server.chat()
    first, second = response.text.strip().split("\n\n")
    assert (response.status_code, first) == (200, "data: {}")
    assert json.loads(second.removeprefix("data: "))["error"]["code"] == "replica_lost"
    assert len(server.replicas.calls) == 1


def test_half_an_answer_whose_replica_is_lost_breaks_the_connection(serve):
    server = serve()
    server.replicas.scripts = [[[PLAIN, body(b'{"half":', more=True)], ReplicaLost()]]
    with pytest.raises(httpx.RemoteProtocolError):
        server.chat()


def test_a_mistake_inside_a_replica_is_told_to_nobody(serve):
    server = serve()
    server.replicas.scripts = [[RuntimeError("a secret path")]]
    response = server.chat()
    assert (response.status_code, response.json()["error"]["code"]) == (500, "internal_error")
    assert "secret" not in response.text


def test_a_client_that_leaves_ends_its_call(serve):
    server = serve()
    never = threading.Event()
    server.replicas.scripts = [[never]]
    with pytest.raises(httpx.ReadTimeout):
        server.http.post("/v1/chat/completions", json=ask(), timeout=0.3)
    wait_until(lambda: server.replicas.closed == 1, "the call ends in the replica")
    assert server.chat().status_code == 200


def test_more_calls_than_the_replicas_may_have_are_refused_unread(serve):
    server = serve(max_num_seqs=1, max_num_queued_reqs=1)
    go = threading.Event()
    server.replicas.scripts = [[go, [PLAIN, body(b"{}")], [LAST]] for _ in range(2)]
    waiting = [in_a_thread(server.chat) for _ in range(2)]
    wait_until(lambda: len(server.replicas.calls) == 2, "both are with their replica")
    refused = server.chat()
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
    assert server.http.get("/health").status_code == 200
    go.set()
    for thread, answers in waiting:
        thread.join(20)
        assert answers[0].status_code == 200
    wait_until(lambda: server.chat().status_code == 200, "there is room again")


def test_a_front_without_replicas_is_alive_and_not_ready(serve):
    server = serve()
    server.replicas.states = []
    wait_until(lambda: server.front.state is State.LOADING, "it has asked again")
    assert server.http.get("/health").json() == {"status": "loading"}
    for response in (server.http.get("/ready"), server.chat()):
        assert (response.status_code, response.json()["error"]["code"]) == (503, "loading")
        assert int(response.headers["retry-after"]) > 0
    assert server.http.get("/metrics").status_code == 200
    server.replicas.states = [State.DEAD, State.READY]
    wait_until(lambda: server.http.get("/ready").status_code == 200, "it is ready")


def test_calls_do_not_wait_for_ever_for_a_replica(serve, monkeypatch):
    monkeypatch.setattr(front_module, "PATIENCE_S", 0.2)
    server = serve()
    server.replicas.scripts = [[threading.Event()]]
    server.replicas.states = []
    response = server.chat()
    assert (response.status_code, response.json()["error"]["code"]) == (503, "loading")


def test_a_call_without_an_answer_in_time_is_ended(serve, monkeypatch):
    monkeypatch.setattr(front_module, "PATIENCE_S", 0.1)
    server = serve(request_timeout=0.2)
    server.replicas.scripts = [[threading.Event()]]
    response = server.chat()
    assert (response.status_code, response.json()["error"]["code"]) == (504, "timeout")


def test_draining_lets_calls_end_and_takes_no_more(serve):
    server = serve()
    go = threading.Event()
    server.replicas.scripts = [[go, [PLAIN, body(b"{}")], [LAST]]]
    thread, answers = in_a_thread(server.chat)
    wait_until(lambda: server.replicas.calls, "the call is with its replica")
    server.front.drain_soon()
    wait_until(lambda: server.http.get("/ready").status_code == 503, "it drains")
    refused = server.chat()
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
    assert not server.ended.is_set()
    go.set()
    thread.join(20)
    assert answers[0].status_code == 200
    assert server.ended.wait(20)


def test_what_does_not_end_in_time_is_aborted_by_draining(serve):
    server = serve(shutdown_timeout=0.1)
    never = threading.Event()
    server.replicas.scripts = [[never], [[EVENTS, body(b"data: {}\n\n", more=True)], never]]
    whole, answers = in_a_thread(server.chat)
    wait_until(lambda: len(server.replicas.calls) == 1, "the first call is there")
    stream, events = in_a_thread(server.chat)
    wait_until(lambda: len(server.replicas.calls) == 2, "the second call is there")
    server.front.drain_soon()
    for thread in (whole, stream):
        thread.join(20)
    assert (answers[0].status_code, answers[0].json()["error"]["code"]) == (503, "shutting_down")
    assert '"shutting_down"' in events[0].text
    assert server.ended.wait(20)
    assert server.replicas.closed == 2


# --- keys and metrics ---


@pytest.mark.parametrize(
    "request_body",
    [
        {"messages": [{"role": "user", "content": "text"}]},
        {"prompt": "text"},
        {"input": ["text"]},
        {"messages": {"role": 1}},
        {"messages": [None, {"content": [None, 3, {"type": "image_url"}, {"type": ["x"]}]}]},
        [1],
        None,
    ],
)
def test_a_body_without_a_picture_has_no_key(request_body):
    assert picture_key(json.dumps(request_body).encode()) == ""


def picture_key_of(url: Any) -> str:
    part = {"type": "image_url", "image_url": url}
    return picture_key(json.dumps({"messages": [{"role": "user", "content": [part]}]}).encode())


def test_a_picture_has_one_key_however_it_is_asked_about():
    url = "data:image/png;base64,AAAA"
    part = {"type": "image_url", "image_url": {"url": url, "detail": "low"}}
    later = [
        {"role": "user", "content": [part, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "That."},
        {"role": "user", "content": [{"type": "image_url", "image_url": "data:image/png;base64,BBBB"}]},
    ]
    assert picture_key(json.dumps({"messages": later}).encode()) == picture_key_of(url)
    assert picture_key(json.dumps({"input": ["a", part]}).encode()) == picture_key_of(url)


@given(st.binary(max_size=200))
def test_no_body_is_too_strange_for_a_key(data):
    assert picture_key(data) == ""


def test_a_body_that_is_too_deep_has_no_key():
    assert picture_key(b"[" * 100_000) == ""


def test_the_metrics_of_all_stand_on_one_page_each_counted_once():
    pages = []
    for name, calls in (("front", 3), ("0", 1), ("1", 2)):
        metrics = Metrics()
        metrics.responses.labels("/v1/models", "200").inc(calls)
        metrics.embeddings.labels("text").inc(10 * calls)
        pages.append((name, metrics.expose()))
    page = joined(pages).decode()
    families = {family.name: family for family in text_string_to_metric_families(page)}
    assert page.count("# TYPE vitrail_embeddings_total counter") == 1
    found = {(one.labels["replica"], one.value) for one in families["vitrail_embeddings"].samples}
    assert found == {("0", 10.0), ("1", 20.0)}
    [calls] = families["vitrail_http_responses"].samples
    assert (calls.labels["replica"], calls.value) == ("front", 3.0)
    buckets = [one for one in families["vitrail_request_seconds"].samples if one.name.endswith("_bucket")]
    assert {one.labels["replica"] for one in buckets} == {"0", "1"}
    assert {one.labels["replica"] for one in families["process_resident_memory_bytes"].samples} == {"front", "0", "1"}


def test_an_end_says_what_the_log_needs():
    assert (End("/x").path, End("/x").reason, End("/x").describe()) == ("/x", None, {})
    reason = End("/x", 504).reason
    assert isinstance(reason, ApiError)
    assert reason.status == 504
