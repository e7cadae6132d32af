"""The vision half in processes of its own, one a device, each taking whatever tiles come next.

Pixels lie in memory that a worker shares with the driver, and so do visual tokens; where the language half is on a GPU
the worker writes them to that GPU's memory, from device to device. Only numbers of jobs go through the channel.
Another worker takes the place of one that ends.
"""

import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from ..config import InternVLConfig
from ..engine.runner import Runner
from ..engine.vision_stage import Arrived, Result
from ..errors import VitrailError
from ..layers.parallel import Part
from ..quantization.config import QuantizationConfig
from ..weights import load_model
from .tile_jobs import Call, Tile, TileQueue, fail
from .worker import Channel, Worker, end, open_shared, shared_bytes

# Jobs that a worker has: one that it runs, and one that it finds there when it is done.
DEPTH = 2
# Tiles of one job: enough for the products of a small vision half to fill a GPU.
TILES_PER_JOB = 8
# Workers in a row that may end on a device, none with a tile encoded, before it gets no other; the second one starts at
# once, every further one so much later than the one before.
_MAX_DEATHS = 5
_PAUSE_S = 1.0
# How long one may take to start that takes the place of another.
_START_S = 300.0
_CLOSED = "the vision half is closed"

_log = logging.getLogger("vitrail")


@dataclass(frozen=True)
class _Plan:
    """What a worker has to know. pixels, tokens: how its process comes by the memory for them."""

    folder: Path
    config: InternVLConfig
    dtype: torch.dtype
    quantization: QuantizationConfig | None
    exact: bool
    enforce_eager: bool
    threads: int | None
    tiles_per_job: int
    device: str = "cpu"
    quiet: bool = False
    pixels: int = -1
    tokens: "int | tuple[Callable[..., Tensor], tuple[Any, ...]]" = -1

    @property
    def pixels_shape(self) -> tuple[int, ...]:
        size = self.config.tile_size
        return DEPTH, self.tiles_per_job, size, size, 3

    @property
    def tokens_shape(self) -> tuple[int, ...]:
        return DEPTH, self.tiles_per_job, self.config.tokens_per_tile, self.config.llm.hidden_size


@dataclass(eq=False)
class _Device:
    """A place for a worker: the memory that it shares, and its jobs by the slot of that memory.

    fds: of the memory, which the next worker here inherits too. deaths: in a row, with no tile encoded in between.
    """

    number: int
    plan: _Plan
    pixels: Tensor
    tokens: Tensor
    fds: tuple[int, ...]
    worker: Worker = field(init=False)
    jobs: dict[int, list[Tile]] = field(default_factory=dict)
    free: list[int] = field(default_factory=lambda: list(range(DEPTH)))
    deaths: int = 0

    @property
    def lane(self) -> str:
        return f"vision half {self.number + 1}"

    @property
    def num_tiles(self) -> int:
        return sum(len(job) for job in self.jobs.values())


class VisionPool:
    """`VisionWorkers` over processes: each device of `devices` has a vision half of its own.

    dtype: of the weights and of the tokens; out_device: where those go. exact: tiles are encoded one by one. threads:
    of torch in each process. Returns when all are ready; raises what a worker failed with. Later on another process
    takes the place of one that ends.
    """

    def __init__(
        self,
        folder: Path,
        config: InternVLConfig,
        devices: Sequence[torch.device | str],
        *,
        dtype: torch.dtype,
        out_device: torch.device | str = "cpu",
        quantization: QuantizationConfig | None = None,
        exact: bool = False,
        enforce_eager: bool = False,
        threads: int | None = None,
        tiles_per_job: int = TILES_PER_JOB,
    ) -> None:
        self.capacity = DEPTH * tiles_per_job * len(devices)
        self._out = torch.device(out_device)
        self._lock = threading.Lock()
        self._queue = TileQueue()
        self._ending = threading.Event()
        self._why = ""  # the end of the last worker
        self._num_jobs = self._num_tiles = self._num_deaths = 0
        plan = _Plan(folder, config, dtype, quantization, exact, enforce_eager, threads, tiles_per_job)
        places = [self._place(replace(plan, device=str(device)), number) for number, device in enumerate(devices)]
        started: list[Worker] = []
        try:
            started.extend(self._start(place, quiet=place.number > 0) for place in places)
            for worker in started:
                worker.ready()
        except BaseException:
            end(started)
            _close_memory(places)
            raise
        self._places = tuple(places)
        self._devices = places[:]  # those that have a worker, or will have one again
        self._ready = places[:]  # those that have one
        self._readers = [
            threading.Thread(target=self._run, args=(place,), name=f"vitrail-{place.lane}", daemon=True)
            for place in places
        ]
        for reader in self._readers:
            reader.start()

    @property
    def pids(self) -> list[int]:
        """Of the processes that are ready."""
        with self._lock:
            return [one.worker.pid for one in self._ready]

    def encode(self, tiles: Tensor, done: Callable[[Result], None]) -> None:
        """As `VisionWorkers` has it; never blocks, however many are in flight."""
        call = Call(done, len(tiles))
        with self._lock:
            error = self._error()
            if error is None:
                self._queue.add(call, tiles)
                self._dispatch()
        if error is not None:
            call.end(error)

    def stats(self) -> dict[str, object]:
        """Counts since the start."""
        with self._lock:
            return {
                "workers": len(self._places),
                "alive": len(self._ready),
                "waiting": len(self._queue),
                "jobs": self._num_jobs,
                "tiles": self._num_tiles,
                "deaths": self._num_deaths,
            }

    def close(self) -> None:
        """End the processes; whoever waits for tiles is told so."""
        with self._lock:  # not while one is being started
            if self._ending.is_set():
                return
            self._ending.set()
        end(place.worker for place in self._places)
        for reader in self._readers:
            if reader is not threading.current_thread():
                reader.join()
        with self._lock:
            tiles = self._queue.clear()
        fail(tiles, VitrailError(_CLOSED))
        _close_memory(self._places)

    # --- who does what; for who has the lock ---

    def _dispatch(self) -> None:
        """Give free slots jobs, those of the least busy worker first, as long as there are tiles."""
        share = self._queue.share(len(self._ready)) if self._ready else 0
        while len(self._queue):
            free = [one for one in self._ready if one.free]
            if not free:
                return
            device = min(free, key=lambda one: one.num_tiles)
            job = self._queue.next_job(min(share, device.pixels.shape[1]))
            slot = device.free.pop()
            for place, tile in enumerate(job):
                device.pixels[slot, place].copy_(tile.pixels)
            device.jobs[slot] = job
            self._num_jobs += 1
            with suppress(OSError):  # it has ended, as its reader will find out
                device.worker.channel.send((slot, len(job)))

    def _error(self) -> VitrailError | None:
        if self._ending.is_set():
            return VitrailError(_CLOSED)
        return None if self._devices else VitrailError(f"the vision half is gone: {self._why}")

    # --- a device, on a thread of its own ---

    def _run(self, device: _Device) -> None:
        """What the workers of a device answer, one after the other."""
        why = self._read(device)
        while self._lose(device, why):
            try:
                with self._lock:
                    if self._ending.is_set():
                        return
                    worker = self._start(device, quiet=True)
                worker.ready(_START_S)
            except (VitrailError, OSError) as error:
                why = str(error)
            else:
                with self._lock:
                    self._ready.append(device)
                    self._dispatch()
                why = self._read(device)

    def _read(self, device: _Device) -> str:
        """What a worker answers until it ends; returns how it did."""
        stream = torch.cuda.Stream(self._out) if self._out.type == "cuda" else None
        words = ""
        while True:
            try:
                message = device.worker.channel.recv()
            except EOFError:
                return f"{device.worker.name} {device.worker.describe_end()}{words}"
            if isinstance(message, VitrailError):
                words = f" ({message})"
                continue
            slot, answer = message
            job = device.jobs[slot]
            failed = isinstance(answer, VitrailError)
            tokens = [] if failed else _copied(device.tokens[slot, : len(job)], stream)
            with self._lock:
                del device.jobs[slot]
                device.free.append(slot)
                if failed and len(job) > 1:
                    self._queue.put_back(job, alone=True)
                elif not failed:
                    device.deaths = 0
                    self._num_tiles += len(job)
                self._dispatch()
            if not failed:
                began, ended, projector_ms = answer
                for tile, part in zip(job, tokens, strict=True):
                    tile.call.put(tile.index, Arrived(part, began, ended, projector_ms, device.lane, len(job)))
            elif len(job) == 1:
                fail(job, answer)

    def _lose(self, device: _Device, why: str) -> bool:
        """A worker is gone, or could not start: its tiles go to whoever is there next. Waits until it is time to start
        another; returns whether to.
        """
        device.worker.close()  # one that only seems to be gone must not write to memory that others get
        with self._lock:
            if device in self._ready:
                self._ready.remove(device)
            now, *later = device.jobs.values() or ([],)
            for job in reversed(later):  # which only lay there
                self._queue.put_back(job)
            lost = self._queue.put_back_after_death(now)
            device.jobs.clear()
            device.free = list(range(DEPTH))
            if not self._ending.is_set():
                device.deaths += 1
                self._num_deaths += 1
                if device.deaths == _MAX_DEATHS:
                    why = f"{why}, the last of {_MAX_DEATHS} in a row that encoded nothing"
                    self._devices.remove(device)
                self._why = why
                _log.warning("%s; %d of %d are left", why, len(self._ready), len(self._places))
            error = self._error()
            if error is not None:
                lost += self._queue.clear()
            else:
                self._dispatch()
        fail(lost, error or VitrailError(f"the vision half failed: {why}"))
        return device in self._devices and not self._ending.wait(_PAUSE_S * (device.deaths - 1))

    # --- the processes ---

    def _place(self, plan: _Plan, number: int) -> _Device:
        """The memory of a device and its workers."""
        pixels_fd, pixels = _shared(plan.pixels_shape, torch.uint8)
        if self._out.type == "cuda":
            tokens = torch.empty(plan.tokens_shape, dtype=plan.dtype, device=self._out)
            return _Device(number, replace(plan, pixels=pixels_fd), pixels, tokens, (pixels_fd,))
        tokens_fd, tokens = _shared(plan.tokens_shape, plan.dtype)
        plan = replace(plan, pixels=pixels_fd, tokens=tokens_fd)
        return _Device(number, plan, pixels, tokens, (pixels_fd, tokens_fd))

    def _start(self, device: _Device, *, quiet: bool) -> Worker:
        plan = replace(device.plan, quiet=quiet)
        if self._out.type == "cuda":
            plan = replace(plan, tokens=reduce_tensor(device.tokens))
        env = {} if plan.threads is None else {"OMP_NUM_THREADS": str(plan.threads)}
        name = f"vision worker {device.number} on {plan.device}"
        device.worker = Worker(name, run_worker, plan, fds=device.fds, env=env)
        return device.worker


def _close_memory(devices: Iterable[_Device]) -> None:
    for device in devices:
        for fd in device.fds:
            os.close(fd)


def _copied(tokens: Tensor, stream: torch.cuda.Stream | None) -> list[Tensor]:
    """The tokens of each tile in memory of their own, so that the slot is free for the next job."""
    if stream is None:
        return [part.clone() for part in tokens]
    with torch.cuda.stream(stream):
        parts = [part.clone() for part in tokens]
    stream.synchronize()
    for part in parts:
        part.record_stream(torch.cuda.default_stream(tokens.device))  # where passes read it
    return parts


def _shared(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[int, Tensor]:
    """A tensor in memory that another process can open, and its descriptor."""
    meta = torch.empty(shape, dtype=dtype, device="meta")
    fd, memory = shared_bytes(meta.nbytes)
    return fd, torch.frombuffer(memory, dtype=dtype, count=meta.numel()).view(shape)


def _opened(fd: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    meta = torch.empty(shape, dtype=dtype, device="meta")
    memory = open_shared(fd, meta.nbytes)
    os.close(fd)
    return torch.frombuffer(memory, dtype=dtype, count=meta.numel()).view(shape)


# --- in the worker ---


def run_worker(channel: Channel, plan: _Plan) -> None:
    """Load the vision half and encode jobs until the driver ends."""
    if plan.threads is not None:
        torch.set_num_threads(plan.threads)
    with warnings.catch_warnings():
        if plan.quiet:  # another worker says the same
            warnings.simplefilter("ignore")
        model = load_model(
            plan.folder,
            plan.config,
            dtype=plan.dtype,
            device=torch.device(plan.device),
            progress=False,
            quantization=plan.quantization,
            part=Part(language=False),
        )
    runner = Runner(model, max_num_seqs=1, max_model_len=1, enforce_eager=plan.enforce_eager, exact=plan.exact)
    runner.warm_up_vision()
    pixels = _opened(plan.pixels, plan.pixels_shape, torch.uint8)
    if runner.device.type == "cuda":  # pinned, or the copy to the device would be made twice
        torch.cuda.check_error(int(torch.cuda.cudart().cudaHostRegister(pixels.data_ptr(), pixels.nbytes, 0)))
    if isinstance(plan.tokens, int):
        tokens = _opened(plan.tokens, plan.tokens_shape, plan.dtype)
    else:
        rebuild, arguments = plan.tokens
        tokens = rebuild(*arguments)
    channel.send("ready")
    while True:
        slot, count = channel.recv()
        try:
            answer: object = _encode(runner, pixels[slot, :count], tokens[slot, :count])
        except torch.AcceleratorError:  # of a device that does nothing more for this process; perhaps for another one
            raise
        except Exception as error:
            reason = " ".join(str(error).split())
            answer = VitrailError(f"the vision half failed: {type(error).__name__}: {reason}")
        channel.send((slot, answer))


@torch.inference_mode()
def _encode(runner: Runner, pixels: Tensor, tokens: Tensor) -> tuple[float, float, float]:
    """Write the visual tokens of tiles. Returns when that began and ended, and milliseconds of the projector."""
    began = perf_counter()
    encoded = runner.encode_beside(pixels)
    if isinstance(encoded.ended, torch.cuda.Event):
        torch.cuda.current_stream(runner.device).wait_event(encoded.ended)
    tokens.copy_(encoded.tokens.view_as(tokens))
    if runner.device.type == "cuda":
        torch.cuda.synchronize(runner.device)  # the driver reads what is written when it has the answer
    return began, perf_counter(), encoded.projector_ms
