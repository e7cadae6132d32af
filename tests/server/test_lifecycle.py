"""From loading to death: states, disconnects at every stage, deadlines, draining, and what is left behind: nothing."""

import json
import os
import signal
import socket
import subprocess
import sysconfig
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch

from vitrail.runtime.engine.engine import Engine
from vitrail.runtime.engine.processor import Processor
from vitrail.runtime.engine.vision_stage import VisionStage
from vitrail.runtime.errors import CheckpointError, VitrailError
from vitrail.runtime.server import main

from ..runtime.command_line import vitrail
from ..runtime.distributed.processes import alive, children
from .conftest import ask, data_url, wait_until

LONG = {"max_tokens": 900, "ignore_eos": True}


def leave_after(server, body, stage_reached, stream=False):
    """Send a request over a socket of our own, and hang up as soon as `stage_reached` holds."""
    content = json.dumps({**body, "stream": stream}).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    port = int(server.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(head.encode() + content)
        wait_until(stage_reached, "the stage is reached")


class Held:
    """A function that waits in the middle until it is let go, and says that it does."""

    def __init__(self, monkeypatch, owner, name):
        self.reached, self.go = threading.Event(), threading.Event()
        original = getattr(owner, name)

        def held(*arguments, **keywords):
            self.reached.set()
            assert self.go.wait(20)
            return original(*arguments, **keywords)

        monkeypatch.setattr(owner, name, held)


def test_a_server_that_loads_is_alive_and_not_ready(make_server, tiny_runtime):
    go = threading.Event()

    def load():
        assert go.wait(20)
        return tiny_runtime()

    server = make_server(runtime=load)
    assert server.http.get("/health").json() == {"status": "loading"}
    for method, path in [
        ("GET", "/ready"),
        ("GET", "/v1/models"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/tokenize"),
    ]:
        response = server.http.request(method, path, json=ask() if method == "POST" else None)
        assert response.status_code == 503, path
        assert response.json()["error"]["code"] == "loading"
        assert int(response.headers["retry-after"]) > 0
    assert server.http.get("/metrics").status_code == 200
    go.set()
    wait_until(lambda: server.http.get("/ready").status_code == 200, "the server is ready")
    assert server.chat().status_code == 200


def test_a_model_that_cannot_be_loaded_ends_the_server(make_server):
    def load():
        raise CheckpointError("no such tensor")

    server = make_server(runtime=load)
    wait_until(lambda: server.service.dead, "the server dies")
    assert server.http.get("/health").status_code == 500
    wait_until(lambda: not server.alive, "the server ends")
    assert isinstance(server.service.failure, CheckpointError)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_while_its_request_is_read_leaves_nothing(make_server, monkeypatch, stream):
    server = make_server()
    held = Held(monkeypatch, Processor, "prepare")
    leave_after(server, ask("Which?", data_url()), held.reached.is_set, stream)
    wait_until(lambda: not server.service.flights, "the call leaves")
    held.go.set()
    wait_until(lambda: server.engine.recorder.counts["requests aborted"], "it is aborted as soon as it is queued")
    server.assert_nothing_is_held()
    assert server.chat().status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_while_its_image_is_decoded_leaves_nothing(make_server, monkeypatch, stream):
    server = make_server()
    held = Held(monkeypatch, Processor, "load")
    leave_after(server, ask("Which?", data_url()), held.reached.is_set, stream)
    threading.Timer(0.2, held.go.set).start()
    server.assert_nothing_is_held()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_while_its_tiles_are_encoded_leaves_nothing(make_server, monkeypatch, stream):
    server = make_server()
    held = Held(monkeypatch, VisionStage, "run")
    leave_after(server, ask("Which?", data_url(), **LONG), held.reached.is_set, stream)
    held.go.set()
    server.assert_nothing_is_held()
    assert server.service.runtime.stats()["requests"]["aborted"] == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_while_its_prompt_runs_leaves_nothing(make_server, monkeypatch, stream):
    server = make_server()
    held = Held(monkeypatch, Engine, "_forward")
    leave_after(server, ask("Which? " * 100, **LONG), held.reached.is_set, stream)
    held.go.set()
    server.assert_nothing_is_held()
    assert server.service.runtime.stats()["requests"]["aborted"] == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("answers", [1, 3])
def test_a_client_that_leaves_while_its_answer_is_written_leaves_nothing(make_server, stream, answers):
    server = make_server()
    body = ask(**LONG, n=answers, temperature=1.0)
    leave_after(server, body, lambda: server.engine.recorder.counts["tokens generated"] > 5, stream)
    server.assert_nothing_is_held()
    assert server.service.runtime.stats()["requests"]["aborted"] == 1
    assert server.engine.recorder.counts["tokens generated"] < 900


def test_a_client_that_leaves_the_queue_leaves_nothing(make_server):
    server = make_server(max_num_seqs=1)
    with ThreadPoolExecutor(1) as other:
        first = other.submit(server.chat, max_tokens=300, ignore_eos=True)
        wait_until(lambda: server.engine.recorder.counts["tokens generated"] > 2, "the first one runs")
        leave_after(server, ask(**LONG), lambda: len(server.service.flights) == 2 and len(server.engine.waiting) == 1)
        wait_until(lambda: len(server.service.flights) == 1, "the second one leaves")
        assert first.result().json()["usage"]["completion_tokens"] == 300
    server.assert_nothing_is_held()


def test_a_request_that_takes_too_long_is_aborted(make_server):
    server = make_server(request_timeout=0.3)
    answer = server.chat(**LONG)
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
    stream = server.chat(**LONG, stream=True)
    assert stream.status_code == 200
    assert '"code":"timeout"' in stream.text
    assert "[DONE]" not in stream.text
    server.assert_nothing_is_held()


def test_media_that_take_too_long_to_read_are_a_mistake(make_server, monkeypatch):
    server = make_server(mm_per_request_timeout=0.2)
    held = Held(monkeypatch, Processor, "prepare")
    response = server.chat()
    assert (response.status_code, response.json()["error"]["code"]) == (400, "media_timeout")
    held.go.set()
    wait_until(lambda: server.engine.recorder.counts["requests aborted"], "it is aborted as soon as it is queued")
    server.assert_nothing_is_held()


def test_media_that_take_too_long_to_decode_are_a_mistake(make_server, monkeypatch):
    server = make_server(mm_per_request_timeout=0.2)
    held = Held(monkeypatch, Processor, "load")
    response = server.chat("Which?", data_url())
    assert (response.status_code, response.json()["error"]["code"]) == (400, "media_timeout")
    held.go.set()
    server.assert_nothing_is_held()
    assert server.chat().status_code == 200


def test_draining_finishes_what_there_is_and_takes_no_more(make_server):
    server = make_server(shutdown_timeout=30)
    with ThreadPoolExecutor(2) as others:
        whole = others.submit(server.chat, max_tokens=200, ignore_eos=True)
        stream = others.submit(server.chat, max_tokens=200, ignore_eos=True, stream=True)
        wait_until(lambda: server.engine.recorder.counts["tokens generated"] > 4, "both run")
        server.call_soon(server.service.drain)
        wait_until(lambda: server.http.get("/ready").status_code == 503, "the server drains")
        assert server.http.get("/health").json() == {"status": "draining"}
        refused = server.chat()
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        assert whole.result().json()["usage"]["completion_tokens"] == 200
        assert stream.result().text.rstrip().endswith("[DONE]")
    wait_until(lambda: not server.alive, "the server ends")


def test_what_does_not_end_in_time_is_aborted_by_draining(make_server):
    server = make_server(shutdown_timeout=0.2)
    with ThreadPoolExecutor(2) as others:
        whole = others.submit(server.chat, **LONG)
        stream = others.submit(server.chat, **LONG, stream=True)
        wait_until(lambda: server.engine.recorder.counts["tokens generated"] > 4, "both run")
        server.call_soon(server.service.drain)
        assert whole.result().status_code == 503
        assert '"shutting_down"' in stream.result().text
    wait_until(lambda: not server.alive, "the server ends")
    assert not server.service.flights


def test_a_device_that_fails_is_the_servers_end(make_server, monkeypatch):
    server = make_server()

    def broken(*_):
        raise torch.AcceleratorError("an illegal memory access was encountered")

    monkeypatch.setattr(Engine, "_decode", broken)
    response = server.chat()
    assert response.status_code == 500
    assert "illegal" not in response.text
    assert server.http.get("/health").status_code == 500
    assert server.chat().json()["error"]["code"] == "engine_dead"
    wait_until(lambda: not server.alive, "the server ends")
    assert server.service.dead


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_whose_thread_ends_is_the_servers_end(make_server, monkeypatch):
    server = make_server()

    def broken(_):
        raise SystemExit

    monkeypatch.setattr(Engine, "_run_step", broken)
    response = server.chat()
    assert response.status_code == 500
    wait_until(lambda: not server.alive, "the server ends")
    assert server.service.dead


def test_processes_of_the_model_that_end_are_the_servers_end(make_server):
    server = make_server()
    server.engine.fail_all(VitrailError("rank 1 of the language half ended: signal 9"))
    assert server.chat().status_code == 500
    wait_until(lambda: not server.alive, "the server ends")
    assert server.service.dead


def test_an_engine_that_stands_still_is_the_servers_end(make_server, monkeypatch):
    server = make_server(stall_timeout=0.3)
    held = Held(monkeypatch, Engine, "_forward")
    response = server.chat()
    assert response.status_code == 500
    assert server.service.dead
    held.go.set()
    wait_until(lambda: not server.alive, "the server ends")


def test_an_engine_that_works_or_waits_for_work_does_not_stand_still(make_server):
    server = make_server(stall_timeout=0.6)
    assert server.chat(max_tokens=400, ignore_eos=True).status_code == 200
    time.sleep(1.5)
    assert server.http.get("/health").json() == {"status": "ready"}


# --- the process ---


def start(*flags):
    """`vitrail serve nano` as a process, and the URL it says it listens at."""
    command = [
        str(Path(sysconfig.get_path("scripts")) / "vitrail"),
        "serve",
        "nano",
        "--port",
        "0",
        "--device",
        "cpu",
        *flags,
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    for line in process.stderr:
        event = json.loads(line)
        if event["event"] == "listening":
            break
    else:
        raise AssertionError("it did not listen")
    lines = []
    reader = threading.Thread(target=lambda: lines.extend(process.stderr))
    reader.start()
    return process, event["url"], lines, reader


def test_the_command_serves_logs_and_ends_on_sigterm():
    process, url, lines, reader = start("--shutdown-timeout", "20")
    try:
        with httpx.Client(base_url=url, timeout=60) as client:
            wait_until(lambda: client.get("/ready").status_code == 200, "nano is loaded", 60)
            secret = "my-own-secret-words"
            with ThreadPoolExecutor(1) as other:
                body = ask(secret, max_tokens=30, ignore_eos=True)
                answer = other.submit(
                    client.post, "/v1/chat/completions", json=body, headers={"x-request-id": "mine-1"}
                )
                wait_until(lambda: 'state="running"} 1.0' in client.get("/metrics").text, "it runs")
                process.send_signal(signal.SIGTERM)
                assert answer.result().json()["usage"]["completion_tokens"] == 30
                assert answer.result().headers["x-request-id"] == "mine-1"
        assert process.wait(30) == 0
    finally:
        process.kill()
        reader.join()
    events = [json.loads(line) for line in lines]
    [entry] = [event for event in events if event.get("request_id") == "mine-1"]
    assert (entry["route"], entry["status"], entry["generated_tokens"]) == ("/v1/chat/completions", 200, 30)
    assert secret not in "".join(lines)
    assert {"ready", "draining"} <= {event["event"] for event in events}


def test_a_server_ends_when_the_process_of_its_engine_is_killed_and_the_other_way_round():
    for killed in ("engine", "server"):
        process, url, lines, reader = start()
        try:
            with httpx.Client(base_url=url, timeout=60) as client, ThreadPoolExecutor(1) as other:
                wait_until(lambda client=client: client.get("/ready").status_code == 200, "nano is loaded", 60)
                [engine] = children(process.pid)
                answer = other.submit(client.post, "/v1/chat/completions", json=ask(**LONG))
                wait_until(lambda client=client: 'state="running"} 1.0' in client.get("/metrics").text, "it runs")
                os.kill(engine if killed == "engine" else process.pid, signal.SIGKILL)
                if killed == "engine":
                    assert answer.result().status_code == 500
                    assert process.wait(20) == 1
                else:
                    assert isinstance(answer.exception(), httpx.HTTPError)
            wait_until(lambda engine=engine: not alive(engine), "nothing is left")
        finally:
            process.kill()
            reader.join()
        if killed == "engine":
            [entry] = [event for line in lines if "processes have ended" in (event := json.loads(line))["event"]]
            assert "SIGKILL" in entry["traceback"]


def test_the_command_tells_what_it_cannot_do_in_one_line(monkeypatch):
    monkeypatch.setattr(main, "configure", lambda level: None)  # the log of this process is pytest's
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for arguments, message in [
            (["no-such-folder"], "no-such-folder"),
            (["nano", "--port", taken.getsockname()[1]], "cannot listen at 127.0.0.1 port"),
            (["nano", "--host", "256.0.0.1"], "cannot listen at 256.0.0.1"),
        ]:
            done = vitrail("serve", *arguments)
            assert (done.status, done.err.count("\n")) == (2, 1)
            assert done.err.startswith("vitrail: ")
            assert message in done.err
