"""The vision half behind a handle of Ray Serve: jobs, their order, and what happens when a half ends."""

import asyncio
import json
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
import torch

pytest.importorskip("ray")

from ray.exceptions import ActorDiedError, RayTaskError

from vitrail.runtime.distributed.ray_vision import JOBS_PER_HALF, TILES_PER_JOB, RayVision, VisionHalf
from vitrail.runtime.engine.vision_stage import Arrived
from vitrail.runtime.errors import VitrailError

SIZE, TOKENS, HIDDEN = 4, 3, 5


def tiles_of(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, SIZE, SIZE, 3), dtype=torch.uint8, generator=generator)


def encode(tiles: torch.Tensor) -> torch.Tensor:
    """Three tokens a tile, each of five numbers."""
    return tiles.flatten(1)[:, : TOKENS * HIDDEN].reshape(-1, HIDDEN).to(torch.bfloat16)


class Handle:
    """A handle of Ray Serve: `fail` is told the number of each call and may raise or wait."""

    def __init__(self, fail: Any = None) -> None:
        self.half = VisionHalf(lambda: encode)
        self.sizes: list[int] = []
        self._fail = fail

    @property
    def encode(self) -> "Handle":
        return self

    async def remote(self, tiles):
        self.sizes.append(len(tiles))
        if self._fail is not None:
            await self._fail(len(self.sizes))
        return self.half.encode(tiles)


class Outcome:
    """What `done` was called with, once."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self._there = threading.Event()

    def __call__(self, value: Any) -> None:
        self.values.append(value)
        self._there.set()

    def get(self) -> Any:
        assert self._there.wait(20)
        [value] = self.values
        return value.tokens if isinstance(value, Arrived) else value


@pytest.fixture
def make():
    made = []

    def workers(handle, num_halves=2, timeout_s=20.0):
        made.append(
            RayVision(handle, num_halves, device=torch.device("cpu"), dtype=torch.bfloat16, timeout_s=timeout_s)
        )
        return made[-1]

    yield workers
    for one in made:
        one.close()


def run(workers: RayVision, tiles: torch.Tensor) -> Any:
    """The tokens of some tiles, or what went wrong."""
    outcome = Outcome()
    workers.encode(tiles, outcome)
    return outcome.get()


class Gate:
    """What calls wait for."""

    def __init__(self) -> None:
        self.open = False

    async def __call__(self, _: int) -> None:
        while not self.open:
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("count", [1, 2, 7, 40])
def test_tokens_come_in_the_order_of_their_tiles(make, count):
    handle = Handle()
    tokens = run(make(handle), tiles_of(count))
    assert tokens.dtype == torch.bfloat16
    assert torch.equal(tokens, encode(tiles_of(count)))
    assert sum(handle.sizes) == count
    assert max(handle.sizes) <= TILES_PER_JOB


def test_the_tiles_of_one_document_are_spread_over_the_halves(make):
    handle = Handle()
    run(make(handle, num_halves=3), tiles_of(13))
    assert handle.sizes == [5, 5, 3]


def test_there_is_work_for_every_half_in_flight(make):
    assert make(Handle(), num_halves=3).capacity == 3 * JOBS_PER_HALF * TILES_PER_JOB


def test_tiles_that_wait_are_joined_whoever_asked_for_them(make):
    handle = Handle(gate := Gate())
    workers, outcomes = make(handle), [Outcome() for _ in range(24)]
    for number, outcome in enumerate(outcomes):
        workers.encode(tiles_of(1 + number % 3, number), outcome)
    assert not any(outcome.values for outcome in outcomes)
    gate.open = True
    for number, outcome in enumerate(outcomes):
        assert torch.equal(outcome.get(), encode(tiles_of(1 + number % 3, number)))
    assert handle.sizes[:4] == [1, 1, 1, 2]  # two jobs for each half; 43 tiles wait
    assert max(handle.sizes) == TILES_PER_JOB
    assert len(handle.sizes) <= 10
    assert workers.stats() == {"jobs": len(handle.sizes), "retries": 0, "failures": 0}
    passes = {id(outcome.values[0].began): outcome.values[0].num_tiles for outcome in outcomes[4:]}
    assert max(passes.values()) == TILES_PER_JOB


def test_a_job_whose_half_ends_goes_to_another(make):
    async def die_once(number):
        if number == 1:
            raise ActorDiedError

    workers = make(Handle(die_once))
    assert torch.equal(run(workers, tiles_of(6)), encode(tiles_of(6)))
    assert workers.stats() == {"jobs": 2 + 3, "retries": 1, "failures": 0}  # tile by tile: one may be the reason


def test_tiles_whose_half_ends_twice_fail_their_request_alone(make):
    async def die(number):
        if number <= 2:
            raise ActorDiedError

    workers = make(Handle(die), num_halves=1)
    error = run(workers, tiles_of(1))
    assert isinstance(error, VitrailError)
    assert "the vision half failed: The actor died" in str(error)
    assert torch.equal(run(workers, tiles_of(2)), encode(tiles_of(2)))


def test_a_tile_that_breaks_a_job_is_found_and_the_others_are_encoded(make):
    handle, broken = Handle(gate := Gate()), tiles_of(1, 5)

    def break_at(tiles, encode=handle.half.encode):
        if any((tile == broken[0].numpy()).all() for tile in tiles):
            raise RayTaskError("encode", "the traceback", ValueError("five"))
        return encode(tiles)

    handle.half.encode = break_at  # type: ignore[method-assign]
    workers, outcomes = make(handle), [Outcome() for _ in range(12)]
    for number, outcome in enumerate(outcomes):
        workers.encode(tiles_of(1, number), outcome)
    gate.open = True
    for number, outcome in enumerate(outcomes):
        if number == 5:
            assert str(outcome.get()).startswith("the vision half failed: ")
        else:
            assert torch.equal(outcome.get(), encode(tiles_of(1, number)))
    assert workers.stats()["failures"] == 1
    sent = len(handle.sizes)
    assert isinstance(run(workers, broken), VitrailError)
    assert len(handle.sizes) == sent + 1, "nobody died of it, and it is known whose fault it is"


def test_a_job_does_not_wait_for_ever_for_a_half(make):
    async def never(_):
        await asyncio.Event().wait()

    error = run(make(Handle(never), timeout_s=0.1), tiles_of(2))
    assert isinstance(error, VitrailError)
    assert "0.1 s" in str(error)


def test_an_answer_that_makes_no_sense_is_an_error(make):
    handle = Handle()
    handle.half.encode = lambda tiles: None  # type: ignore[method-assign]
    assert isinstance(run(make(handle), tiles_of(2)), VitrailError)


def test_tiles_that_wait_behind_others_do_not_wait_longer(make):
    async def never(_):
        await asyncio.Event().wait()

    workers, outcomes = make(Handle(never), num_halves=1, timeout_s=1.0), [Outcome() for _ in range(12)]
    began = time.monotonic()
    for number, outcome in enumerate(outcomes):
        workers.encode(tiles_of(1, number), outcome)
    assert all("within 1 s" in str(outcome.get()) for outcome in outcomes)
    assert time.monotonic() - began < 1.9, "two jobs, one behind the other, had a second each"


def test_closing_fails_what_is_in_flight_what_waits_and_what_comes_later():
    async def never(_):
        await asyncio.Event().wait()

    workers = RayVision(Handle(never), 1, device=torch.device("cpu"), dtype=torch.bfloat16)
    outcomes = [Outcome() for _ in range(6)]
    for outcome in outcomes[:5]:
        workers.encode(tiles_of(2), outcome)
    workers.close()
    workers.encode(tiles_of(2), outcomes[5])
    assert {str(outcome.get()) for outcome in outcomes} == {"the vision half is closed"}
    workers.close()


def test_tokens_survive_the_way_in_every_dtype():
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        half = VisionHalf(lambda dtype=dtype: lambda tiles: encode(tiles).to(dtype))
        found = half.encode(tiles_of(2).numpy())
        assert torch.equal(torch.from_numpy(found).view(dtype).squeeze(-1), encode(tiles_of(2)).to(dtype))


CLUSTER = """
import json, os, secrets, signal, sys, threading
import torch
from vitrail.runtime.server.ray_main import _ENVIRONMENT
os.environ |= _ENVIRONMENT | {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
import ray
from ray import serve
from vitrail.runtime.distributed.ray_folder import ray_folder
from vitrail.runtime.distributed.ray_vision import JOBS_PER_HALF, RayVision, VisionHalf
from vitrail.tests.runtime.distributed.worker_targets import load_namer

def ask(number, kill=None):
    got, ended = {}, threading.Semaphore(0)
    def done(name, result):
        got[name] = result.tokens[0].tolist() if hasattr(result, "tokens") else str(result)
        ended.release()
    for name in range(number):
        vision.encode(torch.full((1, 2, 2, 3), name, dtype=torch.uint8), lambda result, name=name: done(name, result))
    for _ in range(number):
        if kill is not None:
            os.kill(kill, signal.SIGKILL)
            kill = None
        assert ended.acquire(timeout=60)
    return got

with ray_folder() as folder:
    ray.init(num_cpus=1, include_dashboard=False, configure_logging=False, object_store_memory=2**27, _temp_dir=folder)
    serve.start(proxy_location="Disabled")
    halves = serve.deployment(
        num_replicas=2, max_ongoing_requests=JOBS_PER_HALF, ray_actor_options={"num_cpus": 0}, health_check_period_s=1
    )(VisionHalf)
    vision = RayVision(serve.run(halves.bind(load_namer), route_prefix=None), 2, device="cpu", dtype=torch.float64)
    first = ask(60)
    victim = int(first[0][2])
    second = ask(60, victim)
    json.dump([first, second, victim, vision.stats()], sys.stdout)
    vision.close()
    ray.shutdown()
"""


@pytest.mark.slow(smoke=False)
def test_tiles_of_many_calls_are_joined_over_a_real_cluster_and_outlive_a_half_that_is_killed():
    done = subprocess.run([sys.executable, "-c", CLUSTER], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    first, second, victim, stats = json.loads(done.stdout.splitlines()[-1])
    for got in (first, second):
        assert all(got[str(name)][0] == name for name in range(60)), got
        assert max(size for _, size, _ in got.values()) > 4
    assert {pid for *_, pid in first.values()} > {victim}
    assert victim not in [pid for *_, pid in list(second.values())[16:]]
    assert (stats["failures"], stats["jobs"] < 120) == (0, True)
