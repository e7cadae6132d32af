"""`vitrail serve --replicas`, as a process with a Ray of its own: answers, caches, deaths of replicas, and its end.

One server for all of it: Ray takes ten seconds to start. Skipped where Ray is not installed.
"""

import base64
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from vitrail.runtime import Runtime
from vitrail.runtime.server import ray_main

from ..command_line import vitrail
from .processes import alive

pytest.importorskip("ray")
import yaml  # Ray needs it

pytestmark = pytest.mark.slow(smoke=False)  # but for three

ROOT = Path(__file__).resolve().parents[3]
RECEIPT = ROOT / "examples" / "receipt.png"
QUESTIONS = ["What is the total?", "Which shop is this?", "What is the price of the FIG?", "How many tiles?"]
KEY = "a-key"
SECONDS = 120.0  # for what takes a few on a quiet machine


def wait_until(condition: Any, what: str, seconds: float = SECONDS) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.05)


def ask(text: str, image: bytes | None = None, **fields: Any) -> dict[str, Any]:
    """The body of a chat request."""
    content: Any = text
    if image is not None:
        url = f"data:image/png;base64,{base64.b64encode(image).decode()}"
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 16, **fields}


def marked(image: bytes, number: int) -> bytes:
    """The same picture as another file: what stands after a PNG's end is not read."""
    return image + number.to_bytes(4, "big")


class Server:
    """`vitrail serve nano` as a process, its clients, and the processes below it."""

    def __init__(self, *flags: str) -> None:
        command = [str(Path(sysconfig.get_path("scripts")) / "vitrail"), "serve", "nano", "--port", "0", *flags]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        wait_until(lambda: self.url or self.process.poll() is not None, "it listens")
        self.http = httpx.Client(base_url=self.url, timeout=SECONDS, headers={"authorization": f"Bearer {KEY}"})

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines if line.startswith("{")]

    @property
    def url(self) -> str:
        return next((event["url"] for event in self.events if event["event"] == "listening"), "")

    def chat(self, *arguments: Any, **fields: Any) -> httpx.Response:
        return self.http.post("/v1/chat/completions", json=ask(*arguments, **fields))

    def text(self, *arguments: Any, **fields: Any) -> str:
        response = self.chat(*arguments, **fields)
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]["message"]["content"]

    def metric(self, name: str, **labels: str) -> dict[str, float]:
        """A metric by replica."""
        page = text_string_to_metric_families(self.http.get("/metrics").text)
        samples = [sample for family in page for sample in family.samples if sample.name == f"vitrail_{name}"]
        return {one.labels["replica"]: one.value for one in samples if labels.items() <= one.labels.items()}

    @property
    def num_ready(self) -> int:
        return next((event["ready"] for event in reversed(self.events) if event["event"] == "replicas"), 0)

    def idle(self) -> bool:
        states = [self.metric("engine_requests", state=state) for state in ("waiting", "running")]
        return not any(number for state in states for number in state.values())

    def close(self) -> int:
        """Ask it to end, and wait. Returns its exit status."""
        self.http.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(SECONDS)
        finally:
            self.process.kill()
            self._reader.join()


def below(pid: int) -> dict[int, str]:
    """The processes below one, and their titles."""
    parents, titles = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
                titles[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue  # it has just ended
            parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return {one: titles[one] for one in found - {pid}}


def folder_of(processes: dict[int, str]) -> Path:
    """Where Ray, of whose processes these are the titles, has its files."""
    [folder] = {found[0] for title in processes.values() if (found := re.search(r"/tmp/vitrail-\w+", title))}
    return Path(folder)


def processes_of(server: Server, deployment: str) -> list[int]:
    title = f"ray::ServeReplica:vitrail:{deployment}"
    return [pid for pid, found in below(server.process.pid).items() if found.startswith(title)]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """Two replicas of nano, and a vision half that they share. Nothing of them is left in the end."""
    flags = ["--device", "cpu", "--dtype", "float32", "--api-key", KEY, "--max-num-seqs", "8"]
    server = Server("--replicas", "2", "--vision-replicas", "1", *flags)
    try:
        assert server.http.get("/health").json() == {"status": "loading"}
        assert server.http.get("/ready").status_code == 503
        assert server.chat("Too early?").status_code == 503
        wait_until(lambda: server.num_ready == 2 or server.process.poll() is not None, "both replicas are ready")
        yield server
    finally:
        processes = below(server.process.pid)
        status = server.close()
    assert status == 0, "".join(server.lines)
    wait_until(lambda: not [pid for pid in processes if alive(pid)], "all processes end")
    assert not folder_of(processes).exists()
    assert [line for line in server.lines if not line.startswith(("{", "(raylet)"))] == []  # logs are JSON


@pytest.fixture(scope="module")
def picture() -> bytes:
    return RECEIPT.read_bytes()


@pytest.mark.slow
def test_replicas_answer_as_one_process_does(server, picture):
    with Runtime.from_pretrained("nano", dtype="float32", device="cpu") as rt:
        expected = [rt.generate(question, RECEIPT, max_new_tokens=16).text for question in QUESTIONS]
    bodies = [(question, marked(picture, number)) for number in range(4) for question in QUESTIONS]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda arguments: server.text(*arguments), bodies))
    assert found == expected * 4
    generated = server.metric("engine_tokens_total", kind="generated")
    assert set(generated) == {"0", "1"}
    assert all(generated.values())  # both had a share


@pytest.mark.slow
def test_a_picture_goes_to_the_replica_that_has_seen_it(server, picture):
    for number in range(10, 16):
        before = server.metric("engine_vision_cache_lookups_total", result="hit")
        server.text(QUESTIONS[0], marked(picture, number))
        server.text(QUESTIONS[1], marked(picture, number))
        after = server.metric("engine_vision_cache_lookups_total", result="hit")
        assert sum(after.values()) >= sum(before.values()) + 1


def test_openais_client_reads_a_stream(server, picture):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)
    body = ask(QUESTIONS[0], picture)
    chunks = client.chat.completions.create(model="nano", stream=True, **body)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == server.text(QUESTIONS[0], picture)
    endless = {**body, "max_tokens": 1500, "extra_body": {"ignore_eos": True}}
    with client.chat.completions.create(model="nano", stream=True, **endless) as stream:
        assert next(iter(stream)).choices[0].delta.content
        assert sum(server.metric("engine_requests", state="running").values()) == 1  # not all at once in the end
    wait_until(server.idle, "nothing runs")


def test_every_route_is_there(server):
    assert server.http.get("/ready").json() == {"status": "ready"}
    assert server.http.get("/v1/models").json()["data"][0]["id"] == "nano"
    assert "version" in server.http.get("/version").json()
    assert server.http.get("/").headers["content-type"].startswith("text/html")
    assert server.http.get("/nowhere").status_code == 404
    assert server.http.get("/v1/chat/completions").status_code == 405
    assert server.http.post("/tokenize", json={"prompt": "one two"}).json()["count"] > 1


def test_mistakes_are_told_as_ever_and_a_key_is_needed(server):
    refused = server.chat("What?", temprature=1)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "temprature")
    assert httpx.get(f"{server.url}/v1/models").status_code == 401
    assert httpx.get(f"{server.url}/health").status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_replica(server, stream):
    aborted = sum(server.metric("engine_request_ends_total", event="aborted").values())
    with pytest.raises(httpx.ReadTimeout):
        server.http.post(
            "/v1/chat/completions", json=ask("Write.", stream=stream, max_tokens=1900, ignore_eos=True), timeout=0.7
        )
    ends = {"event": "aborted"}
    wait_until(lambda: sum(server.metric("engine_request_ends_total", **ends).values()) == aborted + 1, "it is aborted")
    wait_until(server.idle, "nothing runs")


@pytest.mark.slow
def test_nothing_hangs_when_a_replica_is_killed_under_load(server, picture):
    """Every call is answered, or ends with an error that says why; then there are two replicas again."""
    victim, *_ = before = processes_of(server, "Replica")
    assert len(before) == 2

    def call(number: int) -> str:
        body = ask(QUESTIONS[0], marked(picture, 100 + number), stream=number % 2 == 0, max_tokens=150, ignore_eos=True)
        response = server.http.post("/v1/chat/completions", json=body)
        if response.status_code == 200 and response.text.rstrip().endswith(("[DONE]", "}}")):
            return "replica_lost" if '"replica_lost"' in response.text else "answered"
        return response.text

    with ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(call, number) for number in range(16)]
        wait_until(lambda: sum(one.done() for one in calls) >= 2, "some are answered")
        os.kill(victim, signal.SIGKILL)
        ends = [one.result() for one in calls]
    assert set(ends) <= {"answered", "replica_lost"}, ends
    assert ends.count("answered") >= 8
    assert all(ends[number] == "answered" for number in range(1, 16, 2))  # what had not begun was done again
    assert server.http.get("/ready").status_code == 200
    wait_until(lambda: len(set(processes_of(server, "Replica")) - {victim}) == 2, "there is another process")
    wait_until(lambda: len(server.metric("engine_tokens_total", kind="generated")) == 2, "it has the model")
    assert server.text(QUESTIONS[0], picture)


def test_a_vision_half_that_is_killed_is_replaced(server, picture):
    """Pictures wait for the new one; texts do not."""
    [victim] = processes_of(server, "VisionHalf")
    expected = server.text(QUESTIONS[0], picture)
    os.kill(victim, signal.SIGKILL)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.chat, QUESTIONS[0], marked(picture, 200))
        assert server.chat("Hello.").status_code == 200
        response = answer.result()
    assert response.status_code in (200, 500), response.text
    wait_until(lambda: set(processes_of(server, "VisionHalf")) - {victim}, "there is another process")
    assert server.text(QUESTIONS[0], marked(picture, 201)) == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--device", "cuda"], "device cuda: 0 CUDA devices are visible"),
        (["--device", "cpu", "--llm-devices", "cpu"], "llm_devices and vision_devices go without replicas"),
        (["--device", "cpu", "--host", "256.0.0.1"], "cannot listen at 256.0.0.1"),
        (["--max-image-pixels", "0"], "max_image_pixels"),
    ],
)
def test_what_cannot_be_is_refused_before_ray_starts(monkeypatch, flags, message):
    monkeypatch.setattr(ray_main, "configure", lambda level: None)  # the log of this process is pytest's
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for name in (*ray_main._ENVIRONMENT, "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, "")  # what it becomes is undone
    done = vitrail("serve", "nano", "--replicas", 2, *flags)
    assert (done.status, done.err.count("\n")) == (2, 1)
    assert message in done.err


# --- servers of their own ---


def test_a_model_that_no_replica_can_load_ends_the_command_with_its_own_words():
    server = Server("--replicas", "2", "--device", "cpu", "--max-model-len", "999999")
    wait_until(lambda: server.process.poll() is not None, "it ends")
    processes = below(server.process.pid)
    assert server.close() == 2
    assert processes == {}
    assert server.lines[-1].startswith("vitrail: a replica cannot start: max_model_len 999999 exceeds")


def test_nothing_runs_on_when_the_server_is_killed():
    server = Server("--replicas", "2", "--device", "cpu", "--api-key", KEY)
    wait_until(lambda: server.num_ready == 2, "both replicas are ready")
    processes = below(server.process.pid)
    assert len(processes) > 5
    server.process.kill()
    wait_until(lambda: not [pid for pid in processes if alive(pid)], "all processes end")
    server.close()
    shutil.rmtree(folder_of(processes))  # nobody is left to do it


def test_ray_serve_runs_the_application(tmp_path, picture):
    """As on a cluster: Ray Serve's own command, and its proxy before our ingress."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = yaml.safe_load((ROOT / "docs/deploy/ray.yaml").read_text("utf-8"))
    application = config["applications"][0]
    application["args"] = {"model": "nano", "device": "cpu", "dtype": "float32", "llm_replicas": 2, "host": "0.0.0.0"}
    application["deployments"] = [{"name": "Replica", "num_replicas": 1}]
    config["http_options"] |= {"host": "127.0.0.1", "port": port}
    (tmp_path / "ray.yaml").write_text(yaml.safe_dump(config))
    private = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_TMPDIR": tempfile.mkdtemp(dir="/tmp"),  # names of sockets are short
        "VITRAIL_API_KEY": KEY,
        "OMP_NUM_THREADS": "1",
    }
    command = [str(Path(sysconfig.get_path("scripts")) / "serve"), "run", str(tmp_path / "ray.yaml")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | private)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=SECONDS) as http:
            wait_until(lambda: answers(http), "it is ready")
            assert http.get("/v1/models").status_code == 401
            http.headers["authorization"] = f"Bearer {KEY}"
            whole = http.post("/v1/chat/completions", json=ask(QUESTIONS[0], picture))
            assert whole.json()["choices"][0]["message"]["content"] == "$25.90"
            stream = http.post("/v1/chat/completions", json=ask(QUESTIONS[0], picture, stream=True))
            assert stream.text.rstrip().endswith("[DONE]")
            assert 'replica="0"' in http.get("/metrics").text
            assert 'replica="1"' not in http.get("/metrics").text
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(SECONDS)
        shutil.rmtree(private["RAY_TMPDIR"], ignore_errors=True)


def answers(http: httpx.Client) -> bool:
    try:
        return http.get("/ready", headers={"authorization": f"Bearer {KEY}"}).status_code == 200
    except httpx.TransportError:
        return False
