"""Our own OpenAPI schema, kept: whatever is sent, and whatever comes back."""

import json
import warnings

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .conftest import ask

schemathesis = pytest.importorskip("schemathesis")

PLAIN = [("GET", path) for path in ("/v1/models", "/health", "/ready", "/metrics", "/version", "/")]
BODIES = [("POST", path) for path in ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/tokenize")]
SLOW = {"max_tokens", "max_completion_tokens", "n"}  # what would only make an answer longer


@pytest.fixture(scope="module")
def schema(server):
    return server.http.get("/openapi.json").json()


def check(server, schema, method, path, examples, mode):
    """Send what schemathesis makes of one operation; the answers must be of the schema, and none a server's error."""
    loaded = schemathesis.openapi.from_dict(schema)
    operation = loaded[path][method]
    checks = schemathesis.checks
    wanted = [
        checks.not_a_server_error,
        *checks.CHECKS.get_by_names(
            [f"{part}_conformance" for part in ("status_code", "content_type", "response_schema")]
        ),
    ]
    if mode is schemathesis.GenerationMode.NEGATIVE:
        wanted += checks.CHECKS.get_by_names(["negative_data_rejection"])

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def run(case):
        if isinstance(case.body, dict) and mode is schemathesis.GenerationMode.POSITIVE:
            case.body = {key: value for key, value in case.body.items() if key not in SLOW} | {"max_tokens": 1}
            if path in ("/v1/embeddings", "/tokenize"):
                del case.body["max_tokens"]
        response = case.call(base_url=server.url)
        case.validate_response(response, checks=wanted)

    run()
    server.assert_nothing_is_held()


def test_the_schema_is_one(schema):
    assert schema["openapi"].startswith("3.1")
    found = {(method.upper(), path) for path, methods in schema["paths"].items() for method in methods}
    assert found == {*PLAIN, *BODIES}
    text = json.dumps(schema)
    names = {reference.partition('"')[0] for reference in text.split("#/components/schemas/")[1:]}
    assert names <= set(schema["components"]["schemas"])


@pytest.mark.parametrize(("method", "path"), BODIES)
def test_bodies_of_the_schema_are_answered_by_the_schema(server, schema, method, path):
    check(server, schema, method, path, 25, schemathesis.GenerationMode.POSITIVE)


@pytest.mark.parametrize(("method", "path"), BODIES)
def test_bodies_that_are_not_of_the_schema_are_refused(server, schema, method, path):
    check(server, schema, method, path, 25, schemathesis.GenerationMode.NEGATIVE)


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
@pytest.mark.parametrize(("method", "path"), BODIES)
def test_many_bodies_are_answered_by_the_schema(server, schema, method, path, mode):
    check(server, schema, method, path, 500, mode)


@pytest.mark.parametrize(("method", "path"), PLAIN)
def test_what_has_no_body_is_answered_by_the_schema(server, schema, method, path):
    response = httpx.request(method, f"{server.url}{path}")
    described = schema["paths"][path][method.lower()]["responses"][str(response.status_code)]
    kind = response.headers["content-type"].partition(";")[0]
    assert kind in described["content"]


# --- any JSON at all ---

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)
parts = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image_url", "video_url", "video", "image", "input_audio"]) | scalars},
    optional={"text": anything, "image_url": anything, "video_url": anything, "video": anything, "image": anything},
)
messages = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "developer", "user", "assistant", "tool"]) | scalars},
    optional={"content": anything | st.lists(parts, max_size=3), "name": anything, "tool_calls": anything},
)
NAMES = [
    *("model", "max_tokens", "temperature", "top_p", "n", "stream", "stream_options", "stop", "seed", "logit_bias"),
    *("logprobs", "top_logprobs", "response_format", "max_completion_tokens", "tools", "user", "top_k", "max_tiles"),
]
bodies = st.builds(
    lambda messages, others: {"messages": messages, "max_tokens": 1} | others,
    st.lists(messages, max_size=3) | anything | st.just(ask()["messages"]),
    st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=8), anything, max_size=3),
)


@settings(max_examples=150, suppress_health_check=list(HealthCheck))
@given(body=bodies | anything)
def test_any_json_is_answered_or_refused_as_the_callers_mistake(server, body):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        content = json.dumps(body).encode()
    response = server.http.post("/v1/chat/completions", content=content, headers={"content-type": "application/json"})
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        assert set(response.json()) == {"error"}


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b'{"a":' * 50_000, b'{"messages":' + b"9" * 5000 + b"}", b"1e999", b"\x00" * 50]
)
def test_json_made_to_hurt_is_refused(server, content):
    response = server.http.post("/v1/chat/completions", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert server.chat().status_code == 200
