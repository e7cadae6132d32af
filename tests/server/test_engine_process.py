"""The engine in a process of its own: the same answers and errors, and what happens when that process ends."""

import os
import signal
import threading
import time
from contextlib import closing, suppress
from queue import SimpleQueue

import pytest
import torch

from vitrail.runtime import GenerationConfig, Runtime
from vitrail.runtime.distributed.worker import Worker
from vitrail.runtime.engine.engine import Engine
from vitrail.runtime.engine.processor import Conversation, Picture, Prepared
from vitrail.runtime.errors import CheckpointError, InvalidRequestError, VitrailError
from vitrail.runtime.server import engine_process
from vitrail.runtime.server.engine_process import Beat, _Served, open_runtime
from vitrail.runtime.server.metrics import Metrics
from vitrail.runtime.server.settings import Settings

from ..runtime.tiny_model import picture
from .conftest import wait_until

OPTIONS = {"device": "cpu", "dtype": "float32"}
LONG = GenerationConfig(max_new_tokens=900, ignore_eos=True)


@pytest.fixture(scope="module")
def inside():
    with Runtime.from_pretrained("nano", **OPTIONS) as runtime:
        yield runtime


@pytest.fixture(scope="module")
def outside():
    with closing(open_runtime(Settings(model="nano", **OPTIONS))) as runtime:
        yield runtime


@pytest.fixture
def own():
    with closing(open_runtime(Settings(model="nano", **OPTIONS))) as runtime:
        yield runtime


def question(text="What is the total?", *seeds):
    marks = "<image>\n" * len(seeds)
    return Conversation([(marks + text, None)], [Picture(picture(300, 200, seed)) for seed in seeds])


def finish(runtime, conversation, config):
    """A request at its end, and the deltas that were told until then."""
    news = threading.Event()
    request = runtime.submit(conversation, config)
    runtime.engine.run_in_background(request, news.set)
    deltas = []
    while True:
        finished = request.finished is not None
        while request.deltas:
            deltas.append(request.deltas.popleft())
        if finished:
            return request, deltas
        assert news.wait(60)
        news.clear()


@pytest.mark.parametrize(
    ("conversation", "config"),
    [
        (question(), GenerationConfig(max_new_tokens=12, ignore_eos=True)),
        (question("What is the total?", 1), GenerationConfig(max_new_tokens=12)),
        (question("Which?", 1, 2), GenerationConfig(max_new_tokens=6, logprobs=2, ignore_eos=True, max_tiles=1)),
        (question(), GenerationConfig(max_new_tokens=9, n=3, temperature=1.0, seed=4, logprobs=0)),
        (question(), GenerationConfig(max_new_tokens=9, stop=["e"])),
    ],
)
def test_it_answers_as_an_engine_in_the_same_process(inside, outside, conversation, config):
    own, own_deltas = finish(inside, conversation, config)
    far, far_deltas = finish(outside, conversation, config)
    assert [one.token_ids for one in far.completions] == [one.token_ids for one in own.completions]
    assert [one.text for one in far.completions] == [one.text for one in own.completions]
    assert [one.finish_reason for one in far.completions] == [one.finish_reason for one in own.completions]
    for mine, theirs in zip(own.completions, far.completions, strict=True):
        assert (mine.logprobs is None) == (theirs.logprobs is None) == (config.logprobs is None)
        if config.logprobs is not None:
            assert len(mine.logprobs) == len(theirs.logprobs) == len(theirs.token_ids)
            assert [len(values) for values in mine.logprobs] == [len(values) for values in theirs.logprobs]
            assert theirs.logprobs[0][0] == pytest.approx(mine.logprobs[0][0], abs=1e-4)

    def texts(deltas):
        return ["".join(delta.text for delta in deltas if delta.index == index) for index in range(config.n)]

    assert texts(far_deltas) == texts(own_deltas) == [one.text for one in far.completions]
    usage, expected = far.usage, own.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (expected.prompt_tokens, expected.completion_tokens)
    assert (usage.image_tokens, usage.image_tiles) == (expected.image_tokens, expected.image_tiles)
    assert far.prepared.grids == own.prepared.grids


def test_it_measures_what_happened_there(outside):
    start = time.perf_counter()
    request, _ = finish(outside, question("Is this one new?", 77), GenerationConfig(max_new_tokens=5, ignore_eos=True))
    took_ms = (time.perf_counter() - start) * 1e3
    metrics = request.metrics
    assert start < request.submitted < request.admitted < request.first_token < request.finished
    for stage in ("preprocess_ms", "image_decode_ms", "tile_ms", "vision_ms", "prefill_ms", "decode_ms", "tpot_ms"):
        assert 0 < getattr(metrics, stage) < took_ms, stage
    assert metrics.ttft_ms < metrics.e2e_ms <= took_ms


def test_requests_at_the_same_time_each_get_their_own(inside, outside):
    config = GenerationConfig(max_new_tokens=20, ignore_eos=True)
    prompts = [f"{number}" * (number + 1) for number in range(12)]
    expected = [finish(inside, question(prompt), config)[0].completions[0].token_ids for prompt in prompts]
    found = {}

    def work(number):
        found[number] = finish(outside, question(prompts[number]), config)[0].completions[0].token_ids

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    same = sum(found[number] == expected[number] for number in range(len(prompts)))
    assert same >= len(prompts) - 1  # what runs beside a request may tip one near tie
    assert not outside.engine._records
    assert not outside.engine._notify


def test_what_the_engine_refuses_is_told_before_anything_is_queued(outside):
    with pytest.raises(InvalidRequestError, match="logit_bias"):
        outside.submit(question(), GenerationConfig(logit_bias={10**6: 1.0}))
    with pytest.raises(VitrailError):
        outside.submit(question(), GenerationConfig(response_format={"type": "regex", "regex": "("}))
    assert not outside.engine._records
    assert finish(outside, question(), GenerationConfig(max_new_tokens=2))[0].error is None


def test_an_image_that_cannot_be_read_ends_its_request_alone(outside):
    broken = Conversation([("<image>\nWhat?", None)], [Picture(picture(30, 30, 0))])
    prepared = outside.processor.prepare(broken, decode=False)
    prepared.num_tiles[0] += 1  # what was planned is not what will be found
    other = outside.submit(question(), GenerationConfig(max_new_tokens=30, ignore_eos=True))
    outside.engine.run_in_background(other, lambda: None)
    request = outside.engine.submit("broken", prepared, GenerationConfig())
    news = threading.Event()
    outside.engine.run_in_background(request, news.set)
    wait_until(lambda: request.finished is not None)
    assert isinstance(request.error, VitrailError)
    wait_until(lambda: other.finished is not None)
    assert other.error is None
    assert news.is_set()


def test_an_error_inside_brings_its_traceback(outside):
    prepared = Prepared([5, 6], [1], 1)  # an image that no token of the prompt stands for
    with pytest.raises(Exception) as caught:
        outside.engine.submit("wrong", prepared, GenerationConfig())
    assert "engine.py" in "".join(caught.value.__notes__)


def test_an_aborted_request_ends_with_what_there_is(outside):
    request = outside.submit(question(), LONG)
    outside.engine.run_in_background(request, lambda: None)
    wait_until(lambda: len(request.sequences[0].token_ids) > 3, "it runs")
    assert outside.abort(request.request_id)
    wait_until(lambda: request.finished is not None, "it ends")
    assert request.completions[0].finish_reason == "abort"
    assert 3 < len(request.completions[0].token_ids) < 900
    assert not outside.abort(request.request_id)


def test_it_counts_as_an_engine_does(outside):
    before = outside.stats()
    finish(outside, question(), GenerationConfig(max_new_tokens=7, ignore_eos=True))
    after = outside.stats()
    assert after["tokens"]["generated"] - before["tokens"]["generated"] == 7
    assert after["requests"]["finished"] - before["requests"]["finished"] == 1
    wait_until(lambda: outside.engine.num_steps == after["batches"]["steps"], "the beat tells")
    assert not outside.engine.reading
    assert not outside.engine.broken


def test_it_does_not_end_by_the_signal_that_drains_the_server(outside):
    os.kill(outside.engine.worker.pid, signal.SIGTERM)
    assert finish(outside, question(), GenerationConfig(max_new_tokens=2))[0].error is None


def test_a_model_that_cannot_be_loaded_is_told_as_it_is_and_leaves_no_process(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(engine_process, "Worker", lambda *args: started.append(Worker(*args)) or started[-1])
    with pytest.raises(CheckpointError, match="no-such-folder"):
        open_runtime(Settings(model=str(tmp_path / "no-such-folder"), **OPTIONS))
    assert not started
    settings = Settings(model="nano", gpu_memory_utilization=7.0, **OPTIONS)  # found by the process that loads
    with pytest.raises(VitrailError, match="gpu_memory_utilization"):
        open_runtime(settings)
    assert [worker.alive for worker in started] == [False]


def test_a_killed_engine_ends_its_requests_and_refuses_others(own):
    metrics = Metrics()
    metrics.watch(own)
    assert b"vitrail_engine_process_resident_memory_bytes" in metrics.expose()
    news = threading.Event()
    requests = [own.submit(question(f"{number}"), LONG) for number in range(3)]
    for request in requests:
        own.engine.run_in_background(request, news.set)
    wait_until(lambda: all(request.sequences[0].token_ids for request in requests), "they run")
    os.kill(own.engine.worker.pid, signal.SIGKILL)
    wait_until(lambda: all(request.finished is not None for request in requests), "they end")
    assert news.is_set()
    for request in requests:
        assert "SIGKILL" in str(request.error)
    assert "SIGKILL" in str(own.engine.failure)
    with pytest.raises(VitrailError, match="SIGKILL"):
        own.submit(question(), LONG)
    with pytest.raises(VitrailError, match="SIGKILL"):
        own.stats()
    assert b"vitrail_http_responses" in metrics.expose()


def test_a_device_that_fails_is_told_with_the_next_beat(monkeypatch):
    class Recorded:
        def __init__(self):
            self.calls = SimpleQueue()
            self.sent = []

        def recv(self):
            call = self.calls.get()
            if call is None:
                raise EOFError
            return call

        def send(self, message):
            self.sent.append(message)

    def broken(*_):
        raise torch.AcceleratorError("an illegal memory access was encountered")

    monkeypatch.setattr(Engine, "_decode", broken)
    channel = Recorded()
    with Runtime.from_pretrained("nano", **OPTIONS) as runtime:

        def serve():
            with suppress(EOFError):
                _Served(channel, runtime.engine).run()

        served = threading.Thread(target=serve)
        served.start()
        prepared = runtime.processor.prepare(question(), decode=False)
        channel.calls.put(("submit", 0, "mine", prepared, LONG, 0.0))

        def beats():
            return [message for message in channel.sent if isinstance(message, Beat) and message.failure]

        wait_until(beats, "the beat tells")
        channel.calls.put(None)
        served.join()
    assert "the device failed" in str(beats()[0].failure)
    [last] = [one for message in channel.sent if isinstance(message, list) for one in message if one.outcome]
    assert last.request_id == "mine"
    assert "illegal memory access" in last.outcome["error"].__notes__[0]


def test_what_waits_when_it_is_closed_ends(own):
    request = own.submit(question(), LONG)
    ended = threading.Event()
    own.engine.run_in_background(request, ended.set)
    pid = own.engine.worker.pid
    own.close()
    wait_until(lambda: request.finished is not None, "it ends")
    assert "closed" in str(request.error)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
