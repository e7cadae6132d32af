"""Spans of calls and of their stages, as a collector would get them, and none of what was said."""

import pytest

pytest.importorskip("opentelemetry.sdk")

from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from vitrail.runtime.server import tracing
from vitrail.runtime.server.settings import Settings

from . import conftest
from .conftest import LiveServer, data_url, wait_until

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def traced(tiny_runtime, monkeypatch):
    """A server whose spans come to a list, and that list once the server has ended."""
    exporter = InMemorySpanExporter()
    made = []
    create_app = conftest.create_app

    def create(runtime, settings):
        app = create_app(runtime, settings)
        tracing.instrument(app, settings, exporter)
        made.append(app)
        return app

    monkeypatch.setattr(conftest, "create_app", create)
    server = LiveServer(tiny_runtime(), Settings(served_model_name="tiny", max_num_seqs=4))
    wait_until(lambda: server.http.get("/health").json() == {"status": "ready"}, "the server is ready")

    def spans():
        server.assert_nothing_is_held()
        server.close()  # which hands over what is left
        [middleware] = [one for one in made[0].user_middleware if one.cls is tracing._Tracing]
        assert middleware.kwargs["traces"].calls == {}
        return list(exporter.get_finished_spans())

    yield server, spans
    server.close()


def test_a_call_has_a_span_and_its_stages_lie_below_it(traced):
    server, spans = traced
    body = server.chat("The secret word", data_url(200, 100)).json()
    found = {span.name: span for span in spans()}
    assert set(found) == {
        "POST /v1/chat/completions",
        "generate",
        "queue",
        "preprocess",
        "vision",
        "prefill",
        "decode",
    } - (set() if "queue" in found else {"queue"})
    call, whole = found["POST /v1/chat/completions"], found["generate"]
    assert call.parent is None
    assert call.attributes["http.response.status_code"] == 200
    assert call.attributes["http.route"] == "/v1/chat/completions"
    assert whole.parent.span_id == call.context.span_id
    assert whole.attributes["gen_ai.usage.input_tokens"] == body["usage"]["prompt_tokens"]
    assert whole.attributes["gen_ai.usage.output_tokens"] == body["usage"]["completion_tokens"]
    assert whole.attributes["vitrail.image_tiles"] == 3
    metrics = body["vitrail"]["metrics"]
    for name in ("preprocess", "prefill"):
        span = found[name]
        assert span.parent.span_id == whole.context.span_id
        assert (span.end_time - span.start_time) / 1e6 == pytest.approx(metrics[f"{name}_ms"], abs=0.01)
    assert (whole.end_time - whole.start_time) / 1e6 == pytest.approx(metrics["e2e_ms"], rel=0.2, abs=5)
    for span in found.values():
        assert span.start_time <= span.end_time
        assert call.start_time - 5e6 <= span.start_time
        assert span.end_time <= call.end_time + 5e6
        assert "secret" not in str(dict(span.attributes))
        assert body["choices"][0]["message"]["content"] not in str(dict(span.attributes))


def test_calls_continue_their_callers_trace_and_streams_and_errors_have_spans(traced):
    server, spans = traced
    messages = [{"role": "user", "content": "Hello"}]
    path, fields = "/v1/chat/completions", {"messages": messages, "max_tokens": 4}
    assert "[DONE]" in server.post(path, {**fields, "stream": True}, traceparent=PARENT).text
    assert server.post(path, {**fields, "n": 0}).status_code == 400
    assert server.post("/v1/nowhere", {}).status_code == 404
    assert server.http.get("/v1/models").status_code == 200
    server.http.get("/metrics")
    found = spans()
    calls = [(span.name, span.attributes["http.response.status_code"]) for span in found if span.kind.name == "SERVER"]
    assert calls == [
        ("POST /v1/chat/completions", 200),
        ("POST /v1/chat/completions", 400),
        ("POST other", 404),
        ("GET /v1/models", 200),
    ]
    [streamed] = [span for span in found if span.parent is not None and span.kind.name == "SERVER"]
    assert f"{streamed.context.trace_id:032x}" == PARENT.split("-")[1]
    [whole] = [span for span in found if span.name == "generate"]
    assert whole.context.trace_id == streamed.context.trace_id


def test_a_failed_request_is_an_error_in_its_span(traced):
    server, spans = traced
    from .test_media_http import BAD, inline

    assert server.chat("x", inline(BAD["png cut short"][0])).status_code == 400
    [whole] = [span for span in spans() if span.name == "generate"]
    assert whole.status.status_code is StatusCode.ERROR
    assert whole.status.description == "InvalidRequestError"


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ("http://collector:4318", "http://collector:4318/v1/traces"),
        ("http://collector:4318/", "http://collector:4318/v1/traces"),
        ("https://host/tenant/v1/traces", "https://host/tenant/v1/traces"),
    ],
)
def test_an_endpoint_without_a_path_is_a_collector(tiny_runtime, monkeypatch, given, used):
    asked = []
    monkeypatch.setattr(tracing, "OTLPSpanExporter", lambda endpoint: asked.append(endpoint) or InMemorySpanExporter())
    settings = Settings(otlp_endpoint=given)
    tracing.instrument(conftest.create_app(tiny_runtime(), settings), settings)
    assert asked == [used]
