"""The vision half in processes of its own: answers of one process, work shared, and deaths that harm nobody else."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitrail.runtime import Runtime
from vitrail.runtime.config import load_config
from vitrail.runtime.distributed import vision_pool as vision_pool_module
from vitrail.runtime.distributed.vision_pool import VisionPool
from vitrail.runtime.distributed.worker import Channel
from vitrail.runtime.engine.vision_stage import Arrived
from vitrail.runtime.errors import CheckpointError, VitrailError
from vitrail.runtime.quantization.config import QuantizationConfig
from vitrail.runtime.weights import load_model, resolve_checkpoint

from ...random_checkpoints import random_tiles
from ..random_requests import ask, check_random_requests, finish
from ..tiny_model import assert_idle, assert_same_answer, picture, write_tiny_model
from ..vision_workers import split_runtime
from .processes import alive, children, open_files


def shared_memory():
    return set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()


def is_gone(pid, seconds=10):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not alive(pid):
            return True
        time.sleep(0.01)
    return False


# --- nano: one worker, room for two tiles ---


@pytest.fixture(scope="module")
def nano():
    with Runtime.from_pretrained("nano", dtype="float32", device="cpu", max_num_seqs=16) as runtime:
        yield runtime


@pytest.fixture(scope="module")
def nano_pool(nano):
    before = shared_memory()
    folder = resolve_checkpoint("nano")
    pool = VisionPool(folder, nano.model.config, ["cpu"], dtype=torch.float32, threads=1, tiles_per_job=1)
    yield pool
    pids = pool.pids
    for _ in range(2):  # engines that share it may each close it
        pool.close()
    assert len(pids) == 1
    assert all(is_gone(pid) for pid in pids)
    assert shared_memory() <= before


@pytest.fixture
def split(nano, nano_pool):
    with split_runtime((nano.model, nano.tokenizer), nano_pool, max_num_seqs=16) as runtime:
        yield runtime
        assert_idle(runtime.engine)


def test_a_hundred_random_requests_get_from_two_processes_what_they_get_from_one(nano, split):
    assert check_random_requests(split, nano, 100) <= 1
    assert split.stats()["vision_workers"]["tiles"] > 20


@pytest.mark.slow
def test_a_thousand_random_requests_get_from_two_processes_what_they_get_from_one(nano, split):
    assert check_random_requests(split, nano, 1000) <= 1


def test_many_images_pass_through_room_for_two_tiles(nano, split):
    images = [picture(300, 300, 20 + number) for number in range(12)]
    prompts = ["What does the sign say?"] * len(images)
    expected = nano.generate(prompts, images, max_new_tokens=3, logprobs=2)
    requests = [ask(split, prompt, [image], max_new_tokens=3) for prompt, image in zip(prompts, images, strict=True)]
    most = 0
    while split.engine.scheduler or split.engine.turns._inbox.qsize():
        split.engine.step()
        most = max(most, split.engine.scheduler.num_in_flight)
    assert most == 2
    for wanted, request in zip(expected, requests, strict=True):
        assert_same_answer(wanted.outputs[0], request.completions[0])
        assert request.metrics.vision_ms > 0
        assert request.metrics.projector_ms > 0


def test_a_timeline_has_a_lane_for_the_worker_beside_that_of_the_language_half(split, tmp_path):
    with split.trace(tmp_path / "trace.json"):
        split.generate("What is it?", picture(448, 224, 7), max_new_tokens=4, ignore_eos=True)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    lanes = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    found = [(lanes[event["tid"]], event["name"]) for event in events if event["ph"] == "X"]
    assert found.count(("vision half 1", "vision")) == 3  # two tiles and the thumbnail, each a job
    assert ("language half", "decode") in found
    inside = [event for event in events if event["name"] == "vision"]
    whole = [event["ts"] for event in events if event["name"] == "request" and event["ph"] in "be"]
    assert all(min(whole) <= event["ts"] <= event["ts"] + event["dur"] <= max(whole) for event in inside)


# --- a tiny model: deaths ---


@pytest.fixture(scope="module")
def folder(sentencepiece_folder):
    return write_tiny_model(sentencepiece_folder())


@pytest.fixture(scope="module")
def tiny(folder):
    with Runtime.from_pretrained(folder, dtype="float32", device="cpu") as runtime:
        yield runtime


def wait_until(condition, what, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.01)


def test_others_take_the_tiles_of_a_worker_that_is_killed_and_another_takes_its_place(folder, tiny):
    before, others = shared_memory(), children()
    pool = VisionPool(folder, tiny.model.config, ["cpu", "cpu"], dtype=torch.float32, threads=1, tiles_per_job=2)
    first, second = pool.pids
    with split_runtime((tiny.model, tiny.tokenizer), pool, max_num_seqs=64) as rt, ThreadPoolExecutor(1) as other:
        pictures = [picture(200, 300, 100 + number) for number in range(30)]
        expected = tiny.generate(["what?"] * 30, pictures, max_new_tokens=3, logprobs=2)

        def answer(kill, salt):
            requests = [ask(rt, "what?", [image], max_new_tokens=3, cache_salt=salt) for image in pictures]
            tiles = pool.stats()["tiles"]
            driving = other.submit(finish, rt, *requests)
            while pool.stats()["tiles"] < tiles + 10:
                assert not driving.done()
            kill()
            driving.result(60)
            for wanted, request in zip(expected, requests, strict=True):
                assert_same_answer(wanted.outputs[0], request.completions[0])

        answer(lambda: os.kill(first, signal.SIGKILL), "one")
        assert second in pool.pids
        assert rt.stats()["vision_workers"]["deaths"] == 1

        # All: what waits is answered by those that take their places, and texts are answered meanwhile.
        def kill_all():
            for pid in pool.pids:
                os.kill(pid, signal.SIGKILL)
            wait_until(lambda: not pool.pids, "they are missed")
            rt.generate("hello", max_new_tokens=3)
            assert not pool.pids, "the text waited for a vision half"

        answer(kill_all, "all")
        assert pool.pids
        assert not {first, second} & {*pool.pids}
        assert rt.stats()["requests"]["failed"] == 0
        assert_idle(rt.engine)
        assert len(children() - others) == 2
    pool.close()
    assert not children() - others
    assert shared_memory() <= before


def test_one_that_is_killed_while_it_starts_is_replaced_too_and_closing_ends_one_that_starts(folder, tiny):
    before, others, files = shared_memory(), children(), open_files()
    pool = VisionPool(folder, tiny.model.config, ["cpu"], dtype=torch.float32, threads=1)
    for _ in range(2):
        known = children()
        os.kill(max(known - others), signal.SIGKILL)  # the second one before it is ready
        wait_until(lambda: children() - known, "another is started")  # noqa: B023 - called here
    assert pool.pids == []
    future: Future = Future()
    pool.encode(random_tiles(1, tiny.model.config.tile_size), future.set_result)
    began = time.monotonic()
    pool.close()
    assert time.monotonic() - began < 20
    assert str(future.result(0)) == "the vision half is closed"
    assert not children() - others
    assert shared_memory() <= before
    del pool
    assert open_files() <= files


DRIVER = """
import sys, threading, torch
from pathlib import Path
from vitrail.runtime.config import load_config
from vitrail.runtime.distributed.vision_pool import VisionPool
folder = Path(sys.argv[1])
pool = VisionPool(folder, load_config(folder), ["cpu"], dtype=torch.float32, threads=1)
print(*pool.pids, flush=True)
threading.Event().wait()
"""


@pytest.mark.slow(smoke=False)
def test_workers_end_when_their_driver_is_killed(folder):
    before = shared_memory()
    with subprocess.Popen([sys.executable, "-c", DRIVER, str(folder)], stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        [pid] = map(int, driver.stdout.readline().split())
        assert not is_gone(pid, 0.1)
        driver.kill()
    assert is_gone(pid)
    assert shared_memory() <= before


def test_a_quantised_vision_half_in_bfloat16_gives_what_it_gives_in_this_process(folder, tiny):
    quantization = QuantizationConfig(None, "int8")
    with pytest.warns(UserWarning, match="nearest"):
        model = load_model(
            folder,
            load_config(folder),
            dtype=torch.bfloat16,
            device=torch.device("cpu"),
            quantization=quantization,
        )
    pool = VisionPool(
        folder, model.config, ["cpu"], dtype=torch.bfloat16, quantization=quantization, threads=1, exact=True
    )
    tiles = random_tiles(3, model.config.tile_size)
    future: Future = Future()
    pool.encode(tiles, future.set_result)
    arrived = future.result(60)
    pool.close()
    assert isinstance(arrived, Arrived)
    assert arrived.tokens.dtype == torch.bfloat16
    expected = torch.cat([model.encode_tiles(tile[None]) for tile in tiles]).flatten(0, 1)
    assert torch.equal(arrived.tokens, expected)
    plain = tiny.model.encode_tiles(tiles).flatten(0, 1)
    assert not torch.equal(plain.bfloat16(), expected)


# --- who gets what: workers that are threads of this process ---


class FakeWorker:
    """Stands for a process: runs the worker's function on a thread of this one. `started`: all of them."""

    started: list["FakeWorker"]

    def __init__(self, name, target, plan, *, fds, env):
        assert {plan.pixels, plan.tokens} == set(fds)
        self.name, self.pid, self.dead = name, 1000 + len(self.started), False
        ours, self.theirs = socket.socketpair()
        self.channel = Channel(ours.detach())
        plan = replace(plan, pixels=os.dup(plan.pixels), tokens=os.dup(plan.tokens))
        self.thread = threading.Thread(target=self._run, args=(target, Channel(os.dup(self.theirs.fileno())), plan))
        self.started.append(self)
        self.thread.start()

    def _run(self, target, channel, plan):
        try:
            target(channel, plan)
        except (EOFError, OSError):
            channel.close()
        except VitrailError as error:
            channel.send(error)
        except torch.AcceleratorError as error:
            channel.send(VitrailError(f"its last words: {error}"))
            self.die()

    @classmethod
    def current(cls):
        return next(one for one in cls.started if one.thread is threading.current_thread())

    def ready(self, timeout_s=None):
        try:
            message = self.channel.recv()
        except EOFError:
            message = VitrailError(f"{self.name} {self.describe_end()}")
        if isinstance(message, VitrailError):
            raise message
        return message

    def die(self):
        self.dead = True
        self.theirs.shutdown(socket.SHUT_RDWR)

    def close(self):
        self.die()
        self.thread.join(10)
        assert not self.thread.is_alive()

    def describe_end(self):
        return "ended: signal 9 (SIGKILL)"


class FakeModel:
    """Turns tiles into tokens that name them, and counts; `gate` holds it, `reaction` may raise or kill."""

    def __init__(self):
        self.gate = threading.Semaphore(10**6)
        self.jobs = []
        self.reaction = lambda names: None

    def encode_beside(self, tiles):
        found, worker = tiles[:, 0, 0, 0].tolist(), FakeWorker.current()
        while not self.gate.acquire(timeout=0.01):
            if worker.dead:  # a process would run no further
                raise EOFError
        self.jobs.append(found)
        self.reaction(found)
        tokens = torch.tensor(found, dtype=torch.float32)[:, None, None].expand(-1, 2, 3).flatten(0, 1)
        return SimpleNamespace(tokens=tokens, began=0.0, ended=0.0, projector_ms=0.0)

    device = torch.device("cpu")

    def warm_up_vision(self):
        pass


@contextmanager
def fake_pools():
    """`make(workers, tiles_per_job)`: a pool of such workers and their model."""
    model, pools = FakeModel(), []
    FakeWorker.started = []

    def end(workers):
        for worker in workers:
            worker.die()

    def make(workers=2, tiles_per_job=4):
        pools.append(VisionPool("", config, ["cpu"] * workers, dtype=torch.float32, tiles_per_job=tiles_per_job))
        return pools[-1], model

    config = SimpleNamespace(tile_size=2, tokens_per_tile=2, llm=SimpleNamespace(hidden_size=3))
    with pytest.MonkeyPatch.context() as patch:
        for name, stand_in in (
            ("Worker", FakeWorker),
            ("end", end),
            ("load_model", lambda *_, **__: None),
            ("Runner", lambda *_, **__: model),
            ("_PAUSE_S", 0.0),
        ):
            patch.setattr(vision_pool_module, name, stand_in)
        yield make
        model.gate.release(1000)
        for pool in pools:
            pool.close()
    for worker in FakeWorker.started:
        worker.thread.join(10)
        assert not worker.thread.is_alive()


@pytest.fixture
def fake():
    with fake_pools() as make:
        yield make


class Calls:
    """Calls of a pool, and what each got, which must come once."""

    def __init__(self, pool):
        self.pool, self.got, self.numbers = pool, {}, count(1)
        self.changed = threading.Condition()

    def ask(self, num_tiles=1, note=None):
        names = [next(self.numbers) for _ in range(num_tiles)]
        if note is not None:
            note.update(names)
        tiles = torch.tensor(names, dtype=torch.uint8)[:, None, None, None].expand(-1, 2, 2, 3)
        self.pool.encode(tiles, lambda result: self._take(tuple(names), result))

    def _take(self, names, result):
        with self.changed:
            assert names not in self.got, "answered twice"
            self.got[names] = result
            self.changed.notify_all()

    def wait(self, number):
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.got) >= number, 30)

    def check(self):
        """Each call has its own tokens, or an error; returns the tiles of those with errors."""
        failed = []
        for names, result in self.got.items():
            if isinstance(result, VitrailError):
                failed += names
            else:
                assert result.tokens.tolist() == [[float(name)] * 3 for name in names for _ in range(2)]
        return failed


def test_a_document_is_spread_over_workers_and_what_waits_is_joined(fake):
    pool, model = fake(workers=2, tiles_per_job=4)
    model.gate = threading.Semaphore(0)
    calls = Calls(pool)
    calls.ask(6)  # both workers, as much as there is, shared out
    assert (pool.stats()["jobs"], pool.stats()["waiting"]) == (2, 0)
    for _ in range(7):
        calls.ask()
    assert (pool.stats()["jobs"], pool.stats()["waiting"]) == (4, 5)
    model.gate.release(100)
    calls.wait(8)
    assert calls.check() == []
    assert sorted(map(len, model.jobs)) == [1, 1, 1, 1, 3, 3, 3]
    assert sorted(name for job in model.jobs for name in job) == list(range(1, 14))
    assert {result.lane for result in calls.got.values()} <= {"vision half 1", "vision half 2"}
    assert pool.stats()["tiles"] == 13


def test_the_error_of_one_that_cannot_load_is_raised_and_the_others_end(fake, monkeypatch):
    loads = count()

    def load(*_, **__):
        if next(loads) == 1:
            raise CheckpointError("no such tensor")

    monkeypatch.setattr(vision_pool_module, "load_model", load)
    with pytest.raises(CheckpointError, match=r"^no such tensor$"):
        fake(workers=3)
    assert len(FakeWorker.started) == 3  # whose threads the fixture finds ended


def test_a_tile_that_breaks_a_job_is_found_and_the_others_are_encoded(fake):
    pool, model = fake(workers=1, tiles_per_job=4)
    model.gate = threading.Semaphore(0)

    def reaction(names):
        if 5 in names:
            raise ValueError("five")

    model.reaction = reaction
    calls = Calls(pool)
    for _ in range(8):
        calls.ask()
    model.gate.release(100)
    calls.wait(8)
    assert calls.check() == [5]
    assert str(calls.got[5,]) == "the vision half failed: ValueError: five"
    assert any(5 in job and len(job) > 1 for job in model.jobs)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_tile_that_ends_two_workers_is_not_given_a_third(fake, workers):
    pool, model = fake(workers=workers, tiles_per_job=2)

    def reaction(names):
        if 3 in names:
            FakeWorker.current().die()

    model.reaction = reaction
    calls = Calls(pool)
    for _ in range(9):
        calls.ask()
    calls.wait(9)
    assert calls.check() == [3]
    assert "vision worker" in str(calls.got[3,])
    assert pool.stats()["deaths"] == 2
    wait_until(lambda: pool.stats()["alive"] == workers, "another has taken each place")
    calls.ask()
    calls.wait(10)
    assert calls.check() == [3]


def test_a_worker_whose_device_does_nothing_any_more_ends_and_its_tile_gets_another_one(fake):
    pool, model = fake(workers=1)
    broken = count()

    def reaction(names):
        if not next(broken):
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    model.reaction = reaction
    calls = Calls(pool)
    calls.ask()
    calls.wait(1)
    assert calls.check() == []
    assert pool.stats()["deaths"] == 1
    assert "illegal memory access" in pool._why


def test_after_five_deaths_with_nothing_encoded_a_device_is_given_up_and_calls_are_told_why(fake):
    pool, model = fake(workers=2)
    model.reaction = lambda names: FakeWorker.current().die() if model.broken else None
    calls, model.broken = Calls(pool), True
    asked = 0
    while not isinstance(pool._error(), VitrailError):
        calls.ask()
        asked += 1
        calls.wait(asked)
    assert calls.check() == list(range(1, asked + 1))
    reason = r"the vision half is gone: vision worker [01] on cpu ended: signal 9 \(SIGKILL\), the last of 5 in a row"
    calls.ask()
    calls.wait(asked + 1)
    assert re.match(reason, str(calls.got[asked + 1,]))
    assert (pool.stats()["alive"], pool.stats()["deaths"], pool.pids) == (0, 10, [])
    assert len(FakeWorker.started) == 10


def test_deaths_between_which_tiles_were_encoded_are_no_reason_to_give_up(fake):
    pool, model = fake(workers=1)
    model.reaction = lambda names: FakeWorker.current().die() if names[0] % 2 == 0 else None
    calls = Calls(pool)
    for number in range(1, 21):
        calls.ask()
        calls.wait(number)
    assert calls.check() == list(range(2, 21, 2))
    assert pool.stats()["deaths"] == 20


def test_a_device_whose_next_worker_cannot_load_is_given_up_with_its_reason(fake, monkeypatch):
    pool, _ = fake(workers=1)

    def load(*_, **__):
        raise CheckpointError("no such file")

    monkeypatch.setattr(vision_pool_module, "load_model", load)
    FakeWorker.started[0].die()
    calls = Calls(pool)
    calls.ask()
    calls.wait(1)
    assert str(calls.got[1,]) == "the vision half is gone: no such file, the last of 5 in a row that encoded nothing"


events = st.lists(
    st.one_of(st.integers(1, 5), st.sampled_from(["let one go", "let one go", "break", "kill", "kill"])), max_size=30
)


@settings(max_examples=60)
@given(drawn=events)
def test_every_call_gets_its_own_tokens_or_an_error_once_whatever_happens(drawn):
    with fake_pools() as make:
        check_events(make, drawn)


def check_events(make, drawn):
    pool, model = make(workers=3, tiles_per_job=2)
    model.gate, broken = threading.Semaphore(0), set()

    def reaction(names):
        if broken & set(names):
            raise ValueError("a tile that breaks")

    model.reaction = reaction
    calls, asked, killed = Calls(pool), 0, 0
    for event in drawn:
        if event == "let one go":
            model.gate.release()
        elif event == "kill":
            living = [one for one in FakeWorker.started if not one.dead]
            if living:
                living[killed % len(living)].die()
                killed += 1
        elif event == "break":
            calls.ask(note=broken)
            asked += 1
        elif isinstance(event, int):
            calls.ask(event)
            asked += 1
    model.gate.release(1000)
    calls.wait(asked)
    failed = set(calls.check())
    assert broken <= failed
    assert killed > 1 or failed == broken  # one death harms nobody
