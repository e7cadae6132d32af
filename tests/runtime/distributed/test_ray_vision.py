"""The vision half behind a handle of Ray Serve: jobs, their order, and what happens when a half ends."""

import asyncio
import threading
from typing import Any

import pytest
import torch

pytest.importorskip("ray")

from ray.exceptions import ActorDiedError

from vitrail.runtime.distributed.ray_vision import JOBS_PER_HALF, TILES_PER_JOB, RayVision, VisionHalf
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
        return value


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
    outcome = Outcome()
    workers.encode(tiles, outcome)
    return outcome.get()


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
    assert sorted(handle.sizes) == [3, 5, 5]


def test_there_is_work_for_every_half_in_flight(make):
    assert make(Handle(), num_halves=3).capacity == 3 * JOBS_PER_HALF * TILES_PER_JOB


def test_sending_does_not_wait_for_answers(make):
    go = threading.Event()

    async def wait(_):
        while not go.is_set():
            await asyncio.sleep(0.005)

    workers, outcomes = make(Handle(wait)), [Outcome() for _ in range(4)]
    for number, outcome in enumerate(outcomes):
        workers.encode(tiles_of(4, number), outcome)
    assert not any(outcome.values for outcome in outcomes)
    go.set()
    for number, outcome in enumerate(outcomes):
        assert torch.equal(outcome.get(), encode(tiles_of(4, number)))


def test_a_job_whose_half_ends_goes_to_another(make):
    async def die_once(number):
        if number == 1:
            raise ActorDiedError

    workers = make(Handle(die_once))
    assert torch.equal(run(workers, tiles_of(6)), encode(tiles_of(6)))
    assert workers.stats() == {"jobs": 3, "retries": 1, "failures": 0}


def test_a_job_that_fails_twice_fails_its_request_alone(make):
    async def die(number):
        if number <= 2:
            raise ActorDiedError

    workers = make(Handle(die), num_halves=1)
    error = run(workers, tiles_of(2))
    assert isinstance(error, VitrailError)
    assert "failed 2 times" in str(error)
    assert torch.equal(run(workers, tiles_of(2)), encode(tiles_of(2)))


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


def test_closing_fails_what_is_in_flight():
    async def never(_):
        await asyncio.Event().wait()

    workers = RayVision(Handle(never), 1, device=torch.device("cpu"), dtype=torch.bfloat16)
    outcome = Outcome()
    workers.encode(tiles_of(2), outcome)
    workers.close()
    assert isinstance(outcome.get(), VitrailError)
    workers.close()


def test_tokens_survive_the_way_in_every_dtype():
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        half = VisionHalf(lambda dtype=dtype: lambda tiles: encode(tiles).to(dtype))
        found = half.encode(tiles_of(2).numpy())
        assert torch.equal(torch.from_numpy(found).view(dtype).squeeze(-1), encode(tiles_of(2)).to(dtype))
