"""The gate before every route: keys, hosts, sizes, request ids, and that nothing but JSON comes out."""

import io
import json
import logging
import socket

import pytest

from vitrail.runtime.server import exchange, logs

from .conftest import ask, data_url, wait_until

KEYS = ("first-key", "second-kéy")


def routes(server):
    """(method, path) of everything the schema describes."""
    schema = server.http.get("/openapi.json", headers={"authorization": f"Bearer {KEYS[0]}"}).json()
    return [(method.upper(), path) for path, methods in schema["paths"].items() for method in methods]


def test_the_key_covers_every_route_but_health_and_the_page(make_server):
    server = make_server(api_key=KEYS)
    found = routes(server)
    assert len(found) >= 10
    for method, path in [*found, ("GET", "/openapi.json"), ("GET", "/nothing"), ("PUT", "/v1/models")]:
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": f"Basic {KEYS[0]}"},
            {"authorization": "Bearer"},
        ):
            response = server.http.request(method, path, headers=headers)
            if path in ("/health", "/"):
                assert response.status_code == 200, path
            else:
                assert response.status_code == 401, path
                assert response.json()["error"]["code"] == "invalid_api_key"
    for key in KEYS:
        for headers in ({"authorization": f"Bearer {key}".encode()}, {"authorization": f"bearer  {key}".encode()}):
            assert server.http.get("/v1/models", headers=headers).status_code == 200
    keyed = server.openai.with_options(api_key=KEYS[0])
    assert keyed.models.list().data[0].id == "tiny"


def test_a_path_that_only_looks_open_is_not(make_server):
    server = make_server(api_key=KEYS)
    port = int(server.url.rpartition(":")[2])
    paths = (
        "/health/",
        "//health",
        "/health/../v1/models",
        "/health%2f..%2fv1/models",
        "/./v1/models",
        "//",
        "/HEALTH",
    )
    for path in (*paths, "/v1/models?/health", "/v1/models#/health", "http://localhost/v1/models", "*", "health"):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            answer = b"".join(iter(lambda: connection.recv(4096), b"")).decode()
        assert int(answer.split()[1]) in (400, 401, 404), path
        assert "tiny" not in answer


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "[::2]", "", "localhost@evil"]
)
def test_a_name_that_is_not_this_machines_is_refused(server, host):
    response = server.http.get("/v1/models", headers={"host": host})
    assert response.status_code == 403
    assert response.json()["error"]["code"] == "host_not_allowed"


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1", "[::1]:8000"])
def test_a_name_of_this_machine_is_answered(server, host):
    assert server.http.get("/v1/models", headers={"host": host}).status_code == 200


def test_a_form_of_a_foreign_page_is_refused(server):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        response = server.http.post("/v1/chat/completions", content=json.dumps(ask()), headers={"content-type": kind})
        assert response.status_code == 415


def test_a_body_that_is_too_large_is_refused_whether_it_says_so_or_not(make_server):
    server = make_server(max_request_bytes=20_000)
    body = json.dumps(ask("x" * 30_000)).encode()
    headers = {"content-type": "application/json"}
    announced = server.http.post("/v1/chat/completions", content=body, headers=headers)
    chunked = server.http.post("/v1/chat/completions", content=iter([body[:9000], body[9000:]]), headers=headers)
    for response in (announced, chunked):
        assert response.status_code == 413
        assert "20000" in response.json()["error"]["message"]
    assert server.chat().status_code == 200
    server.assert_nothing_is_held()


def test_three_announced_gigabytes_are_refused_before_they_come(server):
    port = int(server.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 3000000000\r\nExpect: 100-continue\r\n\r\n"
        )
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


def test_a_refusal_is_read_by_a_client_that_is_still_sending(make_server):
    server = make_server(api_key=KEYS)
    for _ in range(5):
        response = server.http.post(
            "/v1/chat/completions", json=ask("Which?", *[data_url(400, 400, s) for s in range(4)])
        )
        assert response.status_code == 401


def test_every_answer_has_a_request_id_and_a_usable_one_is_kept(server):
    assert server.http.get("/version").headers["x-request-id"]
    assert server.http.get("/version", headers={"x-request-id": "mine.1-2_3"}).headers["x-request-id"] == "mine.1-2_3"
    for bad in ("a b", "x" * 65, "<script>", '"'):
        assert server.http.get("/version", headers={"x-request-id": bad}).headers["x-request-id"] != bad
    answer = server.post("/v1/chat/completions", ask(), **{"x-request-id": "abc"})
    assert answer.json()["id"] == "chatcmpl-abc"


def test_two_requests_of_one_id_are_two_requests(server):
    answers = [server.post("/v1/chat/completions", ask(stream=True), **{"x-request-id": "same"}) for _ in range(2)]
    assert all(answer.text.rstrip().endswith("[DONE]") for answer in answers)


def test_what_does_not_exist_is_told_in_openais_form(server):
    for method, path, status in [
        ("GET", "/v2", 404),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("GET", "/docs", 404),
    ]:
        response = server.http.request(method, path)
        assert response.status_code == status
        assert response.json()["error"]["message"]


def the_record(caplog, is_it):
    """The one record; the server's thread writes of a request only after the caller has the answer."""
    wait_until(lambda: any(map(is_it, caplog.records)), "the log has the record")
    [record] = filter(is_it, caplog.records)
    return record


def test_the_log_has_ids_and_numbers_and_no_content(server, caplog):
    with caplog.at_level(logging.INFO, logger="vitrail.server"):
        server.post("/v1/chat/completions", ask("a secret question"), **{"x-request-id": "logged"})
        record = the_record(caplog, lambda record: record.fields.get("request_id") == "logged")
    assert record.fields["status"] == 200
    assert record.fields["prompt_tokens"] > 0
    assert "secret" not in repr(record.__dict__)


def test_the_log_has_content_if_it_is_asked_for(make_server, caplog):
    server = make_server(log_content=True)
    with caplog.at_level(logging.INFO, logger="vitrail.server"):
        text = server.chat("a secret question").json()["choices"][0]["message"]["content"]
        record = the_record(caplog, lambda record: "prompts" in record.fields)
    assert "a secret question" in record.fields["prompts"][0]
    assert record.fields["answers"] == [text]


def test_the_page_may_run_its_own_script_alone(server):
    response = server.http.get("/")
    assert response.headers["content-type"].startswith("text/html")
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert policy.count("sha256-") >= 2


def test_a_body_that_does_not_arrive_takes_no_place_for_long(make_server, monkeypatch):
    monkeypatch.setattr(exchange, "BODY_S", 0.2)
    server = make_server()
    port = int(server.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 30000000\r\n\r\n{"
        )
        assert connection.recv(100).startswith(b"HTTP/1.1 408 ")
    server.assert_nothing_is_held()


def test_what_fails_inside_stands_in_the_log_with_its_id(server, monkeypatch, caplog):
    def broken(*_):
        raise RuntimeError("the reason")

    monkeypatch.setattr(server.service.runtime, "submit", broken)
    with caplog.at_level(logging.ERROR, logger="vitrail.server"):
        response = server.post("/v1/chat/completions", ask(), **{"x-request-id": "failing"})
        record = the_record(caplog, lambda record: record.levelno == logging.ERROR)
    assert "the reason" not in response.text
    assert record.fields["request_id"] == "failing"
    assert "the reason" in str(record.exc_info[1])


def test_log_lines_are_json():
    stream = io.StringIO()
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    try:
        logs.configure("info", stream)
        logs.log("an event", number=1, text="a\nb")
        try:
            raise ValueError("x")
        except ValueError as error:
            logs.log("a failure", logging.ERROR, exc_info=error)
        logging.getLogger("other").warning("of %s", "another")
    finally:
        root.handlers[:] = before
        root.setLevel(level)
        logging.captureWarnings(False)
    lines = map(json.loads, stream.getvalue().splitlines())
    first, second, third = (line for line in lines if line["event"] != "request")  # a server of another test's
    assert (first["event"], first["number"], first["text"], first["level"]) == ("an event", 1, "a\nb", "info")
    assert "ValueError: x" in second["traceback"]
    assert (third["event"], third["logger"], third["level"]) == ("of another", "other", "warning")
