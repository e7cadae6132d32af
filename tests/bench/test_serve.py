"""What the benchmark of servers sends and makes of what comes back; that its loads run against our own server."""

import argparse
import asyncio
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from vitrail.bench.serve import (
    Answer,
    Server,
    answer_in_process,
    by_http,
    make_request,
    make_workload,
    measure_overhead,
    model_of,
    own_server,
    parted,
    read_workload,
    row_of,
)
from vitrail.bench.soak import growth_mib, soak
from vitrail.runtime.api import Runtime

EVENTS = [
    {"choices": [{"delta": {"role": "assistant", "content": ""}}], "usage": None},
    {"choices": [{"delta": {"content": 'Total: "usage":{'}}], "usage": None},
    {"choices": [{"delta": {"content": " $9"}}], "usage": None},
    {"choices": [{"delta": {}, "finish_reason": "length"}], "usage": None},
    {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 7}},
]


class Peer(BaseHTTPRequestHandler):
    """A server of another make: spaces in its JSON, chunks that part events, or none at all."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        body = json.dumps({"data": [{"id": self.headers.get("Authorization", "peer")}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, dict(self.headers), request))
        self.close_connection = True
        if request["max_tokens"] == 429:
            self.send_error(429)
            return
        events = EVENTS[:2] if request["max_tokens"] == 2 else EVENTS
        data = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events) + b"data: [DONE]\n\n"
        self.send_response(200)
        if request["max_tokens"] == 1:
            self.end_headers()
            self.wfile.write(data)
            return
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for place in range(0, len(data), 33):
            part = data[place : place + 33]
            self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def peer():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Peer)
    server.seen = []
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_answers_of_any_server_are_read(peer):
    url = f"http://127.0.0.1:{peer.server_address[1]}"
    assert model_of(url, None) == "peer"
    server = Server(url + "/prefix", model_of(url, "secret"), "secret")
    workload = [{"messages": [], "max_tokens": count} for count in (1, 3, 429, 2)]
    for load in ({"clients": 2}, {"rate": 500.0}):
        peer.seen.clear()
        answers, seconds, _ = by_http(server, workload, **load)
        by_tokens = {request["max_tokens"]: answer for request, answer in zip(workload, answers, strict=True)}
        assert [answer.error for answer in answers] == [None, None, "429", "cut off"]
        for count in (1, 3):
            assert by_tokens[count].tokens == 7
            assert len(by_tokens[count].pieces) == 2
        assert seconds > 0
        path, headers, request = peer.seen[0]
        assert path == "/prefix/v1/chat/completions"
        assert headers["Authorization"] == "Bearer secret"
        assert request["model"] == "Bearer secret"
        assert request["stream_options"] == {"include_usage": True}
    closed = Server("http://127.0.0.1:1", "x")
    assert by_http(closed, workload[:1], clients=1)[0][0].error == "ConnectionRefusedError"


def test_a_row_is_made_of_what_succeeded():
    answers = [Answer(0.0, [0.5, 0.6, 0.8], 4), Answer(1.0, [1.1, 1.3], 2), Answer(1.0, [1.2], 1, "429")]
    row = row_of("peer", "closed, 2", answers, 2.0)
    assert (row["requests"], row["failed"]) == (3, 1)
    assert row["requests_per_s"] == 1
    assert row["output_tokens_per_s"] == 3
    assert row["ttft_p50_ms"] == pytest.approx(300)
    assert row["itl_p50_ms"] == pytest.approx(200)
    assert row_of("peer", "x", answers[2:], 1.0)["ttft_p50_ms"] is None


def test_a_loss_is_parted_into_request_and_token():
    request, token = parted({48: 0.004 + 48 * 5e-5, 16: 0.004 + 16 * 5e-5})
    assert request == pytest.approx(0.004)
    assert token == pytest.approx(5e-5)


def test_memory_grows_by_the_quarters_of_a_soak():
    samples = [50, 90, 100, 100, 101, 102, 103, 105]
    assert growth_mib([{"rss_mib": value} for value in samples]) == 4


def test_requests_of_a_workload_are_each_their_own(tmp_path):
    requests = [make_request(seed, 9, (30, 20), images=2) for seed in (1, 2)]
    urls = [part["image_url"]["url"] for one in requests for part in one["messages"][0]["content"][:2]]
    assert len(set(urls)) == 4
    assert make_request(1, 9, (30, 20), images=2) == requests[0]
    file = tmp_path / "requests.jsonl"
    file.write_text("\n".join(map(json.dumps, requests)) + "\n\n", "utf-8")
    assert read_workload(file) == requests


def test_answers_of_a_workload_are_of_several_lengths_about_one_mean():
    seeds = iter(range(100))
    first, second, other = (make_workload(seeds, 30, 16, (8, 8), draw=draw) for draw in (0, 0, 1))
    lengths = [[request["max_tokens"] for request in workload] for workload in (first, second, other)]
    assert lengths[0] == lengths[1] != lengths[2]  # what two systems are asked in one turn
    assert set(lengths[0] + lengths[2]) <= set(range(8, 25))
    assert len(set(lengths[0])) > 8
    assert sum(lengths[0] + lengths[2]) / 60 == pytest.approx(16, abs=2)
    assert not {json.dumps(request) for request in first} & {json.dumps(request) for request in second}


@pytest.mark.slow(smoke=False)
def test_loads_run_against_our_own_server_and_its_engine():
    arguments = argparse.Namespace(clients=[2], new_tokens=[2, 4], requests=3, rate=50.0, size=(224, 224), turns=1)
    with (
        Runtime.from_pretrained("nano", dtype="float32", device="cpu") as runtime,
        own_server(1) as (server, pid),
    ):
        workload = [make_request(seed, 3, (224, 224)) for seed in range(2)]
        assert [answer.tokens for answer in answer_in_process(runtime, workload, clients=2)] == [3, 3]
        found = list(measure_overhead(server, runtime, arguments))
        rows = [row for row, _ in found]
        assert [row["system"] for row in rows] == ["in process", "vitrail serve"] * 3
        assert [row["failed"] for row in rows] == [0] * 6
        assert [row["new_tokens"] for row in rows] == [2, 2, 4, 4, 4, 4]
        assert set(found[3][1]) == {2, 4}
        for row in rows[1:4:2]:
            assert row["overhead_percent"] < 100
        samples = asyncio.run(soak(server, pid, 0.03, (64, 64)))
        assert samples[-1]["answered"] > 0
        assert samples[-1]["failed"] == 0
        assert samples[-1]["rss_mib"] > 100
        assert samples[-1]["answer_p99_ms"] >= samples[-1]["answer_p50_ms"] > 0
